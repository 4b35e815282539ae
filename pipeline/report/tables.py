"""Compare, part three: the tables of methods and experiments, and cost against quality."""

from collections.abc import Sequence
from typing import NamedTuple

from ..core.metrics_file import TWO_PRECISIONS
from ..evaluation.compare import ARM_FIGURES, Arm, Pairs, best_of
from .collect import Inputs
from .document import Cell, Table, number

# Title and key of the metrics and costs that a table of arms shows.
METRICS = (
    ("mAP", "mAP"),
    ("F1 micro*", "F1_micro_tuned"),
    ("F1 macro*", "F1_macro_tuned"),
    ("P@5", "P@5"),
    ("R@5", "R@5"),
)
COSTS = (
    ("train", "train_s", "{:.1f} s"),
    ("query", "query_latency_ms", "{:.2f} ms"),
    ("index", "index_bytes", "{:,.0f} B"),
)
READING = (
    "Means over seeds, ± their standard deviation; in brackets the 95% bootstrap interval over test images, its ends"
    " averaged over seeds. Bold: the best of its column, where the paired 95% interval of its difference to every other"
    " line leaves out 0; that covers the images drawn and not the seeds, so read it beside the ±. * at the one"
    " threshold that is best on val."
)
# Experiments whose values are set beside each other by cost: what a legend calls them, and the name of a value.
COSTED = {
    "A2": ("bits", "{} bits"),
    "C1": ("neighbours", "K {}"),
    "C2": ("distance", "{}"),
    "A3": ("predictor", "{}"),
    "base": ("baseline", "{}"),
}


class Point(NamedTuple):
    """A configuration: its name, its cost, its mAP, and the group that it belongs to."""

    name: str
    cost: float
    mAP: float
    group: str


def arms_table(
    name: str, title: str, arms: Sequence[Arm], pairs: Pairs, *, first: str, commands: tuple[str, ...] = ()
) -> Table:
    """A row per arm: metrics with spread and interval, and costs.

    Args:
        name: Name of the table.
        title: Its heading.
        arms: One a row.
        pairs: Makes the paired differences that decide what is bold.
        first: Title of the first column.
        commands: The commands that make the runs.
    """
    best = {key: best_of(arms, key, pairs) for _, key in METRICS if key in ARM_FIGURES}
    costs = [cost for cost in COSTS if any(arm.values(cost[1]) for arm in arms)]
    rows = [
        (
            Cell(text=arm.name),
            number(float(len(arm.samples)), "{:.0f}"),
            *(_metric(arm, key, bold=best.get(key) is arm) for _, key in METRICS),
            *(number(arm.mean(key), form) for _, key, form in costs),
        )
        for arm in arms
    ]
    notes = [f"{arm.name}: {arm.note}." for arm in arms if arm.note]
    if any(arm.precision for arm in arms):
        notes.append(TWO_PRECISIONS)
    ceilings = [(key, arm.mean(f"{key}_ceiling")) for key in ("P@5", "R@5") for arm in arms]
    highest = {key: value for key, value in reversed(ceilings) if value is not None}
    if highest:
        values = ", ".join(f"{key} {highest[key]:.3f}" for key in ("P@5", "R@5") if key in highest)
        notes.append(f"Ceilings on these images: {values}.")
    columns = (first, "seeds", *(title for title, _ in METRICS), *(title for title, _, _ in costs))
    return Table(name=name, title=title, columns=columns, rows=tuple(rows), note=" ".join(notes), commands=commands)


def experiment_tables(inputs: Inputs, pairs: Pairs) -> list[Table]:
    """A table for each experiment that has rows, but for the base."""
    tables = []
    for name in inputs.experiments:
        if name == "base":
            continue
        rows = inputs.rows_of(name)
        varies = rows[0]["varies"]
        tables.append(
            arms_table(
                f"table-{name}",
                f"{name}: {inputs.titles.get(name, varies)}",
                inputs.arms(name),
                pairs,
                first=varies or "value",
                commands=(inputs.ablate(name, seeds=len({row["seed"] for row in rows})),),
            )
        )
    return tables


def arms_by_hand(inputs: Inputs) -> list[Arm]:
    """Every method of every run below ``--runs`` itself, on test."""
    return [
        run.arm(row, row["method"] if name == row["method"] else f"{name}, {row['method']}")
        for name, run in list(inputs.runs.items())[: inputs.n_by_hand]
        for row in run.rows
        if row.get("mAP") is not None
    ]


def cost_points(inputs: Inputs, cost: str) -> list[Point]:
    """Configurations with a cost, each once: mean cost and mean mAP over seeds."""
    distinct: dict[tuple[str, ...], Point] = {}
    for experiment, (group, form) in COSTED.items():
        for arm in inputs.arms(experiment):
            x, y = arm.mean(cost), arm.mean("mAP")
            if x is not None and y is not None:
                key = tuple(str(row.get("key")) for row in arm.rows)
                distinct.setdefault(key, Point(name=form.format(arm.name), cost=x, mAP=y, group=group))
    return list(distinct.values())


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats: none costs at most as much and has a mAP at least as high, one of both strictly."""
    return [
        point
        for point in points
        if not any(
            other.cost <= point.cost and other.mAP >= point.mAP and (other.cost < point.cost or other.mAP > point.mAP)
            for other in points
        )
    ]


def _metric(arm: Arm, key: str, *, bold: bool) -> Cell:
    value = arm.mean(key)
    if value is None:
        return number(None)
    spread, ends = arm.spread(key), arm.ends(key) if key == "mAP" else None
    text = f"{value:.3f}" + (f" ±{spread:.3f}" if spread is not None else "")
    return Cell(text=text, detail=f"[{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "", bold=bold, sort=value)
