"""Other ways to find neighbours of codes, for ``mmcli bench knn``: the loop of a first script, scikit-learn, USearch.

Symbols: N codes of the index, Q queries, K neighbours, B bits, C classes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ...heads.neighbours import Packed, Rows, load_faiss

Search = Callable[[Packed], Rows]

TAU = 0.07
# scikit-learn compares floats; a pair costs it about a hundred times what a popcount costs.
SKLEARN_PAIRS = 50_000_000
SKLEARN_MOST = 200_000
USEARCH_MOST = 200_000


def make_codes(n: int, bits: int, seed: int, *, centres: int = 2000, spread: float = 0.55) -> Packed:
    """Codes that lie in groups, as learned ones do: the signs of noise around centres, ``(n, B // 8)``.

    Nearest neighbours are a few bits away, and many codes tie. The centres depend on the bits alone.
    """
    middle = np.random.default_rng(bits).normal(size=(centres, bits)).astype(np.float32)
    rng = np.random.default_rng(seed)
    codes = np.empty((n, bits // 8), np.uint8)
    for start in range(0, n, 1 << 16):
        rows = slice(start, min(n, start + (1 << 16)))
        size = (rows.stop - start, bits)
        noise = rng.standard_normal(size, dtype=np.float32)
        codes[rows] = np.packbits(middle[rng.integers(0, centres, size[0])] + spread * noise > 0, axis=1)
    return codes


def make_labels(n: int, C: int = 80) -> npt.NDArray[np.uint8]:
    """Labels ``(n, C)`` with COCO's 2.9 tags an image on average."""
    return (np.random.default_rng(2).random((n, C), dtype=np.float32) < 2.9 / C).astype(np.uint8)


def plain_index(packed: Packed) -> Any:  # noqa: ANN401 - faiss has no types
    """FAISS's exhaustive index with its defaults."""
    index = load_faiss().IndexBinaryFlat(8 * packed.shape[1])
    index.add(packed)
    return index


def loop(index: Any, queries: Packed, labels: npt.NDArray[np.uint8], K: int) -> npt.NDArray[np.float64]:  # noqa: ANN401
    """The plan's loop: one search a query, then a NumPy vote over its neighbours, in scores ``(Q, C)``."""
    scores = np.zeros((len(queries), labels.shape[1]))
    for row in range(len(queries)):
        distance, neighbours = index.search(queries[row : row + 1], K)
        similarity = 1 - distance[0] / index.d
        weight = np.exp(similarity / TAU)
        weight /= weight.sum()
        for w, neighbour in zip(weight, neighbours[0], strict=True):
            scores[row] += w * labels[neighbour % len(labels)]
    return scores


def sklearn_search(packed: Packed, K: int, Q: int) -> Search | str:
    """Brute force of scikit-learn over unpacked bits; a note in its place where it would take too long."""
    try:
        from sklearn.neighbors import NearestNeighbors
    except ImportError:
        return "scikit-learn is not installed"
    if len(packed) > SKLEARN_MOST:
        return f"scikit-learn left out above {SKLEARN_MOST:,} codes: it would take too long"
    index = NearestNeighbors(n_neighbors=K, algorithm="brute", metric="hamming").fit(np.unpackbits(packed, axis=1))
    few = min(Q, max(10, SKLEARN_PAIRS // len(packed)))
    return _first(lambda queries: index.kneighbors(np.unpackbits(queries, axis=1), return_distance=False), few)


def usearch_search(packed: Packed, K: int, *, exact: bool) -> Search | str:
    """USearch over packed bits: exhaustive, or its graph; a note in its place where it is absent or too slow."""
    try:
        from usearch.index import Index, MetricKind, search
    except ImportError:
        return "USearch is not installed (pip install 'mmcli[usearch]')"
    if exact:
        return lambda queries: np.asarray(search(packed, queries, K, MetricKind.Hamming, exact=True).keys, np.int64)
    if len(packed) > USEARCH_MOST:
        return f"USearch's graph left out above {USEARCH_MOST:,} codes: it would take too long to build"
    index = Index(ndim=8 * packed.shape[1], metric=MetricKind.Hamming, dtype="b1")
    index.add(np.arange(len(packed)), packed)
    return lambda queries: np.asarray(index.search(queries, K).keys, np.int64).reshape(len(queries), -1)


def _first(search: Search, few: int) -> Search:
    """Only the first queries, so that it ends; a rate is a rate."""
    return lambda queries: search(queries[:few])
