"""Multi-label metrics; docs/metrics.md defines each, and the tests compare each with an independent reference.

Symbols: N images, C classes, K tags an image, TP true positives. Scores stay in class order. What is undefined is NaN,
is left out of means, and is counted; it is never a silent 0 or 1.
"""

from typing import NamedTuple

import numpy as np

from ..errors import InputError
from .ranking import (
    TAGS_OF_TOP,
    Floats,
    Labels,
    Scores,
    Truth,
    average_precision,
    best_tags,
    checked,
    group_ends,
    image_figures,
    mean_average_precision,
    mean_of_defined,
    ratio,
)

__all__ = [
    "Thresholds",
    "average_precision",
    "best_threshold",
    "best_threshold_per_class",
    "count_figures",
    "evaluate",
    "mean_average_precision",
    "per_class",
    "tune_thresholds",
]

Counts = tuple[Floats, Floats, Floats]

# Reported again for the three best tags of every image.
OF_TOP = ("CP", "CR", "CF1", "OP", "OR", "OF1")


def count_figures(counts: Counts, size: int) -> dict[str, Floats]:
    """``F1_micro, F1_macro, CP, CR, CF1, OP, OR, OF1`` and ``hamming_loss``, from counts of every class.

    ``CP`` and ``CR`` are means of precision and recall over classes, ``CF1`` their harmonic mean, not macro F1 (Wang et
    al. 2016, section 4.1); ``OP, OR, OF1`` come from the counts of all classes together. A class that is never
    predicted has no precision and is left out of ``CP`` (others count it as 0).

    Args:
        counts: True positives, predictions and labels ``(R, C)`` each, R being resamples, or 1.
        size: N * C.

    Returns:
        ``(R,)`` each; NaN where undefined.
    """
    tp, n_predicted, n_true = counts
    TP, PREDICTED, TRUE = (part.sum(axis=1) for part in counts)
    CP, CR = (mean_of_defined(ratio(tp, whole), axis=1) for whole in (n_predicted, n_true))
    OF1 = ratio(2 * TP, PREDICTED + TRUE)
    return {
        "F1_micro": OF1,
        "F1_macro": mean_of_defined(ratio(2 * tp, n_predicted + n_true), axis=1),
        "CP": CP,
        "CR": CR,
        "CF1": np.where(CP + CR == 0, 0.0, ratio(2 * CP * CR, CP + CR)),
        "OP": ratio(TP, PREDICTED),
        "OR": ratio(TP, TRUE),
        "OF1": OF1,
        "hamming_loss": (PREDICTED + TRUE - 2 * TP) / size,
    }


def per_class(scores: Scores, labels: Labels, *, threshold: float | Floats = 0.5) -> dict[str, Floats]:
    """``AP``, ``precision``, ``recall``, ``F1``, ``n_positive`` and ``n_predicted`` of every class, ``(C,)`` each."""
    s, y = checked(scores, labels)
    tp, n_predicted, n_true = (counts[0] for counts in _counts(s >= threshold, y))
    return {
        "AP": average_precision(s, y),
        "precision": ratio(tp, n_predicted),
        "recall": ratio(tp, n_true),
        "F1": ratio(2 * tp, n_predicted + n_true),
        "n_positive": n_true,
        "n_predicted": n_predicted,
    }


def best_threshold(scores: Scores, labels: Labels) -> float:
    """The threshold of the highest micro F1, exactly: every distinct score is tried; the highest of equally good ones.

    To be used as ``scores >= threshold``, on a split that is not the one that is reported.

    Raises:
        InputError: There is no positive label, so no threshold is better than another.
        ValueError: As :func:`average_precision`.
    """
    s, y = checked(scores, labels)
    best = float(_best_thresholds(s.reshape(1, -1), y.reshape(1, -1))[0])
    if np.isnan(best):
        raise InputError("no threshold to tune", got="no positive label", wanted="some", do="tune on another split")
    return best


def best_threshold_per_class(scores: Scores, labels: Labels) -> Floats:
    """The threshold of the highest F1 of each class ``(C,)``; NaN, which predicts nothing, where none is positive."""
    s, y = checked(scores, labels)
    return _best_thresholds(np.ascontiguousarray(s.T), np.ascontiguousarray(y.T))


class Thresholds(NamedTuple):
    """Tuned on one split, to be used on another.

    Attributes:
        overall: The one of the highest micro F1.
        per_class: The one of the highest F1 of each class ``(C,)``; the overall one where a class has no positive.
        n_kept_overall: How many classes that are.
    """

    overall: float
    per_class: Floats
    n_kept_overall: int


def tune_thresholds(scores: Scores, labels: Labels) -> Thresholds:
    """:func:`best_threshold` and :func:`best_threshold_per_class` of a split that is not the one that is reported.

    Raises:
        InputError: There is no positive label.
        ValueError: As :func:`average_precision`.
    """
    overall, each = best_threshold(scores, labels), best_threshold_per_class(scores, labels)
    none = np.isnan(each)
    return Thresholds(overall, np.where(none, overall, each), int(none.sum()))


def evaluate(scores: Scores, labels: Labels, *, threshold: float | Floats = 0.5) -> dict[str, float]:
    """Every metric of a split under flat keys.

    Args:
        scores: ``(N, C)`` in class order.
        labels: ``(N, C)`` of 0 and 1.
        threshold: A tag is predicted at ``score >= threshold``; one for all, or one a class ``(C,)``.

    Returns:
        ``mAP, mAP_sample, F1_micro, F1_macro, CP, CR, CF1, OP, OR, OF1``, the last six again with ``@3`` for the three
        best tags of every image whatever their score, ``P@K, R@K, P@K_ceiling, R@K_ceiling`` for K in 1, 3, 5, 10,
        ``hamming_loss``, and what was left out: ``n_images, n_images_without_label, n_classes_without_positive,
        n_undefined_CP, n_undefined_CP@3, n_undefined_F1_macro`` (classes neither positive nor predicted), and
        ``threshold`` where it is one for all. NaN where undefined.

    Raises:
        ValueError: As :func:`average_precision`.
    """
    s, y = checked(scores, labels)
    counts, of_top = _counts(s >= threshold, y), _counts(best_tags(s, TAGS_OF_TOP), y)
    row, top = count_figures(counts, y.size), count_figures(of_top, y.size)
    images, ceilings = image_figures(s, y), image_figures(y.astype(np.float32), y)
    _, n_predicted, n_true = counts
    result = {
        "mAP": mean_average_precision(s, y),
        **row,
        **{f"{key}@{TAGS_OF_TOP}": top[key] for key in OF_TOP},
        **{key: mean_of_defined(values) for key, values in images.items()},
        **{f"{key}_ceiling": mean_of_defined(values) for key, values in ceilings.items() if key != "mAP_sample"},
        "n_images": len(y),
        "n_images_without_label": (~y.any(axis=1)).sum(),
        "n_classes_without_positive": (n_true == 0).sum(),
        "n_undefined_CP": (n_predicted == 0).sum(),
        f"n_undefined_CP@{TAGS_OF_TOP}": (of_top[1] == 0).sum(),
        "n_undefined_F1_macro": (n_predicted + n_true == 0).sum(),
    }
    if np.ndim(threshold) == 0:
        result["threshold"] = threshold
    return {key: float(np.squeeze(value)) for key, value in result.items()}


def _counts(predicted: Truth, y: Truth) -> Counts:
    """True positives, predictions and labels of every class ``(1, C)``."""
    tp, n_predicted, n_true = (
        part.sum(axis=0, keepdims=True, dtype=np.float64) for part in (predicted & y, predicted, y)
    )
    return tp, n_predicted, n_true


def _best_thresholds(s: Scores, y: Truth) -> Floats:
    """The score of each row ``(R, n)`` at which predicting all not below it gives the highest F1."""
    order = np.argsort(-s, axis=1)
    s, y = np.take_along_axis(s, order, axis=1), np.take_along_axis(y, order, axis=1)
    n_true = y.sum(axis=1, keepdims=True)
    f1 = 2 * np.cumsum(y, axis=1, dtype=np.int64) / (np.arange(1, s.shape[1] + 1) + n_true)
    best = np.where(group_ends(s), f1, -1.0).argmax(axis=1)
    chosen = np.take_along_axis(s, best[:, None], axis=1)[:, 0].astype(np.float64)
    return np.where(n_true[:, 0] > 0, chosen, np.nan)
