"""Asymmetric search against NumPy in float64, with ties, at every width and number of threads."""

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcli import InputError
from mmcli.heads import neighbours
from mmcli.heads.asymmetric import EXACT, whole_weights
from mmcli.heads.knn import build_index


def signs(packed: np.ndarray) -> np.ndarray:
    return 2.0 * np.unpackbits(packed, axis=1).astype(np.float64) - 1


def reference(soft: np.ndarray, packed: np.ndarray, K: int, exclude: np.ndarray | None = None) -> np.ndarray:
    """Rows by (-score, index), every sum of whole numbers and so exact."""
    scores = np.array([[sum(row) for row in signs(packed) * w.astype(np.float64)] for w in whole_weights(soft)])
    for at, row in enumerate([] if exclude is None else exclude):
        scores[at, row] = -np.inf if row >= 0 else scores[at, row]
    return np.argsort(-scores, axis=1, kind="stable")[:, :K]


@pytest.fixture(params=[1, 2])
def threads(request):
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(request.param)
    yield
    faiss.omp_set_num_threads(before)


@pytest.mark.parametrize("margins", [(32, 1024), (1, 2)])  # the second: straight to looking at every row
def test_order_is_similarity_then_index_where_nearly_all_ties(monkeypatch, margins, threads) -> None:
    monkeypatch.setattr(neighbours, "MARGINS", margins)
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (30, 4), np.uint8)[rng.integers(0, 30, 2500)]  # some 80 of each
    soft = rng.normal(size=(12, 32)).astype(np.float32)
    soft[0] = np.where(rng.random(32) < 0.5, 1, -1)  # Hamming: ties between different codes too
    soft[1] = 0
    index = build_index("asymmetric", packed=packed)
    for K in (1, 20, 100, 2500):
        np.testing.assert_array_equal(index.search(soft=soft, K=K).index, reference(soft, packed, K))
    own = rng.integers(-1, 2500, 12)
    np.testing.assert_array_equal(index.search(soft=soft, K=30, exclude=own).index, reference(soft, packed, 30, own))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 200), st.sampled_from([1, 4, 8, 9, 16, 64]), st.data())
def test_similarity_is_the_cosine_of_soft_query_and_hard_code(seed: int, n: int, width: int, data) -> None:
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (n, width), dtype=np.uint8)
    soft = np.tanh(3 * rng.normal(size=(5, 8 * width))).astype(np.float32)
    K = data.draw(st.integers(1, n))
    found = build_index("asymmetric", packed=packed).search(soft=soft, K=K)
    codes = signs(packed)
    cosine = soft.astype(np.float64) @ codes.T / np.linalg.norm(soft, axis=1)[:, None] / np.sqrt(8 * width)
    np.testing.assert_allclose(found.similarity, np.take_along_axis(cosine, found.index, 1), atol=1e-4)
    np.testing.assert_array_equal(found.distance, 1 - found.similarity)
    np.testing.assert_array_equal(found.index, reference(soft, packed, K))
    assert (np.diff(found.similarity, axis=1) <= 0).all()


def test_hard_queries_give_the_order_of_hamming() -> None:
    rng = np.random.default_rng(1)
    packed = rng.integers(0, 256, (900, 8), np.uint8)
    queries = packed[:40] ^ np.uint8(5)
    found = build_index("asymmetric", packed=packed).search(soft=signs(queries).astype(np.float32), K=50)
    wanted = build_index("hamming", packed=packed).search(packed=queries, K=50)
    np.testing.assert_array_equal(found.index, wanted.index)
    np.testing.assert_allclose(found.similarity, 2 * wanted.similarity - 1, atol=1e-6)


def test_whole_weights_are_whole_and_their_sums_exact() -> None:
    rng = np.random.default_rng(2)
    for bits in (8, 64, 1024, 4096):
        weights = whole_weights(rng.normal(size=(50, bits)).astype(np.float32))
        assert (weights == np.rint(weights)).all()
        assert (np.abs(weights).astype(np.float64).sum(axis=1) <= EXACT).all()
    with pytest.raises(ValueError, match="not finite"):
        whole_weights(np.array([[np.nan] * 8], np.float32))


def test_the_index_keeps_bits_alone() -> None:
    packed = np.zeros((100, 8), np.uint8)
    assert build_index("asymmetric", packed=packed).n_bytes == 800
    with pytest.raises(InputError, match="no packed codes"):
        build_index("asymmetric", soft=np.zeros((3, 4), np.float32))
    with pytest.raises(InputError, match="an index of Hamming distances"):
        build_index("asymmetric", packed=packed, kind="torch")
    with pytest.raises(InputError, match="K is larger"):
        build_index("asymmetric", packed=packed).search(soft=np.ones((1, 64), np.float32), K=101)
