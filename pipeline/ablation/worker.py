"""What a worker of an ablation does: make a run where there is none, evaluate it, keep every result at once.

A worker keeps the store that it read for the next training. Whatever goes wrong with one training or evaluation is
kept as its result, and the next one is done; only the end of the process ends the work.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ... import __version__
from ...cache import Store, is_remote
from ...errors import InputError
from ..core.config import Config, load_config
from ..core.device import pick_device
from ..core.metrics_file import read_metrics
from ..core.progress import Progress
from ..core.run import Run, now, open_run
from ..evaluation.metrics import metrics_row, read_scores
from ..extraction.extract import ExtractPlan, extract_here
from ..training.data import Diverged
from ..training.run import read_fit
from ..training.setup import Prepared, prepare_training
from .evaluate import Measured, evaluate_run
from .plan import Evaluation, Training, flat_config
from .records import KINDS, STORES, Record, failed, keep_scores, own_folder, resumable, write_record
from .request import check_source, model_of


class Places(Protocol):
    """Where to write, and where the images are."""

    @property
    def out(self) -> Path:
        """Folder of the table."""

    @property
    def data(self) -> Path:
        """Folder of the images."""


def extract_at(patches: int, digest: str, store: Path, places: Places, config: Config, progress: Progress) -> Path:
    """Extract a store like another one at another patch budget, below the folder of the table.

    Args:
        patches: The budget.
        digest: Of the key that the new store must have.
        store: The other one; its caption embeddings are taken over.
        places: Where to write, and where the images are.
        config: Hardware and data sections are used, and the model where it was given.
        progress: Who to tell.

    Raises:
        InputError: No images, no checkpoint, or one that is not the store's.
    """
    opened = Store.open(store)
    key = opened.key
    folder = places.out / STORES / f"{key.model.rsplit('/', 1)[-1]}-p{patches}-{digest[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not is_remote(store):
        # Captions are taken over from stores that lie beside the new one.
        beside = folder.parent / f"base-{key.digest[:12]}"
        if not beside.exists():
            beside.unlink(missing_ok=True)
            beside.symlink_to(store.resolve(), target_is_directory=True)
    model = model_of(opened, config, patches)
    # Shards of captions are taken over where they are of the same rows.
    rows = opened.columns(["shard"])["shard"].to_pylist().count(0)
    plan = ExtractPlan(data=places.data, out=folder, dtype=key.dtype, shard_rows=rows)
    result = extract_here(config.model_copy(update={"model": model}), plan, progress=progress)
    if result.digest != digest:
        raise InputError(
            "another store than was planned",
            where=folder,
            got=f"key {result.digest[:12]}",
            wanted=digest[:12],
            do="name the checkpoint, the data and the device that made the store",
        )
    progress.say(
        f"  {result.n_encoded:,} images encoded, {result.reused_text_shards} shards of captions taken over: {folder}"
    )
    return folder.absolute()


SPLIT = "test"


def prior(evaluation: Evaluation, prepared: Prepared) -> Measured:
    """The share of train images that have a tag, as every image's score: what no image has to be looked at for."""
    started = time.perf_counter()
    labels = {name: split.own_labels.cpu().numpy() for name, split in prepared.splits.items()}
    voters = labels.get("database", labels["train"])
    share = voters.mean(axis=0, dtype=np.float64)
    scores = {name: np.tile(share, (len(labels[name]), 1)) for name in (SPLIT, "val")}
    row = metrics_row("prior", SPLIT, scores[SPLIT], labels[SPLIT], tuned_on=(scores["val"], labels["val"]))
    return Measured(
        evaluation=evaluation,
        figures=row,
        scores=scores[SPLIT],
        image_id=prepared.image_ids[SPLIT],
        labels=labels[SPLIT],
        facts={"eval_s": time.perf_counter() - started},
    )


def zero_shot_row(evaluation: Evaluation, run: Run) -> Measured:
    """What the stage measured."""
    row = next(row for row in read_metrics(run.folder) if (row["method"], row["split"]) == ("zero-shot", SPLIT))
    arrays = read_scores(run.folder, "zero-shot", SPLIT)
    facts = {"query_latency_ms": row.get("query_latency_ms")}
    figures = {key: value for key, value in row.items() if key not in {"query_latency_ms", "inputs"}}
    return Measured(
        evaluation=evaluation,
        figures=figures,
        scores=arrays["scores"],
        image_id=arrays["image_id"],
        labels=arrays["labels"],
        facts=facts,
    )


def facts_of(training: Training, folder: Path | None) -> dict[str, Any]:
    """How the training went, and what computed it."""
    facts: dict[str, Any] = {
        "version.mmcli": __version__,
        "version.torch": metadata.version("torch"),
        "version.faiss": _faiss(),
        "device": str(pick_device(training.config.hardware.device)),
        "cpu": cpu_name(),
        "finished_at": now(),
    }
    if folder is not None and training.kind in {"head", "finetune"}:
        info = open_run(folder, kind=KINDS[training.kind]).info
        fit = read_fit(Run(folder=folder, info=info), load_config(folder / "config.yaml"))
        facts |= {"precision": info.precision} if info.precision else {}
        facts |= {
            "train_s": fit.seconds,
            "epochs": len(fit.history),
            "best_epoch": fit.best_epoch,
            "best_val_mAP": fit.best_value,
        }
    return facts


def cpu_name() -> str:
    """The processor, as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _faiss() -> str:
    for name in ("faiss-cpu", "faiss-gpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


BASE = "base"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Work that is done in one go: a training, and what is evaluated of it.

    Attributes:
        trainings: Done one after another.
        evaluations: That are still to be done.
        runs: Runs that are there, by key of the training.
    """

    trainings: tuple[Training, ...]
    evaluations: tuple[Evaluation, ...]
    runs: Mapping[str, Path]

    @property
    def missing(self) -> tuple[Training, ...]:
        """What has to be made."""
        return tuple(one for one in self.trainings if one.key not in self.runs)


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """What every worker is told.

    Attributes:
        out: The folder of the table.
        stores: Folders of stores by digest; under ``base`` the one that was named.
        data: Folder of the images, for what trains towers.
        refused: Why a store that is needed is not there, by digest.
        force: Train anew where an interrupted run could be gone on with.
    """

    out: Path
    stores: Mapping[str, Path]
    data: Path
    refused: Mapping[str, str] = field(default_factory=dict)
    force: bool = False


class Worker:
    """Does units in this process.

    Args:
        place: Where everything is.
        device: Where to compute, in the place of the configuration's: a cluster gives each worker its own.
        told: Who is told of epochs; a training of hours should not be silent.
    """

    def __init__(self, place: Workplace, *, device: str | None = None, told: Progress | None = None) -> None:
        self._place, self._device, self._told = place, device, told or Progress()
        self._prepared: dict[tuple[Any, ...], Prepared] = {}

    def do(self, unit: Unit) -> Iterator[Record]:
        """Make what is missing, evaluate it; every record is kept before it is given."""
        unit, runs = self._here(unit), dict(unit.runs)
        for training in unit.missing:
            try:
                runs |= self._make(training)
            except Exception as error:  # noqa: BLE001 - kept with its rows, and the rest goes on
                yield from self._failed(unit, training, error)
        for training in unit.trainings:
            wanted = [one for one in unit.evaluations if one.training == training.key]
            if wanted and (training.key in runs or training.kind == "prior"):
                yield from self._evaluate(training, runs.get(training.key), wanted)

    def _here(self, unit: Unit) -> Unit:
        """The unit on this worker's device."""
        if self._device is None:
            return unit
        trainings = []
        for one in unit.trainings:
            hardware = one.config.hardware.model_copy(update={"device": self._device})
            trainings.append(replace(one, config=one.config.model_copy(update={"hardware": hardware})))
        return replace(unit, trainings=tuple(trainings))

    def _make(self, training: Training) -> dict[str, Path]:
        """Train; the folder by key."""
        from ..training.train_head import resume_training, train_head

        if training.kind == "prior":
            return {}
        folder, told = own_folder(self._place.out, training), self._told
        if training.kind == "zero-shot":
            from ..evaluation.zero_shot import zero_shot

            zero_shot(training.config, store=self._store(training), out=folder, force=True, progress=told)
        elif training.kind == "finetune":
            self._finetune(training, folder)
        elif not self._gone_on(
            folder,
            training,
            lambda: resume_training(folder, store=self._prepare(training), progress=told),
        ):
            train_head(training.config, store=self._prepare(training), out=folder, force=True, progress=told)
        return {training.key: folder}

    def _gone_on(self, folder: Path, training: Training, resume: Callable[[], object]) -> bool:
        """Whether an interrupted run of a training was there and could be ended; else it is made anew."""
        if self._place.force or not resumable(folder, training):
            return False
        try:
            resume()
        except Diverged:
            raise
        except InputError as error:
            self._told.say(f"{folder} cannot be gone on with and is trained anew: {error}")
            return False
        return True

    def _finetune(self, training: Training, folder: Path) -> None:
        from ..finetuning.finetune import finetune, resume_finetuning

        data, config = self._place.data, training.config
        store = Store.open(self._place.stores[BASE])
        model = model_of(store, config, training.patches).model_copy(update={"freeze_towers": False})
        check_source(store, data, model)
        if self._gone_on(folder, training, lambda: resume_finetuning(folder, data=data, progress=self._told)):
            return
        finetune(
            config.model_copy(update={"model": model}),
            data=data,
            unfreeze=training.towers,
            towers=config.finetune.towers,
            out=folder,
            force=True,
            progress=self._told,
        )

    def _evaluate(self, training: Training, folder: Path | None, wanted: Sequence[Evaluation]) -> Iterator[Record]:
        left = {one.key: one for one in wanted}
        try:
            for found in self._measure(training, folder, wanted):
                one = found[0] if isinstance(found, tuple) else found.evaluation
                try:
                    record = self._keep(training, folder, found)
                except Exception as error:  # noqa: BLE001 - no room for its scores, say
                    record = self._fail(one, training, error)
                left.pop(one.key, None)
                yield record
        except Exception as error:  # noqa: BLE001 - damaged codes fail every row of the run that is not there yet
            for one in left.values():
                yield self._fail(one, training, error)

    def _measure(
        self, training: Training, folder: Path | None, wanted: Sequence[Evaluation]
    ) -> Iterator[Measured | tuple[Evaluation, Exception]]:
        if training.kind == "prior":
            yield from (prior(one, self._prepare(training)) for one in wanted)
            return
        assert folder is not None
        run = open_run(folder, kind=KINDS[training.kind])
        if training.kind == "zero-shot":
            yield from (zero_shot_row(one, run) for one in wanted)
            return
        yield from evaluate_run(run, wanted, split=SPLIT, device=str(pick_device(training.config.hardware.device)))

    def _keep(self, training: Training, folder: Path | None, found: Measured | tuple[Evaluation, Exception]) -> Record:
        if isinstance(found, tuple):
            return self._fail(found[0], training, found[1])
        one, out = found.evaluation, self._place.out
        scores = keep_scores(out, one.key, found.image_id, found.scores, found.labels)
        record = Record(
            key=one.key,
            training=training.key,
            status="finished",
            method=one.method,
            split=SPLIT,
            run="" if folder is None else _relative(folder, out),
            scores=scores,
            figures=dict(found.figures),
            facts={**facts_of(training, folder), **found.facts},
            config=flat_config(one.config),
        )
        write_record(out, record)
        return record

    def _fail(self, one: Evaluation, training: Training, error: Exception) -> Record:
        record = failed(one.key, training.key, error, flat_config(one.config))
        write_record(self._place.out, record)
        return record

    def _failed(self, unit: Unit, training: Training, error: Exception) -> Iterator[Record]:
        for one in unit.evaluations:
            if one.training == training.key:
                yield self._fail(one, training, error)

    def _store(self, training: Training) -> Path:
        found = self._place.stores.get(training.store)
        if found is None:
            why = self._place.refused.get(training.store, "it was not extracted")
            raise InputError(f"no store of {training.patches} patches: {why}")
        return found

    def _prepare(self, training: Training) -> Prepared:
        """The store on the device, read once for all trainings."""
        config = training.config
        key = (training.store, config.data.split_type, config.data.protocol_lists, config.hardware.device)
        if key not in self._prepared:
            self._prepared.clear()  # the arrays of one store fill enough memory
            self._prepared[key] = prepare_training(config, self._store(training), Progress())
        return self._prepared[key]


def _relative(folder: Path, out: Path) -> str:
    return Path(os.path.relpath(folder, out)).as_posix()
