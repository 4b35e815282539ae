"""Experiments and grids: plan, make what is missing, evaluate it, keep every row, and print a table an experiment.

Every result is kept when it is there, so a stop at any moment loses at most the training that was under way, and that
one goes on where it was. The table is made anew from what was kept.
"""

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...cache import Store, is_remote
from ..core.files import make_folder
from ..core.interrupts import interruptible
from ..core.progress import NoteOf, Progress
from ..core.run_folders import hold
from ..extraction.stores import DEFAULT_CACHE
from .plan import Plan, Training
from .records import OWN, STORES, Record, find_runs, find_stores, lines_of, merge, read_record, read_rows, write_rows
from .request import Order, Ordered, place_order
from .tables import AblateResult, DryRun, Estimate, counts, estimate

OUT, RUNS = Path("runs/ablations"), Path("runs")
WRITE_EVERY_S = 5.0
Engine = Literal["local", "ray"]


@dataclass(frozen=True, kw_only=True)
class Means:
    """How a plan is carried out.

    Attributes:
        out: The folder of the table.
        runs: Where runs that were made by hand lie.
        data: Folder of the images, for what needs them.
        force: Make everything again.
        max_time: Seconds after which nothing more is begun.
        workers: Processes.
        engine: This machine, or a Ray cluster.
        address: The cluster's.
    """

    out: Path = OUT
    runs: Path = RUNS
    data: Path = Path("data/coco")
    force: bool = False
    max_time: float | None = None
    workers: int = 1
    engine: Engine = "local"
    address: str | None = None


@dataclass(frozen=True, kw_only=True)
class State:
    """What of a plan is there.

    Attributes:
        records: Finished evaluations by key.
        runs: Runs by key of the training.
        stores: Stores by digest.
        missing: Trainings that have to be made.
    """

    records: Mapping[str, Record]
    runs: Mapping[str, Path]
    stores: Mapping[str, Path]
    missing: tuple[Training, ...]


def dry_run(order: Order, means: Means) -> DryRun:
    """Plan and look at what is there; write nothing.

    Raises:
        InputError: As of :func:`ablate`.
    """
    ordered = place_order(order)
    plan = ordered.plan
    state = look(plan, order.store, means)
    todo = [one for one in plan.evaluations.values() if one.key not in state.records]
    store = Store.open(order.store)
    splits = store.columns(["split"])["split"].to_pylist()
    guess = estimate(
        plan, state.missing, len(todo), state.runs, n_train=splits.count("train"), n_test=splits.count("test")
    )
    status = {key: _state(one, state, {e.training for e in todo}) for key, one in plan.trainings.items()}
    absent = [digest for digest in plan.stores if digest not in state.stores]
    lines = counts(
        plan,
        guess,
        missing=len(state.missing),
        found=len(plan.trainings) - len(state.missing),
        evaluations=len(todo),
        stores=len(absent),
    )
    return DryRun(
        plan=plan,
        status=status,
        runs={key: str(path) for key, path in state.runs.items()},
        lines=tuple(lines),
        counted=_counted(plan, state, len(todo), guess, len(absent)),
    )


def ablate(order: Order, means: Means, progress: Progress | None = None) -> AblateResult:
    """Make every row that was asked for and is not there.

    Args:
        order: What is asked for.
        means: How it is done.
        progress: Who to tell.

    Raises:
        InputError: Nothing to plan from, a folder that another process works in, or no Ray. A training or an
            evaluation that fails is a row that says so.
    """
    started, progress = time.perf_counter(), progress or Progress()
    ordered = place_order(order)
    make_folder(means.out)
    with hold(means.out, what="works in it"), interruptible():
        return _Work(ordered, order, means, progress, started).run()


def look(plan: Plan, store: Path, means: Means) -> State:
    """What of a plan is there already; nothing where it is made again."""
    records, runs = {}, {}
    if not means.force:
        found = ((key, read_record(means.out, key)) for key in plan.evaluations)
        records = {key: record for key, record in found if record is not None and record.finished}
        runs = find_runs(plan.trainings, (means.out / OWN, means.runs))
    digests = plan.stores
    beside = () if is_remote(store) else (store.parent,)
    stores = find_stores(digests, (means.out / STORES, *beside, DEFAULT_CACHE))
    own = Store.open(store).key.digest
    stores |= {own: store}
    needed = {one.training for key, one in plan.evaluations.items() if key not in records}
    missing = tuple(one for key, one in plan.trainings.items() if key in needed and key not in runs)
    return State(records=records, runs=runs, stores=stores, missing=missing)


def anywhere(store: Path) -> Path:
    """A store's place from whatever folder; a URL is one already."""
    return store if is_remote(store) else store.absolute()


class _Work:
    """One call: extractions, then units, with the table written now and then."""

    def __init__(self, ordered: Ordered, order: Order, means: Means, progress: Progress, started: float) -> None:
        self._plan, self._titles, self._config = ordered.plan, ordered.titles, ordered.config
        self._order, self._means, self._progress, self._started = order, means, progress, started
        self._state = look(self._plan, order.store, means)
        self._records = dict(self._state.records)
        self._known = read_rows(means.out)
        self._written = 0.0
        self._left = 0
        self._refused: dict[str, str] = {}
        self._epochs = NoteOf()

    def run(self) -> AblateResult:
        found, trained = len(self._records), 0
        units = self._units()
        progress, n_made = self._progress, len(self._state.missing)
        progress.say(
            f"{len(self._plan.rows)} rows: {n_made} trainings and {len(self._plan.evaluations) - found} evaluations to"
            f" be made, {found} evaluations are there"
        )
        try:
            with progress.task("trainings", len(units)) as task, closing(self._engine(units)) as done:
                self._epochs.task_of_all = task
                for unit, record in done:
                    if record is None:
                        trained += len(unit.missing)
                        task.advance(1)
                        continue
                    self._records[record.key] = record
                    task.advance(0, _note(record))
                    self._write(at_most_every=WRITE_EVERY_S)
        finally:
            self._write()
        return self._result(found, trained)

    def _units(self) -> list[Any]:
        """What is to be done, in order."""
        from .worker import Unit

        todo = [one for key, one in self._plan.evaluations.items() if key not in self._records]
        needed = {one.training for one in todo}
        return [
            Unit(
                trainings=(training,),
                evaluations=tuple(one for one in todo if one.training == key),
                runs={key: self._state.runs[key]} if key in self._state.runs else {},
            )
            for key, training in self._plan.trainings.items()
            if key in needed
        ]

    def _engine(self, units: Sequence[Any]) -> Generator[tuple[Any, Record | None]]:
        from .engines import in_processes, in_this_process
        from .worker import BASE, Workplace

        if not units:
            return
        means = self._means
        stores = self._extracted(units) | {BASE: anywhere(self._order.store)}
        place = Workplace(
            out=means.out.absolute(),
            stores=stores,
            data=means.data.absolute(),
            refused=self._refused,
            force=means.force,
        )
        if means.engine == "ray":
            from ..extraction.ray_cluster import ignored_address
            from .engines import on_ray

            if (note := ignored_address(means.address)) is not None:
                self._progress.say(note)

            yield from on_ray(place, units, self._stop, self._config, workers=means.workers, address=means.address)
        elif means.workers > 1:
            yield from in_processes(
                place, units, self._stop, workers=min(means.workers, len(units)), devices=self._every_gpu()
            )
        else:
            yield from in_this_process(place, units, self._stop, told=self._epochs)

    def _extracted(self, units: Sequence[Any]) -> dict[str, Path]:
        """Every store that is needed; one that cannot be extracted fails the rows that need it."""
        stores = {digest: anywhere(path) for digest, path in self._state.stores.items()}
        needed = {one.store: one.patches for unit in units for one in unit.missing if one.kind != "finetune"}
        for digest, patches in needed.items():
            if digest in stores or self._stop():
                continue
            from .worker import extract_at

            try:
                stores[digest] = extract_at(
                    patches, digest, self._order.store, self._means, self._config, self._progress
                )
            except Exception as error:  # noqa: BLE001 - its rows say so
                self._refused[digest] = " ".join(str(error).split())
                self._progress.say(f"no store of {patches} patches: {error}")
        return stores

    def _on_gpu(self) -> bool:
        device = self._config.hardware.device
        if self._means.engine == "ray" or device == "cpu":
            return False
        from ..core.device import pick_device

        return pick_device(device).type == "cuda"

    def _every_gpu(self) -> list[str]:
        """The GPUs of this machine, where it has several and none was named."""
        if self._config.hardware.device not in {"auto", "cuda"} or not self._on_gpu():
            return []
        import torch

        return [f"cuda:{at}" for at in range(torch.cuda.device_count())]

    def _stop(self) -> bool:
        limit = self._means.max_time
        return limit is not None and time.perf_counter() - self._started >= limit

    def _write(self, *, at_most_every: float = 0.0) -> None:
        if time.perf_counter() - self._written < at_most_every:
            return
        rows, self._left = merge(self._known, lines_of(self._plan, self._records))
        write_rows(self._means.out, rows)
        self._written = time.perf_counter()

    def _result(self, found: int, trained: int) -> AblateResult:
        rows = tuple(lines_of(self._plan, self._records))
        return AblateResult(
            path=self._means.out / "rows.parquet",
            rows=rows,
            titles=self._titles,
            left=self._left,
            seconds=time.perf_counter() - self._started,
            counted={
                "n_rows": len(self._plan.rows),
                "trained": trained,
                "evaluated": len(self._records) - found,
                "found": found,
                "failed": sum(row["status"] == "failed" for row in rows),
                "open": len(self._plan.rows) - len(rows),
            },
        )


def _note(record: Record) -> str:
    if not record.finished:
        return f"failed: {record.note[:80]}"
    value = record.figures.get("mAP")
    return f"{record.method} mAP {value:.3f}" if value is not None else record.method


def _state(one: Training, state: State, needed: set[str]) -> str:
    if one.key not in needed:
        return "done"
    return "found" if one.key in state.runs else "to be made"


def _counted(plan: Plan, state: State, todo: int, guess: Estimate, stores: int) -> dict[str, Any]:
    return {
        "n_rows": len(plan.rows),
        "n_asked": plan.asked,
        "n_trainings": plan.count("head", "finetune"),
        "n_trainings_missing": sum(one.kind in {"head", "finetune"} for one in state.missing),
        "n_baselines": plan.count("zero-shot", "prior"),
        "n_evaluations": len(plan.evaluations),
        "n_evaluations_missing": todo,
        "n_searches": plan.searches,
        "n_votes": plan.votes,
        "n_stores_missing": stores,
        "estimate_s": guess.seconds,
        "estimate_basis": guess.basis,
    }
