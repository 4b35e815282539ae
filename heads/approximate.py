"""Hamming indexes of FAISS for millions of codes, and its exhaustive one on a GPU: built, then settled in their ties.

Symbols: N codes of the index, B bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import isqrt
from typing import Any

import numpy as np

from ..errors import InputError
from .neighbours import Index, Packed, load_faiss
from .settled import SettledIndex, searcher

# FAISS's own limit of neighbours on a GPU.
GPU_MOST = 2048
TRAINING_CODES = 64  # a list, as FAISS advises at least 39
PROBED = 16  # one list in so many is looked at
MOST_LISTS = 4096
HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH = 32, 100, 128
HASHES = 4  # tables of the multi-hash, each on bits of its own
HASH_BITS = 16
FLIPS = 2  # bits that may differ within a hash


def ivf(packed: Packed, exact: Index) -> SettledIndex:
    """Inverted lists (``IndexBinaryIVF``): about sqrt(N) lists, one in 16 of which is searched."""
    faiss, (N, width) = load_faiss(), packed.shape
    lists = max(1, min(MOST_LISTS, isqrt(N)))
    quantizer = faiss.IndexBinaryFlat(8 * width)
    index = faiss.IndexBinaryIVF(quantizer, 8 * width, lists)
    index.own_fields = False
    rows = np.random.default_rng(0).permutation(N)[: TRAINING_CODES * lists]
    index.cp.min_points_per_centroid = 1
    index.train(np.ascontiguousarray(packed[np.sort(rows)]))
    index.add(np.ascontiguousarray(packed))
    index.nprobe = -(-lists // PROBED)
    held = _held("ivf", index, exact, inner_bytes=N * (width + 8) + lists * width)
    held.quantizer = quantizer  # FAISS keeps a bare pointer to it
    return held


def hnsw(packed: Packed, exact: Index) -> SettledIndex:
    """A graph of links (``IndexBinaryHNSW``; Malkov, Yashunin 2018), built on one thread: with more it would vary."""
    faiss, (N, width) = load_faiss(), packed.shape
    index = faiss.IndexBinaryHNSW(8 * width, HNSW_LINKS)
    index.hnsw.efConstruction, index.hnsw.efSearch = HNSW_BUILD, HNSW_SEARCH
    with one_thread():
        index.add(np.ascontiguousarray(packed))
    return _held("hnsw", index, exact, inner_bytes=N * width + 4 * index.hnsw.neighbors.size() + 12 * N)


def multihash(packed: Packed, exact: Index) -> SettledIndex:
    """Tables over parts of the code (``IndexBinaryMultiHash``; Norouzi, Punjani, Fleet 2012)."""
    faiss, (N, width) = load_faiss(), packed.shape
    # Hashes lie side by side, so together they are no longer than a code.
    hashes = max(1, min(HASHES, 8 * width // HASH_BITS))
    index = faiss.IndexBinaryMultiHash(8 * width, hashes, min(HASH_BITS, 8 * width))
    index.add(np.ascontiguousarray(packed))
    index.nflip = FLIPS
    return _held("multihash", index, exact, inner_bytes=N * width + 8 * hashes * N + 16 * index.hashtable_size())


def gpu(packed: Packed, exact: Index) -> SettledIndex:
    """Exhaustive search of FAISS on a GPU (``GpuIndexBinaryFlat``), settled, at most 2048 candidates a query.

    Raises:
        InputError: This FAISS knows no GPU, or there is none.
    """
    faiss = load_faiss()
    # Asked first: any other function of the GPU part ends the process where there is no driver (SPEC section 10.14).
    if not getattr(faiss, "get_num_gpus", lambda: 0)() or not hasattr(faiss, "GpuIndexBinaryFlat"):
        raise InputError(
            "no GPU for FAISS",
            where="--index",
            got="gpu",
            wanted="faiss-gpu and a CUDA device",
            do="use --index auto, which needs neither",
        )
    resources = faiss.StandardGpuResources()
    index = faiss.GpuIndexBinaryFlat(resources, 8 * packed.shape[1])
    index.add(np.ascontiguousarray(packed))
    held = _held("gpu", index, exact, inner_bytes=packed.nbytes, most=GPU_MOST)
    held.resources = resources
    return held


class _Held(SettledIndex):
    """Keeps alive what FAISS points to."""

    inner: Any
    quantizer: Any
    resources: Any


def _held(kind: str, index: Any, exact: Index, *, inner_bytes: int, most: int | None = None) -> _Held:  # noqa: ANN401
    held = _Held(kind, index.d, searcher(index), exact, inner_bytes=inner_bytes, most=most)
    held.inner = index
    return held


@contextmanager
def one_thread() -> Iterator[None]:
    """FAISS on one thread."""
    faiss = load_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
