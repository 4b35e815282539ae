"""What a search gives and what every index promises; checks that all of them share.

Symbols: N codes of the index, Q queries, K neighbours, B bits, F features of a soft code (B, or the width of z).
"""

from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import InputError

Packed = npt.NDArray[np.uint8]
Soft = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


class Neighbours(NamedTuple):
    """The K nearest of each query, the nearest first, ties by index.

    Attributes:
        index: Rows of the index ``(Q, K)`` int64.
        similarity: ``(Q, K)`` float32: ``1 - dist / B``, or the cosine.
        distance: ``(Q, K)``: differing bits, int32; or ``1 - cosine``, float32.
    """

    index: Rows  # type: ignore[assignment]  # hides tuple.index, which nobody needs of arrays
    similarity: npt.NDArray[np.float32]
    distance: npt.NDArray[np.int32] | npt.NDArray[np.float32]


class Index(Protocol):
    """Something that finds neighbours; what it does not need of a query may be ``None``."""

    @property
    def kind(self) -> str:
        """How it searches: ``flat``, ``fastscan``, ``pq``, ``torch``, ``gpu``, ``ivf``, ``hnsw`` or ``multihash``."""
        ...

    @property
    def n_bytes(self) -> int:
        """Bytes of the codes that a search reads."""
        ...

    def __len__(self) -> int: ...

    def search(
        self, *, K: int, packed: Packed | None = None, soft: Soft | None = None, exclude: Rows | None = None
    ) -> Neighbours:
        """Find the K nearest codes of each query.

        Args:
            K: Neighbours a query.
            packed: Hard codes of the queries ``(Q, B // 8)`` uint8; for hamming and hybrid.
            soft: Soft codes of the queries ``(Q, F)``; for cosine, hybrid and asymmetric.
            exclude: For each query the row that must not be returned ``(Q,)``, -1 for none: its own image.

        Raises:
            InputError: K is larger than the index without the excluded row.
            ValueError: Codes of another width, or rows to exclude that the index does not have.
        """
        ...


class ExhaustiveIndex(ABC):
    """What indexes that look at every code have in common: a search for the K nearest, and one more to leave out a row.

    Attributes:
        reads: Which codes of a query.
        width: Bytes of a packed code, or features of a soft one.
    """

    reads: Literal["packed", "soft"] = "packed"
    width: int

    @abstractmethod
    def __len__(self) -> int: ...

    def search(
        self, *, K: int, packed: Packed | None = None, soft: Soft | None = None, exclude: Rows | None = None
    ) -> Neighbours:
        """See :class:`Index`; codes that :attr:`reads` does not name are not read."""
        queries = fitting_queries(packed if self.reads == "packed" else soft, self.width, self.reads)
        exclude = check_search(K, len(self), len(queries), exclude)
        found = self._nearest(queries, K if exclude is None else K + 1)
        return found if exclude is None else without(found, exclude, K)

    @abstractmethod
    def _nearest(self, queries: Any, K: int) -> Neighbours:  # noqa: ANN401 - bytes or floats
        """The K nearest of queries ``(Q, width)``, K at most the codes of the index."""


def fitting_queries(given: npt.NDArray[Any] | None, width: int, name: str) -> npt.NDArray[Any]:
    """Queries ``(Q, width)``.

    Raises:
        ValueError: None were given, or of another width.
    """
    if given is None or given.ndim != 2 or given.shape[1] != width:
        got = None if given is None else given.shape
        raise ValueError(f"{name} queries of shape {got} do not fit an index of width {width}")
    return given


def check_search(K: int, N: int, Q: int, exclude: Rows | None) -> Rows | None:
    """Refuse what the index cannot give; nothing to exclude becomes ``None``.

    Raises:
        InputError: K is larger than the N codes without the excluded one.
        ValueError: ``exclude`` is not one row of the index, or -1, for each of the Q queries.
    """
    if exclude is not None:
        exclude = np.asarray(exclude)
        if exclude.shape != (Q,) or (Q and not (exclude.min() >= -1 and exclude.max() < N)):
            raise ValueError(f"exclude must name one row of 0..{N - 1}, or -1, for each of {Q} queries")
        exclude = exclude if (exclude >= 0).any() else None
    usable = N - (exclude is not None)
    if not 1 <= K <= usable:
        own = " without the query's own image" if exclude is not None else ""
        raise InputError(
            "K does not fit the index" if K < 1 else "K is larger than the index",
            got=f"K {K}",
            wanted=f"1 to {usable}, the codes of the index{own}",
            do="choose another K",
        )
    return exclude


def without(found: Neighbours, exclude: Rows, K: int) -> Neighbours:
    """Of K + 1 neighbours the K that are not excluded, in order."""
    kept = np.argsort(found.index == exclude[:, None], axis=1, kind="stable")[:, :K]
    parts: list[npt.NDArray[Any]] = [np.take_along_axis(part, kept, axis=1) for part in found]
    return Neighbours(*parts)


def as_neighbours(index: Rows, distance: npt.NDArray[np.int32], bits: int) -> Neighbours:
    """Neighbours of a Hamming search ``(Q, K)``, with their similarity ``1 - dist / B``."""
    return Neighbours(index, (1.0 - distance / bits).astype(np.float32), distance)


def load_faiss() -> Any:  # noqa: ANN401
    """The faiss module, imported when first needed, so that nothing else waits for it.

    Raises:
        InputError: It is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise InputError(
            "faiss is not installed", wanted="faiss-cpu or faiss-gpu", do="pip install 'mmcli[cpu]' or 'mmcli[gpu]'"
        ) from None
    return faiss
