"""Where everything for a person is printed: data appear as they are, whole at any width and in any encoding.

Names, captions and paths come from files of others. They are neither markup (``[red]``) nor emoji codes (``:dog:``),
and a control character in one is shown and not sent to the terminal.
"""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import IO, Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from ...errors import visible

# Wide enough for any table: where no terminal sets a limit, nothing is folded.
WIDEST = 10_000
# A column of text may be folded to so many characters; where even that is too wide, the table becomes a list.
NARROWEST_TEXT = 12


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


# Column title, key in a metrics row, format. F1 is shown at the threshold tuned on val: at 0.5 it measures mostly
# how a method scales its scores, and cosine scores never reach 0.5.
COLUMNS = (
    ("mAP", "mAP", "{:.3f}"),
    ("F1_micro*", "F1_micro_tuned", "{:.3f}"),
    ("F1_macro*", "F1_macro_tuned", "{:.3f}"),
    ("P@5", "P@5", "{:.3f}"),
    ("R@5", "R@5", "{:.3f}"),
    ("latency", "query_latency_ms", "{:.2f} ms"),
)
FOOTNOTE = (
    "* at the one threshold that is best on val; at 0.5 see metrics.json. latency: scoring one stored embedding"
    " (zero-shot, classifier) or one code (knn: search and vote). In brackets: 95% bootstrap interval over images;"
    " those of the other figures are in metrics.json."
)


def metrics_table(rows: Sequence[Mapping[str, Any]], title: str) -> RenderableType:
    """One line per method under a title, with the ceilings of P@5 and R@5 where they are known."""
    table = _figures("method")
    for row in rows:
        table.add_row(str(row["method"]), *cells(row))
    ceilings = {"P@5": rows[0].get("P@5_ceiling"), "R@5": rows[0].get("R@5_ceiling")}
    if any(value is not None for value in ceilings.values()):
        table.add_section()
        table.add_row("ceiling", *["" if ceilings.get(n) is None else f"{ceilings[n]:.3f}" for n, _, _ in COLUMNS])
    return Group(Text(title, "bold"), table, Text(FOOTNOTE, "dim"))


def _figures(first: str) -> FittingTable:
    """A table without rows: a first column and one for every figure."""
    table = FittingTable()
    table.add_column(first, style="bold")
    for name, _, _ in COLUMNS:
        table.add_column(name, justify="right")
    return table


def cells(row: Mapping[str, Any]) -> list[str]:
    """The formatted figures of a row, mAP with its interval; a dash where a figure is undefined or was not measured."""
    return [
        form.format(row[key]) + _interval(row, key) if row.get(key) is not None else "-" for _, key, form in COLUMNS
    ]


def _interval(row: Mapping[str, Any], key: str) -> str:
    """The interval of mAP, where a row has one; those of the other figures are in the file."""
    ends = row.get("ci", {}).get(key) if key == "mAP" else None
    return "" if ends is None else f" [{ends[0]:.3f}, {ends[1]:.3f}]"


def spread_table(rows: Sequence[Mapping[str, Any]], title: str) -> RenderableType:
    """One line per seed of one method, then mean and standard deviation of every column."""
    table = _figures("seed")
    for row in rows:
        table.add_row(str(row["seed"]), *cells(row))
    table.add_section()
    for name, of in (("mean", mean), ("std", stdev)):
        full = {key for _, key, _ in COLUMNS if all(row.get(key) is not None for row in rows)}
        table.add_row(name, *cells({key: of([row[key] for row in rows]) for key in full}))
    return Group(Text(title, "bold"), table, Text(FOOTNOTE, "dim"))


def comparison_table(rows: Sequence[Mapping[str, Any]], names: tuple[str, str]) -> RenderableType:
    """A figure a line: its value for A and for B, their difference with its interval, p, and the verdict."""
    table = FittingTable()
    for name in ("figure", *names, "A - B", "95% interval", "p", "A is"):
        table.add_column(name, justify="left" if name in {"figure", "A is"} else "right")
    for row in rows:
        ends = "-" if row["ci"] is None else "[{:+.4f}, {:+.4f}]".format(*row["ci"])
        figures = [_shown(row["A"], "{:.4f}"), _shown(row["B"], "{:.4f}"), _shown(row["difference"], "{:+.4f}")]
        table.add_row(
            row["figure"].replace("_tuned", "*"), *figures, ends, _shown(row["p"], "{:.3f}"), _short(row["verdict"])
        )
    return table


def _short(verdict: str) -> str:
    """The verdict in one word; it is written out below the table."""
    return verdict if verdict in {"better", "worse", "undefined"} else "unclear"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
