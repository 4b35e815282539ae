"""Neighbours vote for tags.

Symbols: Q queries, K neighbours, C classes, s similarity, w weight of a vote, y labels, tau temperature, g members of
a group of equal distance.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .config import KnnConfig, Vote
from .neighbours import Neighbours, Packed, Rows, load_faiss

Labels = npt.NDArray[Any]
Weights = npt.NDArray[np.float64]

# Labels of so many neighbours are looked at together: they stay in the cache.
BLOCK_BYTES = 1 << 20


def weights(similarity: npt.NDArray[np.floating[Any]], strategy: Vote, *, tau: float, theta: float) -> Weights:
    """Weights of the votes of K neighbours, the nearest first; they sum to 1 for every query (SPEC section 8).

    - ``softmax``: ``w_i = exp(s_i / tau) / sum_j exp(s_j / tau)`` (as in Wu et al. 2018, eq. 5, normalised over K).
    - ``uniform``: ``w_i = 1 / K``.
    - ``rank``: ``w_i = (1 / i) / sum_j (1 / j)``, i from 1 (after Chiang, Lo, Lin 2012, who learn the weights).
    - ``threshold``: equal over the neighbours with ``s_i >= theta``; the nearest one alone where none qualifies.

    Args:
        similarity: s ``(Q, K)``, falling along K.
        strategy: One of the above.
        tau: Temperature of ``softmax``. It acts on ``1 - dist / B``, so ``tau * B`` is what it means in bits.
        theta: Least similarity of ``threshold``.

    Returns:
        w ``(Q, K)`` float64.

    Raises:
        ValueError: Similarities that are not finite, or not ``(Q, K)`` with K at least 1.
    """
    s = np.asarray(similarity, dtype=np.float64)
    if s.ndim != 2 or not s.shape[1] or not np.isfinite(s).all():
        raise ValueError(f"similarities must be finite and (Q, K) with K at least 1, got shape {s.shape}")
    if strategy == "softmax":
        # The largest exponent is 0: nothing overflows, and the sum is at least 1.
        w = np.exp((s - s.max(axis=1, keepdims=True)) / tau)
    elif strategy == "uniform":
        w = np.ones_like(s)
    elif strategy == "rank":
        w = np.broadcast_to(1.0 / np.arange(1, s.shape[1] + 1), s.shape)
    else:
        w = (s >= theta).astype(np.float64)
        w[w.sum(axis=1) == 0, 0] = 1.0
    normalised: Weights = w / w.sum(axis=1, keepdims=True)
    return normalised


def vote(neighbours: Neighbours, labels: Labels, config: KnnConfig, K: int | None = None) -> npt.NDArray[np.float32]:
    """Scores of every class: ``score_c = sum_i w_i y_ic`` in [0, 1].

    One search at the largest K serves every smaller one: neighbours beyond K are dropped before weights are made.

    Args:
        neighbours: Of a search with at least K neighbours.
        labels: Labels of the index ``(N, C)`` of 0 and 1.
        config: Strategy, tau and theta; and K where it is not given.
        K: Neighbours that vote.

    Returns:
        ``(Q, C)`` float32, in class order. The scores of an image do not depend on the others of the batch.

    Raises:
        InputError: K is larger than the search's.
    """
    K = _checked(config.K if K is None else K, neighbours)
    w = weights(neighbours.similarity[:, :K], config.voting_strategy, tau=config.tau, theta=config.theta)
    return _scores(neighbours.index[:, :K], w, labels).clip(0.0, 1.0).astype(np.float32)


def vote_shared(
    neighbours: Neighbours, labels: Labels, config: KnnConfig, boundary: "Boundary", K: int | None = None
) -> npt.NDArray[np.float32]:
    """Scores that do not depend on the order of the index: codes of equal distance share their votes equally.

    With w the weights of :func:`weights` by rank, and the ranks ``j <= K`` that the group of i's distance takes,
    ``w_i = sum_j w_j / g``, where g counts all members of the group: those beyond K too, at the boundary. So uniform
    and softmax weights change at the boundary only, where r places are shared by g: each gets ``r / g`` of its vote.
    Ranks are averaged within every group. Where none reaches theta, all of the nearest distance share the one vote.

    Args:
        neighbours: Of a Hamming search with at least K neighbours.
        labels: Labels of the index ``(N, C)`` of 0 and 1.
        config: As for :func:`vote`.
        boundary: The groups at the distance of neighbour K.
        K: Neighbours that vote.

    Returns:
        ``(Q, C)`` float32, the same to the last bit for every order of the index.

    Raises:
        InputError: K is larger than the search's.
    """
    w = shared_weights(neighbours, config, boundary, K)
    K = w.shape[1]
    distance = neighbours.distance[:, :K]
    scores = _scores(neighbours.index[:, :K], np.where(distance == distance[:, -1:], 0.0, w), labels)
    scores += w[:, -1:] * boundary.labels
    return scores.clip(0.0, 1.0).astype(np.float32)


def shared_weights(neighbours: Neighbours, config: KnnConfig, boundary: "Boundary", K: int | None = None) -> Weights:
    """The weight of each listed neighbour where ties share their votes, as of :func:`vote_shared`.

    Args:
        neighbours: As there.
        config: Likewise.
        boundary: Likewise.
        K: Likewise.

    Returns:
        ``(Q, K)`` float64. Members of the group at the boundary that are not listed have the weight of the last one, so
        the sum may be below 1.

    Raises:
        InputError: K is larger than the search's.
    """
    K = _checked(config.K if K is None else K, neighbours)
    distance = neighbours.distance[:, :K]
    w = weights(neighbours.similarity[:, :K], config.voting_strategy, tau=config.tau, theta=config.theta)
    last = distance == distance[:, -1:]
    share = np.where(last, w, 0.0).sum(axis=1) / boundary.size
    return np.where(last, share[:, None], _averaged(w, distance))


def label_sums(query: npt.NDArray[np.int64], index: npt.NDArray[np.int64], labels: Labels, Q: int) -> Any:  # noqa: ANN401
    """How often each tag stands among the rows of each query ``(Q, C)`` int64.

    Args:
        query: Whose row it is ``(n,)``, from 0 to Q - 1.
        index: The row ``(n,)``.
        labels: ``(N, C)`` of 0 and 1.
        Q: Queries.
    """
    C = labels.shape[1]
    sums = np.zeros(Q * C, np.int64)
    step = max(1, 16 * BLOCK_BYTES // max(C, 1))
    for start in range(0, len(index), step):
        rows = slice(start, start + step)
        place, tag = np.nonzero(labels[index[rows]])
        sums += np.bincount(query[rows][place] * C + tag, minlength=Q * C)
    return sums.reshape(Q, C)


def _checked(K: int, neighbours: Neighbours) -> int:
    searched = neighbours.index.shape[1]
    if not 1 <= K <= searched:
        raise InputError(
            "more votes than neighbours",
            got=f"K {K}",
            wanted=f"1 to {searched}, the neighbours searched for",
            do="search with the largest K",
        )
    return K


def _scores(index: npt.NDArray[np.int64], w: Weights, labels: Labels) -> Weights:
    """``sum_i w_i y_ic`` ``(Q, C)``.

    An image has few tags, so only those are added up, neighbour after neighbour: the order of the sum, and so its last
    bit, is the same for one query and for many.
    """
    (Q, K), C = index.shape, labels.shape[1]
    scores = np.zeros((Q, C))
    step = max(1, BLOCK_BYTES // max(1, K * C))
    for start in range(0, Q, step):
        part = index[start : start + step]
        votes = labels[part]
        # NumPy finds what is not zero faster among booleans, and a byte of 0 or 1 is one.
        found = np.flatnonzero(votes.view(np.bool_) if votes.dtype == np.uint8 else votes)
        vote_of, tag = np.divmod(found, C)
        cell = vote_of // K * C + tag
        added = np.bincount(cell, weights=w[start : start + step].reshape(-1)[vote_of], minlength=len(part) * C)
        scores[start : start + step] = added.reshape(-1, C)
    return scores


def _averaged(w: Weights, distance: npt.NDArray[Any]) -> Weights:
    """Each weight replaced by the mean of its group of equal distance; groups lie side by side."""
    Q, K = w.shape
    starts = np.ones((Q, K), np.bool_)
    starts[:, 1:] = distance[:, 1:] != distance[:, :-1]
    first = np.flatnonzero(starts)
    group = np.cumsum(starts.reshape(-1)) - 1
    size = np.diff(np.append(first, Q * K))
    mean = np.add.reduceat(np.ascontiguousarray(w).reshape(-1), first) / size if len(first) else w.reshape(-1)
    averaged: Weights = mean[group].reshape(Q, K)
    return averaged


# Of rows found at a time, twelve bytes each; every code of the index may be one.
RANGE_BYTES = 1 << 28


class Boundary(NamedTuple):
    """The group at the boundary of each query.

    Attributes:
        size: g, all codes at that distance ``(Q,)`` int64.
        labels: Sum of their labels ``(Q, C)`` int64.
    """

    size: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]


class BoundaryIndex:
    """Finds the groups by FAISS's range search over packed codes, exhaustively.

    Args:
        packed: ``(N, B // 8)`` uint8.
        labels: ``(N, C)`` of 0 and 1.
    """

    def __init__(self, packed: Packed, labels: Labels) -> None:
        self._labels, self._packed = labels, packed
        self._index = load_faiss().IndexBinaryFlat(8 * packed.shape[1])
        self._index.add(np.ascontiguousarray(packed))

    def groups(self, packed: Packed, distance: npt.NDArray[np.integer], exclude: Rows | None = None) -> Boundary:
        """The group of each query at a distance.

        Args:
            packed: Queries ``(Q, B // 8)`` uint8.
            distance: Of their groups ``(Q,)``.
            exclude: A row that takes no part ``(Q,)``, -1 for none.
        """
        size = np.zeros(len(packed), np.int64)
        sums = np.zeros((len(packed), self._labels.shape[1]), np.int64)
        for rows, radius in self._blocks(distance):
            limits, far, index = self._index.range_search(np.ascontiguousarray(packed[rows]), radius + 1)
            query = np.repeat(np.arange(len(rows)), np.diff(limits.astype(np.int64)))
            kept = far == radius
            if exclude is not None:
                kept &= index != exclude[rows][query]
            query, index = query[kept], index[kept]
            size[rows] = np.bincount(query, minlength=len(rows))
            sums[rows] = label_sums(query, index, self._labels, len(rows))
        return Boundary(size, sums)

    def _blocks(self, distance: npt.NDArray[np.integer]) -> Iterator[tuple[Rows, int]]:
        """Queries of one distance, few enough that whatever they find fits into the memory."""
        step = max(1, RANGE_BYTES // (12 * len(self._packed)))
        for radius in np.unique(distance):
            rows = np.flatnonzero(distance == radius)
            for start in range(0, len(rows), step):
                yield rows[start : start + step], int(radius)
