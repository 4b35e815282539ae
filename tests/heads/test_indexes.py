"""Every kind of index finds the reference's neighbours on codes full of ties."""

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kit.search import hamming_reference as reference
from mmcli import InputError
from mmcli.heads import fastscan, knn, neighbours, torch_index
from mmcli.heads.gpu_index import GpuIndex
from mmcli.heads.knn import HammingIndex, build_index
from mmcli.heads.neighbours import Neighbours

EXACT = ("auto", "flat", "fastscan", "torch")


def assert_same(found: Neighbours, wanted: tuple) -> None:
    np.testing.assert_array_equal(found.index, wanted[0])
    np.testing.assert_array_equal(found.distance, wanted[1])
    assert (found.index.dtype, found.similarity.dtype, found.distance.dtype) == (np.int64, np.float32, np.int32)


@pytest.fixture(params=[1, 2])
def threads(request):
    before, torch_before = faiss.omp_get_max_threads(), torch.get_num_threads()
    faiss.omp_set_num_threads(request.param)
    torch.set_num_threads(request.param)
    yield
    faiss.omp_set_num_threads(before)
    torch.set_num_threads(torch_before)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("width", [1, 8, 16])
def test_order_is_distance_then_index_where_nearly_all_ties(kind: str, width: int, threads) -> None:
    """Few distinct codes, 5,003 rows: K always ends within a tie, in a block of 32 and in the seam of chunks."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256 if width == 1 else 2, (5003, width), dtype=np.uint8)
    index = build_index("hamming", packed=codes, kind=kind)
    for Q in (1, 3, 200):
        queries = rng.integers(0, 256 if width == 1 else 2, (Q, width), dtype=np.uint8)
        for K in (1, 7, 20, 101, 500):
            assert_same(index.search(packed=queries, K=K), reference(queries, codes, K))
    own = np.arange(200)
    assert_same(index.search(packed=codes[:200], K=30, exclude=own), reference(codes[:200], codes, 30, own))


@pytest.mark.parametrize("bits", [8, 24, 32, 64, 72, 128, 256, 512, 1024])
def test_exact_kinds_agree_at_every_width(bits: int) -> None:
    """Also near the ends, where the tables of the fast scan add up to most: all bits differ, or none."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 256, (700, bits // 8), dtype=np.uint8)
    codes[::7], codes[1::7] = 0, 255
    queries = np.concatenate([codes[:30], np.zeros((1, bits // 8), np.uint8), np.full((1, bits // 8), 255, np.uint8)])
    wanted = reference(queries, codes, 700)
    for kind in EXACT:
        assert_same(build_index("hamming", packed=codes, kind=kind).search(packed=queries, K=700), wanted)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.data())
def test_torch_merges_chunks_of_any_size(seed: int, n: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 4, (n, 2), dtype=np.uint8)
    chunk, K = data.draw(st.integers(1, n)), data.draw(st.integers(1, n))
    index = torch_index.TorchIndex(codes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_index.TorchIndex, "_chunk", lambda *_: chunk)
        patch.setattr(torch_index, "QUERIES", 3)
        assert_same(index.search(packed=codes[:7], K=K), reference(codes[:7], codes, K))


def test_torch_keys_fit_their_integers() -> None:
    index = torch_index.TorchIndex(np.zeros((10, 512), np.uint8))
    index._packed = torch.empty((2**31, 0), dtype=torch.uint8)
    assert (index._chunk(1)) * (index.bits + 1) < 2**31


@pytest.mark.parametrize(("n", "queries", "K"), [(20_000, 1, 5), (20_000, 100, 5), (3000, 64, 3000)])
def test_a_search_of_torch_takes_memory_of_its_own_bound(
    monkeypatch: pytest.MonkeyPatch, n: int, queries: int, K: int
) -> None:
    """Few queries unpack no more codes at a time than many; and what is found stays the same, ties by index."""
    rng = np.random.default_rng(0)
    codes, asked = (rng.integers(0, 4, (size, 8), dtype=np.uint8) for size in (n, queries))
    monkeypatch.setattr(torch_index, "CPU_CHUNK_BYTES", 1 << 19)
    index, largest = torch_index.TorchIndex(codes), 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            tensors = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
            largest = max([largest, *(tensor.numel() * tensor.element_size() for tensor in tensors)])
            return made

    with Watch():
        found = index.search(packed=asked, K=K)
    assert_same(found, reference(asked, codes, K))
    assert 1 << 15 < largest <= 1 << 19


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("width", [1, 8, 16])
def test_torch_on_a_gpu_is_exact(width: int) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 4, (50_003, width), dtype=np.uint8)
    index = build_index("hamming", packed=codes, device="cuda")
    assert index.kind == "torch"
    assert_same(index.search(packed=codes[:50], K=100), reference(codes[:50], codes, 100))


def test_the_fast_scan_is_taken_where_faiss_keeps_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.zeros((40, 8), np.uint8)
    assert fastscan.keeps_order()
    assert build_index("hamming", packed=codes).kind == "fastscan"
    assert build_index("hamming", packed=np.zeros((40, 160), np.uint8)).kind == "flat"
    with pytest.raises(ValueError, match="too long"):
        fastscan.FastScanIndex(np.zeros((40, 160), np.uint8))
    monkeypatch.setattr(knn, "keeps_order", lambda: False)
    assert build_index("hamming", packed=codes).kind == "flat"
    with pytest.raises(InputError, match=r"no fast scan.*--index auto"):
        build_index("hamming", packed=codes, kind="fastscan")


def test_a_faiss_that_keeps_another_order_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """FAISS's reservoir returns other members of a tie; the trial has to see it."""
    monkeypatch.setattr(fastscan, "HEAP_IN_ORDER", 15)
    assert not fastscan.keeps_order.__wrapped__()


class Unordered:
    """An exhaustive search that breaks ties as it likes: what FAISS may do on a GPU."""

    def __init__(self, codes: np.ndarray, seed: int) -> None:
        self.codes, self.rng = codes, np.random.default_rng(seed)

    def search(self, queries: np.ndarray, M: int) -> tuple[np.ndarray, np.ndarray]:
        distance = np.bitwise_count(queries[:, None] ^ self.codes[None]).sum(-1).astype(np.int32)
        rows = np.lexsort((self.rng.random(distance.shape), distance), axis=-1)[:, :M]
        return np.take_along_axis(distance, rows, axis=1), rows


def gpu_index(codes: np.ndarray, inner: Unordered) -> GpuIndex:
    """The index as it is on a machine with a GPU, its search replaced."""
    index = object.__new__(GpuIndex)
    index._index, index._exact, index.width = inner, HammingIndex(codes), codes.shape[1]
    return index


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 200), st.integers(1, 3), st.data())
def test_settling_makes_any_order_exact(seed: int, n: int, width: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 4, (n, width), dtype=np.uint8)
    exclude, K = rng.integers(-1, n, 6), data.draw(st.integers(1, n - 1))
    queries, most = codes[rng.integers(0, n, 6)], data.draw(st.integers(1, n))
    index = gpu_index(codes, Unordered(codes, seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmcli.heads.gpu_index.GPU_MOST", most)
        patch.setattr(neighbours, "MARGINS", data.draw(st.sampled_from([(1, 3), (32, 1024), (5, 6)])))
        assert_same(index.search(packed=queries, K=K, exclude=exclude), reference(queries, codes, K, exclude))


def test_an_index_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    soft = np.ones((10, 8), np.float32)
    with pytest.raises(InputError, match=r"torch with metric cosine, wanted auto or flat"):
        build_index("cosine", soft=soft, kind="torch")
    with pytest.raises(InputError, match=r"no GPU for FAISS.*--index auto"):
        build_index("hamming", packed=np.zeros((10, 8), np.uint8), kind="gpu")
    tiny = np.arange(3, dtype=np.uint8)[:, None]
    for kind in EXACT:
        index = build_index("hamming", packed=tiny, kind=kind)
        assert_same(index.search(packed=tiny, K=3), reference(tiny, tiny, 3))
        assert index.search(packed=tiny[:0], K=2).index.shape == (0, 2)
