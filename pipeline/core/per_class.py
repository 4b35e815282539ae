"""Rows of the classes: which tags a method finds and which it misses, a file for each method and split of a run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...heads.bootstrap import Threshold
from ...heads.metrics import per_class
from ...heads.sigmoid import sigmoid
from .files import write_text

FIGURES = ("precision", "recall", "F1", "n_predicted")
COUNTS = ("n_positive", "n_predicted")


def per_class_path(run: Path, method: str, split: str) -> Path:
    """Where a run keeps the rows of the classes."""
    return run / "per_class" / f"{method}-{split}.json"


def write_per_class(
    run: Path,
    method: str,
    split: str,
    category_names: Sequence[str],
    scores: npt.NDArray[np.floating[Any]],
    labels: npt.NDArray[Any],
    *,
    thresholds: Mapping[str, Threshold] | None = None,
    logits: bool = False,
) -> Path:
    """Write a row for every class, in class order.

    A row holds ``category``, ``index``, ``n_positive``, ``AP``, and for every threshold, with its ending, ``threshold,
    precision, recall, F1, n_predicted``. What is undefined is null: AP and recall of a class without a positive,
    precision of one that is never predicted, F1 where both are so.

    Args:
        run: The run's folder.
        method: Name of the method.
        split: Name of the split.
        category_names: C names.
        scores: ``(N, C)``.
        labels: ``(N, C)`` of 0 and 1.
        thresholds: By the ending of their keys; one for all classes, or one a class.
        logits: The scores are logits; thresholds are written as probabilities.

    Raises:
        ValueError: Another number of names, or as :func:`~mmcli.heads.ranking.average_precision`.
    """
    n_classes = labels.shape[1]
    if len(category_names) != n_classes:
        raise ValueError(f"{len(category_names)} names do not name {n_classes} classes")
    thresholds = {"": 0.5} if thresholds is None else thresholds
    columns: dict[str, npt.NDArray[Any]] = {}
    for ending, threshold in thresholds.items():
        figures = per_class(scores, labels, threshold=threshold)
        columns |= {key: figures[key] for key in ("n_positive", "AP")}
        shown = sigmoid(threshold) if logits else np.asarray(threshold)
        columns[f"threshold{ending}"] = np.broadcast_to(shown, n_classes)
        columns |= {f"{key}{ending}": figures[key] for key in FIGURES}
    rows = [
        {"category": name, "index": c} | {key: _plain(key, float(values[c])) for key, values in columns.items()}
        for c, name in enumerate(category_names)
    ]
    path = per_class_path(run, method, split)
    record = {"method": method, "split": split, "n_images": len(labels), "classes": rows}
    write_text(path, json.dumps(record, indent=1, allow_nan=False))
    return path


def _plain(key: str, value: float) -> float | int | None:
    if key.startswith(COUNTS):
        return int(value)
    return value if np.isfinite(value) else None
