"""Nearest neighbours among the codes of train, in one order on every machine: by distance, then by index.

Symbols: N codes of the index, Q queries, K neighbours, B bits, F features of a soft code.
"""

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from .. import InputError
from .config import Metric
from .cosine import CosineIndex, normalise, rerank
from .neighbours import Index, Neighbours, Packed, Rows, Soft, check_search, fitting_queries, load_faiss, without

__all__ = ["HammingIndex", "HybridIndex", "Index", "Neighbours", "build_index"]

T = TypeVar("T", bound=np.generic)

HYBRID_CANDIDATES = 100
# FAISS searches this many queries at a time, and its counting mode keeps K ids for each of their B + 1 distances.
FAISS_QUERY_BLOCK = 32
COUNTING_BYTES = 1 << 26


def build_index(metric: Metric, *, packed: Packed | None = None, soft: Soft | None = None) -> Index:
    """Build an index over codes.

    Args:
        metric: ``hamming`` reads ``packed``; ``cosine`` reads ``soft``; ``hybrid`` reads both: the Hamming top 100
            (top K where K is larger), reranked by cosine.
        packed: Hard codes ``(N, B // 8)`` uint8.
        soft: Soft codes ``(N, F)`` float32, not necessarily of unit length.

    Raises:
        InputError: The codes that the metric reads are missing, there are none, or FAISS is not installed.
    """
    if metric == "cosine":
        return CosineIndex(_present(soft, "soft", metric))
    if metric == "hamming":
        return HammingIndex(_present(packed, "packed", metric))
    return HybridIndex(_present(packed, "packed", metric), _present(soft, "soft", metric))


def _present(codes: npt.NDArray[T] | None, name: str, metric: Metric) -> npt.NDArray[T]:
    if codes is None or not len(codes):
        raise InputError(
            f"no {name} codes to search by {metric}", got="none", wanted="at least one",
            do="a head without hash layer has no packed codes: use the metric cosine" if name == "packed" else None,
        )  # fmt: skip
    return codes


class HammingIndex:
    """Exhaustive Hamming search over packed codes with FAISS ``IndexBinaryFlat``.

    FAISS keeps the order asked for by itself: one thread scans the rows of a query upwards, its counting mode lists
    ids of one distance as it meets them, and its heap evicts the larger id among equal distances. Neither depends on
    the number of threads or queries. The tests compare both modes with NumPy on codes full of ties.
    """

    def __init__(self, packed: Packed) -> None:
        self.bits: int = 8 * packed.shape[1]
        self._index = load_faiss().IndexBinaryFlat(self.bits)
        self._index.add(np.ascontiguousarray(packed))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def n_bytes(self) -> int:
        """N * B / 8."""
        return len(self) * (self.bits // 8)

    def search(
        self,
        *,
        K: int,
        packed: Packed | None = None,
        soft: Soft | None = None,  # noqa: ARG002
        exclude: Rows | None = None,
    ) -> Neighbours:
        """See :class:`Index`; ``soft`` is not read."""
        queries = fitting_queries(packed, self.bits // 8, "packed")
        exclude = check_search(K, len(self), len(queries), exclude)
        wide = K if exclude is None else K + 1
        # Counting is a third faster than the heap where it does not take too much memory.
        self._index.use_heap = FAISS_QUERY_BLOCK * (self.bits + 1) * wide * 8 > COUNTING_BYTES
        distance, index = self._index.search(np.ascontiguousarray(queries), wide)
        found = Neighbours(index, (1.0 - distance / self.bits).astype(np.float32), distance)
        return found if exclude is None else without(found, exclude, K)


class HybridIndex:
    """The Hamming top 100 reranked by cosine of the soft codes."""

    def __init__(self, packed: Packed, soft: Soft) -> None:
        if len(packed) != len(soft):
            raise ValueError(f"{len(packed)} packed codes and {len(soft)} soft codes are not of the same images")
        self._hamming, self._unit = HammingIndex(packed), normalise(soft)

    def __len__(self) -> int:
        return len(self._unit)

    @property
    def n_bytes(self) -> int:
        """N * (B / 8 + F * 4)."""
        return self._hamming.n_bytes + self._unit.nbytes

    def search(
        self, *, K: int, packed: Packed | None = None, soft: Soft | None = None, exclude: Rows | None = None
    ) -> Neighbours:
        """See :class:`Index`; both codes are read."""
        queries = normalise(fitting_queries(soft, self._unit.shape[1], "soft"))
        exclude = check_search(K, len(self), len(queries), exclude)
        wide = max(K, min(HYBRID_CANDIDATES, len(self) - (exclude is not None)))
        candidates = self._hamming.search(K=wide, packed=packed, exclude=exclude).index
        return rerank(queries, self._unit, candidates, K)
