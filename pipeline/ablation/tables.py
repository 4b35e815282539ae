"""Tables of an ablation for a person: one an experiment, and what a dry run would do."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ..core.console import FittingTable
from ..core.metrics_file import TWO_PRECISIONS, by_precision
from .ablate_plan import Plan, Row
from .estimate import Estimate

MOST_GRID_ROWS, MOST_TRAININGS, MOST_SHOWN = 20, 40, 4
FOOT = (
    "mAP: mean over seeds; spread: standard deviation over seeds; interval: 95% bootstrap over the test images, mean of"
    " the ends over seeds. F1 at the one threshold that is best on val."
)


def experiment_table(rows: Sequence[Mapping[str, Any]], title: str) -> RenderableType:
    """A line a value of one experiment."""
    table = FittingTable()
    table.add_column("value", style="bold")
    for name in ("mAP", "spread", "interval", "F1_micro*", "train"):
        table.add_column(name, justify="right")
    notes: dict[str, None] = {}
    mixed = False
    n_seeds = len({row["seed"] for row in rows})
    values = list(dict.fromkeys((row["order"], row["value"]) for row in rows))
    for order, value in values[:MOST_GRID_ROWS]:
        of_value = [row for row in rows if (row["order"], row["value"]) == (order, value)]
        for precision, own in by_precision(of_value).items():
            few = f" ({len(own)} of {n_seeds} seeds)" if len(own) < n_seeds else ""
            table.add_row(value + (f", {precision}" if precision else "") + few, *_cells(own))
            mixed |= bool(precision)
            notes |= {f"{value}: {row['note']}": None for row in own if row.get("note")}
    parts: list[RenderableType] = [Text(f"{title}, {n_seeds} seed{'s' * (n_seeds > 1)}", "bold"), table]
    if len(values) > MOST_GRID_ROWS:
        parts.append(Text(f"and {len(values) - MOST_GRID_ROWS} more values, in the table", "dim"))
    parts += [Text(f"  {note}", "dim") for note in list(notes)[:MOST_GRID_ROWS]]
    if mixed:
        parts.append(Text(f"  {TWO_PRECISIONS}", "dim"))
    return Group(*parts)


def plan_table(plan: Plan, status: Mapping[str, str]) -> RenderableType:
    """A line a configuration: what it is, its seeds, what is evaluated of it, and what of it is there already."""
    table = FittingTable()
    for name, justify in (
        ("training", "left"),
        ("kind", "left"),
        ("seeds", "right"),
        ("rows", "right"),
        ("for", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("state")
    groups: dict[str, list[str]] = {}
    for key, one in plan.trainings.items():
        groups.setdefault(one.group, []).append(key)
    rows: dict[str, list[Row]] = {}
    for row in plan.rows:
        rows.setdefault(row.training, []).append(row)
    for group, keys in list(groups.items())[:MOST_TRAININGS]:
        own = [row for key in keys for row in rows.get(key, ())]
        shown = list(dict.fromkeys(f"{row.experiment} {row.value}" for row in own))
        more = f" and {len(shown) - MOST_SHOWN} more" if len(shown) > MOST_SHOWN else ""
        states = ", ".join(dict.fromkeys(status[key] for key in keys))
        kind = plan.trainings[keys[0]].kind
        table.add_row(group[:8], kind, str(len(keys)), str(len(own)), ", ".join(shown[:MOST_SHOWN]) + more, states)
    if len(groups) > MOST_TRAININGS:
        table.add_row("", "", "", "", f"and {len(groups) - MOST_TRAININGS} more configurations", "")
    return table


def counts(plan: Plan, estimate: Estimate, *, missing: int, found: int, evaluations: int, stores: int) -> list[str]:
    """What a plan comes to, in lines."""
    asked, rows = plan.asked, len(plan.rows)
    collapsed = f", {asked - rows:,} of {asked:,} collapsed into others" if asked > rows else ""
    refused = [row for row in plan.rows if row.status == "failed"]
    trained, baselines = plan.count("head", "finetune"), plan.count("zero-shot", "prior")
    return [
        f"{rows:,} rows{collapsed}" + (f", {len(refused):,} refused" if refused else ""),
        *list(dict.fromkeys(f"  {row.experiment} {row.value}: {row.note}" for row in refused))[:MOST_GRID_ROWS],
        f"{trained:,} trainings ({plan.count('finetune'):,} of towers) and {baselines:,} baselines:"
        f" {found:,} are there, {missing:,} to be made",
        f"{len(plan.evaluations):,} evaluations, {plan.searches:,} searches, {plan.votes:,} votes;"
        f" {evaluations:,} evaluations to be made",
        f"{stores:,} stores to be extracted (images alone: captions are shared)" if stores else "no store to extract",
        f"about {duration(estimate.seconds)} on this machine, of which evaluations {duration(estimate.evaluate_s)};"
        f" by {estimate.basis}",
    ]  # fmt: skip


def duration(seconds: float) -> str:
    """Seconds for a person."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    done = [row for row in rows if row["status"] != "failed" and row.get("mAP") is not None]
    if not done:
        return ["failed", *["-"] * 4]
    maps = [row["mAP"] for row in done]
    ends = [row["ci"]["mAP"] for row in done if row.get("ci") and row["ci"].get("mAP")]
    interval = f"[{mean(e[0] for e in ends):.3f}, {mean(e[1] for e in ends):.3f}]" if ends else "-"
    return [
        f"{mean(maps):.3f}", f"{stdev(maps):.3f}" if len(maps) > 1 else "-", interval, _mean(done, "F1_micro_tuned"),
        _mean(done, "train_s", "{:.1f} s"),
    ]  # fmt: skip


def _mean(rows: Sequence[Mapping[str, Any]], key: str, form: str = "{:.3f}") -> str:
    values = [row[key] for row in rows if row.get(key) is not None]
    return form.format(mean(values)) if values else "-"
