"""How long experiments take on a store of COCO's size: to plan, train and evaluate, and as a loop that shares nothing.

The loop is not run: it would train every row's head, so its time is that of the trainings that were timed, each as
often as it has rows, and of every row's own search and evaluation.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from ..ablation.ablate import Means, ablate, dry_run
from ..ablation.records import ROWS
from ..ablation.request import Order, Told
from ..ablation.tables import duration
from ..core.console import FittingTable
from ..core.progress import Progress
from .data import N_TRAIN, make_full_store

NAMES = ("A1", "A2", "A3", "B2", "B4", "C1", "C2", "C3", "C4")


@dataclass(frozen=True, kw_only=True)
class BenchAblate:
    """What was timed.

    Attributes:
        plan_s: Seconds of a dry run.
        wall_s: Of everything that the dry run listed.
        counted: Rows, trainings, evaluations.
        rows: The table's.
        table: Where it is; nowhere where it was thrown away.
    """

    plan_s: float
    wall_s: float
    counted: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    table: Path | None

    @property
    def train_s(self) -> float:
        """Epochs of every training, once."""
        return float(sum({row["training_key"]: row["train_s"] for row in self._done}.values()))

    @property
    def evaluate_s(self) -> float:
        """Votes, metrics and intervals of every evaluation, once; searches are shared and are not in it."""
        return float(sum({row["key"]: row["eval_s"] for row in self._done}.values()))

    @property
    def plain_s(self) -> float:
        """What a loop over rows that shares nothing would compute for."""
        return float(sum(row["train_s"] + row["eval_s"] + (row.get("search_s") or 0.0) for row in self._done))

    @property
    def _done(self) -> list[Mapping[str, Any]]:
        return [row for row in self.rows if row.get("train_s") is not None]

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        case = {
            "name": "ablate",
            "plan_s": self.plan_s,
            "wall_s": self.wall_s,
            "train_s": self.train_s,
            "evaluate_s": self.evaluate_s,
            "plain_s": self.plain_s,
            "ratio_plain": self.plain_s / self.wall_s,
            "ratio_ceiling": self.train_s / self.wall_s,
        }
        return {**self.counted, "cases": [case], "table_path": None if self.table is None else str(self.table)}

    def summary(self) -> list[RenderableType]:
        """What a person reads."""
        table = FittingTable()
        for name in ("part", "time"):
            table.add_column(name, justify="left" if name == "part" else "right")
        parts = (
            ("planning (a dry run)", self.plan_s),
            ("everything", self.wall_s),
            ("epochs of training", self.train_s),
            ("votes, metrics and intervals", self.evaluate_s),
            ("a loop that shares nothing (computed)", self.plain_s),
        )
        for name, seconds in parts:
            table.add_row(name, duration(seconds))
        made = f"{self.counted['n_rows']} rows of {self.counted['n_trainings']} trainings"
        lines = [f"{made}; {self.plain_s / self.wall_s:.1f} times as fast as a loop that shares nothing"]
        return [table, *lines, *([] if self.table is None else [f"wrote {self.table}"])]


def bench_ablate(
    told: Told,
    *,
    names: Sequence[str] = NAMES,
    store: Path | None = None,
    n_train: int | None = None,
    seeds: int = 1,
    workers: int = 1,
    out: Path | None = None,
    progress: Progress | None = None,
) -> BenchAblate:
    """Plan and run experiments, and time them.

    Args:
        told: The configuration.
        names: Experiments that a store alone serves.
        store: The store; one of COCO's size that is made, and thrown away, when not given.
        n_train: Train images of the one that is made.
        seeds: Rows of each value.
        workers: Processes.
        out: Where the table and the runs go; thrown away when not given.
        progress: Who to tell.

    Raises:
        InputError: As of :func:`~mmcli.pipeline.ablation.ablate.ablate`.
    """
    progress = progress or Progress()
    with _places(store, out, n_train, progress) as (folder, place):
        order = Order(names=tuple(names), seeds=seeds, store=folder, told=told)
        means = Means(out=place, runs=place / "nothing", workers=workers)
        started = time.perf_counter()
        planned = dry_run(order, means)
        plan_s = time.perf_counter() - started
        result = ablate(order, means, progress)
        return BenchAblate(
            plan_s=plan_s,
            wall_s=result.seconds,
            counted=dict(planned.counted),
            rows=result.rows,
            table=None if out is None else place / ROWS,
        )


@contextmanager
def _places(
    store: Path | None, out: Path | None, n_train: int | None, progress: Progress
) -> Iterator[tuple[Path, Path]]:
    """The store and the table's folder; what was made for the purpose goes when the block ends."""
    scratch = Path(tempfile.mkdtemp(prefix="mmcli-bench-"))
    try:
        if store is None:
            progress.say("making a store of COCO's size")
            store = make_full_store(scratch / "store", n_train=n_train or N_TRAIN)
        yield store, out or scratch / "ablations"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
