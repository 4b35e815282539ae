"""Experiments and grids: plan, make what is missing, evaluate it, keep every row, and print a table an experiment.

Every result is kept as soon as it exists, so a stop at any moment loses at most the training that was under way, which
the next call resumes. The table is made anew from what was kept.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...cache import Store, is_remote
from ..core import defaults
from ..core.files import make_folder
from ..core.interrupts import interruptible
from ..core.progress import NoteOf, Progress
from ..core.run_folders import hold
from .plan import Evaluation, Plan, Training
from .records import ROWS, Record, merge, read_record, read_rows, rows_of, write_rows
from .request import Planned, Request, plan_request
from .runs import RUNS, STORES, find_runs, find_stores
from .tables import AblateResult, DryRun, estimate

if TYPE_CHECKING:
    from .engines import Results
    from .worker import Unit, Workplace

WRITE_EVERY_S = 5.0


@dataclass(frozen=True, kw_only=True)
class State:
    """What of a plan is finished, and what is missing.

    Attributes:
        records: Finished evaluations by key.
        runs: Finished runs by key of the training.
        stores: Stores by digest.
        evaluations: Evaluations that have to be made.
        trainings: Trainings that have to be made for them.
    """

    records: Mapping[str, Record]
    runs: Mapping[str, Path]
    stores: Mapping[str, Path]
    evaluations: tuple[Evaluation, ...]
    trainings: tuple[Training, ...]


def dry_run(request: Request) -> DryRun:
    """Plan, and look at what is finished already; write nothing.

    Raises:
        InputError: The request cannot be planned, as in :func:`ablate`.
    """
    plan = plan_request(request).plan
    state = read_state(plan, request)
    splits = Store.open(request.store).columns(["split"])["split"].to_pylist()
    needed, missing = {item.training for item in state.evaluations}, {item.key for item in state.trainings}
    return DryRun(
        plan=plan,
        status={
            key: "done" if key not in needed else "to be made" if key in missing else "found" for key in plan.trainings
        },
        runs=state.runs,
        n_evaluations=len(state.evaluations),
        n_stores=len(plan.stores.keys() - state.stores.keys()),
        estimate=estimate(
            state.trainings,
            len(state.evaluations),
            state.runs.values(),
            n_train=splits.count("train"),
            n_test=splits.count("test"),
        ),
    )


def ablate(request: Request, progress: Progress | None = None) -> AblateResult:
    """Make every row that was asked for and is missing.

    Args:
        request: What is asked for, and how it is carried out.
        progress: Progress bars and messages; silent by default.

    Raises:
        InputError: A request that cannot be planned, a folder that another process works in, or no Ray. A training or
            an evaluation that fails is a row that says so.
    """
    started = time.perf_counter()
    planned = plan_request(request)
    make_folder(request.out)
    with hold(request.out, what="works in it"), interruptible():
        return _Work(planned, request, progress or Progress(), started).run()


def read_state(plan: Plan, request: Request) -> State:
    """What of a plan is finished; nothing of it counts where everything is made again."""
    out, store = request.out, request.store
    records: dict[str, Record] = {}
    runs: dict[str, Path] = {}
    if not request.force:
        kept = ((key, read_record(out, key)) for key in plan.evaluations)
        records = {key: record for key, record in kept if record is not None and record.finished}
        runs = find_runs(plan.trainings, (out / RUNS, request.runs))
    beside = () if is_remote(store) else (store.parent,)
    stores = find_stores(plan.stores, (out / STORES, *beside, defaults.STORES))
    stores[Store.open(store).key.digest] = store
    evaluations = tuple(item for key, item in plan.evaluations.items() if key not in records)
    needed = {item.training for item in evaluations}
    trainings = tuple(item for key, item in plan.trainings.items() if key in needed and key not in runs)
    return State(records=records, runs=runs, stores=stores, evaluations=evaluations, trainings=trainings)


class _Work:
    """One call: extractions, then units, with the table written now and then."""

    def __init__(self, planned: Planned, request: Request, progress: Progress, started: float) -> None:
        self._plan, self._titles, self._config = planned.plan, planned.titles, planned.config
        self._request, self._progress, self._started = request, progress, started
        self._state = read_state(self._plan, request)
        self._records = dict(self._state.records)
        self._rows_before = read_rows(request.out)
        self._written = 0.0
        self._left = 0

    def run(self) -> AblateResult:
        """Make what is missing; whatever stops it, the table holds what was finished."""
        progress, state, trained = self._progress, self._state, 0
        units = self._units()
        progress.say(
            f"{len(self._plan.rows)} rows: {len(state.trainings)} trainings and {len(state.evaluations)} evaluations to"
            f" be made, {len(state.records)} evaluations are finished"
        )
        epochs = NoteOf()
        try:
            with progress.task("trainings", len(units)) as task, closing(self._results(units, epochs)) as results:
                epochs.task_of_all = task
                for unit, record in results:
                    if record is None:
                        trained += unit.run is None
                        task.advance(1)
                        continue
                    self._records[record.key] = record
                    task.advance(0, _note(record))
                    if time.perf_counter() - self._written >= WRITE_EVERY_S:
                        self._write()
        finally:
            self._write()
        return self._result(trained)

    def _units(self) -> "list[Unit]":
        """The trainings that something is to be evaluated of, in the order in which they are best made."""
        from .worker import Unit

        evaluations: dict[str, list[Evaluation]] = {}
        for item in self._state.evaluations:
            evaluations.setdefault(item.training, []).append(item)
        return [
            Unit(training=training, evaluations=tuple(evaluations[key]), run=self._state.runs.get(key))
            for key, training in self._plan.trainings.items()
            if key in evaluations
        ]

    def _results(self, units: "Sequence[Unit]", epochs: Progress) -> "Results":
        """The records of all units, by the engine that was asked for."""
        from .engines import Assignment, in_processes, in_this_process, on_ray
        from .worker import BASE, Workplace

        if not units:
            return
        request = self._request
        stores = {digest: _absolute(path) for digest, path in self._state.stores.items()}
        place = Workplace(
            out=request.out.absolute(),
            stores=stores | {BASE: _absolute(request.store)},
            data=request.data.absolute(),
            force=request.force,
        )
        place = self._extract_missing(units, place)
        assignment = Assignment(place=place, units=units, stop=self._stop)
        if request.engine == "ray":
            from ..extraction.ray_cluster import ignored_address

            if (note := ignored_address(request.address)) is not None:
                self._progress.say(note)
            yield from on_ray(assignment, self._config, workers=request.workers, address=request.address)
        elif request.workers > 1:
            yield from in_processes(assignment, workers=min(request.workers, len(units)), devices=self._gpus())
        else:
            yield from in_this_process(assignment, progress=epochs)

    def _extract_missing(self, units: "Sequence[Unit]", place: "Workplace") -> "Workplace":
        """The workplace with every store that is needed; one that cannot be extracted fails the rows that need it."""
        from .worker import extract_store

        stores, refused = dict(place.stores), dict[str, str]()
        missing = [unit.training for unit in units if unit.run is None and unit.training.kind != "finetune"]
        for digest, patches in {training.store: training.patches for training in missing}.items():
            if digest in stores or self._stop():
                continue
            try:
                stores[digest] = extract_store(patches, digest, place, self._config, self._progress)
            except Exception as error:  # noqa: BLE001 - its rows say so
                refused[digest] = " ".join(str(error).split())
                self._progress.say(f"no store of {patches} patches: {error}")
        return replace(place, stores=stores, refused=refused)

    def _gpus(self) -> list[str]:
        """The GPUs of this machine, for processes to take in turn; none where one device was named."""
        if self._config.hardware.device not in {"auto", "cuda"}:
            return []
        import torch

        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]

    def _stop(self) -> bool:
        limit = self._request.max_time
        return limit is not None and time.perf_counter() - self._started >= limit

    def _write(self) -> None:
        rows, self._left = merge(self._rows_before, rows_of(self._plan, self._records))
        write_rows(self._request.out, rows)
        self._written = time.perf_counter()

    def _result(self, trained: int) -> AblateResult:
        rows, n_found = tuple(rows_of(self._plan, self._records)), len(self._state.records)
        return AblateResult(
            path=self._request.out / ROWS,
            rows=rows,
            titles=self._titles,
            left=self._left,
            seconds=time.perf_counter() - self._started,
            counted={
                "n_rows": len(self._plan.rows),
                "trained": trained,
                "evaluated": len(self._records) - n_found,
                "found": n_found,
                "failed": sum(row["status"] == "failed" for row in rows),
                "open": len(self._plan.rows) - len(rows),
            },
        )


def _absolute(store: Path) -> Path:
    """A store's path from any working directory; a URL stays as it is."""
    return store if is_remote(store) else store.absolute()


def _note(record: Record) -> str:
    if not record.finished:
        return f"failed: {record.note[:80]}"
    value = record.figures.get("mAP")
    return f"{record.method} mAP {value:.3f}" if value is not None else record.method
