"""Stage 2: train a head from a store, keep the best checkpoints, and write the codes of every split."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from types import TracebackType
from typing import Any, Self

from rich.console import RenderableType

from ...errors import InputError
from ..core.config import Config, load_config, notices
from ..core.console import spread_table
from ..core.cores import PROCESSES
from ..core.defaults import RUNS
from ..core.interrupts import Interrupted
from ..core.progress import Progress
from ..core.run import Run, RunInfo, begun_config, mark, read_info, start_run
from ..core.run_folders import clean_up, hold
from ..data.protocols import lists_digest
from ..extraction.stores import Reading, describe_run
from .data import Diverged
from .loop import fit
from .monitor import Monitor
from .run import TrainingRun, TrainResult, read_result
from .setup import Prepared, prepare_training
from .state import TrainingState, check_precision, kept_epoch, read_state
from .trackers import Tracker, check_trackers, open_trackers

KIND = "train-head"
MOST_SEEDS = 2**32


@dataclass(frozen=True, kw_only=True)
class Place:
    """The folder of a run.

    Attributes:
        out: The folder; a new one below ``runs`` when not given.
        runs: The folder of all runs.
        force: Replace an existing run in ``out``.
        suffix: The end of a new folder's name.
    """

    out: Path | None
    runs: Path
    force: bool
    suffix: str = ""


class RunSession:
    """Starts, resumes and holds the runs of one command, and marks those that end too early.

    Args:
        progress: Shows how runs proceed.
        tensorboard: Log every epoch for TensorBoard.
        wandb: Log every epoch for Weights & Biases.

    Raises:
        InputError: A tracker that is not installed.
    """

    def __init__(self, progress: Progress | None, *, tensorboard: bool, wandb: bool) -> None:
        check_trackers(tensorboard=tensorboard, wandb=wandb)
        self.progress, self._trackers = progress or Progress(), {"tensorboard": tensorboard, "wandb": wandb}
        self._open: list[Run] = []
        self._resumed = False
        self._locks = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = []
        with self._locks:
            for run in self._open:
                if error is not None and read_info(run.folder).status == "running":
                    mark(run, "interrupted")
                    interrupted.append(run)
        if isinstance(error, KeyboardInterrupt) and interrupted:
            raise self._interruption(interrupted) from error

    def _interruption(self, runs: Sequence[Run]) -> Interrupted:
        """Which epochs of interrupted runs are kept, and the commands that resume them, unless this was such a one."""
        epochs = {run.folder: kept_epoch(run.paths.state) for run in runs}
        kept = ", ".join(
            f"{folder} is kept up to epoch {epoch}" if epoch else f"no epoch of {folder} was kept"
            for folder, epoch in epochs.items()
        )
        options = [f"--{name}" for name, wanted in self._trackers.items() if wanted]
        if PROCESSES in os.environ:
            options += ["--num-processes", os.environ[PROCESSES]]
        commands = [[run.info.kind, "--resume", str(run.folder), *options] for run in runs]
        return Interrupted(kept, commands=() if self._resumed else commands)

    def start(self, info: RunInfo, config: Config, place: Place, *, name: str, device: str) -> Run:
        """Start a run in its folder, which this process holds until the session ends.

        Raises:
            InputError: The folder is in use, or no run that ``force`` may replace.
        """
        run = start_run(
            info,
            config,
            label=name + place.suffix,
            out=place.out,
            runs=place.runs,
            device=device,
            force=place.force,
            locks=self._locks,
        )
        self._open.append(run)
        return run

    def resume(self, run: Run) -> tuple[Run, TrainingState | None]:
        """Resume a run that this process holds: the run, and its state.

        Raises:
            InputError: A damaged state.
        """
        clean_up(run.folder)
        state = read_state(run.paths.state)
        after = f"resuming after epoch {state.epoch}" if state else "no epoch was kept: from the start"
        self.progress.say(after + (f" and {state.batches} batches" if state and state.batches else ""))
        run = mark(run, "running")
        self._open.append(run)
        self._resumed = True
        return run, state

    def hold(self, run: Run) -> None:
        """Keep other processes from a run until this session ends."""
        self._locks.enter_context(hold(run.folder))

    def trackers(self, run: Run, config: Config, state: TrainingState | None) -> list[Tracker]:
        """The trackers of a run; of a resumed one they forget epochs after its state."""
        epoch = 0 if state is None else state.epoch
        after = epoch if self._resumed else None
        return list(open_trackers(run.folder, config, **self._trackers, after=after, say=self.progress.say))


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """Finished runs that differ in the seed alone.

    Attributes:
        results: One a seed.
    """

    results: tuple[TrainResult, ...]

    def to_json(self) -> dict[str, Any]:
        """Every run, and mean and standard deviation of every figure that all of them have."""
        rows = [result.to_json() for result in self.results]
        numbers = [key for key, value in rows[0].items() if isinstance(value, float)]
        columns = {key: [row[key] for row in rows] for key in numbers}
        full = {key: values for key, values in columns.items() if None not in values}
        return {
            "runs": rows,
            "seeds": [row["seed"] for row in rows],
            "mean": {key: mean(values) for key, values in full.items()},
            "std": {key: stdev(values) for key, values in full.items()},
        }

    def summary(self) -> list[RenderableType]:
        """A table for the terminal, and the folders."""
        rows = [{**result.metrics, "seed": result.run.info.seed} for result in self.results]
        folders = [f"wrote {result.run.folder}" for result in self.results]
        return [spread_table(rows, f"test split, {len(rows)} seeds"), *folders]


def train_head(
    config: Config,
    *,
    store: Path | Reading | Prepared | None = None,
    out: Path | None = None,
    runs: Path = RUNS,
    force: bool = False,
    tensorboard: bool = False,
    wandb: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a head on the train split of a store.

    Args:
        config: Everything but the data section is used.
        store: The store's folder, the newest below ``data/cache`` when not given; or a store that is being read, or
            that an earlier training of this process has read.
        out: The run folder; a new one below ``runs`` when not given.
        runs: The folder of all runs.
        force: Replace an existing run in ``out``.
        tensorboard: Log every epoch for TensorBoard, below the run folder.
        wandb: Log every epoch for Weights & Biases, below the run folder.
        progress: Progress bars; pass ``Progress.quiet()`` to silence them.

    Raises:
        InputError: A bad store, an empty split, no label to learn or to choose the best epoch by, fewer train images
            than neighbours, or a loss that diverges.
    """
    with RunSession(progress, tensorboard=tensorboard, wandb=wandb) as session:
        prepared = prepare_training(config, store, session.progress)
        _say_notices(prepared.config, session.progress)
        run = _start(session, prepared, Place(out=out, runs=runs, force=force))
        return _train(session, prepared, run)


def train_replicas(
    config: Config,
    *,
    seeds: int,
    store: Path | None = None,
    out: Path | None = None,
    force: bool = False,
    tensorboard: bool = False,
    wandb: bool = False,
    progress: Progress | None = None,
) -> Replicas:
    """Train heads that differ in the seed alone, one after another, each a run of its own.

    All folders are taken before anything is trained. Where one diverges, the others are trained all the same.

    Args:
        config: Everything but the data section is used; the seeds are ``hardware.seed`` and the numbers after it.
        seeds: Number of seeds, 2 or more.
        store: The store; the newest below ``data/cache`` when not given.
        out: The run folders, ``-seedN`` added to the name; new ones below ``runs`` when not given.
        force: Replace existing runs.
        tensorboard: Log every epoch for TensorBoard, below the run folders.
        wandb: Log every epoch for Weights & Biases, below the run folders.
        progress: Progress bars; pass ``Progress.quiet()`` to silence them.

    Raises:
        InputError: Seeds beyond the largest, an ``out`` without a name, or whatever :func:`train_head` refuses.
    """
    numbers = _seeds(config.hardware.seed, seeds)
    if out is not None and not out.name:
        raise InputError(
            "no name for run folders", where="--out", got=out, wanted="a folder with a name", do="name one"
        )
    with RunSession(progress, tensorboard=tensorboard, wandb=wandb) as session:
        first = prepare_training(config, store, session.progress)
        _say_notices(first.config, session.progress)
        begun = []
        for seed in numbers:
            hardware = config.hardware.model_copy(update={"seed": seed})
            prepared = prepare_training(config.model_copy(update={"hardware": hardware}), first, session.progress)
            folder = None if out is None else out.with_name(f"{out.name}-seed{seed}")
            place = Place(out=folder, runs=RUNS, force=force, suffix=f"-seed{seed}")
            begun.append((prepared, _start(session, prepared, place)))
        results, errors = [], []
        for prepared, run in begun:
            try:
                results.append(_train(session, prepared, run))
            except Diverged as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return Replicas(results=tuple(results))


def resume_training(
    folder: Path,
    *,
    store: Path | Prepared | None = None,
    tensorboard: bool = False,
    wandb: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Resume an interrupted run with its own configuration; a finished one is left as it is.

    Args:
        folder: The run.
        store: Where its store is now, or the store as it was read; where it was when not given.
        tensorboard: Log every epoch for TensorBoard, below the run folder.
        wandb: Log every epoch for Weights & Biases, below the run folder.
        progress: Progress bars; pass ``Progress.quiet()`` to silence them.

    Raises:
        InputError: No run of a head, another store, a damaged state, or one of another precision; or whatever
            :func:`train_head` refuses.
    """
    settings = begun_config(folder, kind=KIND)
    run = _read_begun(folder)
    config = load_config(settings)
    with RunSession(progress, tensorboard=tensorboard, wandb=wandb) as session:
        if run.info.status != "finished":
            session.hold(run)
            run = _read_begun(folder)  # another process may have finished it meanwhile
        if run.info.status == "finished":
            session.progress.say(f"{folder} is finished already")
            return read_result(run, config)
        prepared = prepare_training(config, store or Path(run.info.store), session.progress)
        _check_same_data(run, prepared)
        check_precision(run.info.precision, prepared.precision)
        run, state = session.resume(run)
        return _train(session, prepared, run, state)


def _read_begun(folder: Path) -> Run:
    info = read_info(folder, kind=KIND)
    if info.kind != KIND:
        raise InputError("cannot resume", where=folder, got=f"a run of {info.kind}", wanted=f"a run of {KIND}")
    return Run(folder=folder, info=info)


def _check_same_data(run: Run, prepared: Prepared) -> None:
    """Refuse to resume a run with another store or other lists of its protocol than it was begun with."""
    data, digest = prepared.config.data, prepared.labelled.store.key.digest
    if run.info.lists_digest and lists_digest(data) != run.info.lists_digest:
        raise InputError(
            "cannot resume",
            where=run.folder,
            got=f"other lists in {data.protocol_lists}",
            wanted="those that it was begun with",
            do="bring them back, or train again",
        )
    if digest != run.info.store_digest:
        raise InputError(
            "cannot resume",
            where=run.folder,
            got=f"store {digest}",
            wanted=f"store {run.info.store_digest}",
            do="name the store that it was trained from with --store",
        )


def _say_notices(config: Config, progress: Progress) -> None:
    for line in notices(config):
        progress.say(line)


def _seeds(first: int, n: int) -> range:
    if first + n > MOST_SEEDS:
        raise InputError(
            "no such seeds",
            where="--seeds",
            got=f"{n} from {first} on",
            wanted=f"numbers below {MOST_SEEDS}",
            do="lower --seed",
        )
    return range(first, first + n)


def _start(session: RunSession, prepared: Prepared, place: Place) -> Run:
    config = prepared.config
    name = "mlp" if config.head == "mlp" else f"b{config.hash.bits}-{config.fusion.type}"
    info = describe_run(KIND, config, prepared.labelled, precision=prepared.precision)
    return session.start(info, config, place, name=name, device=str(prepared.device))


def _train(session: RunSession, prepared: Prepared, run: Run, state: TrainingState | None = None) -> TrainResult:
    """Train a run that is under way, and finish it.

    Raises:
        Diverged: The loss or the head is no longer finite; the run is marked as failed.
    """
    config, splits = prepared.config, prepared.run_splits
    head = prepared.make_head(splits["train"])
    monitor = Monitor(config, splits["train"], splits["val"])
    trackers = session.trackers(run, config, state)
    training = TrainingRun(run, config, splits, monitor, trackers=trackers, progress=session.progress, state=state)
    try:
        with session.progress.task("epochs", config.training.num_epochs) as task:
            fitted = fit(head, splits["train"], config, training.hooks, task=task, resumed=state)
    except Diverged:
        mark(run, "failed")
        raise
    return training.finish(fitted, prepared.image_ids)
