"""The result of a search, the interface of every index, and the checks and the tie-breaking that they share.

Symbols: N codes of the index, Q queries, K neighbours, M candidates, B bits, F features of a soft code (B, or the
width of z).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import InputError

Packed = npt.NDArray[np.uint8]
Soft = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

# Candidates beyond K that FAISS is asked for, first for every query, then for those whose ties reach beyond.
MARGINS = (32, 1024)
CHUNK_BYTES = 1 << 26


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

    @classmethod
    def from_distance(cls, index: Rows, distance: npt.NDArray[np.int32], bits: int) -> "Neighbours":
        """Neighbours of a Hamming search, with their similarity ``1 - dist / B``."""
        return cls(index, (1.0 - distance / bits).astype(np.float32), distance)

    @classmethod
    def from_similarity(cls, index: Rows, similarity: npt.NDArray[np.float32]) -> "Neighbours":
        """Neighbours of a search by cosine, with their distance ``1 - cosine``."""
        return cls(index, similarity, (1.0 - similarity).astype(np.float32))


class Index(ABC):
    """An exact search for the K nearest codes; a backend implements :meth:`_nearest`.

    Attributes:
        kind: The backend: ``flat``, ``fastscan``, ``torch``, ``gpu`` or, for asymmetric search, ``pq``.
        reads: Which codes of a query the backend reads.
        width: Bytes of a packed code, or features of a soft one.
    """

    kind: str
    reads: Literal["packed", "soft"] = "packed"
    width: int

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def n_bytes(self) -> int:
        """Bytes of the codes that a search reads."""

    def search(
        self, *, K: int, packed: Packed | None = None, soft: Soft | None = None, exclude: Rows | None = None
    ) -> Neighbours:
        """Find the K nearest codes of each query.

        Args:
            K: Neighbours a query.
            packed: Hard codes of the queries ``(Q, B // 8)`` uint8; read by hamming and hybrid.
            soft: Soft codes of the queries ``(Q, F)``; read by cosine, hybrid and asymmetric.
            exclude: For each query the row that must not be returned ``(Q,)``, -1 for none: its own image.

        Raises:
            InputError: K is larger than the index without the excluded row.
            ValueError: Codes of another width, or rows to exclude that the index does not have.
        """
        queries = check_queries(packed if self.reads == "packed" else soft, self.width, self.reads)
        exclude = check_search(K, len(self), len(queries), exclude)
        if exclude is None:
            return self._nearest(queries, K)
        wider = self._nearest(queries, K + 1)
        kept = np.argsort(wider.index == exclude[:, None], axis=1, kind="stable")[:, :K]
        parts: list[npt.NDArray[Any]] = [np.take_along_axis(part, kept, axis=1) for part in wider]
        return Neighbours(*parts)

    @abstractmethod
    def _nearest(self, queries: Any, K: int) -> Neighbours:  # noqa: ANN401 - bytes or floats
        """The K nearest of queries ``(Q, width)``, K at most the codes of the index."""


def check_queries(queries: npt.NDArray[Any] | None, width: int, name: str) -> npt.NDArray[Any]:
    """Return the queries if they are ``(Q, width)``; raise a ValueError otherwise."""
    if queries is None or queries.ndim != 2 or queries.shape[1] != width:
        got = None if queries is None else queries.shape
        raise ValueError(f"{name} queries of shape {got} do not fit an index of width {width}")
    return queries


def check_search(K: int, N: int, Q: int, exclude: Rows | None) -> Rows | None:
    """Refuse a K that the N codes cannot give; return ``exclude``, or ``None`` where it excludes nothing.

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
        without = " without the query's own image" if exclude is not None else ""
        raise InputError(
            "K does not fit the index" if K < 1 else "K is larger than the index",
            got=f"K {K}",
            wanted=f"1 to {usable}, the codes of the index{without}",
            do="choose another K",
        )
    return exclude


Values = npt.NDArray[Any]
Ranked = tuple[Rows, Values]  # rows of the index and their similarities, ``(n, K)`` each


def settle_ties(
    Q: int,
    K: int,
    N: int,
    propose: Callable[[Rows, int], tuple[Rows, Values, Values]],
    exhaustive: Callable[[Rows], Ranked],
    *,
    most: int | None = None,
) -> Ranked:
    """Exact order from a search that is fast and breaks ties as it likes.

    The fast search proposes more candidates than K. A query is settled where every code beyond them is farther than
    neighbour K, because then no tie at K's distance is missing. The others are asked for more candidates, and in the
    end compared with every code.

    Args:
        Q: Number of queries.
        K: Neighbours a query.
        N: Codes of the index.
        propose: From rows of the queries and M to their M candidates and the similarity of each, ``(n, M)``, and the
            most that any other code can have ``(n,)``.
        exhaustive: From rows of the queries to their K best of all codes.
        most: Candidates that the fast search can be asked for; all codes when not given.

    Returns:
        Rows of the index and their similarities.
    """
    most = N if most is None else min(most, N)
    pending, parts = np.arange(Q), []
    for M in sorted({min(K + margin, most) for margin in MARGINS}) if most >= K else ():
        candidates, similarity, beyond = propose(pending, M)
        index, values = nearest_first(candidates, similarity, K)
        settled = (beyond < values[:, -1]) | (M == N)
        parts.append((pending[settled], index[settled], values[settled]))
        pending = pending[~settled]
        if not len(pending):
            break
    if len(pending):
        parts.append((pending, *exhaustive(pending)))
    rows, index, values = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.argsort(rows)
    return index[order], values[order]


def nearest_first(candidates: Rows, similarity: Values, K: int) -> Ranked:
    """The K most similar of the candidates ``(Q, M)`` of each query, ties by index."""
    order = np.lexsort((candidates, -similarity), axis=-1)[:, :K]
    return np.take_along_axis(candidates, order, axis=1), np.take_along_axis(similarity, order, axis=1)


def compare_with_all(queries: Soft, K: int, N: int, score: Callable[[Soft, slice], Values]) -> Ranked:
    """The K best of all N rows, ties by index, for queries with more ties than candidates.

    Args:
        queries: Vectors ``(Q, F)``.
        K: Neighbours a query.
        N: Codes of the index.
        score: From some queries and rows of the index to their similarities.
    """
    index, values = np.empty((len(queries), K), np.int64), np.empty((len(queries), K), np.float32)
    step = max(1, CHUNK_BYTES // (4 * N))
    for start in range(0, len(queries), step):
        part = queries[start : start + step]
        similarity = np.empty((len(part), N), np.float32)
        width = max(1, CHUNK_BYTES // (8 * queries.shape[1] + 8 * len(part)))
        for rows in (slice(first, first + width) for first in range(0, N, width)):
            similarity[:, rows] = score(part, rows)
        for query, s in enumerate(similarity, start):
            last = np.partition(s, N - K)[N - K]
            above, equal = np.flatnonzero(s > last), np.flatnonzero(s == last)
            chosen = np.concatenate([above, equal[: K - len(above)]])
            index[query] = chosen[np.argsort(-s[chosen], kind="stable")]
            values[query] = s[index[query]]
    return index, values


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
