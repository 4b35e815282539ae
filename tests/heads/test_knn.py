"""Neighbours against NumPy on codes full of ties, what is left out, and what is refused."""

import sys

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.search import hamming_reference
from mmcli import InputError
from mmcli.heads import knn, neighbours
from mmcli.heads.cosine import normalise
from mmcli.heads.knn import Neighbours, build_index

EXACT = ("flat", "fastscan", "torch")


def cosine_reference(
    queries: np.ndarray, soft: np.ndarray, K: int, exclude: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    similarity = np.empty((len(queries), len(soft)), np.float32)
    for i, q in enumerate(normalise(queries).astype(np.float64)):
        similarity[i] = (normalise(soft).astype(np.float64) * q).sum(axis=1).clip(-1, 1)
    order = similarity.astype(np.float64)
    if exclude is not None:
        rows = np.flatnonzero(exclude >= 0)
        order[rows, exclude[rows]] = -np.inf
    index = np.argsort(-order, axis=1, kind="stable")[:, :K]
    return index, np.take_along_axis(similarity, index, axis=1)


def assert_hamming(found: Neighbours, wanted: tuple[np.ndarray, np.ndarray], bits: int) -> None:
    np.testing.assert_array_equal(found.distance, wanted[1])
    np.testing.assert_array_equal(found.index, wanted[0])
    np.testing.assert_allclose(found.similarity, 1 - wanted[1] / bits, rtol=1e-6)
    assert (found.index.dtype, found.similarity.dtype, found.distance.dtype) == (np.int64, np.float32, np.int32)


@pytest.fixture
def threads():
    before = faiss.omp_get_max_threads()
    yield faiss.omp_set_num_threads
    faiss.omp_set_num_threads(before)


@pytest.mark.parametrize("counting_bytes", [0, knn.COUNTING_BYTES])  # 0: the heap
@pytest.mark.parametrize("n_threads", [1, 2])
def test_hamming_order_is_distance_then_index_among_ties(
    monkeypatch: pytest.MonkeyPatch, threads, counting_bytes: int, n_threads: int
) -> None:
    """8 bits, 5,000 rows: some twenty rows for every code, so that K always ends within a tie."""
    monkeypatch.setattr(knn, "COUNTING_BYTES", counting_bytes)
    threads(n_threads)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (5000, 1), dtype=np.uint8)
    index = build_index("hamming", packed=codes, kind="flat")
    for Q in (1, 3, 200):
        queries = rng.integers(0, 256, (Q, 1), dtype=np.uint8)
        for K in (1, 7, 20, 101, 500):
            assert_hamming(index.search(packed=queries, K=K), hamming_reference(queries, codes, K), 8)
    assert index._index.use_heap == (counting_bytes == 0)


@pytest.mark.parametrize("counting_bytes", [0, knn.COUNTING_BYTES])
def test_hamming_order_holds_across_the_blocks_of_faiss(monkeypatch: pytest.MonkeyPatch, counting_bytes: int) -> None:
    """FAISS scans 65,536 rows at a time; ties lie on both sides of the seam."""
    monkeypatch.setattr(knn, "COUNTING_BYTES", counting_bytes)
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 256, (70_000, 2), dtype=np.uint8)
    codes[:65_530] |= 0x0F
    queries = codes[[65_535, 65_536, 5, 69_999]] & 0xF0
    assert_hamming(
        build_index("hamming", packed=codes, kind="flat").search(packed=queries, K=50),
        hamming_reference(queries, codes, 50),
        16,
    )


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.integers(1, 9), st.sampled_from([1, 3, 8, 16, 20]), st.data())
def test_hamming_equals_the_reference(seed: int, n: int, n_queries: int, width: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 4, (n, width), dtype=np.uint8)
    queries = codes[rng.integers(0, n, n_queries)]
    exclude = rng.integers(-1, n, n_queries)
    K = data.draw(st.integers(1, n - 1))
    for kind in EXACT:
        index = build_index("hamming", packed=codes, kind=kind)
        assert_hamming(
            index.search(packed=queries, K=K, exclude=exclude), hamming_reference(queries, codes, K, exclude), 8 * width
        )
        assert_hamming(index.search(packed=queries, K=n), hamming_reference(queries, codes, n), 8 * width)


@pytest.mark.parametrize("margins", [(32, 1024), (1, 2)])  # the second: straight to looking at every row
def test_cosine_order_is_similarity_then_index_with_equal_rows(monkeypatch: pytest.MonkeyPatch, margins) -> None:
    monkeypatch.setattr(neighbours, "MARGINS", margins)
    rng = np.random.default_rng(0)
    distinct = rng.normal(size=(40, 24)).astype(np.float32)
    soft = distinct[rng.integers(0, 40, 3001)]  # some 75 of each
    queries = np.concatenate([distinct[:9], rng.normal(size=(60, 24)).astype(np.float32)])
    index = build_index("cosine", soft=soft)
    for K in (1, 20, 100):
        found = index.search(soft=queries, K=K)
        wanted = cosine_reference(queries, soft, K)
        np.testing.assert_array_equal(found.index, wanted[0])
        np.testing.assert_allclose(found.similarity, wanted[1], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(found.distance, 1 - wanted[1], atol=1e-6)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(2, 400), st.integers(1, 40), st.data())
def test_cosine_equals_the_reference(seed: int, n: int, width: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    soft = rng.normal(size=(n, width)).astype(np.float32)
    queries = rng.normal(size=(5, width)).astype(np.float32) * 10
    exclude, K = rng.integers(-1, n, 5), data.draw(st.integers(1, n - 1))
    found = build_index("cosine", soft=soft).search(soft=queries, K=K, exclude=exclude)
    index, similarity = cosine_reference(queries, soft, K, exclude)
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_allclose(found.similarity, similarity, atol=1e-6)


def test_cosine_of_collapsed_codes_is_exact_and_does_not_hang() -> None:
    """An untrained hash layer gives nearly one code to all: everything ties, or nearly so."""
    rng = np.random.default_rng(0)
    soft = (1 + 1e-7 * rng.normal(size=(4000, 16))).astype(np.float32)
    soft[rng.integers(0, 4000, 1500)] = 0  # and some with no direction at all: cosine 0
    queries = soft[:20]
    found = build_index("cosine", soft=soft).search(soft=queries, K=50)
    wanted = cosine_reference(queries, soft, 50)
    np.testing.assert_array_equal(found.index, wanted[0])
    zero = ~queries.any(axis=1)
    assert zero.any()
    assert (found.similarity[zero] == 0).all()
    np.testing.assert_array_equal(found.index[zero], np.tile(np.arange(50), (zero.sum(), 1)))


@pytest.mark.parametrize("metric", ["hamming", "cosine", "hybrid"])
def test_one_query_finds_what_a_batch_of_them_finds(metric: str) -> None:
    rng = np.random.default_rng(2)
    soft = np.sign(rng.normal(size=(600, 16))).astype(np.float32)
    soft[::3] *= 0.5
    packed = np.packbits(soft > 0, axis=1)
    index = build_index(metric, packed=packed, soft=soft)
    whole = index.search(packed=packed[:50], soft=soft[:50], K=30)
    for i in range(50):
        one = index.search(packed=packed[i : i + 1], soft=soft[i : i + 1], K=30)
        for a, b in zip(one, whole, strict=True):
            np.testing.assert_array_equal(a[0], b[i])


@pytest.mark.parametrize("n", [90, 700])
@pytest.mark.parametrize("excluding", [False, True])
def test_hybrid_reranks_the_hamming_top_100_by_cosine(n: int, excluding: bool) -> None:
    rng = np.random.default_rng(3)
    soft = np.tanh(rng.normal(size=(n, 16))).astype(np.float32)
    packed = np.packbits(soft >= 0, axis=1)
    exclude = np.arange(30) if excluding else None
    found = build_index("hybrid", packed=packed, soft=soft).search(
        packed=packed[:30], soft=soft[:30], K=20, exclude=exclude
    )
    candidates, _ = hamming_reference(packed[:30], packed, min(100, n - excluding), exclude)
    for q in range(30):
        inside = np.sort(candidates[q])
        index, similarity = cosine_reference(soft[q : q + 1], soft[inside], 20)
        np.testing.assert_array_equal(found.index[q], inside[index[0]])
        np.testing.assert_allclose(found.similarity[q], similarity[0], atol=1e-6)
    more = build_index("hybrid", packed=packed, soft=soft).search(packed=packed[:2], soft=soft[:2], K=min(n, 150))
    assert more.index.shape == (2, min(n, 150))


@pytest.mark.parametrize("metric", ["hamming", "cosine", "hybrid"])
def test_the_query_itself_is_left_out(metric: str) -> None:
    """Also among equals: only that row goes, its duplicates stay."""
    rng = np.random.default_rng(4)
    soft = np.repeat(np.tanh(rng.normal(size=(30, 16))), 4, axis=0).astype(np.float32)
    packed = np.packbits(soft >= 0, axis=1)
    index = build_index(metric, packed=packed, soft=soft)
    own = np.where(np.arange(120) % 2, np.arange(120), -1)
    found = index.search(packed=packed, soft=soft, K=3, exclude=own)
    for q in range(120):
        group = [row for row in range(4 * (q // 4), 4 * (q // 4) + 4) if row != own[q]]
        assert found.index[q].tolist() == group[:3]
    every = index.search(packed=packed, soft=soft, K=119, exclude=np.arange(120)).index
    assert all(sorted(row) == [i for i in range(120) if i != q] for q, row in enumerate(every.tolist()))


@pytest.mark.parametrize("metric", ["hamming", "cosine", "hybrid"])
def test_k_larger_than_the_index_names_both_numbers(metric: str) -> None:
    soft = np.random.default_rng(0).normal(size=(10, 8)).astype(np.float32)
    packed = np.packbits(soft >= 0, axis=1)
    index = build_index(metric, packed=packed, soft=soft)
    assert index.search(packed=packed, soft=soft, K=10).index.shape == (10, 10)
    with pytest.raises(InputError, match=r"K 11, wanted 1 to 10"):
        index.search(packed=packed, soft=soft, K=11)
    with pytest.raises(InputError, match=r"K 10, wanted 1 to 9.*own image"):
        index.search(packed=packed, soft=soft, K=10, exclude=np.arange(10))
    with pytest.raises(InputError, match="K does not fit"):
        index.search(packed=packed, soft=soft, K=0)
    assert index.search(packed=packed, soft=soft, K=10, exclude=np.full(10, -1)).index.shape == (10, 10)


def test_what_does_not_fit_is_refused() -> None:
    codes, soft = np.zeros((10, 2), np.uint8), np.ones((10, 16), np.float32)
    index = build_index("hamming", packed=codes)
    with pytest.raises(ValueError, match=r"shape \(10, 3\)"):
        index.search(packed=np.zeros((10, 3), np.uint8), K=1)
    with pytest.raises(ValueError, match="packed queries of shape None"):
        index.search(soft=soft, K=1)
    for bad in (np.arange(9), np.full(10, 10), np.full(10, -2)):
        with pytest.raises(ValueError, match="exclude"):
            index.search(packed=codes, K=1, exclude=bad)
    for metric in ("hamming", "hybrid"):
        with pytest.raises(InputError, match=r"no packed codes.*use the metric cosine"):
            build_index(metric, soft=soft)
    with pytest.raises(InputError, match="no soft codes"):
        build_index("cosine", packed=codes)
    with pytest.raises(InputError, match="no packed codes"):
        build_index("hamming", packed=codes[:0])
    with pytest.raises(ValueError, match="not of the same images"):
        build_index("hybrid", packed=codes, soft=soft[:5])
    with pytest.raises(ValueError, match="soft code 3 is not finite"):
        build_index("cosine", soft=np.where(np.arange(10)[:, None] == 3, np.nan, soft))


def test_spec10_3_an_index_takes_an_eighth_of_a_byte_a_bit() -> None:
    soft = np.random.default_rng(0).normal(size=(100, 64)).astype(np.float32)
    packed = np.packbits(soft >= 0, axis=1)
    assert build_index("hamming", packed=packed, kind="flat").n_bytes == 100 * 64 // 8
    assert build_index("cosine", soft=soft).n_bytes == 100 * 64 * 4
    assert build_index("hybrid", packed=packed, soft=soft, kind="flat").n_bytes == 100 * (8 + 256)
    assert build_index("hamming", packed=packed, kind="fastscan").n_bytes == 128 * 9  # a byte more, blocks of 32
    assert build_index("hamming", packed=packed, kind="torch").n_bytes == 100 * 64 // 8
    assert len(build_index("hybrid", packed=packed, soft=soft)) == 100


def test_spec10_4_distance_counts_differing_bits() -> None:
    codes = np.array([[0b0000_0000], [0b1111_1111], [0b0000_0111]], np.uint8)
    found = build_index("hamming", packed=codes).search(packed=codes[:1], K=3)
    assert found.index.tolist() == [[0, 2, 1]]
    assert found.distance.tolist() == [[0, 3, 8]]
    assert found.similarity.tolist() == [[1.0, 0.625, 0.0]]


@pytest.mark.parametrize("metric", ["hamming", "cosine"])
def test_missing_faiss_says_what_to_install(monkeypatch: pytest.MonkeyPatch, metric: str) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"pip install 'mmcli\[cpu\]' or 'mmcli\[gpu\]'"):
        build_index(metric, packed=np.zeros((2, 1), np.uint8), soft=np.ones((2, 8), np.float32))
