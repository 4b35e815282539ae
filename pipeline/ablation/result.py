"""What an ablation or its dry run tells: as JSON, and as tables for a person."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from .ablate_plan import Plan
from .tables import FOOT, experiment_table, plan_table


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
            "experiment", "value", "order", "seed", "status", "note", "key", "training_key", "method", "mAP", "ci",
            "F1_micro_tuned", "P@5", "precision", "run", "scores",
        )  # fmt: skip
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
                "key": key, "kind": one.kind, "seed": one.seed, "patches": one.patches, "towers": one.towers,
                "state": self.status[key], "run": self.runs.get(key), "evaluations": len(self.plan.of(key)),
                "rows": [f"{row.experiment}: {row.value}" for row in self.plan.rows if row.training == key],
            }
            for key, one in self.plan.trainings.items()
        ]  # fmt: skip
        return {**self.counted, "trainings": trainings}

    def summary(self) -> list[RenderableType]:
        """What a person reads."""
        return [plan_table(self.plan, self.status), *self.lines, "nothing was written (--dry-run)"]
