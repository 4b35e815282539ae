"""Stage 2: train a head from a store, keep the best checkpoints, and write the codes of every split."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy.typing as npt
import torch
from rich.console import RenderableType

from .. import InputError
from ..heads.model import BaseHead, Head, make_head
from .codes import SPLITS
from .config import Config, load_config
from .device import pick_device, seed_everything
from .metrics_file import read_metrics
from .progress import Progress
from .runs import Run, mark, read_info, start_run
from .settle import notices, settle
from .splits import Split
from .stores import LabelledStore, Reading, describe_run, find_store, read_store, resolve_config
from .tables import spread_table
from .trackers import check_trackers, open_trackers
from .trainer import fit
from .training_run import TrainingRun, TrainResult, read_fit, with_seed
from .training_state import STATE, TrainingState, read_state

KIND, RUNS = "train-head", Path("runs")


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
            "runs": rows, "seeds": [row["seed"] for row in rows],
            "mean": {key: mean(values) for key, values in full.items()},
            "std": {key: stdev(values) for key, values in full.items()},
        }  # fmt: skip

    def summary(self) -> list[RenderableType]:
        """What a person reads at the end."""
        rows = [{**result.metrics, "seed": result.run.info.seed} for result in self.results]
        folders = [f"wrote {result.run.folder}" for result in self.results]
        return [spread_table(rows, f"test split, {len(rows)} seeds"), *folders]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All that a training needs of a store.

    Attributes:
        config: Resolved: what the store knows is in it.
        labelled: The store.
        splits: Its splits, on the device.
        device: Where to train.
    """

    config: Config
    labelled: LabelledStore
    splits: dict[str, Split]
    device: torch.device

    @property
    def image_ids(self) -> dict[str, npt.NDArray[Any]]:
        """Of every split, ``(n,)`` int64."""
        listing = self.labelled.listing
        return {split: listing.image_ids[listing.rows(split)] for split in SPLITS}

    def make_head(self, seed: int) -> BaseHead:
        """A head whose parameters were drawn by a seed, its statistics fitted."""
        config = self.config
        seed_everything(seed, deterministic=config.hardware.deterministic)
        width = self.labelled.store.width
        head = make_head(config.head, config.fusion, config.hash, config.classifier, width=width).to(self.device)
        fit_statistics(head, self.splits["train"])
        return head


def train_head(
    config: Config, *, store: Path | None = None, out: Path | None = None, runs: Path = RUNS, force: bool = False,
    tensorboard: bool = False, wandb: bool = False, progress: Progress | None = None, reading: Reading | None = None,
) -> TrainResult:  # fmt: skip
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

    Raises:
        InputError: A bad store, an empty split, no label to learn or to choose the best epoch by, fewer train images
            than neighbours, or a loss that diverges.
    """
    work = _Work(progress or Progress(), tensorboard=tensorboard, wandb=wandb)
    started = time.perf_counter()
    prepared = prepare_training(config, store, work.progress, reading)
    place = _Place(out=out, runs=runs, force=force)
    return work.train([work.begin(prepared, place, prepared.config)], prepared, started=started)[0]


def train_replicas(
    config: Config, *, seeds: int, store: Path | None = None, out: Path | None = None, runs: Path = RUNS,
    force: bool = False, tensorboard: bool = False, wandb: bool = False, progress: Progress | None = None,
) -> Replicas:  # fmt: skip
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

    Raises:
        InputError: As of :func:`train_head`.
    """
    work = _Work(progress or Progress(), tensorboard=tensorboard, wandb=wandb)
    started = time.perf_counter()
    prepared = prepare_training(config, store, work.progress)
    first = prepared.config.hardware.seed
    wanted = [with_seed(prepared.config, seed) for seed in range(first, first + seeds)]
    # On a CPU the products of one head fill the cores, and heads side by side take longer than one after another.
    parts = [wanted] if prepared.device.type == "cuda" else [[one] for one in wanted]
    results: list[TrainResult] = []
    for part in parts:
        opened = []
        for one in part:
            suffix = f"-seed{one.hardware.seed}"
            named = None if out is None else out.with_name(out.name + suffix)
            place = _Place(out=named, runs=runs, force=force, suffix=suffix)
            opened.append(work.begin(prepared, place, one))
        results += work.train(opened, prepared, started=started)
        started = time.perf_counter()
    return Replicas(results=tuple(results))


def resume_training(
    folder: Path, *, store: Path | None = None, tensorboard: bool = False, wandb: bool = False,
    progress: Progress | None = None,
) -> TrainResult:  # fmt: skip
    """Go on with a run that was interrupted, as it was configured; a finished one is left as it is.

    Args:
        folder: The run.
        store: Where its store is now; where it was when not given.
        tensorboard: As of :func:`train_head`.
        wandb: Likewise.
        progress: Who to tell.

    Raises:
        InputError: No run of a head, another store, a damaged state, or one of another precision; or as of
            :func:`train_head`.
    """
    work = _Work(progress or Progress(), tensorboard=tensorboard, wandb=wandb)
    started, info = time.perf_counter(), read_info(folder, kind=KIND)
    run = Run(folder=folder, info=info)
    if info.kind != KIND:
        raise InputError("cannot resume", where=folder, got=f"a run of {info.kind}", wanted=f"a run of {KIND}")
    config = load_config(folder / "config.yaml")
    if info.status == "finished":
        work.progress.say(f"{folder} is finished already")
        row = next(row for row in read_metrics(folder) if (row["method"], row["split"]) == ("classifier", "test"))
        return TrainResult(
            run=run, fit=read_fit(run, config), monitor=config.training.monitor, metrics=row, seconds=0.0
        )  # fmt: skip
    prepared = prepare_training(config, store or Path(info.store), work.progress)
    digest = prepared.labelled.store.key.digest
    if digest != info.store_digest:
        raise InputError(
            "cannot resume", where=folder, got=f"store {digest}", wanted=f"store {info.store_digest}",
            do="name the store that it was trained from with --store",
        )  # fmt: skip
    return work.train([work.go_on(prepared, run, config)], prepared, started=started)[0]


def prepare_training(
    config: Config, store: Path | None, progress: Progress, reading: Reading | None = None
) -> Prepared:  # fmt: skip
    """Read a store and put its splits where the training will be.

    Args:
        config: As of :func:`train_head`.
        store: The store; the newest below ``data/cache`` when not given.
        progress: Who to tell.
        reading: The store, where reading it has begun already.

    Raises:
        InputError: As of :func:`train_head`, as far as the store and the configuration go.
    """
    folder = find_store(store) if reading is None else reading.folder
    device = pick_device(config.hardware.device)
    labelled = read_store(folder, config, reading)
    progress.say(f"training from {folder} on {device.type}" + ("" if store else " (the newest store)"))
    config = settle(resolve_config(config, labelled))
    splits = place_splits(labelled, config, device)
    check_splits(splits, config, folder)
    for line in notices(config):
        progress.say(line)
    return Prepared(config=config, labelled=labelled, splits=splits, device=device)


def place_splits(labelled: LabelledStore, config: Config, device: torch.device) -> dict[str, Split]:
    """The three splits on a device, in arrays that they share."""
    arrays, listing = labelled.embeddings, labelled.listing
    whole = Split.place(
        arrays.v_img, arrays.v_txt, arrays.n_captions, listing.labels_matrix(), device,
        norms=(arrays.norm_img, arrays.norm_txt),
    )  # fmt: skip
    splits = {split: whole.part(listing.rows(split)) for split in SPLITS}
    if config.fusion.magnitude == "shuffled":
        return {name: split.shuffle_magnitudes(config.hardware.seed) for name, split in splits.items()}
    return splits


def fit_statistics(head: BaseHead, train: Split) -> None:
    """Give a head the mean and deviation of the log-norms of train, each image with its first caption."""
    if isinstance(head, Head):
        head.fusion.fit_log_norms(train.log_norms())


def check_splits(splits: dict[str, Split], config: Config, folder: Path) -> None:
    """Refuse what would only show after the first epoch.

    Raises:
        InputError: No label in train or val, or fewer train images than a batch or a vote needs.
    """
    for name in ("train", "val"):
        if not splits[name].own_labels.any():
            raise InputError(
                f"no {name} image has a label", where=folder, got="all-zero labels", wanted="at least one",
                do="give the manifest labels, or another split",
            )  # fmt: skip
    least = max(2, config.knn.K if config.training.monitor == "knn" else 0)
    if len(splits["train"]) < least:
        raise InputError(
            "too few train images", where=folder, got=len(splits["train"]), wanted=f"at least {least}",
            do="lower it (--set knn.K=N) or give --monitor classifier" if least > 2 else "add images to the manifest",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a run goes."""

    out: Path | None
    runs: Path
    force: bool
    suffix: str = ""


class _Work:
    """Begins, goes on with and finishes runs, and tells whoever wants to know."""

    def __init__(self, progress: Progress, *, tensorboard: bool, wandb: bool) -> None:
        check_trackers(tensorboard=tensorboard, wandb=wandb)
        self.progress, self._trackers = progress, {"tensorboard": tensorboard, "wandb": wandb}

    def begin(self, prepared: Prepared, place: _Place, config: Config) -> TrainingRun:
        name = "mlp" if config.head == "mlp" else f"b{config.hash.bits}-{config.fusion.type}"
        run = start_run(
            describe_run(KIND, config, prepared.labelled), config, label=name + place.suffix, out=place.out,
            runs=place.runs, device=str(prepared.device), force=place.force,
        )  # fmt: skip
        return self._open(prepared, run, config, None)

    def go_on(self, prepared: Prepared, run: Run, config: Config) -> TrainingRun:
        state = read_state(run.folder / STATE)
        self.progress.say(f"going on after epoch {state.epoch}" if state else "no epoch was kept: from the start")
        return self._open(prepared, mark(run, "running"), config, state)

    def _open(self, prepared: Prepared, run: Run, config: Config, state: TrainingState | None) -> TrainingRun:
        return TrainingRun(
            run, config, prepared.make_head(config.hardware.seed), prepared.splits,
            width=prepared.labelled.store.width, progress=self.progress, resumed=state,
            trackers=open_trackers(run.folder, config, **self._trackers, say=self.progress.say),
        )  # fmt: skip

    def train(self, opened: Sequence[TrainingRun], prepared: Prepared, *, started: float) -> list[TrainResult]:
        runs, epochs = [one.run for one in opened], prepared.config.training.num_epochs
        with _marked(runs), self.progress.task("epochs", epochs) as task:
            fits = fit([one.member for one in opened], prepared.splits["train"], prepared.config, task=task)
            pairs = zip(opened, fits, strict=True)
            return [one.finish(fitted, prepared.image_ids, started=started) for one, fitted in pairs]


@contextmanager
def _marked(runs: Sequence[Run]) -> Iterator[None]:
    """Runs that end before they are finished say so, and how to go on."""
    try:
        yield
    except BaseException as error:
        for run in runs:
            mark(run, "failed" if isinstance(error, InputError) else "interrupted")
        raise
