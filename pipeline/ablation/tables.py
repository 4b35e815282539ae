"""Tables of an ablation for a person: one an experiment, and what a dry run would do."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ...errors import InputError
from ..core.console import FittingTable
from ..core.metrics_file import TWO_PRECISIONS, by_precision, read_history
from .plan import Plan, Row, Training

# Train images that a head sees in a second on two cores; README, the loop over bits.
IMAGES_PER_S = 10_000.0
# Seconds an image that votes, metrics and intervals of an evaluation take on two cores.
EVALUATION_S_PER_IMAGE = 6e-4
MOST_GRID_ROWS, MOST_TRAININGS, MOST_SHOWN = 20, 40, 4
FOOT = (
    "mAP: mean over seeds; spread: standard deviation over seeds; interval: 95% bootstrap over the test images, mean of"
    " the ends over seeds. F1 at the one threshold that is best on val."
)
# What `--json` prints of a row.
JSON_KEYS = (
    *("experiment", "value", "order", "seed", "status", "note", "key", "training_key", "method", "mAP"),
    *("F1_micro_tuned", "P@5", "precision", "run", "scores"),
)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds that trainings and evaluations will take, and what the estimate rests on."""

    train_s: float
    evaluate_s: float
    basis: str

    @property
    def seconds(self) -> float:
        """Seconds of trainings and evaluations together."""
        return self.train_s + self.evaluate_s


def estimate(
    missing: Iterable[Training], n_evaluations: int, runs: Iterable[Path], *, n_train: int, n_test: int
) -> Estimate:
    """Estimate what is still to be done.

    Args:
        missing: Trainings that have to be made.
        n_evaluations: How many evaluations have to be made.
        runs: Runs of the same plan that are finished.
        n_train: Train images of the store.
        n_test: Images that are evaluated.
    """
    missing = list(missing)
    heads = [training for training in missing if training.kind == "head"]
    seconds = [spent for folder in runs if (spent := seconds_of(folder)) > 0]
    if seconds:
        train_s, basis = median(seconds) * len(heads), f"the median of {len(seconds)} finished trainings of this plan"
    else:
        train_s = sum(training.config.training.num_epochs * n_train / IMAGES_PER_S for training in heads)
        basis = (
            f"{IMAGES_PER_S:,.0f} train images a second, every epoch of every training: early stopping makes it less"
        )
    n_towers = sum(training.kind == "finetune" for training in missing)
    basis += f"; {n_towers} trainings of towers are not estimated" if n_towers else ""
    return Estimate(train_s=train_s, evaluate_s=n_evaluations * n_test * EVALUATION_S_PER_IMAGE, basis=basis)


def seconds_of(folder: Path) -> float:
    """Seconds of all epochs of a run; 0 where it does not say."""
    try:
        return float(sum(line["epoch_s"] for line in read_history(folder)))
    except (InputError, KeyError):
        return 0.0


def duration(seconds: float) -> str:
    """Seconds in a unit that is easily read: ``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def experiment_table(rows: Sequence[Mapping[str, Any]], title: str) -> RenderableType:
    """A line for each value of one experiment."""
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
        for precision, group in by_precision(of_value).items():
            few = f" ({len(group)} of {n_seeds} seeds)" if len(group) < n_seeds else ""
            table.add_row(value + (f", {precision}" if precision else "") + few, *_cells(group))
            mixed |= bool(precision)
            notes |= {f"{value}: {row['note']}": None for row in group if row.get("note")}
    parts: list[RenderableType] = [Text(f"{title}, {n_seeds} seed{'s' * (n_seeds > 1)}", "bold"), table]
    if len(values) > MOST_GRID_ROWS:
        parts.append(Text(f"and {len(values) - MOST_GRID_ROWS} more values, in the table", "dim"))
    parts += [Text(f"  {note}", "dim") for note in list(notes)[:MOST_GRID_ROWS]]
    if mixed:
        parts.append(Text(f"  {TWO_PRECISIONS}", "dim"))
    return Group(*parts)


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    done = [row for row in rows if row["status"] != "failed" and row.get("mAP") is not None]
    if not done:
        return ["failed", *["-"] * 4]
    maps = [row["mAP"] for row in done]
    ends = [row["ci"]["mAP"] for row in done if row.get("ci") and row["ci"].get("mAP")]
    interval = f"[{mean(low for low, _ in ends):.3f}, {mean(high for _, high in ends):.3f}]" if ends else "-"
    spread = f"{stdev(maps):.3f}" if len(maps) > 1 else "-"
    return [f"{mean(maps):.3f}", spread, interval, _mean(done, "F1_micro_tuned"), _mean(done, "train_s", "{:.1f} s")]


def _mean(rows: Sequence[Mapping[str, Any]], key: str, form: str = "{:.3f}") -> str:
    values = [row[key] for row in rows if row.get(key) is not None]
    return form.format(mean(values)) if values else "-"


@dataclass(frozen=True, kw_only=True)
class AblateResult:
    """The rows that were asked for, and where the table is.

    Attributes:
        path: The table.
        rows: The rows that were asked for and are finished, failed or collapsed.
        titles: Titles of experiments.
        counted: How many rows, trainings and evaluations there are, of this call and in all.
        left: How many rows of another base left the table.
        seconds: Duration of this call.
    """

    path: Path
    rows: tuple[dict[str, Any], ...]
    titles: Mapping[str, str]
    counted: Mapping[str, int]
    left: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """One JSON object; of every row what identifies it and its main figures."""
        rows = [{key: row.get(key) for key in JSON_KEYS} for row in self.rows]
        for line, row in zip(rows, self.rows, strict=True):
            line["ci"] = (row.get("ci") or {}).get("mAP")
        return {"table_path": str(self.path), **self.counted, "seconds": self.seconds, "rows": rows}

    def summary(self) -> list[RenderableType]:
        """What a person reads at the end."""
        tables: list[RenderableType] = []
        for name, title in self.titles.items():
            rows = [row for row in self.rows if row["experiment"] == name]
            if rows:
                tables.append(experiment_table(rows, f"{name}: {title}"))
        done = self.counted
        lines = [
            f"{done['trained']} trainings and {done['evaluated']} evaluations in {self.seconds:.0f} s;"
            f" {done['found']} evaluations were finished before"
        ]
        if done["failed"]:
            lines.append(f"{done['failed']} rows failed: the reasons are in the column note; the next call tries again")
        if done["open"]:
            lines.append(f"{done['open']} rows are still to be made: the same command resumes")
        if self.left:
            lines.append(
                f"{self.left} rows of another base configuration left the table; asking for them brings them back"
            )
        return [*tables, Text(FOOT, "dim"), *lines, f"wrote {self.path}"]


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """The trainings and evaluations that a command would do.

    Attributes:
        plan: The plan.
        status: For every training by key, ``done``, ``found`` or ``to be made``.
        runs: Runs that are finished already, by key of the training.
        n_evaluations: How many evaluations have to be made.
        n_stores: How many stores have to be extracted.
        estimate: How long it takes.
    """

    plan: Plan
    status: Mapping[str, str]
    runs: Mapping[str, Path]
    n_evaluations: int
    n_stores: int
    estimate: Estimate

    @property
    def counted(self) -> dict[str, Any]:
        """How many rows, trainings, evaluations, searches, votes and stores there are, and how long they take."""
        plan = self.plan
        missing = [training for key, training in plan.trainings.items() if self.status[key] == "to be made"]
        return {
            "n_rows": len(plan.rows),
            "n_asked": plan.asked,
            "n_trainings": plan.count("head", "finetune"),
            "n_trainings_missing": sum(training.kind in {"head", "finetune"} for training in missing),
            "n_baselines": plan.count("zero-shot", "prior"),
            "n_evaluations": len(plan.evaluations),
            "n_evaluations_missing": self.n_evaluations,
            "n_searches": plan.searches,
            "n_votes": plan.votes,
            "n_stores_missing": self.n_stores,
            "estimate_s": self.estimate.seconds,
            "estimate_basis": self.estimate.basis,
        }

    def to_json(self) -> dict[str, Any]:
        """One JSON object, with what is shared and missing of every training."""
        rows, evaluations = self._rows(), Counter(item.training for item in self.plan.evaluations.values())
        trainings = [
            {
                "key": key,
                "kind": training.kind,
                "seed": training.seed,
                "patches": training.patches,
                "towers": training.towers,
                "state": self.status[key],
                "run": str(self.runs[key]) if key in self.runs else None,
                "evaluations": evaluations[key],
                "rows": [f"{row.experiment}: {row.value}" for row in rows[key]],
            }
            for key, training in self.plan.trainings.items()
        ]
        return {**self.counted, "trainings": trainings}

    def summary(self) -> list[RenderableType]:
        """The trainings as a table, and what the plan comes to, for a person."""
        return [self._table(), *self._lines(), "nothing was written (--dry-run)"]

    def _rows(self) -> dict[str, list[Row]]:
        """The rows of every training, by its key."""
        rows: dict[str, list[Row]] = {key: [] for key in self.plan.trainings}
        for row in self.plan.rows:
            if row.training:
                rows[row.training].append(row)
        return rows

    def _table(self) -> RenderableType:
        """A line a configuration: what it is, its seeds, what is evaluated of it, and what of it is finished."""
        table = FittingTable()
        for name in ("training", "kind", "seeds", "rows", "for", "state"):
            table.add_column(name, justify="right" if name in {"seeds", "rows"} else "left")
        groups: dict[str, list[str]] = {}
        for key, training in self.plan.trainings.items():
            groups.setdefault(training.group, []).append(key)
        rows = self._rows()
        for group, keys in list(groups.items())[:MOST_TRAININGS]:
            served = [row for key in keys for row in rows[key]]
            labels = list(dict.fromkeys(f"{row.experiment} {row.value}" for row in served))
            more = f" and {len(labels) - MOST_SHOWN} more" if len(labels) > MOST_SHOWN else ""
            states = ", ".join(dict.fromkeys(self.status[key] for key in keys))
            kind, purpose = self.plan.trainings[keys[0]].kind, ", ".join(labels[:MOST_SHOWN]) + more
            table.add_row(group[:8], kind, str(len(keys)), str(len(served)), purpose, states)
        if len(groups) > MOST_TRAININGS:
            table.add_row("", "", "", "", f"and {len(groups) - MOST_TRAININGS} more configurations", "")
        return table

    def _lines(self) -> list[str]:
        """The lines that sum up a plan."""
        plan, n = self.plan, self.counted
        collapsed = n["n_asked"] - n["n_rows"]
        refused = [row for row in plan.rows if row.status == "failed"]
        missing = sum(state == "to be made" for state in self.status.values())
        stores = f"{self.n_stores:,} stores to be extracted (images alone: captions are shared)"
        return [
            f"{n['n_rows']:,} rows"
            + (f", {collapsed:,} of {n['n_asked']:,} collapsed into others" if collapsed else "")
            + (f", {len(refused):,} refused" if refused else ""),
            *list(dict.fromkeys(f"  {row.experiment} {row.value}: {row.note}" for row in refused))[:MOST_GRID_ROWS],
            f"{n['n_trainings']:,} trainings ({plan.count('finetune'):,} of towers) and"
            f" {n['n_baselines']:,} baselines: {len(plan.trainings) - missing:,} are finished,"
            f" {missing:,} to be made",
            f"{n['n_evaluations']:,} evaluations, {n['n_searches']:,} searches, {n['n_votes']:,} votes;"
            f" {self.n_evaluations:,} evaluations to be made",
            stores if self.n_stores else "no store to extract",
            f"about {duration(self.estimate.seconds)} on this machine, of which evaluations"
            f" {duration(self.estimate.evaluate_s)}; by {self.estimate.basis}",
        ]
