"""Votes against plain loops, and that weights are made after the cut to K."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcli import InputError
from mmcli.heads import voting
from mmcli.heads import voting as boundary
from mmcli.heads.config import KnnConfig
from mmcli.heads.knn import Neighbours, build_index
from mmcli.heads.voting import BoundaryIndex, vote, weights

STRATEGIES = ("softmax", "uniform", "rank", "threshold")


def make_case(seed: int, Q: int = 5, K: int = 6, N: int = 30, C: int = 7) -> tuple[Neighbours, np.ndarray]:
    rng = np.random.default_rng(seed)
    distance = np.sort(rng.integers(0, 17, (Q, K)), axis=1).astype(np.int32)
    index = rng.integers(0, N, (Q, K))
    labels = rng.integers(0, 2, (N, C)).astype(np.uint8)
    return Neighbours(index, (1 - distance / 16).astype(np.float32), distance), labels


def slow_weights(s: list[float], strategy: str, tau: float, theta: float) -> list[float]:
    if strategy == "softmax":
        raw = [math.exp(x / tau) for x in s]
    elif strategy == "uniform":
        raw = [1.0] * len(s)
    elif strategy == "rank":
        raw = [1 / (i + 1) for i in range(len(s))]
    else:
        raw = [float(x >= theta) for x in s]
        raw = raw if any(raw) else [1.0] + [0.0] * (len(s) - 1)
    return [x / sum(raw) for x in raw]


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(seed=st.integers(0, 2**32 - 1), K=st.integers(1, 6), tau=st.floats(0.03, 2), theta=st.floats(-1, 1))
def test_votes_equal_the_loop(strategy: str, seed: int, K: int, tau: float, theta: float) -> None:
    found, labels = make_case(seed)
    config = KnnConfig(K=K, voting_strategy=strategy, tau=tau, theta=theta)
    scores = vote(found, labels, config)
    for q in range(5):
        w = slow_weights(found.similarity[q, :K].tolist(), strategy, tau, theta)
        wanted = [sum(w[i] * labels[found.index[q, i], c] for i in range(K)) for c in range(7)]
        np.testing.assert_allclose(scores[q], wanted, rtol=1e-5, atol=1e-6)
    assert scores.dtype == np.float32
    assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(seed=st.integers(0, 2**32 - 1), tau=st.floats(1e-6, 1e3), theta=st.floats(-1, 1))
def test_weights_sum_to_one_and_fall(strategy: str, seed: int, tau: float, theta: float) -> None:
    found, _ = make_case(seed)
    w = weights(found.similarity, strategy, tau=tau, theta=theta)
    np.testing.assert_allclose(w.sum(axis=1), 1, rtol=1e-12)
    assert (w >= 0).all()
    assert (np.diff(w, axis=1) <= 1e-15).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_smaller_k_is_cut_before_the_weights(strategy: str) -> None:
    """One search at the largest K serves every smaller one, with weights that sum to 1 again."""
    found, labels = make_case(0, K=6)
    labels[:] = 1
    short = Neighbours(*(part[:, :3] for part in found))
    config = KnnConfig(K=3, voting_strategy=strategy, theta=0.2)
    np.testing.assert_array_equal(vote(found, labels, config), vote(short, labels, config))
    np.testing.assert_allclose(vote(found, labels, config), 1, rtol=1e-6)


def test_softmax_is_stable_and_threshold_falls_back() -> None:
    s = np.array([[0.9, 0.9, -1.0]])
    np.testing.assert_allclose(weights(s, "softmax", tau=1e-5, theta=0), [[0.5, 0.5, 0]])
    np.testing.assert_allclose(weights(s, "threshold", tau=1, theta=0.95), [[1, 0, 0]])
    np.testing.assert_allclose(weights(s, "threshold", tau=1, theta=0.9), [[0.5, 0.5, 0]])


def test_spec10_7_scores_stay_in_class_order() -> None:
    found = Neighbours(np.array([[0, 1]]), np.ones((1, 2), np.float32), np.zeros((1, 2), np.int32))
    labels = np.array([[0, 1, 0], [0, 1, 1]], np.uint8)
    assert vote(found, labels, KnnConfig(K=2)).tolist() == [[0.0, 1.0, 0.5]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scores_do_not_depend_on_the_batch(strategy: str) -> None:
    found, labels = make_case(1, Q=40, K=20)
    config = KnnConfig(voting_strategy=strategy)
    whole = vote(found, labels, config)
    for q in range(40):
        np.testing.assert_array_equal(
            vote(Neighbours(*(part[q : q + 1] for part in found)), labels, config)[0], whole[q]
        )


def test_what_cannot_vote_is_refused() -> None:
    found, labels = make_case(0)
    with pytest.raises(InputError, match=r"K 7, wanted 1 to 6"):
        vote(found, labels, KnnConfig(K=7))
    for bad in (np.full((1, 3), np.nan), np.zeros(3), np.zeros((3, 0))):
        with pytest.raises(ValueError, match="finite"):
            weights(bad, "softmax", tau=1, theta=0)


def test_no_loop_over_queries(count_calls) -> None:
    found, labels = make_case(0, Q=5000, K=20, N=5000, C=80)
    assert count_calls(lambda: vote(found, labels, KnnConfig())) < 1000


def shuffled(seed: int, N: int, bits: int = 8, C: int = 6, Q: int = 5) -> tuple[np.ndarray, ...]:
    """Codes with many ties, their labels, queries, and an order to put the index into."""
    rng = np.random.default_rng(seed)
    codes = np.packbits(rng.integers(0, 2, (N, bits)) & rng.integers(0, 2, (N, bits)), axis=1)
    return codes, rng.integers(0, 2, (N, C)).astype(np.uint8), codes[rng.integers(0, N, Q)], rng.permutation(N)


def shared(codes: np.ndarray, labels: np.ndarray, queries: np.ndarray, config: KnnConfig, exclude=None) -> np.ndarray:
    found = build_index("hamming", packed=codes).search(packed=queries, K=config.K, exclude=exclude)
    groups = BoundaryIndex(codes, labels).groups(queries, found.distance[:, -1], exclude)
    return vote(found, labels, config, groups)


def slow_shared(
    codes: np.ndarray, labels: np.ndarray, query: np.ndarray, config: KnnConfig, own: int = -1
) -> np.ndarray:
    """The mean of the plain vote over every order of equals: by groups, one rank at a time."""
    distance = np.bitwise_count(codes ^ query).sum(axis=1).astype(int)
    rows = sorted((r for r in range(len(codes)) if r != own), key=lambda r: distance[r])
    bits = 8 * codes.shape[1]
    nearest = [float(np.float32(1 - distance[r] / bits)) for r in rows[: config.K]]
    w = slow_weights(nearest, config.voting_strategy, config.tau, config.theta)
    scores = np.zeros(labels.shape[1])
    for rank, weight in enumerate(w):
        group = [r for r in rows if distance[r] == distance[rows[rank]]]
        scores += weight * labels[group].mean(axis=0)
    return scores


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), N=st.integers(2, 120), theta=st.floats(-1, 1), data=st.data())
def test_shared_votes_are_the_mean_over_orders(strategy, seed, N, theta, data) -> None:
    codes, labels, queries, order = shuffled(seed, N)
    config = KnnConfig(K=data.draw(st.integers(1, N - 1)), voting_strategy=strategy, tau=0.3, theta=theta)
    own = np.random.default_rng(seed).integers(-1, N, 5)
    for exclude in (None, own):
        scores = shared(codes, labels, queries, config, exclude)
        for q, query in enumerate(queries):
            wanted = slow_shared(codes, labels, query, config, -1 if exclude is None else exclude[q])
            np.testing.assert_allclose(scores[q], wanted, rtol=1e-5, atol=1e-6)
        moved = None if exclude is None else np.where(exclude < 0, -1, np.argsort(order)[exclude])
        np.testing.assert_array_equal(shared(codes[order], labels[order], queries, config, moved), scores)


def test_votes_by_index_do_depend_on_the_order() -> None:
    """What the shared votes are for."""
    codes, labels, queries, order = shuffled(0, 100)
    config = KnnConfig(K=10)
    scores = []
    for rows in (np.arange(100), order):
        found = build_index("hamming", packed=codes[rows]).search(packed=queries, K=10)
        scores.append(vote(found, labels[rows], config))
    assert np.abs(scores[0] - scores[1]).max() > 0.05


def test_shared_votes_are_plain_ones_where_nothing_ties() -> None:
    codes = np.array([[0b0], [0b1], [0b11], [0b111], [0b1111]], np.uint8)
    labels = np.eye(5, dtype=np.uint8)
    for strategy in STRATEGIES:
        config = KnnConfig(K=3, voting_strategy=strategy, theta=0.8)
        found = build_index("hamming", packed=codes).search(packed=codes[:1], K=3)
        np.testing.assert_allclose(shared(codes, labels, codes[:1], config), vote(found, labels, config), rtol=1e-6)


def test_a_group_in_numbers() -> None:
    """Two places for four equals: each gets half a vote of three."""
    codes = np.array([[1], [0], [2], [4], [8]], np.uint8)
    groups = BoundaryIndex(codes, np.eye(5, dtype=np.uint8)).groups(np.zeros((1, 1), np.uint8), np.array([1]))
    assert (groups.size.tolist(), groups.labels.tolist()) == ([4], [[1, 0, 1, 1, 1]])
    scores = shared(
        codes, np.eye(5, dtype=np.uint8), np.zeros((1, 1), np.uint8), KnnConfig(K=3, voting_strategy="uniform")
    )
    np.testing.assert_allclose(scores, [[1 / 6, 1 / 3, 1 / 6, 1 / 6, 1 / 6]], rtol=1e-6)


def test_groups_are_found_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, labels, queries, _ = shuffled(3, 90, Q=20)
    index, distance = BoundaryIndex(codes, labels), np.arange(20) % 4
    own = np.arange(20)
    whole = index.groups(queries, distance, own)
    monkeypatch.setattr(boundary, "RANGE_BYTES", 1)
    for a, b in zip(whole, index.groups(queries, distance, own), strict=True):
        np.testing.assert_array_equal(a, b)
    far = np.bitwise_count(queries[:, None] ^ codes).sum(-1).astype(int)
    far[np.arange(20), own] = -1
    np.testing.assert_array_equal(whole.size, (far == distance[:, None]).sum(axis=1))
    np.testing.assert_array_equal(whole.labels, (far == distance[:, None]).astype(np.int64) @ labels)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int64])
def test_blocks_and_kinds_of_labels_change_no_bit(monkeypatch: pytest.MonkeyPatch, dtype) -> None:
    found, labels = make_case(4, Q=40)
    whole = vote(found, labels, KnnConfig(K=6))
    monkeypatch.setattr(voting, "BLOCK_BYTES", 100)
    np.testing.assert_array_equal(vote(found, labels.astype(dtype), KnnConfig(K=6)), whole)
