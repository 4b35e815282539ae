"""Stage 2: train a head from a store, keep the best checkpoints, and write the codes of every split."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import RenderableType

from .. import InputError
from ..heads.hashing import binarise, pack_codes
from ..heads.knn import build_index
from ..heads.metrics import mean_average_precision
from ..heads.model import Head
from ..heads.voting import vote
from .checkpoint import CheckpointKeeper, load_head
from .codes import SPLITS, Codes, write_codes
from .config import Config
from .device import pick_device, seed_everything
from .evaluation import classifier_row, write_scores
from .progress import Progress
from .runs import Run, finish_run, start_run
from .stores import LabelledStore, describe_run, find_store, read_store, resolve_config
from .tables import metrics_table
from .trainer import FitResult, Monitor, Split, encode_split, fit

LATENCY_QUERIES = 100


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run, how its training went, what chose the best epoch, and the classifier's row of metrics."""

    run: Run
    fit: FitResult
    monitor: str
    metrics: dict[str, Any]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """One flat JSON object."""
        return {
            "run": str(self.run.folder), "store": self.run.info.store, "preset": self.run.info.preset,
            "epochs": len(self.fit.history), "best_epoch": self.fit.best_epoch, "best_val_mAP": self.fit.best_value,
            "monitor": self.monitor,
            "stopped_early": self.fit.stopped_early, "seconds": self.seconds, **self.metrics,
        }  # fmt: skip

    def summary(self) -> list[RenderableType]:
        """What a person reads at the end."""
        ended = "stopped early" if self.fit.stopped_early else "all epochs done"
        how = f"{len(self.fit.history)} epochs in {self.seconds:.1f} s ({ended})"
        best = f"best val mAP of the {self.monitor} {self.fit.best_value:.3f} in epoch {self.fit.best_epoch}"
        return [f"{how}; {best}", metrics_table([self.metrics], "test split"), f"wrote {self.run.folder}"]


def train_head(
    config: Config,
    *,
    store: Path | None = None,
    out: Path | None = None,
    runs: Path = Path("runs"),
    force: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a head on the train split of a store.

    Args:
        config: Everything but the data section is used.
        store: The store; the newest below ``data/cache`` when not given.
        out: The run folder; a new one below ``runs`` when not given.
        runs: The folder of all runs.
        force: Replace an existing run in ``out``.
        progress: Who to tell.

    Raises:
        InputError: A bad store, an empty split, no label to learn or to choose the best epoch by, fewer train images
            than neighbours, or a loss that diverges.
    """
    started = time.perf_counter()
    progress = progress or Progress()
    folder = find_store(store)
    device = pick_device(config.hardware.device)
    labelled = read_store(folder, config)
    progress.say(f"training from {folder} on {device.type}" + ("" if store else " (the newest store)"))
    config = _settle_metric(resolve_config(config, labelled))
    seed_everything(config.hardware.seed, deterministic=config.hardware.deterministic)
    splits = place_splits(labelled, device)
    _check_splits(splits, config, folder)
    head = Head(config.fusion, config.hash, config.classifier, width=labelled.store.width).to(device)
    head.fit_statistics(splits["train"].v_img, splits["train"].v_txt[:, 0])
    for line in _notices(config):
        progress.say(line)
    info = describe_run("train-head", config, labelled)
    label = f"b{config.hash.bits}-{config.fusion.type}"
    run = start_run(info, config, label=label, out=out, runs=runs, device=str(device), force=force)
    keeper = CheckpointKeeper(run.folder / "checkpoints", config, width=labelled.store.width)
    with progress.task("epochs", config.training.num_epochs) as task:
        result = fit(
            head, splits["train"], config, monitor=_monitor(config, splits), on_epoch=_recorder(run.folder, keeper),
            task=task, device=device,
        )  # fmt: skip
    head = load_head(keeper.best, device)
    codes = _write_all_codes(run.folder, head, config, labelled, splits)
    row = _classifier_row(run.folder, head, codes, splits["test"])
    run = finish_run(run, [row])
    return TrainResult(
        run=run, fit=result, monitor=config.training.monitor, metrics=row, seconds=time.perf_counter() - started
    )


def _settle_metric(config: Config) -> Config:
    """Without a hash layer neighbours are found by cosine on z, and the saved configuration says so."""
    if config.hash.bits or config.knn.distance_metric == "cosine":
        return config
    if "distance_metric" in config.knn.model_fields_set:
        raise InputError(
            "no hash layer", where="knn.distance_metric", got=config.knn.distance_metric, wanted="cosine with --bits 0",
            do="leave it out, or give --bits 64",
        )  # fmt: skip
    return config.model_copy(update={"knn": config.knn.model_copy(update={"distance_metric": "cosine"})})


def place_splits(labelled: LabelledStore, device: torch.device) -> dict[str, Split]:
    """The three splits on a device."""
    labels, arrays = labelled.listing.labels_matrix(), labelled.embeddings
    placed = {}
    for split in SPLITS:
        rows = labelled.listing.rows(split)
        placed[split] = Split.place(
            arrays.v_img[rows], arrays.v_txt[rows], arrays.n_captions[rows], labels[rows], device
        )
    return placed


def _check_splits(splits: dict[str, Split], config: Config, folder: Path) -> None:
    """Refuse what would only show after the first epoch."""
    for name in ("train", "val"):
        if not splits[name].labels.any():
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


def _notices(config: Config) -> list[str]:
    lines = []
    inputs = config.fusion.inputs
    if config.loss.cosine_weight > 0 and inputs != "both":
        lines.append(
            f"note: with --inputs {inputs} the cosine term would train on the other modality, so it takes no part: it"
            " is logged, but alpha changes nothing"
        )
    elif config.loss.cosine_weight > 0 and config.fusion.adapter == "none":
        lines.append(
            "note: the towers are frozen and there is no adapter, so the cosine term has no trainable input: it is"
            " logged, but alpha changes nothing (--adapter linear makes it live)"
        )
    if config.training.batch_size == 1 and config.hash.bits and config.hash.batch_norm:
        lines.append(
            "note: batch normalisation needs two images a batch, so --batch-size 1 is taken as 2 (--set"
            " hash.batch_norm=false leaves it at 1)"
        )
    return lines


def _monitor(config: Config, splits: dict[str, Split]) -> Monitor:
    """Val mAP of what the user will use: votes of train neighbours, or the classifier."""
    train_labels, val_labels = (splits[name].labels.cpu().numpy() for name in ("train", "val"))

    def by_classifier(head: Head) -> float:
        _, logits = encode_split(head, splits["val"])
        return mean_average_precision(logits.cpu().numpy(), val_labels)

    def by_neighbours(head: Head) -> float:
        base, query = (encode_split(head, splits[name])[0].cpu().numpy() for name in ("train", "val"))
        packed = [pack_codes(binarise(soft)) if config.hash.bits else None for soft in (base, query)]
        index = build_index(config.knn.distance_metric, packed=packed[0], soft=base)
        found = index.search(packed=packed[1], soft=query, K=config.knn.K)
        return mean_average_precision(vote(found, train_labels, config.knn), val_labels)

    return by_neighbours if config.training.monitor == "knn" else by_classifier


def _recorder(folder: Path, keeper: CheckpointKeeper) -> Any:  # noqa: ANN401
    """After every epoch: a line of history and, if it is among the best, a checkpoint."""
    history = folder / "history.jsonl"

    def record(head: Head, row: dict[str, float]) -> None:
        with history.open("a", encoding="utf-8") as stream:
            # A step that the loss scaler of float16 skips has an infinite gradient norm, which JSON has no word for.
            known = {name: value if math.isfinite(value) else None for name, value in row.items()}
            stream.write(json.dumps(known, allow_nan=False) + "\n")
        keeper.offer(head, epoch=int(row["epoch"]), val_mAP=row["val_mAP"])

    return record


def _write_all_codes(
    run: Path, head: Head, config: Config, labelled: LabelledStore, splits: dict[str, Split]
) -> dict[str, Codes]:
    codes = {}
    for split in SPLITS:
        soft, logits = (tensor.cpu().numpy() for tensor in encode_split(head, splits[split]))
        codes[split] = Codes(
            image_id=labelled.listing.image_ids[labelled.listing.rows(split)],
            soft=soft,
            packed=pack_codes(binarise(soft)) if config.hash.bits else None,
            labels=splits[split].labels.cpu().numpy(),
            logits=None if split == "train" else logits,
        )
        write_codes(run, split, codes[split])
    return codes


def _classifier_row(run: Path, head: Head, codes: dict[str, Codes], test: Split) -> dict[str, Any]:
    for split in ("val", "test"):
        probabilities = codes[split].probabilities
        assert probabilities is not None
        write_scores(run, "classifier", split, codes[split].image_id, probabilities)
    row = classifier_row("test", codes["test"], val=codes["val"])
    return {**row, "query_latency_ms": _latency_ms(head, test)}


def _latency_ms(head: Head, split: Split) -> float:
    """Mean time from one stored embedding to its scores, in milliseconds."""
    times = []
    with torch.inference_mode():
        for row in range(min(LATENCY_QUERIES, len(split))):
            started = time.perf_counter()
            v_img, v_txt, _ = split.batch(torch.tensor([row], device=split.v_img.device), 0)
            head(v_img, v_txt).logits.cpu()
            times.append(time.perf_counter() - started)
    return 1e3 * float(np.mean(times))
