"""Nearest neighbours among the codes of train, in one order on every machine: by distance, then by index.

Symbols: N codes of the index, Q queries, K neighbours, B bits, F features of a soft code.
"""

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .asymmetric import AsymmetricIndex
from .config import HYBRID_CANDIDATES, IndexKind, Metric
from .cosine import CosineIndex, cosines, normalise
from .fastscan import MAX_BITS, FastScanIndex, keeps_order
from .neighbours import Index, Neighbours, Packed, Rows, Soft, check_queries, check_search, load_faiss, nearest_first

__all__ = ["HammingIndex", "HybridIndex", "Index", "Neighbours", "build_index"]

T = TypeVar("T", bound=np.generic)

# FAISS's counting mode keeps K ids for each of B + 1 distances of a query. More queries at a time mean fewer waits of
# its threads for each other, which cost most where others use the machine too.
COUNTING_BYTES = 1 << 26
QUERY_BLOCK = 32
MOST_QUERIES = 4096


def build_index(
    metric: Metric,
    *,
    packed: Packed | None = None,
    soft: Soft | None = None,
    kind: IndexKind = "auto",
    device: str = "cpu",
) -> Index:
    """Build an index over codes.

    Args:
        metric: ``hamming`` reads ``packed``; ``cosine`` reads ``soft``; ``hybrid`` reads both: the Hamming top 100
            (top K where K is larger), reranked by cosine; ``asymmetric`` reads ``packed``, and soft codes of queries.
        packed: Hard codes ``(N, B // 8)`` uint8.
        soft: Soft codes ``(N, F)`` float32, not necessarily of unit length.
        kind: How packed codes are searched; every kind gives the same neighbours. ``auto`` takes ``torch`` on a GPU,
            else ``fastscan``, or ``flat`` where that one does not fit.
        device: Where ``torch`` searches, a name that torch knows.

    Raises:
        InputError: The codes that the metric reads are missing, there are none, FAISS is not installed, or the kind
            does not fit the metric or the codes.
    """
    if metric in ("cosine", "asymmetric") and kind not in ("auto", "flat"):
        raise InputError(
            "an index of Hamming distances",
            where="--index",
            got=f"{kind} with metric {metric}",
            wanted="auto or flat",
            do="use --metric hamming or hybrid, or leave --index out",
        )
    if metric == "cosine":
        return CosineIndex(_present(soft, "soft", metric))
    if metric == "asymmetric":
        return AsymmetricIndex(_present(packed, "packed", metric))
    hamming = _hamming_index(_present(packed, "packed", metric), kind, device)
    return hamming if metric == "hamming" else HybridIndex(hamming, _present(soft, "soft", metric))


def _hamming_index(packed: Packed, kind: IndexKind, device: str) -> Index:
    if kind == "torch" or (kind == "auto" and not device.startswith("cpu")):
        from .torch_index import TorchIndex

        return TorchIndex(packed, device)
    if kind == "gpu":
        from .gpu_index import GpuIndex

        return GpuIndex(packed)
    scans = kind != "flat" and 8 * packed.shape[1] <= MAX_BITS and keeps_order()
    if kind == "fastscan" and not scans:
        raise InputError(
            "no fast scan for these codes",
            where="--index",
            got=f"fastscan with {8 * packed.shape[1]} bits",
            wanted=f"at most {MAX_BITS} bits and a FAISS that keeps the order",
            do="use --index auto",
        )
    return FastScanIndex(packed) if scans else HammingIndex(packed)


def _present(codes: npt.NDArray[T] | None, name: str, metric: Metric) -> npt.NDArray[T]:
    if codes is None or not len(codes):
        raise InputError(
            f"no {name} codes to search by {metric}",
            got="none",
            wanted="at least one",
            do="a head without hash layer has no packed codes: use the metric cosine" if name == "packed" else None,
        )
    return codes


class HammingIndex(Index):
    """Exhaustive Hamming search over packed codes with FAISS ``IndexBinaryFlat``.

    FAISS keeps the order asked for by itself: one thread scans the rows of a query upwards, its counting mode lists
    ids of one distance as it meets them, and its heap evicts the larger id among equal distances. Neither depends on
    the number of threads or queries. The tests compare both modes with NumPy on codes full of ties.
    """

    kind = "flat"

    def __init__(self, packed: Packed) -> None:
        self.width: int = packed.shape[1]
        self.bits: int = 8 * self.width
        self._index = load_faiss().IndexBinaryFlat(self.bits)
        self._index.add(np.ascontiguousarray(packed))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def n_bytes(self) -> int:
        """N * B / 8."""
        return len(self) * self.width

    def _nearest(self, queries: Packed, K: int) -> Neighbours:
        # Counting is a third faster than the heap for many queries, where it does not take too much memory.
        most = COUNTING_BYTES // ((self.bits + 1) * K * 8)
        self._index.use_heap = min(most, len(queries)) < QUERY_BLOCK
        self._index.query_batch_size = QUERY_BLOCK if self._index.use_heap else min(most, MOST_QUERIES)
        distance, index = self._index.search(np.ascontiguousarray(queries), K)
        return Neighbours.from_distance(index, distance, self.bits)


class HybridIndex(Index):
    """The Hamming top 100 reranked by cosine of the soft codes."""

    def __init__(self, hamming: Index, soft: Soft) -> None:
        if len(hamming) != len(soft):
            raise ValueError(f"{len(hamming)} packed codes and {len(soft)} soft codes are not of the same images")
        self._hamming, self._unit, self.kind = hamming, normalise(soft), hamming.kind

    def __len__(self) -> int:
        return len(self._unit)

    @property
    def n_bytes(self) -> int:
        """N * (B / 8 + F * 4)."""
        return self._hamming.n_bytes + self._unit.nbytes

    def search(
        self, *, K: int, packed: Packed | None = None, soft: Soft | None = None, exclude: Rows | None = None
    ) -> Neighbours:
        """See :meth:`Index.search`; both codes of a query are read."""
        queries = normalise(check_queries(soft, self._unit.shape[1], "soft"))
        exclude = check_search(K, len(self), len(queries), exclude)
        wide = max(K, min(HYBRID_CANDIDATES, len(self) - (exclude is not None)))
        candidates = self._hamming.search(K=wide, packed=packed, exclude=exclude).index
        return Neighbours.from_similarity(*nearest_first(candidates, cosines(queries, self._unit, candidates), K))

    def _nearest(self, queries: Packed, K: int) -> Neighbours:
        raise NotImplementedError("a hybrid search reads two codes of a query")
