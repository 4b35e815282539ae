"""From scores to a row of metrics, the same way for every method."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from ..heads.metrics import best_threshold, evaluate
from ..heads.sigmoid import sigmoid
from .codes import Codes
from .files import write_whole

Scores = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.uint8]

TUNED = ("F1_micro", "F1_macro", "CF1", "OF1", "hamming_loss")


def metrics_row(
    method: str,
    split: str,
    scores: Scores,
    labels: Labels,
    *,
    tuned_on: tuple[Scores, Labels] | None,
    threshold: float = 0.5,
) -> dict[str, Any]:
    """Every metric of a method on a split.

    Args:
        method: Name of the method.
        split: Name of the split.
        scores: ``(N, C)``, in class order.
        labels: ``(N, C)`` uint8.
        tuned_on: Scores and labels of val, on which the global threshold of the ``_tuned`` figures is chosen; ``None``
            leaves these out, and so do labels without a positive, which a ``note`` says.
        threshold: Where a score predicts a tag.

    Returns:
        Flat keys; F1 and Hamming loss at ``threshold``, and again with ``_tuned`` at the one that is best on val.
    """
    row: dict[str, Any] = {"method": method, "split": split, **evaluate(scores, labels, threshold=threshold)}
    if tuned_on is not None and not tuned_on[1].any():
        row["note"] = "no threshold is tuned, because no val image has a label"
    elif tuned_on is not None:
        best = float(best_threshold(*tuned_on))
        tuned = evaluate(scores, labels, threshold=best)
        row["threshold_tuned"] = best
        for key in TUNED:
            row[f"{key}_tuned"] = tuned[key]
    return {key: int(value) if key.startswith("n_") else _plain(value) for key, value in row.items()}


def classifier_row(split: str, codes: Codes, *, val: Codes) -> dict[str, Any]:
    """Every metric of the classifier on a split, from the logits kept with its codes.

    Logits are ranked, not probabilities: the sigmoid keeps their order, but large logits all become 1, and ties cost.
    Thresholds are given as probabilities all the same, as those of any other method.

    Args:
        split: Name of the split.
        codes: Its codes, with logits.
        val: Codes of val, to tune the threshold on; on val itself nothing is tuned.
    """
    assert codes.logits is not None
    assert val.logits is not None
    tuned_on = None if split == "val" else (val.logits, val.labels)
    row = metrics_row("classifier", split, codes.logits, codes.labels, tuned_on=tuned_on, threshold=0.0)
    for key in {"threshold", "threshold_tuned"} & row.keys():
        row[key] = float(sigmoid(row[key]))
    return row


def write_scores(run: Path, method: str, split: str, image_id: npt.NDArray[np.int64], scores: Scores) -> Path:
    """Keep a method's scores in its run, so that two methods can be compared image by image later."""
    path = run / "scores" / f"{method}-{split}.safetensors"
    arrays: dict[str, npt.NDArray[Any]] = {
        "image_id": np.ascontiguousarray(image_id),
        "scores": np.ascontiguousarray(scores),
    }
    write_whole(path, lambda temporary: save_file(arrays, temporary))
    return path


def _plain(value: object) -> object:
    """NumPy scalars become Python's, and what is undefined becomes null in JSON."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
