"""The evaluations of a table, worked out beforehand: one search a metric serves every K, vote and tau.

Nothing here reads or computes; the command line and the table both rest on it.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import get_args

from ...heads.config import HYBRID_CANDIDATES, VOTE_PARAMETER, KnnConfig, Metric, Vote

# Keys of the knn section that take several values; and the choices that `all` stands for.
LISTED = ("K", "distance_metric", "voting_strategy", "tau", "theta")
ALL: dict[str, tuple[str, ...]] = {"distance_metric": get_args(Metric), "voting_strategy": get_args(Vote)}


def split_values(key: str, text: str) -> tuple[str, ...]:
    """The values of ``a,b,c`` in order, each once; ``all`` where the key has choices.

    Args:
        key: One of :data:`LISTED`.
        text: The option's value.
    """
    if text.strip().lower() == "all" and key in ALL:
        return ALL[key]
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def sweep(values: Mapping[str, Sequence[KnnConfig]], base: KnnConfig) -> list[KnnConfig]:
    """Every combination of listed values once: tau matters to softmax votes alone, theta to threshold votes alone.

    Args:
        values: For each listed key one configuration a value, which was checked with it.
        base: Gives the value of every other key.

    Returns:
        One configuration an evaluation, ordered by metric, K, vote, tau and theta as listed.
    """
    K, metrics, votes, taus, thetas = (
        dict.fromkeys(getattr(config, key) for config in values.get(key, (base,))) for key in LISTED
    )
    return [
        base.model_copy(update={"K": k, "distance_metric": metric, "voting_strategy": vote, "tau": tau, "theta": theta})
        for metric, k, vote in product(metrics, K, votes)
        for tau in (taus if VOTE_PARAMETER.get(vote) == "tau" else (base.tau,))
        for theta in (thetas if VOTE_PARAMETER.get(vote) == "theta" else (base.theta,))
    ]


def searches(configs: Iterable[KnnConfig]) -> list[list[KnnConfig]]:
    """Configurations grouped by the search that serves them, in the order in which they first occur."""
    groups: dict[tuple[Metric, int], list[KnnConfig]] = {}
    for config in configs:
        groups.setdefault(search_key(config), []).append(config)
    return list(groups.values())


def search_key(knn: KnnConfig) -> tuple[Metric, int]:
    """The key of a search: its metric, and its K where the K nearest are not the first of a search for more, else 0.

    A hybrid search reranks as many candidates as it is asked for neighbours, a fixed number at least.
    """
    reranked = knn.distance_metric == "hybrid" and knn.K > HYBRID_CANDIDATES
    return knn.distance_metric, knn.K if reranked else 0
