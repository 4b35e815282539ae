"""Who stands at the boundary: all codes as far away as the last neighbour that votes, in it or not.

Symbols: N codes of the index, Q queries, K neighbours, C classes, B bits, g members of a group.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .neighbours import Packed, Rows, load_faiss
from .voting import Labels, label_sums

# Of rows found at a time, twelve bytes each; every code of the index may be one.
RANGE_BYTES = 1 << 28


class Boundary(NamedTuple):
    """The group at the boundary of each query.

    Attributes:
        size: g, all codes at that distance ``(Q,)`` int64.
        labels: Sum of their labels ``(Q, C)`` int64.
    """

    size: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]


class BoundaryIndex:
    """Finds the groups by FAISS's range search over packed codes, exhaustively.

    Args:
        packed: ``(N, B // 8)`` uint8.
        labels: ``(N, C)`` of 0 and 1.
    """

    def __init__(self, packed: Packed, labels: Labels) -> None:
        self._labels, self._packed = labels, packed
        self._index = load_faiss().IndexBinaryFlat(8 * packed.shape[1])
        self._index.add(np.ascontiguousarray(packed))

    def groups(self, packed: Packed, distance: npt.NDArray[np.integer], exclude: Rows | None = None) -> Boundary:
        """The group of each query at a distance.

        Args:
            packed: Queries ``(Q, B // 8)`` uint8.
            distance: Of their groups ``(Q,)``.
            exclude: A row that takes no part ``(Q,)``, -1 for none.
        """
        size = np.zeros(len(packed), np.int64)
        sums = np.zeros((len(packed), self._labels.shape[1]), np.int64)
        for rows, radius in self._blocks(distance):
            limits, far, index = self._index.range_search(np.ascontiguousarray(packed[rows]), radius + 1)
            query = np.repeat(np.arange(len(rows)), np.diff(limits.astype(np.int64)))
            kept = far == radius
            if exclude is not None:
                kept &= index != exclude[rows][query]
            query, index = query[kept], index[kept]
            size[rows] = np.bincount(query, minlength=len(rows))
            sums[rows] = label_sums(query, index, self._labels, len(rows))
        return Boundary(size, sums)

    def _blocks(self, distance: npt.NDArray[np.integer]) -> Iterator[tuple[Rows, int]]:
        """Queries of one distance, few enough that whatever they find fits into the memory."""
        step = max(1, RANGE_BYTES // (12 * len(self._packed)))
        for radius in np.unique(distance):
            rows = np.flatnonzero(distance == radius)
            for start in range(0, len(rows), step):
                yield rows[start : start + step], int(radius)
