"""Retrieval against a slow reference that follows the definition of the deep-hashing toolboxes, ties included."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcli.heads import retrieval
from mmcli.heads.retrieval import retrieval_row, retrieve


def make(seed: int, Q: int, N: int, bits: int, C: int, density: float):
    """Codes of few distinct bits, so that most distances tie; some images without a tag."""
    rng = np.random.default_rng(seed)
    few = np.zeros(bits, bool)
    few[rng.choice(bits, min(bits, 5), replace=False)] = True
    codes = [np.packbits((rng.random((n, bits)) < 0.5) & few, axis=1) for n in (Q, N)]
    labels = [(rng.random((n, C)) < density).astype(np.uint8) for n in (Q, N)]
    return codes[0], labels[0], codes[1], labels[1]


cases = st.builds(
    make,
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from([8, 24, 64, 72, 128]),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.1, 0.3, 1.0]),
)


def slow(q, ql, b, bl, K: int) -> list[tuple[list[int], list[int]]]:
    """For each query the distances and the relevance of the whole base, ranked by (distance, index)."""
    ranked = []
    for code, tags in zip(q, ql, strict=True):
        distance = [sum(bin(int(x) ^ int(y)).count("1") for x, y in zip(code, other, strict=True)) for other in b]
        relevant = [int(any(x and y for x, y in zip(tags, other, strict=True))) for other in bl]
        order = sorted(range(len(b)), key=lambda i: (distance[i], i))
        ranked.append(([distance[i] for i in order], [relevant[i] for i in order]))
    return ranked


@settings(max_examples=30)
@given(cases, st.sampled_from([1, 3, 10, 100]))
def test_every_figure_equals_the_loop(case, K: int) -> None:
    row, B = retrieval_row(*case, K=K), 8 * case[0].shape[1]
    APs, within2, empty, curve, without = [], [], 0, [], 0
    for distance, relevant in slow(*case, K):
        if not any(relevant):
            without += 1
            continue
        at = [rank for rank, hit in enumerate(relevant[:K], 1) if hit]
        APs.append(np.mean([number / rank for number, rank in enumerate(at, 1)]) if at else 0.0)
        balls = [[hit for d, hit in zip(distance, relevant, strict=True) if d <= r] for r in range(B + 1)]
        curve.append([(np.mean(ball) if ball else 0.0, sum(ball) / sum(relevant)) for ball in balls])
        within2.append(curve[-1][2][0])
        empty += not balls[2]
    assert row["n_queries_without_relevant"] == without
    assert row["n_queries_empty_radius_2"] == empty
    if not APs:
        assert row[f"retrieval_mAP@{K}"] is row["precision_radius_2"] is row["radius_precision"] is None
        assert row["retrieval_ci"] == {}
        return
    assert row[f"retrieval_mAP@{K}"] == pytest.approx(np.mean(APs), abs=1e-12)
    assert row["precision_radius_2"] == pytest.approx(np.mean(within2), abs=1e-12)
    for at, name in enumerate(("radius_precision", "radius_recall")):
        np.testing.assert_allclose(row[name], np.mean(curve, axis=0)[:, at], atol=1e-12)
    assert row["radius_recall"][-1] == 1.0
    assert set(row["retrieval_ci"]) == {f"retrieval_mAP@{K}", "precision_radius_2"}


def toolbox(q, ql, b, bl, K: int) -> float:
    """mAP as deep-hashing toolboxes compute it from codes of -1 and 1: argsort of (B - b1.b2) / 2, a stable one here;
    a query without a relevant image among the first K adds 0, and every query counts."""
    plus, signs = np.unpackbits(q, axis=1) * 2.0 - 1, np.unpackbits(b, axis=1) * 2.0 - 1
    total = 0.0
    for code, tags in zip(plus, ql.astype(float), strict=True):
        order = np.argsort((signs.shape[1] - signs @ code) / 2, kind="stable")[:K]
        ranks = np.flatnonzero(bl.astype(float)[order] @ tags > 0) + 1
        total += (np.arange(1, len(ranks) + 1) / ranks).mean() if len(ranks) else 0.0
    return total / len(q)


@settings(max_examples=30)
@given(cases, st.sampled_from([1, 5, 30]))
def test_map_is_the_toolboxes(case, K: int) -> None:
    """Theirs counts queries without a relevant image as 0; ours leaves them out, and the count gives theirs back."""
    row, Q = retrieval_row(*case, K=K), len(case[0])
    ours = row[f"retrieval_mAP@{K}"] or 0.0
    assert ours * (Q - row["n_queries_without_relevant"]) / Q == pytest.approx(toolbox(*case, K), abs=1e-12)


def test_ties_are_broken_by_index() -> None:
    """At one distance the first image is ranked first; the other order would be another figure."""
    codes, query = np.zeros((3, 1), np.uint8), np.zeros((1, 1), np.uint8)
    for labels, wanted in (([[1], [0], [0]], 1.0), ([[0], [0], [1]], 1 / 3)):
        assert retrieval_row(query, np.array([[1]]), codes, np.array(labels))["retrieval_mAP@5000"] == wanted


def test_an_empty_ball_counts_zero_and_is_counted() -> None:
    base, query = np.array([[0], [255]], np.uint8), np.array([[0], [15]], np.uint8)
    row = retrieval_row(query, np.ones((2, 1)), base, np.ones((2, 1)))
    assert (row["precision_radius_2"], row["n_queries_empty_radius_2"]) == (0.5, 1)


@given(cases)
def test_blocks_and_threads_do_not_matter(case) -> None:
    whole = retrieve(*case, K=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "QUERY_CHUNK", 2)
        patch.setattr(retrieval, "BASE_CHUNK", 3)
        for a, b in zip(whole, retrieve(*case, K=5), strict=True):
            np.testing.assert_array_equal(a, b)


def test_keys_of_a_large_base_do_not_overflow(monkeypatch) -> None:
    """Beyond 32 bits the keys are 64 wide, as they are for some 17 million images of 128 bits."""
    case = make(0, 4, 300, 128, 3, 0.3)
    wanted = retrieve(*case, K=20)
    base = retrieval._Base(case[2], case[3])
    base._key, base._places = np.uint64, base._places.astype(np.uint64)
    got = base.search(retrieval._words(case[0]), case[1].astype(np.float32), 20)
    np.testing.assert_array_equal(got.average_precision, wanted.average_precision)


def test_the_interval_is_of_the_mean_over_queries() -> None:
    case = make(3, 200, 60, 24, 4, 0.3)
    AP = retrieve(*case).average_precision
    low, high = retrieval_row(*case)["retrieval_ci"]["retrieval_mAP@5000"]
    AP = AP[~np.isnan(AP)]
    half = 1.96 * AP.std() / math.sqrt(len(AP))
    assert (low, high) == pytest.approx((AP.mean() - half, AP.mean() + half), abs=half / 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: np.zeros((2, 2), np.uint8)}, "in common"),
        ({1: np.zeros((2, 4))}, "in common"),
        ({2: np.zeros((3, 1), np.int64)}, "base codes: .* int64"),
        ({3: np.zeros((2, 3))}, "base codes"),
        ({0: np.zeros((0, 1), np.uint8), 1: np.zeros((0, 3))}, "must have images"),
    ],
)
def test_what_does_not_fit_is_refused(change, message: str) -> None:
    given = [np.zeros((2, 1), np.uint8), np.zeros((2, 3)), np.zeros((3, 1), np.uint8), np.zeros((3, 3))]
    for at, value in change.items():
        given[at] = value
    with pytest.raises(ValueError, match=message):
        retrieval_row(*given)
    with pytest.raises(ValueError, match="K must be at least 1"):
        retrieve(*(np.ones((2, 1), np.uint8) for _ in range(4)), K=0)


def test_a_tenth_of_coco_in_a_tenth_of_the_time() -> None:
    """500 queries in 113,287 codes: about 0.3 s on two cores; the limit leaves room for a busy machine."""
    rng = np.random.default_rng(0)
    b, q = (rng.integers(0, 256, (n, 8), dtype=np.uint8) for n in (113_287, 500))
    bl, ql = ((rng.random((n, 80)) < 0.035).astype(np.uint8) for n in (113_287, 500))
    started = time.process_time()
    retrieve(q, ql, b, bl)
    assert time.process_time() - started < 4.0
