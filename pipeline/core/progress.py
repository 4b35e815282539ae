"""What a long stage shows the person who waits: lines and counted tasks, behind one small interface.

Stages take a :class:`Progress`; the command line passes one that writes to stderr. :mod:`tqdm` draws the bars, in a
notebook too.
"""

import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.text import Text

from ...errors import visible
from .console import make_console

# Where nothing can be drawn over, a line of progress is written so often.
LINE_EVERY_S = 10.0
# At 80 columns: what is counted, how much of it, the time it took and the time that is left, and a note.
_BAR = "{desc} {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_LINE = "{desc}: {n_fmt} of {total_fmt} [{elapsed}<{remaining}{postfix}]"


class Task(Protocol):
    """One counted piece of work."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count ``count`` more as done, with a short note on how it goes."""


class Progress:
    """Progress that shows nothing, and the interface of the others."""

    @classmethod
    def quiet(cls) -> "Progress":
        """Make progress that shows nothing at all."""
        return Progress()

    def say(self, line: str) -> None:
        """Show one line to the person who waits."""

    def show(self, renderable: RenderableType) -> None:
        """Show a table or a panel."""

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:  # noqa: ARG002
        """Count to ``total`` under ``title``."""
        yield _Silent()


class _Silent:
    def advance(self, count: int = 1, note: str = "") -> None:
        """Show nothing of what is counted."""


class NoteOf(Progress):
    """Progress of a part of another task: what it counts becomes that task's note, and its lines are not shown.

    Attributes:
        task_of_all: The other task.
    """

    def __init__(self) -> None:
        self.task_of_all: Task = _Silent()

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:
        """Count below the other task."""
        yield _Below(self, title, total)


class _Below:
    def __init__(self, owner: NoteOf, title: str, total: int) -> None:
        self._owner, self._title, self._total, self._done = owner, title, total, 0

    def advance(self, count: int = 1, note: str = "") -> None:
        """Put how far this one is into the note of the other task."""
        self._done += count
        self._owner.task_of_all.advance(0, f"{self._title} {self._done:,} of {self._total:,}, {note}".rstrip(", "))


class ConsoleProgress(Progress):
    """Bars on a terminal and in a notebook, a line every ten seconds elsewhere; on stderr, so that stdout stays clean.

    Args:
        console: Where to write; stderr when not given.
        bars: Draw bars where they can be drawn; else lines.
    """

    def __init__(self, console: Console | None = None, *, bars: bool = True) -> None:
        self.console = console or make_console(sys.stderr)
        # Not what the console takes for a terminal: FORCE_COLOR asks a log of CI for colours, not for bars.
        is_drawn = self.console.file.isatty() and not self.console.is_dumb_terminal
        self._bars = bars and (is_drawn or "ipykernel" in sys.modules)

    def say(self, line: str) -> None:
        """Write one line, above the bars."""
        self._write(line)

    def show(self, renderable: RenderableType) -> None:
        """Write a table or a panel, above the bars."""
        # A command is copied whole from a terminal; a table has to fit it.
        self._write(renderable, soft_wrap=isinstance(renderable, Text))

    def _write(self, renderable: RenderableType, **options: Any) -> None:  # noqa: ANN401 - those of rich
        from tqdm import tqdm

        with tqdm.external_write_mode(file=self.console.file):
            self.console.print(renderable, **options)

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:
        """Draw a bar with count, elapsed and remaining time, and leave one line when it is done."""
        from tqdm.auto import tqdm

        tqdm.monitor_interval = 0  # no thread of its own: processes are forked beside it
        options: dict[str, Any] = {"desc": f"  {visible(title)}", "total": total, "leave": False, "unit": ""}
        if self._bars:
            options |= {"file": self.console.file, "bar_format": _BAR, "dynamic_ncols": True}
        else:
            lines = _Lines(lambda line: self.say(line) if counted.n < total else None)
            pace = {"mininterval": LINE_EVERY_S, "maxinterval": LINE_EVERY_S, "delay": LINE_EVERY_S}
            options |= {"file": lines, "bar_format": _LINE, "miniters": 1, **pace}
        started = time.perf_counter()
        with tqdm(**options) as counted:
            task = _Counted(counted)
            yield task
        note = f", {task.note}" if task.note else ""
        self.say(f"  {title}: {task.done:,} in {time.perf_counter() - started:.1f} s{note}")


class _Counted:
    def __init__(self, bar: Any) -> None:  # noqa: ANN401 - of tqdm
        self._bar, self.done, self.note = bar, 0, ""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count on, and keep the last note."""
        self.done += count
        if note and note != self.note:
            self.note = note
            self._bar.set_postfix_str(visible(note), refresh=False)
        self._bar.update(count)


class _Lines(io.TextIOBase):
    """A file for tqdm that cannot be drawn over: each state of the bar becomes a line."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say

    def write(self, text: str) -> int:
        """Write a state of the bar as a line."""
        if line := text.strip("\r\n").rstrip():
            self._say(line)
        return len(text)
