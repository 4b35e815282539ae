"""Multi-label metrics, each against an independent reference in the tests (SPEC section 8).

Symbols: N images, C classes, K tags an image, TP, FP, FN counts. Scores stay in class order. What is undefined is NaN,
is left out of means, and is counted; it is never a silent 0 or 1.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

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
    mean_average_precision,
    mean_of_defined,
    precision_recall_at,
    ratio,
    sample_average_precision,
)

__all__ = [
    "Counts",
    "Thresholds",
    "average_precision",
    "best_threshold",
    "best_threshold_per_class",
    "evaluate",
    "mean_average_precision",
    "overall_and_per_class",
    "per_class",
    "precision_recall_at",
    "sample_average_precision",
    "tune_thresholds",
]


class Counts(NamedTuple):
    """True positives, false positives and false negatives of every class ``(C,)`` int64."""

    tp: npt.NDArray[np.int64]
    fp: npt.NDArray[np.int64]
    fn: npt.NDArray[np.int64]

    @classmethod
    def of(cls, predicted: Truth, labels: Truth) -> "Counts":
        """Count predictions ``(N, C)`` against labels ``(N, C)``."""
        tp, n_predicted, n_true = (part.sum(axis=0) for part in (predicted & labels, predicted, labels))
        return cls(tp, n_predicted - tp, n_true - tp)

    @property
    def precision(self) -> Floats:
        """``TP / (TP + FP)``, NaN where nothing is predicted."""
        return ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> Floats:
        """``TP / (TP + FN)``, NaN where nothing is positive."""
        return ratio(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> Floats:
        """``2 TP / (2 TP + FP + FN)``, NaN where nothing is predicted or positive."""
        return ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def overall(self) -> "Counts":
        """The counts of all classes together ``(1,)``."""
        return Counts(*(part.sum(keepdims=True) for part in self))


def overall_and_per_class(counts: Counts) -> dict[str, float]:
    """``CP, CR, CF1, OP, OR, OF1`` (Wang et al. 2016, section 4.1).

    ``CP`` and ``CR`` are means of precision and recall over classes, ``CF1`` their harmonic mean (not macro F1);
    ``OP, OR, OF1`` come from the counts of all classes together. A class that is never predicted has no precision and
    is left out of ``CP`` (others count it as 0): ``n_undefined_CP`` says how many.
    """
    precision, recall = counts.precision, counts.recall
    CP, CR = mean_of_defined(precision), mean_of_defined(recall)
    both = counts.overall
    return {
        "CP": CP,
        "CR": CR,
        "CF1": 0.0 if CP == CR == 0 else 2 * CP * CR / (CP + CR),
        "OP": float(both.precision[0]),
        "OR": float(both.recall[0]),
        "OF1": float(both.f1[0]),
        "n_undefined_CP": float(np.isnan(precision).sum()),
    }


def per_class(scores: Scores, labels: Labels, *, threshold: float | Floats = 0.5) -> dict[str, Floats]:
    """``AP``, ``precision``, ``recall``, ``F1``, ``n_positive`` and ``n_predicted`` of every class, ``(C,)`` each."""
    s, y = checked(scores, labels)
    counts = Counts.of(s >= threshold, y)
    return {
        "AP": average_precision(s, y),
        "precision": counts.precision,
        "recall": counts.recall,
        "F1": counts.f1,
        "n_positive": (counts.tp + counts.fn).astype(np.float64),
        "n_predicted": (counts.tp + counts.fp).astype(np.float64),
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
    predicted = s >= threshold
    counts = Counts.of(predicted, y)
    top = best_tags(s, TAGS_OF_TOP)
    result = {
        "mAP": mean_average_precision(s, y),
        "mAP_sample": sample_average_precision(s, y),
        "F1_micro": float(counts.overall.f1[0]),
        "F1_macro": mean_of_defined(counts.f1),
        **overall_and_per_class(counts),
    }
    result |= {f"{key}@{TAGS_OF_TOP}": value for key, value in overall_and_per_class(Counts.of(top, y)).items()}
    for K, at in precision_recall_at(s, y).items():
        result |= {f"P@{K}": at.precision, f"R@{K}": at.recall}
        result |= {f"P@{K}_ceiling": at.precision_ceiling, f"R@{K}_ceiling": at.recall_ceiling}
    result |= {
        "hamming_loss": float((predicted != y).mean()),
        "n_images": float(len(y)),
        "n_images_without_label": float((~y.any(axis=1)).sum()),
        "n_classes_without_positive": float((~y.any(axis=0)).sum()),
        "n_undefined_F1_macro": float(np.isnan(counts.f1).sum()),
    }
    return result | ({"threshold": float(threshold)} if np.ndim(threshold) == 0 else {})


def _best_thresholds(s: Scores, y: Truth) -> Floats:
    """The score of each row ``(R, n)`` at which predicting all not below it gives the highest F1."""
    order = np.argsort(-s, axis=1)
    s, y = np.take_along_axis(s, order, axis=1), np.take_along_axis(y, order, axis=1)
    n_true = y.sum(axis=1, keepdims=True)
    f1 = 2 * np.cumsum(y, axis=1, dtype=np.int64) / (np.arange(1, s.shape[1] + 1) + n_true)
    best = np.where(group_ends(s), f1, -1.0).argmax(axis=1)
    chosen = np.take_along_axis(s, best[:, None], axis=1)[:, 0].astype(np.float64)
    return np.where(n_true[:, 0] > 0, chosen, np.nan)
