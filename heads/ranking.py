"""Metrics of a ranking: average precision, precision and recall of the K best tags.

Symbols: N images, C classes, K tags an image. What is undefined is NaN and is left out of means.
"""

from typing import Any

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
    return float(mean_of_defined(average_precision(scores, labels)))


def image_figures(s: Scores, y: Truth) -> dict[str, Floats]:
    """Figures whose mean over images is reported: ``mAP_sample``, and ``P@K`` and ``R@K`` for K in 1, 3, 5, 10.

    ``mAP_sample`` is the average precision of an image's ranking of classes; ``P@K = hits / K``, 0 for an image without
    a label; ``R@K = hits / tags``. Of equal scores the class of the lower index is taken. K above C takes all classes,
    and still divides by K. With the labels as scores, P and R are the most that any ranking could reach.

    Args:
        s: Scores ``(N, C)`` as of :func:`checked`.
        y: Labels ``(N, C)``, bool.

    Returns:
        ``(N,)`` float64 each; NaN for an image without a label, except for ``P@K``.
    """
    hits = np.cumsum(np.take_along_axis(y, _ranking(s), axis=1), axis=1, dtype=np.int64)
    tags = y.sum(axis=1)
    figures = {"mAP_sample": average_precision(s.T, y.T)}
    for K in TOP_KS:
        of_best = hits[:, min(K, y.shape[1]) - 1]
        figures |= {f"P@{K}": of_best / K, f"R@{K}": ratio(of_best, tags)}
    return figures


def checked(scores: Scores, labels: Labels) -> tuple[Scores, Truth]:
    """Check scores and labels ``(N, C)``, and return them with the labels as bool.

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


def _ranking(s: Scores) -> npt.NDArray[np.int64]:
    """Classes of each image, the best first, of equal scores the lower index."""
    return np.argsort(-s, axis=1, kind="stable")


def best_tags(s: Scores, K: int) -> Truth:
    """The K best classes of each image as predictions ``(N, C)``, whatever their score."""
    top = np.zeros(s.shape, np.bool_)
    np.put_along_axis(top, _ranking(s)[:, :K], values=True, axis=1)
    return top


def group_ends(s: Scores) -> Truth:
    """Last place of each run of equal values along the last axis."""
    return np.concatenate([s[:, 1:] != s[:, :-1], np.ones((len(s), 1), np.bool_)], axis=1)


def ratio(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> Floats:
    """``part / whole``, NaN where the whole is 0."""
    out: Floats = np.full(np.shape(whole), np.nan)
    np.divide(part, whole, out=out, where=whole > 0)
    return out


def mean_of_defined(values: npt.NDArray[Any], axis: int | None = None) -> Any:  # noqa: ANN401 - a number, or an array
    """Mean of the values that are defined, of all or along an axis; NaN where none is."""
    if axis is None:
        values = values[~np.isnan(values)]
    return ratio(np.nansum(values, axis=axis), np.sum(~np.isnan(values), axis=axis))
