"""Where everything for a person is printed: data appear as they are, whole at any width and in any encoding.

Names, captions and paths come from files of others. They are neither markup (``[red]``) nor emoji codes (``:dog:``),
and a control character in one is shown and not sent to the terminal.
"""

import os
import re
import sys
from collections.abc import Iterable
from typing import IO, Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

# Wide enough for any table: where no terminal sets a limit, nothing is folded.
WIDEST = 10_000
# A column of text may be folded to so many characters; where even that is too wide, the table becomes a list.
NARROWEST_TEXT = 12
# Control characters but line feed and tab, half surrogates, and what turns the direction of the text around it.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """A text whose control characters are spelled out as in Python's source, and not sent as they are."""
    return _COMMANDS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def make_console(file: IO[str] | None = None) -> Console:
    """A console for a file, or for stdout.

    It is as wide as the variable COLUMNS says, else as the terminal, and without a terminal as wide as its widest line.
    """
    file = sys.stdout if file is None else file
    return _Console(file=file, width=_width(file), soft_wrap=True, markup=False, emoji=False, highlight=False)


def _width(file: IO[str]) -> int | None:
    """The width to draw for; None lets the console follow its terminal."""
    given = os.environ.get("COLUMNS", "").strip()
    if given.isdecimal() and int(given) > 0:
        return min(int(given), WIDEST)
    if not file.isatty():
        return WIDEST
    # The console would take a bad COLUMNS for a width.
    return os.get_terminal_size(file.fileno()).columns or None if given else None


class _Console(Console):
    """A console that shows control characters instead of sending them."""

    def render_str(self, text: str, **options: Any) -> Text:  # noqa: ANN401
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


class FittingTable(Table):
    """A table that cuts nothing off: where it is too wide its text folds, and where that is not enough it is a list.

    A column that is justified to the right holds figures, which are never broken.
    """

    def __init__(self, *headers: str, **options: Any) -> None:  # noqa: ANN401 - those of rich's table
        plain: dict[str, Any] = {
            "box": box.SIMPLE_HEAD,
            "pad_edge": False,
            "collapse_padding": True,
            "title_justify": "left",
        }
        super().__init__(*headers, **(plain | options))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for column in self.columns:
            column.overflow, column.no_wrap = "fold", column.no_wrap or column.justify == "right"
        if self._least_width(console, options) <= options.max_width:
            yield from super().__rich_console__(console, options)
        else:
            yield from self._as_list()

    def _least_width(self, console: Console, options: ConsoleOptions) -> int:
        """The width of the table with its text folded as far as it may be."""
        whole = options.update(width=WIDEST)
        widths = [_widest(column, console, whole, header=self.show_header) for column in self.columns]
        frame = Measurement.get(console, whole, self).maximum - sum(widths)
        least = [
            width if column.no_wrap else min(width, NARROWEST_TEXT)
            for width, column in zip(widths, self.columns, strict=True)
        ]
        return frame + sum(least)

    def _as_list(self) -> RenderResult:
        """A paragraph a row: its first cell, then a line for each further cell, named by its column."""
        if self.title:
            yield Text(str(self.title), "italic", overflow="fold")
        names = [str(column.header) if self.show_header else "" for column in self.columns]
        for row in zip(*(column.cells for column in self.columns), strict=True):
            first, *rest = (cell if isinstance(cell, Text) else Text(visible(str(cell))) for cell in row)
            lines = [first, *(_line(name, cell) for name, cell in zip(names[1:], rest, strict=True) if cell.plain)]
            for line in lines:
                line.overflow, line.no_wrap = "fold", False
                if line.plain:
                    yield line
        if self.caption:
            yield Text(str(self.caption), "dim italic", overflow="fold")


def _widest(column: Column, console: Console, options: ConsoleOptions, *, header: bool) -> int:
    cells = [*([column.header] if header else []), *column.cells]
    return max((Measurement.get(console, options, cell).maximum for cell in cells), default=0)


def _line(name: str, cell: Text) -> Text:
    return Text.assemble("  ", (f"{name}: " if name else "", "dim"), cell)
