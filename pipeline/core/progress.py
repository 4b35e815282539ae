"""What a long stage tells the person who waits: lines and counted tasks, behind one small interface.

Stages take a :class:`Progress`; the command line passes one that draws on stderr, tests pass the silent one.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBar
from rich.text import Text

from .console import make_console

LINE_EVERY_S = 10.0


class Task(Protocol):
    """One counted piece of work."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count ``count`` more done, with a short note on how it goes."""


class Progress:
    """The silent one, and the interface of the others."""

    def say(self, line: str) -> None:
        """Tell one line."""

    def show(self, renderable: RenderableType) -> None:
        """Show a table or a panel."""

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:  # noqa: ARG002
        """Count to ``total`` under ``title``."""
        yield _Silent()


class NoteOf(Progress):
    """Tells what is counted below another task as the note of that one; lines are not told.

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
        """Say how far this one is."""
        self._done += count
        self._owner.task_of_all.advance(0, f"{self._title} {self._done:,} of {self._total:,}, {note}".rstrip(", "))


class _Silent:
    def advance(self, count: int = 1, note: str = "") -> None:
        """Count nothing."""


class ConsoleProgress(Progress):
    """Bars on a terminal, a line every ten seconds elsewhere; always on stderr, so that stdout stays clean."""

    def __init__(self, console: Console | None = None, *, bars: bool = True) -> None:
        self.console = console or make_console(sys.stderr)
        # Not what the console takes for a terminal: FORCE_COLOR asks a log of CI for colours, not for bars.
        self._bars = bars and self.console.file.isatty() and not self.console.is_dumb_terminal

    def say(self, line: str) -> None:
        """Print one line."""
        self.console.print(line)

    def show(self, renderable: RenderableType) -> None:
        """Print a table or a panel."""
        # A command is copied whole from a terminal; a table has to fit it.
        self.console.print(renderable, soft_wrap=isinstance(renderable, Text))

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:
        """Draw a bar with count, elapsed and remaining time, and leave one line when it is done."""
        started = time.perf_counter()
        if self._bars:
            columns = (
                SpinnerColumn("line"),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            with RichBar(*columns, console=self.console, transient=True) as bar:
                counted: _Bar | _Lines = _Bar(bar, title, total)
                yield counted
        else:
            counted = _Lines(self, title, total)
            yield counted
        seconds = time.perf_counter() - started
        note = f", {counted.note}" if counted.note else ""
        self.say(f"  {title}: {counted.done:,} in {seconds:.1f} s{note}")


class _Bar:
    def __init__(self, bar: RichBar, title: str, total: int) -> None:
        self._bar, self._id = bar, bar.add_task(title, total=total, note="")
        self.done, self.note = 0, ""

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done, self.note = self.done + count, note or self.note
        self._bar.update(self._id, advance=count, note=self.note)


class _Lines:
    def __init__(self, owner: ConsoleProgress, title: str, total: int) -> None:
        self._owner, self._title, self._total = owner, title, total
        self._last = time.perf_counter()
        self.done, self.note = 0, ""

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done, self.note = self.done + count, note or self.note
        now = time.perf_counter()
        if now - self._last >= LINE_EVERY_S and self.done < self._total:
            self._last = now
            note = f", {self.note}" if self.note else ""
            self._owner.say(f"  {self._title}: {self.done:,} of {self._total:,}{note}")
