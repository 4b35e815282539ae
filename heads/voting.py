"""Neighbours vote for tags.

Symbols: Q queries, K neighbours, C classes, s similarity, w weight of a vote, y labels, tau temperature, g members of
a group of equal distance.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, assert_never

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .config import KnnConfig, Vote
from .knn import build_index
from .neighbours import Neighbours, Packed, Rows, Soft, load_faiss

Labels = npt.NDArray[Any]
Weights = npt.NDArray[np.float64]
Scores = npt.NDArray[np.float32]

# Labels of so many neighbours are looked at together: they stay in the cache.
BLOCK_BYTES = 1 << 20
# Of rows that a range search returns at a time, twelve bytes each; every code of the index may be one.
RANGE_BYTES = 1 << 28


def weights(similarity: npt.NDArray[np.floating[Any]], strategy: Vote, *, tau: float, theta: float) -> Weights:
    """Weights of the votes of K neighbours, the nearest first; they sum to 1 for every query.

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
    match strategy:
        case "softmax":
            # The largest exponent is 0: nothing overflows, and the sum is at least 1.
            w = np.exp((s - s.max(axis=1, keepdims=True)) / tau)
        case "uniform":
            w = np.ones_like(s)
        case "rank":
            w = np.broadcast_to(1.0 / np.arange(1, s.shape[1] + 1), s.shape)
        case "threshold":
            w = (s >= theta).astype(np.float64)
            w[w.sum(axis=1) == 0, 0] = 1.0
        case _:
            assert_never(strategy)
    normalised: Weights = w / w.sum(axis=1, keepdims=True)
    return normalised


class Boundary(NamedTuple):
    """All codes at the distance of neighbour K of each query, whether they are among its neighbours or not.

    Attributes:
        size: g, how many they are ``(Q,)`` int64.
        labels: Sum of their labels ``(Q, C)`` int64.
    """

    size: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]


def vote(neighbours: Neighbours, labels: Labels, config: KnnConfig, boundary: Boundary | None = None) -> Scores:
    """Scores of every class: ``score_c = sum_i w_i y_ic`` in [0, 1], with the weights w of :func:`vote_weights`.

    Args:
        neighbours: The result of a search for at least K neighbours; only the first K vote.
        labels: Labels of the index ``(N, C)`` of 0 and 1.
        config: K, strategy, tau and theta.
        boundary: The groups of codes at the distance of neighbour K; with them the scores do not depend on the order
            of the index.

    Returns:
        ``(Q, C)`` float32, in class order. The scores of an image do not depend on the others of the batch.

    Raises:
        InputError: K is larger than the search's.
    """
    w = vote_weights(neighbours, config, boundary)
    index, distance = neighbours.index[:, : config.K], neighbours.distance[:, : config.K]
    if boundary is None:
        scores = _scores(index, w, labels)
    else:
        scores = _scores(index, np.where(distance == distance[:, -1:], 0.0, w), labels)
        scores += w[:, -1:] * boundary.labels
    return scores.clip(0.0, 1.0).astype(np.float32)


def vote_weights(neighbours: Neighbours, config: KnnConfig, boundary: Boundary | None = None) -> Weights:
    """The weight of each neighbour that votes ``(Q, K)`` float64.

    Without ``boundary`` these are the weights of :func:`weights`. With it, codes of equal distance share their votes
    equally: with w the weights by rank, and the ranks ``j <= K`` that the group of i's distance takes,
    ``w_i = sum_j w_j / g``, where g counts all members of the group, at the boundary those beyond K too. So uniform
    and softmax weights change at the boundary only, where r places are shared by g: each gets ``r / g`` of its vote.
    Ranks are averaged within every group. Where none reaches theta, all of the nearest distance share the one vote.
    Members of the group at the boundary that are not listed have the weight of the last one, so the sum may be below 1.

    Args:
        neighbours: The result of a search for at least K neighbours.
        config: K, strategy, tau and theta.
        boundary: The groups at the distance of neighbour K of a Hamming search.

    Raises:
        InputError: K is larger than the search's.
    """
    K, searched = config.K, neighbours.index.shape[1]
    if searched < K:
        raise InputError(
            "K is larger than the number of neighbours that were searched for",
            got=f"K {K}",
            wanted=f"1 to {searched}",
            do=f"search again with K {K} or more",
        )
    w = weights(neighbours.similarity[:, :K], config.voting_strategy, tau=config.tau, theta=config.theta)
    if boundary is None:
        return w
    distance = neighbours.distance[:, :K]
    last = distance == distance[:, -1:]
    share = np.where(last, w, 0.0).sum(axis=1) / boundary.size
    return np.where(last, share[:, None], _averaged(w, distance))


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
        tagged = np.flatnonzero(votes.view(np.bool_) if votes.dtype == np.uint8 else votes)
        vote_of, tag = np.divmod(tagged, C)
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


class BoundaryIndex:
    """Groups of codes at one distance, from FAISS's exhaustive range search over packed codes.

    Args:
        packed: ``(N, B // 8)`` uint8.
        labels: ``(N, C)`` of 0 and 1.
    """

    def __init__(self, packed: Packed, labels: Labels) -> None:
        self._labels, self._packed = labels, packed
        self._index = load_faiss().IndexBinaryFlat(8 * packed.shape[1])
        self._index.add(np.ascontiguousarray(packed))

    def groups(self, packed: Packed, distance: npt.NDArray[np.integer], exclude: Rows | None = None) -> Boundary:
        """All codes at a given distance of each query.

        Args:
            packed: Queries ``(Q, B // 8)`` uint8.
            distance: The distance of each query's group ``(Q,)``.
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
            sums[rows] = self._label_sums(query, index, len(rows))
        return Boundary(size, sums)

    def _blocks(self, distance: npt.NDArray[np.integer]) -> Iterator[tuple[Rows, int]]:
        """Queries of one distance, few enough that the rows in range fit into the memory."""
        step = max(1, RANGE_BYTES // (12 * len(self._packed)))
        for radius in np.unique(distance):
            rows = np.flatnonzero(distance == radius)
            for start in range(0, len(rows), step):
                yield rows[start : start + step], int(radius)

    def _label_sums(self, query: Rows, index: Rows, Q: int) -> npt.NDArray[np.int64]:
        """How often each tag occurs among the rows ``index`` of each of Q queries, ``query`` saying whose row it is."""
        C = self._labels.shape[1]
        sums = np.zeros(Q * C, np.int64)
        step = max(1, 16 * BLOCK_BYTES // max(C, 1))
        for start in range(0, len(index), step):
            rows = slice(start, start + step)
            place, tag = np.nonzero(self._labels[index[rows]])
            sums += np.bincount(query[rows][place] * C + tag, minlength=Q * C)
        return sums.reshape(Q, C)


@dataclass(kw_only=True)
class QueryNeighbours:
    """The neighbours of some queries, and the groups at their boundaries, each found when it is needed.

    Attributes:
        neighbours: The result of the search.
        packed: The queries' codes ``(Q, B // 8)``, if any.
        exclude: The row that each query left out, -1 for none; ``None`` where no query left one out.
        boundaries: Groups at the distance of neighbour K, by K.
    """

    neighbours: Neighbours
    packed: Packed | None
    exclude: Rows | None
    boundaries: dict[int, Boundary] = field(default_factory=dict)


class VotingIndex:
    """Codes with labels: the nearest of them vote for the tags of a query.

    Args:
        knn: Metric, index kind and ties.
        labels: Labels of the codes ``(N, C)`` of 0 and 1.
        packed: Hard codes ``(N, B // 8)`` uint8, ``None`` without hash layer.
        soft: Soft codes ``(N, F)`` float32.
        device: Where to search, a name that torch knows.

    Raises:
        InputError: The codes do not serve the metric, or the metric the ties.
    """

    def __init__(
        self, knn: KnnConfig, labels: Labels, *, packed: Packed | None, soft: Soft | None, device: str = "cpu"
    ) -> None:
        check_ties(knn)
        self.index = build_index(knn.distance_metric, packed=packed, soft=soft, kind=knn.index, device=device)
        self._labels, self._packed = labels, packed
        self._boundary_index: BoundaryIndex | None = None

    def search(
        self, K: int, *, packed: Packed | None, soft: Soft | None, exclude: Rows | None = None
    ) -> QueryNeighbours:
        """The K nearest of each query; the arguments are those of :meth:`mmcli.heads.neighbours.Index.search`."""
        nearest = self.index.search(K=K, packed=packed, soft=soft, exclude=exclude)
        return QueryNeighbours(neighbours=nearest, packed=packed, exclude=exclude)

    def vote(self, queries: QueryNeighbours, knn: KnnConfig) -> Scores:
        """Scores of every class ``(Q, C)``; the K of ``knn`` is at most that of the search."""
        return vote(queries.neighbours, self._labels, knn, self._shared(queries, knn))

    def weights(self, queries: QueryNeighbours, knn: KnnConfig) -> Weights:
        """The share of the vote that each neighbour has ``(Q, K)``."""
        return vote_weights(queries.neighbours, knn, self._shared(queries, knn))

    def boundary(self, queries: QueryNeighbours, K: int) -> Boundary:
        """The groups at the distance of neighbour K of a Hamming search; each K is searched for once."""
        if K not in queries.boundaries:
            assert queries.packed is not None
            assert self._packed is not None
            if self._boundary_index is None:
                self._boundary_index = BoundaryIndex(self._packed, self._labels)
            distance = queries.neighbours.distance[:, K - 1].astype(np.int32)
            queries.boundaries[K] = self._boundary_index.groups(queries.packed, distance, queries.exclude)
        return queries.boundaries[K]

    def _shared(self, queries: QueryNeighbours, knn: KnnConfig) -> Boundary | None:
        return self.boundary(queries, knn.K) if knn.ties == "average" else None


def check_ties(knn: KnnConfig) -> None:
    """Refuse shared ties of distances that do not tie.

    Raises:
        InputError: The metric is not Hamming.
    """
    if knn.ties == "average" and knn.distance_metric != "hamming":
        raise InputError(
            "only Hamming distances tie",
            where="--ties",
            got=f"average with metric {knn.distance_metric}",
            wanted="--metric hamming",
            do="leave --ties out: cosines are settled by index",
        )
