"""Rows of what is not a head, and what every row says of how it was made: seconds, epochs, versions, device."""

import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ... import __version__
from ..core.config import load_config
from ..core.device import pick_device
from ..core.metrics_file import read_metrics
from ..core.run import Run, now, open_run
from ..evaluation.metrics import metrics_row, read_scores
from ..training.run import read_fit
from ..training.training_data import Prepared
from .ablate_plan import Evaluation, Training
from .evaluate import Measured
from .runs import KINDS

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
        evaluation=evaluation, figures=row, scores=scores[SPLIT], image_id=prepared.image_ids[SPLIT],
        labels=labels[SPLIT], facts={"eval_s": time.perf_counter() - started},
    )  # fmt: skip


def zero_shot_row(evaluation: Evaluation, run: Run) -> Measured:
    """What the stage measured."""
    row = next(row for row in read_metrics(run.folder) if (row["method"], row["split"]) == ("zero-shot", SPLIT))
    arrays = read_scores(run.folder, "zero-shot", SPLIT)
    facts = {"query_latency_ms": row.get("query_latency_ms")}
    figures = {key: value for key, value in row.items() if key not in {"query_latency_ms", "inputs"}}
    return Measured(
        evaluation=evaluation, figures=figures, scores=arrays["scores"], image_id=arrays["image_id"],
        labels=arrays["labels"], facts=facts,
    )  # fmt: skip


def facts_of(training: Training, folder: Path | None) -> dict[str, Any]:
    """How the training went, and what computed it."""
    facts: dict[str, Any] = {
        "version.mmcli": __version__, "version.torch": metadata.version("torch"), "version.faiss": _faiss(),
        "device": str(pick_device(training.config.hardware.device)), "cpu": cpu_name(), "finished_at": now(),
    }  # fmt: skip
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
