"""One unit of an ablation: make a run where there is none, evaluate it, and keep every result immediately.

A worker keeps the store that it read for the next training. Whatever goes wrong with one training or evaluation is
kept as its result, and the next one is done; only the end of the process ends the work.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ... import __version__
from ...cache import Store, is_remote
from ...errors import InputError
from ..core.config import Config, ModelConfig, load_config
from ..core.device import pick_device
from ..core.metrics_file import read_metrics
from ..core.progress import Progress
from ..core.run import Run, now, open_run
from ..data.manifest import read_manifest
from ..evaluation.metrics import metrics_row, read_scores
from ..extraction.extract import ExtractPlan, extract_here
from ..training.data import Diverged
from ..training.run import read_fit
from ..training.setup import Prepared, prepare_training
from .evaluate import Measured, evaluate_run
from .identity import flat_config
from .plan import Evaluation, Training
from .records import Record, write_record, write_scores
from .runs import RUN_KINDS, STORES, resumable, run_folder

SPLIT = "test"
# The key of the store that was named, among those of a workplace.
BASE = "base"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Work that is done in one go: a training, and what is still to be evaluated of it.

    Attributes:
        training: The training.
        evaluations: Its evaluations that are missing.
        run: Its run; None where it has to be made.
    """

    training: Training
    evaluations: tuple[Evaluation, ...]
    run: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """What every worker needs to know.

    Attributes:
        out: The folder of the table.
        stores: Folders of stores by digest; under ``base`` the one that was named.
        data: Folder of the images, for what trains towers.
        refused: Why a store that is needed is missing, by digest.
        force: Train anew where an interrupted run could be resumed.
    """

    out: Path
    stores: Mapping[str, Path]
    data: Path
    refused: Mapping[str, str] = field(default_factory=dict)
    force: bool = False

    def store(self, training: Training) -> Path:
        """The store of a training.

        Raises:
            InputError: It could not be extracted.
        """
        if training.store not in self.stores:
            why = self.refused.get(training.store, "it was not extracted")
            raise InputError(f"no store of {training.patches} patches: {why}")
        return self.stores[training.store]

    def fail(self, evaluation: Evaluation, error: Exception) -> Record:
        """Keep an evaluation as failed."""
        note = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        record = Record(
            key=evaluation.key,
            training=evaluation.training,
            status="failed",
            note=" ".join(note.split()),
            config=flat_config(evaluation.config),
        )
        write_record(self.out, record)
        return record


class Worker:
    """Does units in this process.

    Args:
        place: Where everything is.
        device: Where to compute, in the place of the configuration's: a cluster gives each worker its own.
        progress: Shows the epochs of a training; silent by default.
    """

    def __init__(self, place: Workplace, *, device: str | None = None, progress: Progress | None = None) -> None:
        self._place, self._device, self._progress = place, device, progress or Progress()
        self._prepared: dict[tuple[Any, ...], Prepared] = {}

    def do(self, unit: Unit) -> Iterator[Record]:
        """Make the run if it is missing and evaluate it; every record is kept before it is yielded."""
        training, folder = self._on_device(unit.training), unit.run
        pending = {evaluation.key: evaluation for evaluation in unit.evaluations}
        try:
            if folder is None and training.kind != "prior":
                folder = self._make(training)
            for result in self._measure(training, folder, unit.evaluations):
                if isinstance(result, tuple):
                    record = self._place.fail(*result)
                else:
                    record = self._keep(training, folder, result)
                pending.pop(record.key, None)
                yield record
        except Exception as error:  # noqa: BLE001 - a failed training or damaged codes fail every row that is left
            for evaluation in pending.values():
                yield self._place.fail(evaluation, error)

    def _on_device(self, training: Training) -> Training:
        """The training on this worker's device."""
        if self._device is None:
            return training
        hardware = training.config.hardware.model_copy(update={"device": self._device})
        return replace(training, config=training.config.model_copy(update={"hardware": hardware}))

    def _make(self, training: Training) -> Path:
        """Train, or resume what was interrupted; the run's folder."""
        from ..training.train_head import resume_training, train_head

        config, folder, progress = training.config, run_folder(self._place.out, training), self._progress
        if training.kind == "finetune":
            self._finetune(training, folder)
            return folder
        store = self._place.store(training)
        if training.kind == "zero-shot":
            from ..evaluation.zero_shot import zero_shot

            zero_shot(config, store=store, out=folder, force=True, progress=progress)
            return folder
        prepared = self._prepare(training)
        if not self._resumed(folder, training, lambda: resume_training(folder, store=prepared, progress=progress)):
            train_head(config, store=prepared, out=folder, force=True, progress=progress)
        return folder

    def _finetune(self, training: Training, folder: Path) -> None:
        from ..finetuning.finetune import finetune, resume_finetuning

        data, config = self._place.data, training.config
        store = Store.open(self._place.stores[BASE])
        model = model_of(store, config, training.patches).model_copy(update={"freeze_towers": False})
        check_source(store, data, model)
        if self._resumed(folder, training, lambda: resume_finetuning(folder, data=data, progress=self._progress)):
            return
        finetune(
            config.model_copy(update={"model": model}),
            data=data,
            unfreeze=training.towers,
            towers=config.finetune.towers,
            out=folder,
            force=True,
            progress=self._progress,
        )

    def _resumed(self, folder: Path, training: Training, resume: Callable[[], object]) -> bool:
        """Whether an interrupted run of a training was found and could be finished; else it is made anew."""
        if self._place.force or not resumable(folder, training):
            return False
        try:
            resume()
        except Diverged:
            raise
        except InputError as error:
            self._progress.say(f"{folder} cannot be resumed and is trained anew: {error}")
            return False
        return True

    def _measure(
        self, training: Training, folder: Path | None, evaluations: Sequence[Evaluation]
    ) -> Iterator[Measured | tuple[Evaluation, Exception]]:
        if folder is None:
            yield from (measure_prior(evaluation, self._prepare(training)) for evaluation in evaluations)
            return
        run = open_run(folder, kind=RUN_KINDS[training.kind])
        if training.kind == "zero-shot":
            yield from (measure_zero_shot(evaluation, run) for evaluation in evaluations)
            return
        device = str(pick_device(training.config.hardware.device))
        yield from evaluate_run(run, evaluations, split=SPLIT, device=device)

    def _keep(self, training: Training, folder: Path | None, measured: Measured) -> Record:
        """Keep scores and record of an evaluation; one that cannot be kept, for want of room, has failed."""
        evaluation, out = measured.evaluation, self._place.out
        try:
            scores = write_scores(out, evaluation.key, measured.image_id, measured.scores, measured.labels)
            record = Record(
                key=evaluation.key,
                training=training.key,
                status="finished",
                method=evaluation.method,
                split=SPLIT,
                run="" if folder is None else Path(os.path.relpath(folder, out)).as_posix(),
                scores=scores,
                figures=dict(measured.figures),
                facts={**facts_of(training, folder), **measured.facts},
                config=flat_config(evaluation.config),
            )
            write_record(out, record)
        except Exception as error:  # noqa: BLE001 - kept with its row
            return self._place.fail(evaluation, error)
        return record

    def _prepare(self, training: Training) -> Prepared:
        """The store on the device, read once for all trainings."""
        config = training.config
        key = (training.store, config.data.split_type, config.data.protocol_lists, config.hardware.device)
        if key not in self._prepared:
            self._prepared.clear()  # the arrays of one store fill enough memory
            self._prepared[key] = prepare_training(config, self._place.store(training), Progress())
        return self._prepared[key]


def extract_store(patches: int, digest: str, place: Workplace, config: Config, progress: Progress) -> Path:
    """Extract a store like the one that was named at another patch budget, below the folder of the table.

    Args:
        patches: The budget.
        digest: Digest of the key that the new store must have.
        place: Where to write, where the images are, and the named store, whose caption embeddings are reused.
        config: Hardware and data sections are used, and the model where it was given.
        progress: Progress bars and messages.

    Raises:
        InputError: No images, no checkpoint, or one that is not the store's.
    """
    store = place.stores[BASE]
    opened = Store.open(store)
    key = opened.key
    folder = place.out / STORES / f"{key.model.rsplit('/', 1)[-1]}-p{patches}-{digest[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not is_remote(store):
        # Extraction reuses captions of stores that lie beside the new one.
        link = folder.parent / f"base-{key.digest[:12]}"
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(store.resolve(), target_is_directory=True)
    model = model_of(opened, config, patches)
    # Shards of captions are reused where they are of the same rows.
    rows = opened.columns(["shard"])["shard"].to_pylist().count(0)
    plan = ExtractPlan(data=place.data, out=folder, dtype=key.dtype, shard_rows=rows)
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
        f"  {result.n_encoded:,} images encoded, {result.reused_text_shards} shards of captions reused: {folder}"
    )
    return folder.absolute()


def model_of(store: Store, config: Config, patches: int) -> ModelConfig:
    """The checkpoint of a store at a patch budget; the configuration may give another path to it."""
    key, is_given = store.key, "siglip2_variant" in config.model.model_fields_set
    return ModelConfig(
        siglip2_variant=config.model.siglip2_variant if is_given else str(store.extra.get("model_path", key.model)),
        revision=config.model.revision or key.commit,
        max_num_patches=patches,
        text_max_length=key.text_length,
    )


def check_source(store: Store, data: Path, model: ModelConfig) -> None:
    """Refuse to train towers on other images, or from another checkpoint, than those of the store that rows are of.

    Raises:
        InputError: The manifest below ``data``, or the local checkpoint, is another one.
    """
    from ..extraction.siglip import local_digest
    from ..finetuning.setup import MANIFEST

    key, name = store.key, Path(model.siglip2_variant)
    digest = read_manifest(data / MANIFEST).sha256
    if digest != key.manifest_sha256:
        raise InputError(
            "another data set than the store's",
            where=data,
            got=f"manifest {digest[:12]}",
            wanted=f"manifest {key.manifest_sha256[:12]}",
            do="name the data set's folder with --data, or another --store",
        )
    if key.revision.startswith("sha256:"):
        same = name.is_dir() and local_digest(name) == key.revision
        got, do = "other weights or settings", "name the store's checkpoint with --model"
    else:
        same = (model.siglip2_variant, model.revision) == (key.model, key.revision)
        got, do = f"revision {model.revision}", "leave --model and model.revision out"
    if not same:
        wanted = f"{key.model} at {key.revision[:19]}"
        raise InputError(
            "another checkpoint than the store's", where=model.siglip2_variant, got=got, wanted=wanted, do=do
        )


def measure_prior(evaluation: Evaluation, prepared: Prepared) -> Measured:
    """The share of train images that have a tag, as every image's score: what can be said without looking at images."""
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


def measure_zero_shot(evaluation: Evaluation, run: Run) -> Measured:
    """The row that the zero-shot stage has measured."""
    row = next(row for row in read_metrics(run.folder) if (row["method"], row["split"]) == ("zero-shot", SPLIT))
    arrays = read_scores(run.folder, "zero-shot", SPLIT)
    facts = {"query_latency_ms": row.pop("query_latency_ms", None)}
    row.pop("inputs", None)
    return Measured(
        evaluation=evaluation,
        figures=row,
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
        "version.faiss": _faiss_version(),
        "device": str(pick_device(training.config.hardware.device)),
        "cpu": cpu_name(),
        "finished_at": now(),
    }
    if folder is not None and training.kind in {"head", "finetune"}:
        run = open_run(folder, kind=RUN_KINDS[training.kind])
        fit = read_fit(run, load_config(run.paths.config))
        facts |= {"precision": run.info.precision} if run.info.precision else {}
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
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _faiss_version() -> str:
    for name in ("faiss-cpu", "faiss-gpu"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return ""
