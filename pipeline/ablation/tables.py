"""Tables of an ablation for a person: one an experiment, and what a dry run would do."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ...errors import InputError
from ..core.console import FittingTable
from ..core.metrics_file import TWO_PRECISIONS, by_precision, read_history
from .plan import Plan, Row, Training

# Train images a second of a head on two cores; README, the loop over bits.
IMAGES_PER_S = 10_000.0
# Of an evaluation: votes, metrics and intervals of 5,000 images, on two cores.
EVALUATION_S_PER_IMAGE = 6e-4


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds, and what they rest on."""

    train_s: float
    evaluate_s: float
    basis: str

    @property
    def seconds(self) -> float:
        """Of all."""
        return self.train_s + self.evaluate_s


def estimate(
    plan: Plan, missing: Iterable[Training], n_evaluations: int, runs: Mapping[str, Path], *, n_train: int, n_test: int
) -> Estimate:
    """Estimate what is still to be done.

    Args:
        plan: Everything that was asked for.
        missing: Trainings that are not there.
        n_evaluations: Evaluations that are not there.
        runs: Runs that are there.
        n_train: Train images of the store.
        n_test: Images that are evaluated.
    """
    known = [spent for key, folder in runs.items() if key in plan.trainings and (spent := seconds_of(folder)) > 0]
    heads = [one for one in missing if one.kind == "head"]
    if known:
        each, basis = median(known), f"the median of {len(known)} finished trainings of this plan"
        train_s = each * len(heads)
    else:
        basis = (
            f"{IMAGES_PER_S:,.0f} train images a second, every epoch of every training: early stopping makes it less"
        )
        train_s = sum(one.config.training.num_epochs * n_train / IMAGES_PER_S for one in heads)
    others = [one for one in missing if one.kind == "finetune"]
    basis += f"; {len(others)} trainings of towers are not estimated" if others else ""
    return Estimate(train_s=train_s, evaluate_s=n_evaluations * n_test * EVALUATION_S_PER_IMAGE, basis=basis)


def seconds_of(folder: Path) -> float:
    """Seconds of all epochs of a run; 0 where it does not say."""
    try:
        return float(sum(line["epoch_s"] for line in read_history(folder)))
    except (InputError, KeyError):
        return 0.0


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
    ]


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
        f"{mean(maps):.3f}",
        f"{stdev(maps):.3f}" if len(maps) > 1 else "-",
        interval,
        _mean(done, "F1_micro_tuned"),
        _mean(done, "train_s", "{:.1f} s"),
    ]


def _mean(rows: Sequence[Mapping[str, Any]], key: str, form: str = "{:.3f}") -> str:
    values = [row[key] for row in rows if row.get(key) is not None]
    return form.format(mean(values)) if values else "-"


@dataclass(frozen=True, kw_only=True)
class AblateResult:
    """The rows that were asked for, and where the table is.

    Attributes:
        path: The table.
        rows: Those that were asked for and are there.
        titles: Of experiments.
        counted: Rows, trainings, evaluations, of this call and in all.
        left: Rows of another base that left the table.
        seconds: Of this call.
    """

    path: Path
    rows: tuple[dict[str, Any], ...]
    titles: Mapping[str, str]
    counted: Mapping[str, int]
    left: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """One JSON object; of every row what identifies it and its main figures."""
        keys = (
            "experiment",
            "value",
            "order",
            "seed",
            "status",
            "note",
            "key",
            "training_key",
            "method",
            "mAP",
            "ci",
            "F1_micro_tuned",
            "P@5",
            "precision",
            "run",
            "scores",
        )
        rows = [{key: row.get(key) for key in keys} | {"ci": (row.get("ci") or {}).get("mAP")} for row in self.rows]
        return {"table_path": str(self.path), **self.counted, "seconds": self.seconds, "rows": rows}

    def summary(self) -> list[RenderableType]:
        """What a person reads at the end."""
        tables: list[RenderableType] = []
        for name, title in self.titles.items():
            own = [row for row in self.rows if row["experiment"] == name]
            if own:
                tables.append(experiment_table(own, f"{name}: {title}"))
        done = self.counted
        lines = [
            f"{done['trained']} trainings and {done['evaluated']} evaluations in {self.seconds:.0f} s;"
            f" {done['found']} evaluations were there already"
        ]
        if done["failed"]:
            lines.append(f"{done['failed']} rows failed: the reasons are in the column note; the next call tries again")
        if done["open"]:
            lines.append(f"{done['open']} rows are not there yet: the same command goes on")
        if self.left:
            lines.append(
                f"{self.left} rows of another base configuration left the table; asking for them brings them back"
            )
        return [*tables, Text(FOOT, "dim"), *lines, f"wrote {self.path}"]


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What would be done."""

    plan: Plan
    status: Mapping[str, str]
    runs: Mapping[str, str]
    lines: tuple[str, ...]
    counted: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        trainings = [
            {
                "key": key,
                "kind": one.kind,
                "seed": one.seed,
                "patches": one.patches,
                "towers": one.towers,
                "state": self.status[key],
                "run": self.runs.get(key),
                "evaluations": len(self.plan.of(key)),
                "rows": [f"{row.experiment}: {row.value}" for row in self.plan.rows if row.training == key],
            }
            for key, one in self.plan.trainings.items()
        ]
        return {**self.counted, "trainings": trainings}

    def summary(self) -> list[RenderableType]:
        """What a person reads."""
        return [plan_table(self.plan, self.status), *self.lines, "nothing was written (--dry-run)"]
