"""``mmcli report``: from run folders and the rows of the experiments to one page, Markdown with figures, LaTeX tables.

Reads files only: no stage, no tower and no store. Everything is written beside the folder and put in place when it is
whole, file by file, the pages last: so each page is the old or the new one at any moment.
"""

import json
import re
import shlex
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from ...cache.locks import SOFT, LockHeld, locked
from ...cache.ownership import Contents, contents, remove_files
from ...cache.strict_json import parse_json
from ...errors import InputError
from ..core.files import (
    final_name,
    make_folder,
    one_line,
    refuse_existing,
    remove_leftovers,
    unwritable,
    write_folder,
    write_text,
)
from ..core.progress import Progress
from .document import Answers, Document, Failures, Queries, Shown
from .html import to_html
from .inputs import choose, look_into, read_inputs
from .latex import to_latex
from .render import to_markdown
from .sections import build

PAGE, MARKDOWN = "report.html", "report.md"
RUNS, OUT = Path("runs"), Path("report")
# The list of the files of a report, in its folder: what it does not list is somebody's own.
INVENTORY, LOCK = ".report.json", ".lock"
FORMAT = "mmcli-report"
# Files of a report of before it had a list.
_OLDER = re.compile(
    r"report\.(html|md)|figures/[a-z0-9_-]+\.(svg|png)|pictures/[0-9]+-[0-9]+\.webp|tables/[a-z0-9_-]+\.tex"
)
_OLDER_TITLE = "– mmcli report</title>"
# What a page of Markdown says near its beginning.
MADE_BY = "Written by `mmcli report"
# Files that a desktop leaves in every folder that is looked at.
_DESKTOP = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})


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
        given = {
            "--runs": self.runs if self.runs != RUNS else None,
            "--ablations": self.ablations,
            "--data": self.data,
            "--run": self.run,
            "--markdown-only": self.markdown_only,
            "--out": self.out if self.out != OUT and self.markdown_only is None else None,
        }
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
            "files": [str(path) for path in self.files],
            "run": None if self.run is None else str(self.run),
            "run_chosen_by": self.why,
            "seconds": self.seconds,
            "answers": [
                {
                    "name": one.name,
                    "question": one.question,
                    "answer": one.answer,
                    "comparisons": [vars(comparison) for comparison in one.comparisons],
                    "missing": [gap.command for gap in one.gaps],
                }
                for one in found
            ],
        }

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
        files=files,
        run=None if chosen is None else chosen[0].run.folder,
        why="" if chosen is None else chosen[1],
        document=document,
        seconds=time.perf_counter() - started,
    )


def _check_out(plan: ReportPlan) -> None:
    """Refuse to write over what is there before anything is computed."""
    target = plan.markdown_only
    if target is not None:
        refuse_existing(target, _is_page, force=plan.force, what="a page of mmcli report", option="--markdown-only")
        return
    out = plan.out
    if (out.exists() or out.is_symlink()) and not out.is_dir():
        raise InputError(
            "will not replace what mmcli did not write",
            where=out,
            got="no folder",
            wanted="a new or empty folder",
            do="give another --out",
        )
    if not out.is_dir():
        return
    with one_line(out):
        inside = _inside(out)
    # The first report of a folder, if it was interrupted, has no page yet.
    if inside.foreign or (PAGE in inside.ours and not plan.force):
        got = f"a folder with {inside.foreign[0]}" if inside.foreign else "a report"
        raise InputError(
            "the folder is in use",
            where=out,
            got=got,
            wanted="a new or empty folder",
            do="give another --out" + ("" if inside.foreign else ", or --force to replace the report"),
        )


def _inside(out: Path) -> Contents:
    """What of a folder is a report's, by the list that it holds; what passes is in neither."""
    try:
        record = parse_json((out / INVENTORY).read_bytes())
        listed = frozenset({INVENTORY, *record["files"]}) if record["format"] == FORMAT else frozenset()
    except (OSError, ValueError, LookupError, TypeError):
        listed = frozenset()
    older = not listed and _OLDER_TITLE in _start(out / PAGE)
    inside = contents(out, lambda name: name in listed or (older and _OLDER.fullmatch(name) is not None))
    passing = _DESKTOP | {LOCK, LOCK + SOFT}
    foreign = (name for name in inside.foreign if not final_name(name.partition("/")[0]))
    return Contents(inside.ours, tuple(name for name in foreign if Path(name).name not in passing))


def _start(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(4096)
    except OSError:
        return ""


def _is_page(path: Path) -> bool:
    return MADE_BY in _start(path)


def _check_data(known: Any, asked: Any, data: Path | None) -> None:  # noqa: ANN401 - arrays
    """Refuse a data folder that was named and holds other images."""
    missing = set(asked.tolist()) - set(known.tolist())
    if missing and data is not None:
        raise InputError(
            "a data folder of other images",
            where=data,
            got=f"{len(missing)} test images of the run are not in it",
            wanted="the data set that the run was trained on",
            do="name its folder with --data",
        )


def _write(plan: ReportPlan, document: Document) -> tuple[Path, ...]:
    out = plan.out
    make_folder(out)
    try:
        with locked(out / LOCK, keep=False):
            remove_leftovers(out, lambda name: name in {INVENTORY, PAGE, MARKDOWN}, alone=True)
            _check_out(plan)
            _replace(out, _files(plan, document))
    except LockHeld as error:
        raise InputError("another process writes this report", where=out, do=error.do) from None
    except OSError as error:
        raise unwritable(out, error) from None
    return tuple(out / name for name in (PAGE, MARKDOWN, *(["tables"] if plan.latex else [])))


def _files(plan: ReportPlan, document: Document) -> dict[str, bytes]:
    """Every file of the report by its relative name."""
    files = {f"figures/{figure.name}.svg": figure.svg.encode() for figure in document.figures}
    files |= {f"figures/{figure.name}.png": figure.png for figure in document.figures}
    files |= {f"pictures/{picture.file}": picture.webp for picture in _pictures(document)}
    if plan.latex:
        files |= {f"tables/{name}.tex": text.encode() for name, text in to_latex(document).items()}
    return files | {MARKDOWN: to_markdown(document).encode(), PAGE: to_html(document).encode()}


def _replace(out: Path, files: dict[str, bytes]) -> None:
    """Put files in the place of an older report's; a kill at any moment leaves pages that are whole, and a list."""
    old = _inside(out).ours

    def fill(scratch: Path) -> None:
        for name, data in files.items():
            (scratch / name).parent.mkdir(exist_ok=True)
            (scratch / name).write_bytes(data)

    # First all that may lie there from now on, until the rest of the older report is gone.
    _write_list(out, {*old, *files})
    write_folder(out, fill, last=(MARKDOWN, PAGE), alone=True)
    remove_files(out, {*old} - {*files, INVENTORY})
    _write_list(out, files)


def _write_list(out: Path, names: Iterable[str]) -> None:
    write_text(out / INVENTORY, json.dumps({"format": FORMAT, "files": sorted({*names} - {INVENTORY})}, indent=1))


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
