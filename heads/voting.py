"""Neighbours vote for tags.

Symbols: Q queries, K neighbours, C classes, s similarity, w weight of a vote, y labels, tau temperature.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from .. import InputError
from .config import KnnConfig, Vote
from .knn import Neighbours


def weights(
    similarity: npt.NDArray[np.floating[Any]], strategy: Vote, *, tau: float, theta: float
) -> npt.NDArray[np.float64]:
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
    normalised: npt.NDArray[np.float64] = w / w.sum(axis=1, keepdims=True)
    return normalised


def vote(
    neighbours: Neighbours, labels: npt.NDArray[Any], config: KnnConfig, K: int | None = None
) -> npt.NDArray[np.float32]:
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
    K = config.K if K is None else K
    searched = neighbours.index.shape[1]
    if not 1 <= K <= searched:
        raise InputError(
            "more votes than neighbours", got=f"K {K}", wanted=f"1 to {searched}, the neighbours searched for",
            do="search with the largest K",
        )  # fmt: skip
    w = weights(neighbours.similarity[:, :K], config.voting_strategy, tau=config.tau, theta=config.theta)
    scores = np.zeros((len(w), labels.shape[1]))
    # Neighbour after neighbour: the order of the sum, and so its last bit, is the same for one query and for many.
    for rank in range(K):
        scores += w[:, rank, None] * labels[neighbours.index[:, rank]]
    return scores.clip(0.0, 1.0).astype(np.float32)
