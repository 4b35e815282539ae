"""Bootstrap over test images: how far a figure may be off, and whether two methods differ (docs/metrics.md).

Symbols: N images, C classes, R resamples, W weights (how often each image was drawn), K tags an image.

A resample draws N of the N images with replacement. It is never built: every figure is computed from W. Ranks do not
change with W, so each class is sorted once, and every resample is two cumulative sums over that order.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from .metrics import count_figures
from .ranking import (
    TAGS_OF_TOP,
    Floats,
    Labels,
    Scores,
    Truth,
    best_tags,
    checked,
    group_ends,
    image_figures,
    mean_of_defined,
    ratio,
)

Weights = npt.NDArray[np.float32]
Threshold = float | Floats
T = TypeVar("T")

RESAMPLES = 1000
SEED = 42
LEVEL = 0.95
# Resamples at a time: the weights of all images are one short row each, which the caches hold.
CHUNK = 64
MOST_THREADS = 8


class Interval(NamedTuple):
    """A percentile interval, and how many resamples had no such figure and were left out."""

    low: float
    high: float
    n_undefined: int


class Difference(NamedTuple):
    """Interval of ``A - B``, and the two-sided p of no difference; NaN where no resample has the figure."""

    low: float
    high: float
    p: float


def resample(
    scores: Scores,
    labels: Labels,
    thresholds: Mapping[str, Threshold] | None = None,
    *,
    n: int = RESAMPLES,
    seed: int = SEED,
) -> dict[str, Floats]:
    """Figures of ``n`` resamples of the images.

    Every figure is what :func:`~mmcli.heads.metrics.evaluate` would say of the resampled arrays. Classes and images
    that are undefined in a resample are left out of its means: a class that lost its positives has no AP there.

    Args:
        scores: ``(N, C)`` in class order.
        labels: ``(N, C)`` of 0 and 1.
        thresholds: By the ending of the keys; each one for all classes, or one a class ``(C,)``. They are not tuned
            again: where they come from another split, they are as fixed as the scores are.
        n: Resamples, R.
        seed: Seed of the draws. These depend on N, n and the seed alone, so two score sets of the same images are
            resampled alike.

    Returns:
        ``(R,)`` float64 each: ``mAP, mAP_sample, P@K, R@K``, and with every ending, and with ``@3``, ``F1_micro,
        F1_macro, CP, CR, CF1, OP, OR, OF1, hamming_loss``. NaN where undefined.

    Raises:
        ValueError: As :func:`~mmcli.heads.ranking.average_precision`.
    """
    s, y = checked(scores, labels)
    predictions = {end: s >= threshold for end, threshold in ({"": 0.5} if thresholds is None else thresholds).items()}
    predictions[f"@{TAGS_OF_TOP}"] = best_tags(s, TAGS_OF_TOP)
    truth = y.astype(np.float32)
    marks = {end: (part.astype(np.float32), (part & y).astype(np.float32)) for end, part in predictions.items()}
    classes, images = [_RankedClass(s[:, c], y[:, c]) for c in range(s.shape[1])], image_figures(s, y)
    columns = np.stack(list(images.values()), axis=1)
    values, defined = np.nan_to_num(columns), ~np.isnan(columns)

    def figures(W: Weights) -> dict[str, Floats]:
        AP = np.stack([ranked.average_precision(W) for ranked in classes])
        w = W.T.astype(np.float64)
        means = ratio(w @ values, w @ defined)
        result = {"mAP": mean_of_defined(AP, axis=0)} | dict(zip(images, means.T, strict=True))
        # Whole numbers below 2^24 are exact in float32.
        n_true = (W.T @ truth).astype(np.float64)
        for ending, (predicted, right) in marks.items():
            n_predicted, tp = ((W.T @ part).astype(np.float64) for part in (predicted, right))
            counted = count_figures((tp, n_predicted, n_true), y.size)
            result |= {f"{key}{ending}": value for key, value in counted.items()}
        return result

    chunks = _in_chunks(figures, len(s), n, seed)
    return {key: np.concatenate([part[key] for part in chunks]) for key in chunks[0]}


def resample_classes(scores: Scores, labels: Labels, *, n: int = RESAMPLES, seed: int = SEED) -> Floats:
    """AP of every class ``(R, C)`` in the very resamples of :func:`resample`; its mean over classes is the ``mAP``.

    The arguments are those of :func:`resample`. NaN where a class has no positive.
    """
    s, y = checked(scores, labels)
    classes = [_RankedClass(s[:, c], y[:, c]) for c in range(s.shape[1])]

    def figures(W: Weights) -> Floats:
        return np.stack([ranked.average_precision(W) for ranked in classes], axis=1)

    return np.concatenate(_in_chunks(figures, len(s), n, seed))


def _in_chunks(figures: Callable[[Weights], T], N: int, n: int, seed: int) -> list[T]:
    """The results of ``figures`` for the weights of every chunk of n resamples of N images."""

    def chunk(start: int) -> T:
        return figures(draw(N, min(CHUNK, n - start), seed=(seed, start)))

    return in_threads(chunk, range(0, n, CHUNK))


def in_threads(compute: Callable[[int], T], starts: Iterable[int]) -> list[T]:
    """The results of ``compute`` for every start, from a pool of threads that keep BLAS on one thread each.

    Where BLAS has threads too, they and those of the pool wait for each other in loops that burn a core: on two cores
    the bootstrap of 5,000 images took ten times the processor time.
    """
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(compute, starts))


def draw(N: int, n: int, *, seed: int | tuple[int, ...]) -> Weights:
    """How often each of N images is drawn in each of n resamples, ``(N, n)`` float32; every column sums to N."""
    drawn = np.random.default_rng(seed).integers(0, N, (N, n))
    counts = np.bincount((drawn * n + np.arange(n)).reshape(-1), minlength=N * n)
    return counts.reshape(N, n).astype(np.float32)


def interval(values: Floats, *, figure: float | None = None) -> Interval:
    """The bias-corrected percentile interval (Efron and Tibshirani 1993, sections 10.2 and 13.3).

    Its ends are the 2.5% and 97.5% quantiles of the defined resampled values, after the bootstrap's estimate of its own
    bias was subtracted: with a handful of positives a class, an image that is drawn twice raises AP, and the plain
    percentiles may lie wholly above the metric.

    Args:
        values: The metric on every resample ``(R,)``.
        figure: The metric on the original images; without it no bias is subtracted.
    """
    defined = values[~np.isnan(values)]
    if not len(defined):
        return Interval(float("nan"), float("nan"), len(values))
    low, high = np.quantile(_moved(defined, figure), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high), len(values) - len(defined))


def _moved(values: Floats, figure: float | None) -> Floats:
    """The resampled values, shifted so that their mean is the metric on the original images."""
    return values if figure is None else values - (values.mean() - figure)


def difference(a: Floats, b: Floats, *, figure: float | None = None) -> Difference:
    """Paired bootstrap of ``A - B`` over resamples that both were computed from.

    ``p = min(1, 2 (1 + min(#{d <= 0}, #{d >= 0})) / (R + 1))`` is the two-sided p-value of the percentile
    interval (Efron and Tibshirani 1993, section 15.4); the added 1 keeps it above 0 (Davison and Hinkley 1997, section
    4.2). Where it is below 0.05 the 95% interval excludes 0.

    Args:
        a: The metric of A on every resample ``(R,)``.
        b: The metric of B on the same resamples.
        figure: ``A - B`` on the original images; without it no bias is subtracted.

    Raises:
        ValueError: Other numbers of resamples.
    """
    if a.shape != b.shape:
        raise ValueError(f"{a.shape} and {b.shape} are not of the same resamples")
    d = (a - b)[~np.isnan(a - b)]
    if not len(d):
        return Difference(float("nan"), float("nan"), float("nan"))
    d = _moved(d, figure)
    low, high, _ = interval(d)
    one_sided = (1 + min(int((d <= 0).sum()), int((d >= 0).sum()))) / (len(d) + 1)
    return Difference(low, high, min(1.0, 2 * one_sided))


class _RankedClass:
    """The images of a class, sorted once; its average precision under any weights.

    Precision is only needed at the end of each group of equal scores that holds a positive, so images between two such
    ends are summed in one go, and images after the last one are never looked at.
    """

    def __init__(self, s: Scores, y: Truth) -> None:
        order = np.argsort(-s, kind="stable")
        ends = np.flatnonzero(group_ends(s[order][None])[0])
        positives = np.flatnonzero(y[order])
        group = np.searchsorted(ends, positives)
        used, first = np.unique(group, return_index=True)
        stops = ends[used] + 1
        self._images, self._starts = order[: stops[-1] if len(stops) else 0], np.concatenate([[0], stops[:-1]])
        self._positives, self._firsts = order[positives], first

    def average_precision(self, W: Weights) -> Floats:
        """Tie-aware, ``(R,)`` float64 for W ``(N, R)``; NaN where no positive was drawn."""
        if not len(self._positives):
            return np.full(W.shape[1], np.nan)
        drawn = np.add.reduceat(W[self._positives], self._firsts, axis=0)
        hits = np.cumsum(drawn, axis=0, dtype=np.float64)
        ranked = np.cumsum(np.add.reduceat(W[self._images], self._starts, axis=0), axis=0, dtype=np.float64)
        precision = np.divide(hits, ranked, out=np.zeros_like(hits), where=ranked > 0)
        return ratio((drawn * precision).sum(axis=0), hits[-1])


def mean_difference(a: Sequence[Floats], b: Sequence[Floats], *, figure: float) -> Difference:
    """Paired bootstrap of the mean over seeds of A less that of B: images are resampled, seeds are not.

    Resample r draws the same images for every seed and for both, so what all of them find hard cancels. The interval
    is that of these seeds' mean; how far seeds differ among themselves is not in it, and is to be shown beside it.

    Args:
        a: A figure of A in every resample, ``(R,)`` for each seed.
        b: The metric of every seed of B on the same resamples; its seeds may be others, or of another number.
        figure: ``A - B`` of the images as they are, means over seeds.

    Raises:
        ValueError: No seed of one of them, or other numbers of resamples.
    """
    if not a or not b:
        raise ValueError("no seed of one of the two")
    return difference(np.mean(np.stack(a), axis=0), np.mean(np.stack(b), axis=0), figure=figure)
