"""``mmcli bench ablate``: experiments on a store of COCO's size, beside a loop that shares nothing.

The loop is not run: it would train every row's head, so its time is that of the trainings that were timed, each as
often as it has rows, and of every row's own search and evaluation.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..ablation.ablate import ablate, dry_run
from ..ablation.request import ConfigSource, Request
from ..ablation.tables import AblateResult, duration
from ..core.progress import Progress
from .data import N_TRAIN, make_full_store
from .harness import BenchResult, Case

NAMES = ("A1", "A2", "A3", "B2", "B4", "C1", "C2", "C3", "C4")


def bench_ablate(
    source: ConfigSource,
    *,
    names: Sequence[str] = NAMES,
    store: Path | None = None,
    n_train: int | None = None,
    seeds: int = 1,
    workers: int = 1,
    out: Path | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Plan and run experiments, and time them.

    Args:
        source: Where the configuration comes from.
        names: Experiments that a store alone serves.
        store: The store; by default one of COCO's size is made, and thrown away afterwards.
        n_train: Train images of the store that is made.
        seeds: Rows of each value.
        workers: How many processes.
        out: Where the table and the runs go; by default they are thrown away.
        progress: Progress bars and messages; silent by default.

    Returns:
        A case whose plain way is the loop and whose ceiling is the epochs of the trainings alone.

    Raises:
        InputError: The request cannot be planned, as in :func:`~mmcli.pipeline.ablation.ablate.ablate`.
    """
    progress = progress or Progress()
    with tempfile.TemporaryDirectory(prefix="mmcli-bench-") as scratch:
        if store is None:
            progress.say("making a store of COCO's size")
            store = make_full_store(Path(scratch) / "store", n_train=n_train or N_TRAIN)
        table = out or Path(scratch) / "ablations"
        request = Request(
            names=tuple(names),
            seeds=seeds,
            store=store,
            source=source,
            out=table,
            runs=table / "nothing",
            workers=workers,
        )
        started = time.perf_counter()
        counted = dry_run(request).counted
        plan_s = time.perf_counter() - started
        result = ablate(request, progress)
    return _timed(result, counted, plan_s, kept=out is not None)


def _timed(result: AblateResult, counted: Mapping[str, Any], plan_s: float, *, kept: bool) -> BenchResult:
    rows = [row for row in result.rows if row.get("train_s") is not None]
    if not rows:
        note = next((row["note"] for row in result.rows), "no rows")
        raise InputError("nothing was timed", got=note, wanted="a training that ends")
    train_s = sum({row["training_key"]: row["train_s"] for row in rows}.values())
    evaluate_s = sum({row["key"]: row["eval_s"] for row in rows}.values())
    plain_s = sum(row["train_s"] + row["eval_s"] + (row.get("search_s") or 0.0) for row in rows)
    rates = {"plain": len(rows) / plain_s, "ours": len(rows) / result.seconds, "ceiling": len(rows) / train_s}
    note = "plain: a loop that shares nothing (computed); ceiling: the epochs of the trainings alone"
    return BenchResult(
        title=f"{counted['n_rows']} rows of {counted['n_trainings']} trainings",
        cases=(Case(name="ablate", unit="rows", note=note, **rates),),
        facts={
            **counted,
            "plan_s": plan_s,
            "wall_s": result.seconds,
            "train_s": train_s,
            "evaluate_s": evaluate_s,
            "plain_s": plain_s,
            "table_path": str(result.path) if kept else None,
        },
        lines=(
            f"planning (a dry run) {duration(plan_s)}; everything {duration(result.seconds)}; epochs of training"
            f" {duration(train_s)}; votes, metrics and intervals {duration(evaluate_s)}",
            *([f"wrote {result.path}"] if kept else []),
        ),
    )
