"""Hashing's own figures: how good the codes are for finding images that share a tag.

Symbols: Q queries, N images of the base, C classes, B bits, K results, r radius, b packed code, y labels.

An image of the base is relevant to a query when both have a tag in common. Results stand by (distance, then index).
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .bootstrap import RESAMPLES, SEED, draw, in_threads, interval
from .ranking import Floats, ratio

Packed = npt.NDArray[np.uint8]
Labels = npt.NDArray[Any]
Words = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]

TOP = 5000
RADIUS = 2
# Queries at a time, and images of the base at a time: what is computed for a pair stays in the caches.
QUERY_CHUNK = 64
BASE_CHUNK = 8192


class Retrieval(NamedTuple):
    """The figures of each query.

    Attributes:
        average_precision: Average precision over the K nearest ``(Q,)``; NaN where nothing in the base is relevant.
        within: Images within each radius ``(Q, B + 1)``.
        relevant_within: Relevant ones among them ``(Q, B + 1)``; the last column is all that are relevant.
    """

    average_precision: Floats
    within: Counts
    relevant_within: Counts


def retrieve(
    query_codes: Packed, query_labels: Labels, base_codes: Packed, base_labels: Labels, *, K: int = TOP
) -> Retrieval:
    """Rank the base for every query, by Hamming distance, then index.

    ``AP = 1/n sum_k P(k) rel(k)`` over ranks k up to K, n the relevant images **among the K nearest**, as toolboxes of
    deep hashing define it (after HashNet, Cao et al. 2017); 0 where none of these is relevant.

    Args:
        query_codes: ``(Q, B / 8)`` uint8.
        query_labels: ``(Q, C)`` of 0 and 1.
        base_codes: ``(N, B / 8)`` uint8.
        base_labels: ``(N, C)`` of 0 and 1.
        K: Results that count; all of a base that is smaller.

    Raises:
        ValueError: Shapes that do not fit each other, codes that are not uint8, nothing to search, or K below 1.
    """
    _check(query_codes, query_labels, base_codes, base_labels, K)
    base = _Base(base_codes, base_labels)
    words, tags = _words(query_codes), query_labels.astype(np.float32)

    def chunk(start: int) -> Retrieval:
        rows = slice(start, start + QUERY_CHUNK)
        return base.search(words[rows], tags[rows], min(K, len(base_codes)))

    parts = in_threads(chunk, range(0, len(words), QUERY_CHUNK))
    return Retrieval(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def retrieval_row(
    query_codes: Packed, query_labels: Labels, base_codes: Packed, base_labels: Labels, *, K: int = TOP
) -> dict[str, Any]:
    """The figures of :func:`retrieve` for a row of metrics.

    Queries to which nothing in the base is relevant are left out of all of them, and counted.

    The arguments are those of :func:`retrieve`.

    Returns:
        ``retrieval_mAP@5000`` (or another K); ``precision_radius_2``, in which a query without an image that near
        counts 0, and ``n_queries_empty_radius_2``; ``radius_precision`` and ``radius_recall``, lists over radii 0..B,
        means over queries with the same convention; ``n_queries_without_relevant``; and ``retrieval_ci``, the 95%
        bootstrap interval over queries of the first two. Undefined figures are None.

    Raises:
        ValueError: As :func:`retrieve`.
    """
    AP, within, relevant = retrieve(query_codes, query_labels, base_codes, base_labels, K=K)
    kept = ~np.isnan(AP)
    AP, within, relevant = AP[kept], within[kept], relevant[kept]
    precision = np.nan_to_num(ratio(relevant, within))
    recall = ratio(relevant, np.broadcast_to(relevant[:, -1:], relevant.shape))
    radius = min(RADIUS, within.shape[1] - 1)

    def mean(values: Floats) -> float | None:
        return float(values.mean()) if len(values) else None

    each = {f"retrieval_mAP@{K}": AP, f"precision_radius_{RADIUS}": precision[:, radius]}
    return {
        **{key: mean(values) for key, values in each.items()},
        f"n_queries_empty_radius_{RADIUS}": int((within[:, radius] == 0).sum()),
        "n_queries_without_relevant": int((~kept).sum()),
        "radius_precision": precision.mean(axis=0).tolist() if kept.any() else None,
        "radius_recall": recall.mean(axis=0).tolist() if kept.any() else None,
        "retrieval_ci": {key: _interval(values) for key, values in each.items()} if kept.any() else {},
    }


class _Base:
    """The images that are searched, in words of 64 bits."""

    def __init__(self, codes: Packed, labels: Labels) -> None:
        self._words, self._bits = _words(codes), 8 * codes.shape[1]
        self._tags = np.ascontiguousarray(labels.T, dtype=np.float32)
        # One number orders by distance, then index, and carries in its last bit whether the image is relevant.
        small = (self._bits + 1) * 2 * len(codes) < 2**32
        self._key: type[np.unsignedinteger[Any]] = np.uint32 if small else np.uint64
        self._places = 2 * np.arange(len(codes), dtype=self._key)

    def search(self, words: Words, tags: npt.NDArray[np.float32], K: int) -> Retrieval:
        """Rank all images for some queries."""
        Q, N, bins = len(words), len(self._words), 2 * (self._bits + 1)
        keys = np.empty((Q, N), self._key)
        counts = np.zeros((Q, bins), np.int64)
        offsets = bins * np.arange(Q, dtype=np.intp)[:, None]
        for start in range(0, N, BASE_CHUNK):
            part = slice(start, start + BASE_CHUNK)
            relevant = tags @ self._tags[:, part] > 0
            distance = _distances(words, self._words[part])
            # The two bins of one distance stand together, the relevant images in the second.
            binned = (2 * distance + relevant + offsets).reshape(-1)
            counts += np.bincount(binned, minlength=Q * bins).reshape(Q, bins)
            np.multiply(distance, 2 * N, out=keys[:, part], dtype=self._key)
            keys[:, part] += self._places[part]
            keys[:, part] |= relevant
        relevant_within = counts[:, 1::2].cumsum(axis=1)
        within = counts[:, ::2].cumsum(axis=1) + relevant_within
        AP = _average_precision(keys, K)
        return Retrieval(np.where(relevant_within[:, -1] > 0, AP, np.nan), within, relevant_within)


def _average_precision(keys: npt.NDArray[np.unsignedinteger[Any]], K: int) -> Floats:
    """Average precision over the K least keys of each row, which are reordered; 0 where none of them is relevant."""
    keys.partition(K - 1, axis=1)
    relevant = (np.sort(keys[:, :K], axis=1) & 1).astype(np.bool_)
    hits = np.cumsum(relevant, axis=1, dtype=np.int64)
    precision = np.where(relevant, hits / np.arange(1, K + 1), 0.0)
    return np.nan_to_num(ratio(precision.sum(axis=1), hits[:, -1]))


def _distances(queries: Words, base: Words) -> npt.NDArray[np.uint16]:
    """Hamming distances of all pairs ``(Q, n)``."""
    distance = np.zeros((len(queries), len(base)), np.uint16)
    for w in range(queries.shape[1]):
        distance += np.bitwise_count(queries[:, w, None] ^ base[:, w])
    return distance


def _words(packed: Packed) -> Words:
    """Codes as words of 64 bits ``(N, W)``; bits that fill up the last one are equal in all, and cost no distance."""
    filled = np.zeros((len(packed), -(-packed.shape[1] // 8) * 8), np.uint8)
    filled[:, : packed.shape[1]] = packed
    return filled.view(np.uint64)


def _interval(values: Floats) -> list[float]:
    """95% bootstrap interval of the mean over queries."""
    means = values @ draw(len(values), RESAMPLES, seed=SEED) / len(values)
    low, high, _ = interval(means, figure=float(values.mean()))
    return [low, high]


def _check(query_codes: Packed, query_labels: Labels, base_codes: Packed, base_labels: Labels, K: int) -> None:
    for name, codes, labels in (("query", query_codes, query_labels), ("base", base_codes, base_labels)):
        if codes.dtype != np.uint8 or codes.ndim != 2 or labels.ndim != 2 or len(codes) != len(labels):
            raise ValueError(
                f"{name} codes: wanted (n, B / 8) uint8, labels (n, C), got {codes.shape} {codes.dtype}, {labels.shape}"
            )
    widths = query_codes.shape[1], base_codes.shape[1], query_labels.shape[1], base_labels.shape[1]
    if widths[0] != widths[1] or widths[2] != widths[3] or 0 in widths or not len(query_codes) or not len(base_codes):
        shapes = [array.shape for array in (query_codes, query_labels, base_codes, base_labels)]
        raise ValueError(f"queries and base must have images, bits and classes in common, got shapes {shapes}")
    if K < 1:
        raise ValueError(f"K must be at least 1, got {K}")
