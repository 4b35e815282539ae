"""Tables of metrics for a person: the same columns for every method."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from .console import FittingTable

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
    table = FittingTable()
    table.add_column("method", style="bold")
    for name, _, _ in COLUMNS:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(str(row["method"]), *cells(row))
    ceilings = {"P@5": rows[0].get("P@5_ceiling"), "R@5": rows[0].get("R@5_ceiling")}
    if any(value is not None for value in ceilings.values()):
        table.add_section()
        table.add_row("ceiling", *["" if ceilings.get(n) is None else f"{ceilings[n]:.3f}" for n, _, _ in COLUMNS])
    return Group(Text(title, "bold"), table, Text(FOOTNOTE, "dim"))


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
    table = FittingTable()
    table.add_column("seed", style="bold")
    for name, _, _ in COLUMNS:
        table.add_column(name, justify="right")
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
        table.add_row(row["figure"], *figures, ends, _shown(row["p"], "{:.3f}"), row["verdict"])
    return table


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
