"""Order made exact around a search that keeps none: approximate FAISS indexes and FAISS on a GPU.

Symbols: N codes of the index, Q queries, K neighbours, M candidates, B bits.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .neighbours import Index, Neighbours, Packed, Rows, Soft, as_neighbours, check_search, fitting_queries

Distances = npt.NDArray[np.int32]
Candidates = Callable[[Packed, int], tuple[Distances, Rows]]

# Candidates beyond K that are asked for, first of every query, then of those whose ties reach beyond.
MARGINS = (32, 1024)


class SettledIndex:
    """Neighbours by (distance, then index) among those that an inner index reaches.

    An inner index may break ties as it likes, depend on threads for it, or find fewer than K. It is asked for more
    candidates than K. Where the last of them is farther than neighbour K, none of the ties at K's distance that it
    reaches is missing, and sorting settles the order. A query whose ties reach beyond all candidates, or for which too
    few were found, is searched exhaustively: it costs time and can only raise the recall.

    Args:
        kind: Its name.
        bits: B.
        inner: Gives ``(distance, index)`` of M candidates for queries, -1 where it found none.
        exact: Searches the same codes exhaustively.
        inner_bytes: Bytes of what the inner index keeps beside the codes of ``exact``.
        most: Candidates that the inner index can be asked for.
    """

    def __init__(
        self, kind: str, bits: int, inner: Candidates, exact: Index, *, inner_bytes: int, most: int | None = None
    ) -> None:
        self.kind, self.bits = kind, bits
        self._inner, self._exact, self._bytes = inner, exact, inner_bytes
        self._most = len(exact) if most is None else min(most, len(exact))

    def __len__(self) -> int:
        return len(self._exact)

    @property
    def n_bytes(self) -> int:
        """Of the codes and of what stands beside them."""
        return self._exact.n_bytes + self._bytes

    def search(
        self,
        *,
        K: int,
        packed: Packed | None = None,
        soft: Soft | None = None,  # noqa: ARG002
        exclude: Rows | None = None,
    ) -> Neighbours:
        """See :class:`~mmcli.heads.neighbours.Index`; ``soft`` is not read."""
        queries = fitting_queries(packed, self.bits // 8, "packed")
        exclude = check_search(K, len(self), len(queries), exclude)
        own = np.full(len(queries), -1, np.int64) if exclude is None else exclude
        index = np.empty((len(queries), K), np.int64)
        distance = np.empty((len(queries), K), np.int32)
        pending = np.arange(len(queries))
        for M in self._widths(K + (exclude is not None)):
            if not len(pending):
                break
            rows, far, settled = self._candidates(queries[pending], own[pending], K, M)
            index[pending[settled]], distance[pending[settled]] = rows[settled], far[settled]
            pending = pending[~settled]
        if len(pending):
            found = self._exact.search(packed=queries[pending], K=K, exclude=own[pending])
            index[pending], distance[pending] = found.index, found.distance
        return as_neighbours(index, distance, self.bits)

    def _widths(self, wide: int) -> list[int]:
        if wide > self._most:
            return []
        return sorted({min(wide + margin, self._most) for margin in MARGINS})

    def _candidates(self, queries: Packed, own: Rows, K: int, M: int) -> tuple[Rows, Distances, npt.NDArray[np.bool_]]:
        """The K first of M candidates by (distance, index), and whether nothing is missing among them."""
        distance, index = self._inner(queries, M)
        whole = (index >= 0).all(axis=1)
        # What was not found sorts last, and so does the query's own row.
        last = distance.max(axis=1, initial=0)
        gone = (index < 0) | (index == own[:, None])
        key = np.where(gone, np.iinfo(np.int64).max, distance.astype(np.int64) * len(self) + index)
        kept = np.argsort(key, axis=1, kind="stable")[:, :K]
        index, distance = np.take_along_axis(index, kept, axis=1), np.take_along_axis(distance, kept, axis=1)
        enough = (~gone).sum(axis=1) >= K
        settled = enough & ((distance[:, -1] < last) | ~whole | (len(self) == M))
        return index, distance, settled


def searcher(index: Any) -> Candidates:  # noqa: ANN401 - faiss has no types
    """How a FAISS binary index is asked."""

    def search(queries: Packed, M: int) -> tuple[Distances, Rows]:
        distance, rows = index.search(np.ascontiguousarray(queries), M)
        return distance.astype(np.int32, copy=False), rows

    return search
