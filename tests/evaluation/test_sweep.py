"""The plan of a sweep: every combination once, one search a metric, what does not matter left out."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcli.heads.config import KnnConfig
from mmcli.pipeline.evaluation.sweep import ALL, searches, split_values, sweep

VOTES, METRICS = ALL["voting_strategy"], ALL["distance_metric"]


def distinct(values) -> st.SearchStrategy:
    return st.lists(st.sampled_from(values), min_size=1, unique=True).map(tuple)


@given(distinct((1, 5, 20, 50)), distinct(METRICS), distinct(VOTES), distinct((0.03, 0.07, 0.2)), distinct((0.1, 0.5)))
def test_every_combination_that_matters_is_evaluated_once(K, metrics, votes, taus, thetas) -> None:
    base = KnnConfig(ties="index", top_n_tags=3)
    values = {"K": K, "distance_metric": metrics, "voting_strategy": votes, "tau": taus, "theta": thetas}
    groups = searches(
        sweep({key: [KnnConfig(**{key: value}) for value in listed] for key, listed in values.items()}, base)
    )
    assert tuple(configs[0].distance_metric for configs in groups) == metrics
    wanted = set()
    for metric, k, vote in product(metrics, K, votes):
        if vote == "softmax":
            wanted |= {(metric, k, vote, tau) for tau in taus}
        elif vote == "threshold":
            wanted |= {(metric, k, vote, theta) for theta in thetas}
        else:
            wanted.add((metric, k, vote, None))
    found = [
        (
            one.distance_metric,
            one.K,
            one.voting_strategy,
            {"softmax": one.tau, "threshold": one.theta}.get(one.voting_strategy),
        )
        for configs in groups
        for one in configs
    ]
    assert len(found) == len(set(found))
    assert set(found) == wanted
    for configs in groups:
        assert len({one.distance_metric for one in configs}) == 1
        assert all(one.top_n_tags == 3 for one in configs)


@pytest.mark.parametrize(
    ("key", "text", "values"),
    [
        ("K", "5,10, 20", ("5", "10", "20")),
        ("K", "20", ("20",)),
        ("K", "5,5,1", ("5", "1")),
        ("voting_strategy", "all", VOTES),
        ("distance_metric", " ALL ", METRICS),
        ("tau", "all", ("all",)),  # no choices: refused where it is parsed
    ],
)
def test_lists_are_split(key: str, text: str, values: tuple[str, ...]) -> None:
    assert split_values(key, text) == values


def test_what_is_not_listed_keeps_its_value() -> None:
    base = KnnConfig(K=7, tau=0.5)
    configs = sweep({"K": [KnnConfig(K=3), KnnConfig(K=9)]}, base)
    assert [(knn.K, knn.tau, knn.distance_metric) for knn in configs] == [(3, 0.5, "hamming"), (9, 0.5, "hamming")]
