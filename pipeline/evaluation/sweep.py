"""What is to be searched and evaluated, worked out beforehand: one search a metric serves every K, vote and tau.

Nothing here reads or computes; the command line and the table both rest on it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, get_args

from ...heads.config import APPROXIMATE_KINDS, HYBRID_CANDIDATES, KnnConfig, Metric, Vote

# Keys of the knn section that take several values; and the choices that `all` stands for.
LISTED = ("K", "distance_metric", "voting_strategy", "tau", "theta")
ALL: dict[str, tuple[str, ...]] = {"distance_metric": get_args(Metric), "voting_strategy": get_args(Vote)}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Values of each key, in the order in which they are shown; one where none was listed."""

    K: tuple[int, ...]
    distance_metric: tuple[Metric, ...]
    voting_strategy: tuple[Vote, ...]
    tau: tuple[float, ...]
    theta: tuple[float, ...]


class Search(NamedTuple):
    """One search and what is evaluated of it.

    Attributes:
        metric: How neighbours are found.
        K: The most neighbours that any evaluation needs.
        evaluations: Each with its K, vote, tau and theta.
    """

    metric: Metric
    K: int
    evaluations: tuple[KnnConfig, ...]


def split_values(key: str, text: str) -> tuple[str, ...]:
    """The values of ``a,b,c`` in order, each once; ``all`` where the key has choices.

    Args:
        key: One of :data:`LISTED`.
        text: As it was given.
    """
    if text.strip().lower() == "all" and key in ALL:
        return ALL[key]
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def sweep_of(configs: Mapping[str, Sequence[KnnConfig]], base: KnnConfig) -> Sweep:
    """Collect the values of listed keys, each checked in a configuration of its own.

    Args:
        configs: For each listed key one configuration a value.
        base: Gives the value of every other key.
    """
    values: dict[str, Any] = {
        key: tuple(dict.fromkeys(getattr(one, key) for one in configs.get(key, (base,)))) for key in LISTED
    }
    return Sweep(**values)


def plan(sweep: Sweep, base: KnnConfig) -> tuple[Search, ...]:
    """Every combination once: tau matters to softmax votes alone, theta to threshold votes alone.

    Args:
        sweep: Values of the keys.
        base: Everything else.

    Returns:
        One search a metric, more where :func:`own_search` says so, with its evaluations ordered by K, vote, tau, theta
        as listed.
    """
    searches: dict[tuple[Metric, int], list[KnnConfig]] = {}
    for metric in sweep.distance_metric:
        evaluations = [
            base.model_copy(
                update={"K": K, "distance_metric": metric, "voting_strategy": vote, "tau": tau, "theta": theta}
            )
            for K, vote in product(sweep.K, sweep.voting_strategy)
            for tau in (sweep.tau if vote == "softmax" else (base.tau,))
            for theta in (sweep.theta if vote == "threshold" else (base.theta,))
        ]
        for one in evaluations:
            searches.setdefault((metric, own_search(one)), []).append(one)
    return tuple(Search(metric, max(one.K for one in found), tuple(found)) for (metric, _), found in searches.items())


def own_search(knn: KnnConfig) -> int:
    """K where its neighbours are not the first of a search for more, else 0.

    A hybrid search reranks as many candidates as it is asked for neighbours, a fixed number at least; approximate
    indexes look further for more.
    """
    approximate = knn.index in APPROXIMATE_KINDS and knn.distance_metric in ("hamming", "hybrid")
    reranked = knn.distance_metric == "hybrid" and knn.K > HYBRID_CANDIDATES
    return knn.K if approximate or reranked else 0
