"""``mmcli report``: from run folders and the rows of the experiments to one page, Markdown with figures, LaTeX tables.

Reads files only: no stage, no tower and no store. The folder that it writes is made new beside the old one and takes
its place when it is whole.
"""

import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from .. import InputError
from .files import make_folder, unwritable, write_text
from .progress import Progress
from .report_build import build
from .report_depth import choose, look_into
from .report_document import Answers, Document, Failures, Queries, Shown
from .report_html import to_html
from .report_inputs import read_inputs
from .report_latex import to_latex
from .report_markdown import to_markdown

PAGE, MARKDOWN = "report.html", "report.md"
RUNS, OUT = Path("runs"), Path("report")
# What a report writes: a folder that holds anything else is somebody's own.
WRITTEN = frozenset({PAGE, MARKDOWN, "figures", "pictures", "tables"})


@dataclass(frozen=True, kw_only=True)
class ReportPlan:
    """What is reported, and where to.

    Attributes:
        runs: Folder of the runs.
        ablations: Folder of the experiments' table; ``ablations`` below the runs when not given.
        data: The data set's folder; the default place, where it is there, when not given.
        run: The run that is looked into; chosen by val when not given.
        out: The folder to write.
        latex: Write the tables for LaTeX too.
        force: Replace a report that is there.
        markdown_only: Write this file instead: answers and tables as Markdown, without figures and pictures.
    """

    runs: Path = RUNS
    ablations: Path | None = None
    data: Path | None = None
    run: Path | None = None
    out: Path = OUT
    latex: bool = False
    force: bool = False
    markdown_only: Path | None = None

    @property
    def command(self) -> str:
        """The command line that makes this report."""
        words = ["mmcli", "report"]
        given = {"--runs": self.runs if self.runs != RUNS else None, "--ablations": self.ablations, "--data": self.data,
                 "--run": self.run, "--markdown-only": self.markdown_only,
                 "--out": self.out if self.out != OUT and self.markdown_only is None else None}  # fmt: skip
        for flag, value in given.items():
            words += [] if value is None else [flag, value.as_posix()]
        return shlex.join([*words, *(["--latex"] if self.latex else [])])


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """What was written, and the answers."""

    files: tuple[Path, ...]
    run: Path | None
    why: str
    document: Document
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        found = [answer for block in self._answers() for answer in block.answers]
        return {
            "files": [str(path) for path in self.files], "run": None if self.run is None else str(self.run),
            "run_chosen_by": self.why, "seconds": self.seconds,
            "answers": [
                {
                    "name": one.name, "question": one.question, "answer": one.answer,
                    "comparisons": [vars(comparison) for comparison in one.comparisons],
                    "missing": [gap.command for gap in one.gaps],
                }
                for one in found
            ],
        }  # fmt: skip

    def summary(self) -> list[RenderableType]:
        """What a person reads at the end."""
        lines = [f"{one.question}\n  {one.answer}" for block in self._answers() for one in block.answers]
        looked = [] if self.run is None else [f"\nlooked into {self.run}: {self.why}"]
        return [*lines, *looked, *(f"wrote {path}" for path in self.files)]

    def _answers(self) -> Iterator[Answers]:
        for section in self.document.sections:
            yield from (block for block in section.blocks if isinstance(block, Answers))


def report(plan: ReportPlan, progress: Progress | None = None) -> ReportResult:
    """Read, compare, draw, write.

    Raises:
        InputError: Nothing to report, a run or a data folder that cannot be used, or a folder that is in use.
    """
    started, progress = time.perf_counter(), progress or Progress()
    _check_out(plan)
    ablations = plan.ablations or plan.runs / "ablations"
    progress.say("read runs and experiments")
    inputs = read_inputs(plan.runs, ablations, plan.data)
    chosen = choose(inputs, plan.run)
    depth = None if chosen is None else look_into(*chosen)
    if depth is not None and inputs.listing is not None:
        _check_data(inputs.listing.image_ids, depth.query.image_id, plan.data)
    progress.say("compare and draw")
    document = build(inputs, depth, command=plan.command, pictures=plan.markdown_only is None)
    if plan.markdown_only is not None:
        write_text(plan.markdown_only, to_markdown(document))
        files: tuple[Path, ...] = (plan.markdown_only,)
    else:
        files = _write(plan, document)
    return ReportResult(
        files=files, run=None if chosen is None else chosen[0].run.folder, why="" if chosen is None else chosen[1],
        document=document, seconds=time.perf_counter() - started,
    )  # fmt: skip


def _check_out(plan: ReportPlan) -> None:
    """Refuse to write over what is there before anything is computed."""
    target = plan.markdown_only
    if target is not None:
        if target.is_dir() or (target.exists() and not plan.force):
            raise InputError(
                "the file is there", where=target, got="a folder" if target.is_dir() else "a file",
                wanted="a new file", do="give another --markdown-only, or --force to replace the file",
            )  # fmt: skip
        return
    out = plan.out
    if out.is_dir() and any(out.iterdir()):
        others = sorted(path.name for path in out.iterdir() if path.name not in WRITTEN)
        if others or not plan.force:
            raise InputError(
                "the folder is in use", where=out, got=f"a folder with {others[0]}" if others else "a report",
                wanted="a new or empty folder",
                do="give another --out" + ("" if others else ", or --force to replace the report"),
            )  # fmt: skip


def _check_data(known: Any, asked: Any, data: Path | None) -> None:  # noqa: ANN401 - arrays
    """Refuse a data folder that was named and holds other images."""
    missing = set(asked.tolist()) - set(known.tolist())
    if missing and data is not None:
        raise InputError(
            "a data folder of other images", where=data, got=f"{len(missing)} test images of the run are not in it",
            wanted="the data set that the run was trained on", do="name its folder with --data",
        )  # fmt: skip


def _write(plan: ReportPlan, document: Document) -> tuple[Path, ...]:
    out, found = plan.out, [PAGE, MARKDOWN]
    with _new_folder(out) as made:
        write_text(made / PAGE, to_html(document))
        write_text(made / MARKDOWN, to_markdown(document))
        for figure in document.figures:
            write_text(made / "figures" / f"{figure.name}.svg", figure.svg)
            (made / "figures" / f"{figure.name}.png").write_bytes(figure.png)
        for picture in _pictures(document):
            make_folder(made / "pictures")
            (made / "pictures" / picture.file).write_bytes(picture.webp)
        if plan.latex:
            found.append("tables")
            for name, text in to_latex(document).items():
                write_text(made / "tables" / f"{name}.tex", text)
    return tuple(out / name for name in found)


def _pictures(document: Document) -> Iterator[Any]:
    """Pictures that the Markdown names."""
    for section in document.sections:
        for block in section.blocks:
            shown: list[Shown] = []
            if isinstance(block, Queries):
                shown = [one for query in block.queries for one in (query.image, *query.neighbours)]
            elif isinstance(block, Failures):
                shown = [one for c in block.classes for one in (*c.false_positives, *c.false_negatives)]
            yield from (one.picture for one in shown if one.picture is not None)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of ``out`` when it is full; nothing changes where that fails."""
    make_folder(out.parent)
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            made = Path(scratch) / "new"
            made.mkdir()
            yield made
            if out.exists():
                out.rename(Path(scratch) / "old")
            made.rename(out)
    except (OSError, shutil.Error) as error:
        raise unwritable(out, error) from error
