"""``mmcli report``: from run folders and the rows of the experiments to one page, Markdown with figures, LaTeX tables.

Three passes: :mod:`.collect` reads files into one table; :mod:`.analysis`, :mod:`.answers`, :mod:`.tables` and
:mod:`.figures` compute every number and :mod:`.sections` lays them out; :mod:`.render`
and :mod:`.plots` write the result without computing any.

No stage is run, and neither a tower nor a store is read. Everything is written beside the folder and put in place when
it is whole, file by file, the pages last: so each page is the old or the new one at any moment.
"""

import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import RenderableType

from ...cache.locks import SOFT, LockHeld, locked
from ...cache.ownership import Contents, contents, remove_files
from ...cache.strict_json import parse_json
from ...errors import InputError
from ..core.defaults import REPORT, RUNS
from ..core.files import (
    command,
    final_name,
    make_folder,
    one_line,
    refuse_existing,
    remove_leftovers,
    unwritable,
    write_folder,
    write_text,
    write_whole,
)
from ..core.progress import Progress
from .analysis import analyse
from .collect import choose_run, collect
from .document import Answer, Document, Figure
from .plots import draw_figure
from .render import to_html, to_latex, to_markdown
from .sections import TITLE, build

Ids = npt.NDArray[np.int64]

PAGE, MARKDOWN = "report.html", "report.md"
# The list of the files of a report, in its folder: what it does not list is somebody's own.
INVENTORY, LOCK = ".report.json", ".lock"
FORMAT = "mmcli-report"
# A page of Markdown begins with its title, a paragraph or two, and the command that wrote it.
_PAGE_START = re.compile(rf"# {re.escape(TITLE)}\n\n[^\n]+\n\n(?:[^\n]+\n\n)?Written by `+ ?mmcli report")
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
    out: Path = REPORT
    latex: bool = False
    force: bool = False
    markdown_only: Path | None = None

    @property
    def paths(self) -> dict[str, Path]:
        """The paths that differ from the default, by their options."""
        paths = {
            "--runs": self.runs if self.runs != RUNS else None,
            "--ablations": self.ablations,
            "--data": self.data,
            "--run": self.run,
            "--markdown-only": self.markdown_only,
            "--out": self.out if self.out != REPORT and self.markdown_only is None else None,
        }
        return {option: path for option, path in paths.items() if path is not None}

    @property
    def command(self) -> str:
        """The command line that makes this report."""
        words = [word for option, path in self.paths.items() for word in (option, path.as_posix())]
        return command("report", *words, *(["--latex"] if self.latex else []))


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """The files of a report, and its answers."""

    files: tuple[Path, ...]
    run: Path | None
    why: str
    document: Document
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The result as ``--json`` prints it."""
        return {
            "files": [str(path) for path in self.files],
            "run": None if self.run is None else str(self.run),
            "run_chosen_by": self.why,
            "seconds": self.seconds,
            "answers": [
                {
                    "name": answer.name,
                    "question": answer.question,
                    "answer": answer.answer,
                    "comparisons": [vars(comparison) for comparison in answer.comparisons],
                    "missing": [gap.command for gap in answer.gaps],
                }
                for answer in self.document.blocks(Answer)
            ],
        }

    def summary(self) -> list[RenderableType]:
        """What the command prints at its end."""
        lines = [f"{answer.question}\n  {answer.answer}" for answer in self.document.blocks(Answer)]
        chosen = [] if self.run is None else [f"\nlooked into {self.run}: {self.why}"]
        return [*lines, *chosen, *(f"wrote {path}" for path in self.files)]


def report(plan: ReportPlan, progress: Progress | None = None) -> ReportResult:
    """Collect what runs and experiments left, compare it, and write it as a page.

    Args:
        plan: What is reported, and where to.
        progress: Progress bars and messages; silent when not given.

    Raises:
        InputError: Nothing to report, a run or a data folder that cannot be used, or a folder that is in use.
    """
    started, progress = time.perf_counter(), progress or Progress()
    _check_names(plan)
    _check_out(plan)
    progress.say("read runs and experiments")
    inputs = collect(plan.runs, plan.ablations or plan.runs / "ablations", plan.data)
    chosen = choose_run(inputs, plan.run)
    if chosen is not None and plan.data is not None and inputs.manifest is not None:
        _check_data(plan.data, inputs.manifest.image_ids, chosen.codes.query.image_id)
    progress.say("compare and draw")
    analysis = None if chosen is None else analyse(chosen)
    document = build(inputs, analysis, command=plan.command, with_images=plan.markdown_only is None)
    if plan.markdown_only is not None:
        text = _encoded(to_markdown(document))
        write_whole(plan.markdown_only, lambda temporary: temporary.write_bytes(text))
        files: tuple[Path, ...] = (plan.markdown_only,)
    else:
        files = _write(plan, document)
    return ReportResult(
        files=files,
        run=None if chosen is None else chosen.finished.folder,
        why="" if chosen is None else chosen.reason,
        document=document,
        seconds=time.perf_counter() - started,
    )


def _check_names(plan: ReportPlan) -> None:
    """Refuse names that the page, which is UTF-8, could not repeat as a part of its command."""
    for option, path in plan.paths.items():
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise InputError(
                "a name that is not UTF-8",
                where=option,
                got=path,
                wanted="a name that the report can repeat in its command",
                do=f"rename it, or give another {option}",
            ) from None


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
    """Which files of a folder are a report's, by the list in it; files that come and go are left out."""
    try:
        record = parse_json(_start(out / INVENTORY, None))
        listed = frozenset({INVENTORY, *record["files"]}) if record["format"] == FORMAT else frozenset()
    except (ValueError, LookupError, TypeError):
        listed = frozenset()
    inside = contents(out, lambda name: name in listed and (out / name).is_file())
    passing = _DESKTOP | {LOCK, LOCK + SOFT}
    foreign = (name for name in inside.foreign if not final_name(name.partition("/")[0]))
    return Contents(inside.ours, tuple(name for name in foreign if Path(name).name not in passing))


def _start(path: Path, n_letters: int | None = 4096) -> str:
    """The first letters of a file, all when None; empty where it is no regular file or cannot be read."""
    try:
        if not path.is_file():  # a FIFO would be waited for without end
            return ""
        with path.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(n_letters)
    except OSError:
        return ""


def _is_page(path: Path) -> bool:
    return _PAGE_START.match(_start(path)) is not None


def _check_data(data: Path, known_ids: Ids, asked_ids: Ids) -> None:
    """Refuse a data folder that holds other images than the run was tested on."""
    missing = set(asked_ids.tolist()) - set(known_ids.tolist())
    if missing:
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
    drawings = {figure.name: draw_figure(figure) for figure in document.blocks(Figure)}
    files = {f"figures/{name}.svg": _encoded(drawing.svg) for name, drawing in drawings.items()}
    files |= {f"figures/{name}.png": drawing.png for name, drawing in drawings.items()}
    pages = {MARKDOWN: _encoded(to_markdown(document)), PAGE: _encoded(to_html(document, drawings))}
    files |= {f"pictures/{picture.file}": picture.webp for picture in document.pictures.shown}
    if plan.latex:
        files |= {f"tables/{name}.tex": _encoded(text) for name, text in to_latex(document).items()}
    return files | pages


def _encoded(text: str) -> bytes:
    """UTF-8; a byte in the name of a run that is not UTF-8 becomes a question mark."""
    return text.encode(errors="replace")


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
