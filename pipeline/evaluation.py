"""From scores to a row of metrics, the same way for every method."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from ..heads.metrics import best_threshold, evaluate
from .files import write_whole

Scores = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]


def metrics_row(
    method: str, split: str, scores: Scores, labels: Labels, *, tuned_on: tuple[Scores, Labels] | None
) -> dict[str, Any]:
    """Every metric of a method on a split.

    Args:
        method: Name of the method.
        split: Name of the split.
        scores: ``(N, C)`` float32, in class order.
        labels: ``(N, C)`` uint8.
        tuned_on: Scores and labels of val, on which the global threshold of the ``_tuned`` figures is chosen;
            ``None`` leaves these out.

    Returns:
        Flat keys; F1 and Hamming loss at 0.5, and again with ``_tuned`` at the threshold that is best on val.
    """
    row: dict[str, Any] = {"method": method, "split": split, **evaluate(scores, labels, threshold=0.5)}
    if tuned_on is not None:
        threshold = float(best_threshold(*tuned_on))
        tuned = evaluate(scores, labels, threshold=threshold)
        row["threshold_tuned"] = threshold
        for key in ("F1_micro", "F1_macro", "CF1", "OF1", "hamming_loss"):
            row[f"{key}_tuned"] = tuned[key]
    return {key: int(value) if key.startswith("n_") else _plain(value) for key, value in row.items()}


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
