"""Cosine search over soft codes, exact in its ties.

Symbols: N codes of the index, Q queries, K neighbours, M candidates, F features of a soft code.
"""

import numpy as np
import numpy.typing as npt

from .neighbours import CHUNK_BYTES, Index, Neighbours, Ranked, Rows, Soft, compare_with_all, load_faiss, settle_ties


class CosineIndex(Index):
    """Exhaustive cosine search with FAISS ``IndexFlatIP``; order (-similarity, index).

    A blocked float32 product gives equal rows products that differ in the last bit, so their order would depend on
    where they stand. FAISS therefore only proposes candidates; the similarity is computed again in float64 and rounded
    to float32. Where ties may reach beyond the candidates, every row is looked at for that query.
    """

    kind, reads = "flat", "soft"

    def __init__(self, soft: Soft) -> None:
        self._unit, self.width = normalise(soft), soft.shape[1]
        self._index = load_faiss().IndexFlatIP(self.width)
        self._index.add(self._unit)

    def __len__(self) -> int:
        return len(self._unit)

    @property
    def n_bytes(self) -> int:
        """N * F * 4."""
        return self._unit.nbytes

    def _nearest(self, queries: Soft, K: int) -> Neighbours:
        queries = normalise(queries)
        # No row that FAISS left out comes before the last neighbour, unless it is as near as the worst candidate; a
        # float32 inner product of unit vectors is off by less than this, in whatever order it is summed.
        slack = self.width * 2.0**-23

        def propose(rows: Rows, M: int) -> tuple[Rows, Soft, Soft]:
            rough, candidates = self._index.search(queries[rows], M)
            return candidates, cosines(queries[rows], self._unit, candidates), rough[:, -1] + slack

        def score(part: Soft, rows: slice) -> npt.NDArray[np.float64]:
            return (part.astype(np.float64) @ self._unit[rows].astype(np.float64).T).clip(-1.0, 1.0)

        def exhaustive(rows: Rows) -> Ranked:
            return compare_with_all(queries[rows], K, len(self), score)

        return Neighbours.from_similarity(*settle_ties(len(queries), K, len(self), propose, exhaustive))


def normalise(soft: Soft) -> Soft:
    """Rows of unit length, float32; a zero row stays zero, with cosine 0 to everything.

    Raises:
        ValueError: A value is not finite.
    """
    if not np.isfinite(soft).all():
        raise ValueError(f"soft code {int(np.argwhere(~np.isfinite(soft))[0, 0])} is not finite")
    unit = np.empty(soft.shape, np.float32)
    step = max(1, CHUNK_BYTES // (8 * soft.shape[1]))
    for start in range(0, len(soft), step):
        rows = slice(start, start + step)
        wide = soft[rows].astype(np.float64)
        n = np.sqrt(np.square(wide).sum(axis=1, keepdims=True))
        unit[rows] = wide / np.where(n > 0, n, 1.0)
    return unit


def cosines(queries: Soft, unit: Soft, candidates: Rows) -> Soft:
    """The cosines of unit vectors ``(Q, F)`` with their candidates ``(Q, M)`` among the rows of ``unit (N, F)``."""
    Q, M = candidates.shape
    similarity = np.empty((Q, M), np.float32)
    step = max(1, CHUNK_BYTES // (8 * M * unit.shape[1]))
    for start in range(0, Q, step):
        rows = slice(start, start + step)
        # einsum sums the features of each pair alone, in one order; a matrix product does not promise that.
        near, query = unit[candidates[rows]].astype(np.float64), queries[rows].astype(np.float64)
        similarity[rows] = np.einsum("qmf,qf->qm", near, query).clip(-1.0, 1.0)
    return similarity
