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
from ..core.interrupts import Interrupted
from ..core.metrics_file import read_metrics
from ..core.progress import Progress
from ..core.run import Run, RunInfo, begun_config, mark, read_info, start_run
from ..core.run_folders import clean_up, hold
from ..data.protocols import lists_digest
from ..extraction.stores import Reading, describe_run
from .data import Diverged
from .loop import fit
from .run import TrainingRun, TrainResult, read_fit, shape_of, with_seed
from .setup import Prepared, prepare_training
from .state import STATE, TrainingState, check_precision, kept_epoch, read_state
from .step import Step
from .trackers import Tracker, check_trackers, open_trackers


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run goes.

    Attributes:
        out: Its folder; a new one below ``runs`` when not given.
        runs: The folder of all runs.
        force: Replace an existing run in ``out``.
        suffix: Ends the name of a new folder.
    """

    out: Path | None
    runs: Path
    force: bool
    suffix: str = ""


class Work:
    """Begins, holds and goes on with runs; one that ends too early says so.

    Args:
        progress: Who to tell.
        tensorboard: Whether every epoch is logged for TensorBoard.
        wandb: Whether every epoch is logged for Weights & Biases.

    Raises:
        InputError: A tracker that is not installed.
    """

    def __init__(self, progress: Progress, *, tensorboard: bool, wandb: bool) -> None:
        check_trackers(tensorboard=tensorboard, wandb=wandb)
        self.progress, self._trackers = progress, {"tensorboard": tensorboard, "wandb": wandb}
        self._open: list[Run] = []
        self._resumed = False
        self._held = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        left = []
        with self._held:
            for run in self._open:
                if error is not None and read_info(run.folder).status == "running":
                    mark(run, "interrupted")
                    left.append(run)
        if isinstance(error, KeyboardInterrupt) and left:
            raise self._interrupted(left) from error

    def _interrupted(self, left: Sequence[Run]) -> Interrupted:
        """What is kept of runs, and how they go on; a command line that went on with one does so again."""
        epochs = {run.folder: kept_epoch(run.folder / STATE) for run in left}
        kept = ", ".join(
            f"{folder} is kept up to epoch {epoch}" if epoch else f"no epoch of {folder} was kept"
            for folder, epoch in epochs.items()
        )
        options = [f"--{name}" for name, wanted in self._trackers.items() if wanted]
        if PROCESSES in os.environ:
            options += ["--num-processes", os.environ[PROCESSES]]
        commands = [[run.info.kind, "--resume", str(run.folder), *options] for run in left]
        return Interrupted(kept, commands=() if self._resumed else commands)

    def start(self, info: RunInfo, config: Config, place: Place, *, name: str, device: str) -> Run:
        """Start a run in a folder of its own, which this process holds.

        Raises:
            InputError: As of :func:`~mmcli.pipeline.core.run.start_run`.
        """
        run = start_run(
            info, config, label=name + place.suffix, out=place.out, runs=place.runs, device=device, force=place.force
        )
        self.hold(run)
        self._open.append(run)
        return run

    def take_up(self, run: Run) -> tuple[Run, TrainingState | None]:
        """Go on with a run that this process holds: the run, and where it stood.

        Raises:
            InputError: A damaged state.
        """
        clean_up(run.folder)
        state = read_state(run.folder / STATE)
        after = f"going on after epoch {state.epoch}" if state else "no epoch was kept: from the start"
        self.progress.say(after + (f" and {state.batches} batches" if state and state.batches else ""))
        run = mark(run, "running")
        self._open.append(run)
        self._resumed = True
        return run, state

    def hold(self, run: Run) -> None:
        """Keep other processes from a run until this work ends."""
        self._held.enter_context(hold(run.folder))

    def trackers(self, run: Run, config: Config, *, after: int | None) -> list[Tracker]:
        """Who else is told of every epoch; ``after`` which one, where the run goes on."""
        return list(open_trackers(run.folder, config, **self._trackers, after=after, say=self.progress.say))


KIND, RUNS = "train-head", Path("runs")
MOST_SEEDS = 2**32


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """Finished runs that differ in the seed alone."""

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
        """What a person reads at the end."""
        rows = [{**result.metrics, "seed": result.run.info.seed} for result in self.results]
        folders = [f"wrote {result.run.folder}" for result in self.results]
        return [spread_table(rows, f"test split, {len(rows)} seeds"), *folders]


def train_head(
    config: Config,
    *,
    store: Path | None = None,
    out: Path | None = None,
    runs: Path = RUNS,
    force: bool = False,
    tensorboard: bool = False,
    wandb: bool = False,
    progress: Progress | None = None,
    reading: Reading | None = None,
    prepared: Prepared | None = None,
) -> TrainResult:
    """Train a head on the train split of a store.

    Args:
        config: Everything but the data section is used.
        store: The store; the newest below ``data/cache`` when not given.
        out: The run folder; a new one below ``runs`` when not given.
        runs: The folder of all runs.
        force: Replace an existing run in ``out``.
        tensorboard: Log every epoch for TensorBoard, below the run folder.
        wandb: Log every epoch for Weights & Biases, likewise.
        progress: Who to tell.
        reading: The store, where reading it has begun already.
        prepared: The store, where an earlier training of this process has read it; its protocol and device count.

    Raises:
        InputError: A bad store, an empty split, no label to learn or to choose the best epoch by, fewer train images
            than neighbours, or a loss that diverges.
    """
    with _Work(progress or Progress(), tensorboard=tensorboard, wandb=wandb) as work:
        prepared = prepared.configured(config) if prepared else prepare_training(config, store, work.progress, reading)
        _note(prepared.config, work.progress)
        place = Place(out=out, runs=runs, force=force)
        return work.train([work.begin(prepared, place, prepared.config)], prepared)[0]


def train_replicas(
    config: Config,
    *,
    seeds: int,
    store: Path | None = None,
    out: Path | None = None,
    runs: Path = RUNS,
    force: bool = False,
    tensorboard: bool = False,
    wandb: bool = False,
    progress: Progress | None = None,
    prepared: Prepared | None = None,
) -> Replicas:
    """Train heads that differ in the seed alone, each a run of its own: on a GPU in one pass.

    Args:
        config: As of :func:`train_head`; the seeds are ``hardware.seed`` and the numbers after it.
        seeds: How many, 2 or more.
        store: As of :func:`train_head`, and so are the other arguments; names of run folders end in ``-seedN``.
        out: Likewise.
        runs: Likewise.
        force: Likewise.
        tensorboard: Likewise.
        wandb: Likewise.
        progress: Likewise.
        prepared: Likewise.

    Raises:
        InputError: As of :func:`train_head`.
    """
    wanted = _seeds(config.hardware.seed, seeds)
    if out is not None and not out.name:
        raise InputError(
            "no name for run folders", where="--out", got=out, wanted="a folder with a name", do="name one"
        )
    with _Work(progress or Progress(), tensorboard=tensorboard, wandb=wandb) as work:
        prepared = prepared.configured(config) if prepared else prepare_training(config, store, work.progress)
        _note(prepared.config, work.progress)
        places = [
            Place(
                out=None if out is None else out.with_name(f"{out.name}-seed{seed}"),
                runs=runs,
                force=force,
                suffix=f"-seed{seed}",
            )
            for seed in wanted
        ]
        configs = [with_seed(prepared.config, seed) for seed in wanted]
        return Replicas(results=tuple(work.train_all(prepared, configs, places)))


def train_together(
    configs: Sequence[Config],
    outs: Sequence[Path],
    *,
    store: Path | None = None,
    progress: Progress | None = None,
    prepared: Prepared | None = None,
) -> list[TrainResult]:
    """Train heads that differ in the seed and in the weights of the loss's terms: on a GPU in one pass.

    Args:
        configs: As of :func:`train_head`.
        outs: The run folder of each; what is there is replaced.
        store: As of :func:`train_head`.
        progress: Likewise.
        prepared: Likewise.

    Raises:
        ValueError: Configurations that differ in more.
        InputError: As of :func:`train_head`.
    """
    if any(shape_of(one) != shape_of(configs[0]) for one in configs):
        raise ValueError("trainings of one pass may differ in the seed and in the weights of the loss's terms alone")
    with _Work(progress or Progress(), tensorboard=False, wandb=False) as work:
        prepared = prepared or prepare_training(configs[0], store, work.progress)
        settled = [prepared.configured(config).config for config in configs]
        _note(settled[0], work.progress)
        return work.train_all(prepared.configured(configs[0]), settled, [_replacing(out) for out in outs])


def resume_training(
    folder: Path,
    *,
    store: Path | None = None,
    tensorboard: bool = False,
    wandb: bool = False,
    progress: Progress | None = None,
    prepared: Prepared | None = None,
) -> TrainResult:
    """Go on with a run that was interrupted, as it was configured; a finished one is left as it is.

    Args:
        folder: The run.
        store: Where its store is now; where it was when not given.
        tensorboard: As of :func:`train_head`.
        wandb: Likewise.
        progress: Who to tell.
        prepared: As of :func:`train_head`.

    Raises:
        InputError: No run of a head, another store, a damaged state, or one of another precision; or as of
            :func:`train_head`.
    """
    settings = begun_config(folder, kind=KIND)
    info = read_info(folder, kind=KIND)
    run = Run(folder=folder, info=info)
    if info.kind != KIND:
        raise InputError("cannot resume", where=folder, got=f"a run of {info.kind}", wanted=f"a run of {KIND}")
    config = load_config(settings)
    with _Work(progress or Progress(), tensorboard=tensorboard, wandb=wandb) as work:
        if info.status == "finished":
            work.progress.say(f"{folder} is finished already")
            row = next(row for row in read_metrics(folder) if (row["method"], row["split"]) == ("classifier", "test"))
            return TrainResult(run=run, fit=read_fit(run, config), monitor=config.training.monitor, metrics=row)
        work.hold(run)
        if prepared is None:
            prepared = prepare_training(config, store or Path(info.store), work.progress)
        prepared = prepared.configured(config)
        digest = prepared.labelled.store.key.digest
        if info.lists_digest and lists_digest(config.data) != info.lists_digest:
            raise InputError(
                "cannot resume",
                where=folder,
                got=f"other lists in {config.data.protocol_lists}",
                wanted="those that it was begun with",
                do="bring them back, or train again",
            )
        if digest != info.store_digest:
            raise InputError(
                "cannot resume",
                where=folder,
                got=f"store {digest}",
                wanted=f"store {info.store_digest}",
                do="name the store that it was trained from with --store",
            )
        return work.train([work.go_on(prepared, run, config)], prepared)[0]


def _replacing(out: Path) -> Place:
    return Place(out=out, runs=out.parent, force=True)


def _note(config: Config, progress: Progress) -> None:
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


class _Work(Work):
    """Begins, goes on with and finishes runs of heads."""

    def begin(self, prepared: Prepared, place: Place, config: Config) -> TrainingRun:
        """Start a run in a folder of its own."""
        name = "mlp" if config.head == "mlp" else f"b{config.hash.bits}-{config.fusion.type}"
        precision = Step.autocast_of(prepared.device, config).name
        info = describe_run(KIND, config, prepared.labelled, precision=precision)
        run = self.start(info, config, place, name=name, device=str(prepared.device))
        return self._make(prepared, run, config, None, resume=False)

    def go_on(self, prepared: Prepared, run: Run, config: Config) -> TrainingRun:
        """Go on with a run that this process holds."""
        check_precision(run.info.precision, Step.autocast_of(prepared.device, config).name)
        run, state = self.take_up(run)
        return self._make(prepared, run, config, state, resume=True)

    def _make(
        self, prepared: Prepared, run: Run, config: Config, state: TrainingState | None, *, resume: bool
    ) -> TrainingRun:
        splits = prepared.splits_of(config)
        after = (0 if state is None else state.epoch) if resume else None
        return TrainingRun(
            run,
            config,
            prepared.make_head(config, splits["train"]),
            splits,
            width=prepared.labelled.store.width,
            progress=self.progress,
            resume=resume,
            state=state,
            trackers=self.trackers(run, config, after=after),
        )

    def train_all(self, prepared: Prepared, configs: Sequence[Config], places: Sequence[Place]) -> list[TrainResult]:
        """Train heads of one shape, each a run of its own; all folders are taken before anything is trained."""
        opened = [self.begin(prepared, place, config) for place, config in zip(places, configs, strict=True)]
        # On a CPU the products of one head fill the cores, and heads side by side take longer than one after another.
        # Shuffled magnitudes are other data for every seed.
        together = prepared.device.type == "cuda" and prepared.config.fusion.magnitude == "own"
        parts = [opened] if together else [[one] for one in opened]
        return [result for part in parts for result in self.train(part, prepared)]

    def train(self, opened: Sequence[TrainingRun], prepared: Prepared) -> list[TrainResult]:
        """Train runs in one pass and finish them; one that diverges does so after the others are finished.

        Raises:
            Diverged: A run did.
        """
        members = [one.member for one in opened]
        try:
            with self.progress.task("epochs", prepared.config.training.num_epochs) as task:
                fits = fit(members, opened[0].splits["train"], prepared.config, task=task)
        except Diverged:
            for one in opened:
                mark(one.run, "failed")
            raise
        pairs = list(zip(opened, fits, strict=True))
        results = [one.finish(fitted, prepared.image_ids) for one, fitted in pairs if fitted.error is None]
        for one, fitted in pairs:
            if fitted.error is not None:
                mark(one.run, "failed")
                raise fitted.error
        return results
