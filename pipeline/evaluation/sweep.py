"""The evaluations of a table, worked out beforehand: one search a metric serves every K, vote and tau.

Nothing here reads or computes; the command line and the table both rest on it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, get_args

from ...heads.config import HYBRID_CANDIDATES, KnnConfig, Metric, Vote

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


def split_values(key: str, text: str) -> tuple[str, ...]:
    """The values of ``a,b,c`` in order, each once; ``all`` where the key has choices.

    Args:
        key: One of :data:`LISTED`.
        text: The option's value.
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
        key: tuple(dict.fromkeys(getattr(config, key) for config in configs.get(key, (base,)))) for key in LISTED
    }
    return Sweep(**values)


def plan(sweep: Sweep, base: KnnConfig) -> list[list[KnnConfig]]:
    """Every combination once, by search: tau matters to softmax votes alone, theta to threshold votes alone.

    Args:
        sweep: Values of the keys.
        base: Everything else.

    Returns:
        The configurations of each search, ordered by K, vote, tau and theta as listed.
    """
    return searches(
        base.model_copy(update={"K": K, "distance_metric": metric, "voting_strategy": vote, "tau": tau, "theta": theta})
        for metric, K, vote in product(sweep.distance_metric, sweep.K, sweep.voting_strategy)
        for tau in (sweep.tau if vote == "softmax" else (base.tau,))
        for theta in (sweep.theta if vote == "threshold" else (base.theta,))
    )


def searches(configs: Iterable[KnnConfig]) -> list[list[KnnConfig]]:
    """Configurations grouped by the search that serves them, in the order in which they first occur."""
    groups: dict[tuple[Metric, int], list[KnnConfig]] = {}
    for config in configs:
        groups.setdefault(search_key(config), []).append(config)
    return list(groups.values())


def search_key(knn: KnnConfig) -> tuple[Metric, int]:
    """What a search depends on: the metric, and K where the K nearest are not the first of a search for more, else 0.

    A hybrid search reranks as many candidates as it is asked for neighbours, a fixed number at least.
    """
    reranked = knn.distance_metric == "hybrid" and knn.K > HYBRID_CANDIDATES
    return knn.distance_metric, knn.K if reranked else 0
