"""Metrics of a ranking: average precision, precision and recall of the K best tags.

Symbols: N images, C classes, K tags an image. What is undefined is NaN and is left out of means.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[Any]
Truth = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

TOP_KS = (1, 3, 5, 10)
TAGS_OF_TOP = 3


def average_precision(scores: Scores, labels: Labels) -> Floats:
    """Tie-aware average precision of every class.

    ``AP = sum_n (R_n - R_(n-1)) P_n`` over the distinct scores as thresholds, as scikit-learn's
    ``average_precision_score``: images of one score enter together, so their order cannot matter.

    Args:
        scores: ``(N, C)``, any scale.
        labels: ``(N, C)`` of 0 and 1.

    Returns:
        ``(C,)`` float64, NaN where a class has no positive.

    Raises:
        ValueError: Shapes that differ, scores that are not finite, labels other than 0 and 1.
    """
    s, y = checked(scores, labels)
    s, y = np.ascontiguousarray(s.T), np.ascontiguousarray(y.T)
    order = np.argsort(-s, axis=1)
    s, y = np.take_along_axis(s, order, axis=1), np.take_along_axis(y, order, axis=1)
    N = s.shape[1]
    # The last place of each place's group of equal scores: precision is taken there.
    place = np.arange(N, dtype=np.int64)
    ends = np.where(group_ends(s), place, N)
    end = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    precision = np.take_along_axis(np.cumsum(y, axis=1, dtype=np.int64), end, axis=1) / (end + 1)
    return ratio(np.where(y, precision, 0.0).sum(axis=1), y.sum(axis=1))


def mean_average_precision(scores: Scores, labels: Labels) -> float:
    """``mAP``: mean of :func:`average_precision` over the classes that have a positive; NaN where none has."""
    return mean_of_defined(average_precision(scores, labels))


def sample_average_precision(scores: Scores, labels: Labels) -> float:
    """``mAP_sample``: mean of the average precision of every image's ranking of classes, over images with a label."""
    return mean_of_defined(average_precision(np.asarray(scores).T, np.asarray(labels).T))


class TopK(NamedTuple):
    """Precision and recall of the K best tags, with the most that any ranking could reach."""

    precision: float
    recall: float
    precision_ceiling: float
    recall_ceiling: float


def precision_recall_at(scores: Scores, labels: Labels, ks: Sequence[int] = TOP_KS) -> dict[int, TopK]:
    """``P@K`` and ``R@K`` and their ceilings.

    ``P@K = mean(hits / K)`` over all images, one without a label counting 0 in figure and ceiling alike;
    ``R@K = mean(hits / tags)`` over images with a label. The ceilings put ``min(K, tags)`` for the hits. Of equal
    scores the class of the lower index is taken. K above C takes all classes, and still divides by K.

    Args:
        scores: ``(N, C)``.
        labels: ``(N, C)`` of 0 and 1.
        ks: Values of K.

    Raises:
        ValueError: As :func:`average_precision`.
    """
    s, y = checked(scores, labels)
    hits = hits_of_best(s, y)
    tags = y.sum(axis=1)
    result = {}
    for K in ks:
        found, best = hits[:, min(K, y.shape[1]) - 1], np.minimum(K, tags)
        result[K] = TopK(
            mean_of_defined(found / K),
            mean_of_defined(ratio(found, tags)),
            mean_of_defined(best / K),
            mean_of_defined(ratio(best, tags)),
        )
    return result


def checked(scores: Scores, labels: Labels) -> tuple[Scores, Truth]:
    """Scores and labels as one ``(N, C)``, labels as bool.

    Raises:
        ValueError: Shapes that differ, scores that are not finite, labels other than 0 and 1.
    """
    s, y = np.asarray(scores), np.asarray(labels)
    if s.dtype.kind != "f":
        s = s.astype(np.float64)  # the negative of an unsigned integer would wrap
    if s.ndim != 2 or s.shape != y.shape or 0 in s.shape:
        raise ValueError(f"scores {s.shape} and labels {y.shape} must be one (N, C), with an image and a class")
    if not np.isfinite(s).all():
        image, class_ = np.argwhere(~np.isfinite(s))[0]
        raise ValueError(f"the score of image {image}, class {class_} is {s[image, class_]}, not a number to rank by")
    truth = y.astype(np.bool_)
    if y.dtype != np.bool_ and not (truth == y).all():
        raise ValueError("labels must be 0 or 1")
    return s, truth


def ranking(s: Scores) -> npt.NDArray[np.int64]:
    """Classes of each image, the best first, of equal scores the lower index."""
    return np.argsort(-s, axis=1, kind="stable")


def hits_of_best(s: Scores, y: Truth) -> npt.NDArray[np.int64]:
    """How many of the 1, 2, ... C best classes of each image are its tags, ``(N, C)``."""
    return np.cumsum(np.take_along_axis(y, ranking(s), axis=1), axis=1, dtype=np.int64)


def best_tags(s: Scores, K: int) -> Truth:
    """The K best classes of each image as predictions ``(N, C)``, whatever their score."""
    top = np.zeros(s.shape, np.bool_)
    np.put_along_axis(top, ranking(s)[:, :K], values=True, axis=1)
    return top


def group_ends(s: Scores) -> Truth:
    """Last place of each run of equal values along the last axis."""
    return np.concatenate([s[:, 1:] != s[:, :-1], np.ones((len(s), 1), np.bool_)], axis=1)


def ratio(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> Floats:
    """``part / whole``, NaN where the whole is 0."""
    out: Floats = np.full(np.shape(whole), np.nan)
    np.divide(part, whole, out=out, where=whole > 0)
    return out


def mean_of_defined(values: npt.NDArray[Any]) -> float:
    """Mean of what is defined; NaN where nothing is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")
