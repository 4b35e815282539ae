"""Cosine search over soft codes, exact in its ties.

Symbols: N codes of the index, Q queries, K neighbours, M candidates, F features of a soft code.
"""

import numpy as np
import numpy.typing as npt

from .neighbours import Neighbours, Packed, Rows, Soft, check_search, fitting_queries, load_faiss, without

# Candidates beyond K that FAISS is asked for, so that ties at the end are nearly always settled among them.
MARGIN = 32
# A float32 inner product of unit vectors of some thousand features is off by less than this.
SLACK = 1e-5
CHUNK_BYTES = 1 << 26


class CosineIndex:
    """Exhaustive cosine search with FAISS ``IndexFlatIP``; order (-similarity, index).

    A blocked float32 product gives equal rows products that differ in the last bit, so their order would depend on
    where they stand. FAISS therefore only proposes candidates; the similarity is computed again in float64 and rounded
    to float32. Where ties may reach beyond the candidates, every row is looked at for that query.
    """

    def __init__(self, soft: Soft) -> None:
        self._unit = normalise(soft)
        self._index = load_faiss().IndexFlatIP(self._unit.shape[1])
        self._index.add(self._unit)

    def __len__(self) -> int:
        return len(self._unit)

    @property
    def n_bytes(self) -> int:
        """N * F * 4."""
        return self._unit.nbytes

    def search(
        self,
        *,
        K: int,
        packed: Packed | None = None,  # noqa: ARG002
        soft: Soft | None = None,
        exclude: Rows | None = None,
    ) -> Neighbours:
        """See :class:`~mmcli.heads.neighbours.Index`; ``packed`` is not read."""
        queries = normalise(fitting_queries(soft, self._unit, "soft"))
        exclude = check_search(K, len(self), len(queries), exclude)
        wide = K if exclude is None else K + 1
        rough, candidates = self._index.search(queries, min(len(self), wide + MARGIN))
        found = rerank(queries, self._unit, candidates, wide)
        if candidates.shape[1] < len(self):
            unsettled = np.flatnonzero(rough[:, -1] >= found.similarity[:, -1] - SLACK)
            step = max(1, CHUNK_BYTES // (4 * len(self)))
            for start in range(0, len(unsettled), step):
                rows = unsettled[start : start + step]
                for part, settled in zip(found, exhaustive(queries[rows], self._unit, wide), strict=True):
                    part[rows] = settled
        return found if exclude is None else without(found, exclude, K)


def normalise(soft: Soft) -> Soft:
    """Rows of unit length, float32; a zero row stays zero, with cosine 0 to everything.

    Raises:
        ValueError: A value is not finite.
    """
    soft = np.ascontiguousarray(soft, dtype=np.float32)
    n = np.sqrt(np.einsum("nf,nf->n", soft, soft, dtype=np.float64))[:, None]
    if not np.isfinite(n).all():
        raise ValueError(f"soft code {int(np.flatnonzero(~np.isfinite(n))[0])} is not finite")
    return (soft / np.where(n > 0, n, 1.0)).astype(np.float32)


def rerank(queries: Soft, unit: Soft, candidates: Rows, K: int) -> Neighbours:
    """The K best candidates by cosine, ties by index.

    Args:
        queries: Unit vectors ``(Q, F)``.
        unit: Unit vectors of the index ``(N, F)``.
        candidates: Rows of the index ``(Q, M)``, M >= K.
        K: Neighbours to keep.
    """
    Q, M = candidates.shape
    similarity = np.empty((Q, M), np.float32)
    step = max(1, CHUNK_BYTES // (8 * M * unit.shape[1]))
    for start in range(0, Q, step):
        rows = slice(start, start + step)
        # einsum goes over the features of each pair alone, in one order; a matrix product does not promise that.
        pairs = np.einsum("qmf,qf->qm", unit[candidates[rows]], queries[rows], dtype=np.float64)
        similarity[rows] = pairs.clip(-1.0, 1.0)
    order = np.lexsort((candidates, -similarity), axis=-1)[:, :K]
    return _neighbours(np.take_along_axis(candidates, order, axis=1), np.take_along_axis(similarity, order, axis=1))


def exhaustive(queries: Soft, unit: Soft, K: int) -> Neighbours:
    """The same over all N rows, for queries with more ties than candidates; takes ``4 Q N`` bytes."""
    similarity = np.empty((len(queries), len(unit)), np.float32)
    wide = queries.astype(np.float64)
    step = max(1, CHUNK_BYTES // (8 * unit.shape[1] + 8 * len(queries)))
    for start in range(0, len(unit), step):
        rows = slice(start, start + step)
        similarity[:, rows] = (wide @ unit[rows].astype(np.float64).T).clip(-1.0, 1.0)
    index = np.empty((len(queries), K), np.int64)
    for row, s in enumerate(similarity):
        last = np.partition(s, len(s) - K)[len(s) - K]
        above, equal = np.flatnonzero(s > last), np.flatnonzero(s == last)
        chosen = np.concatenate([above, equal[: K - len(above)]])
        index[row] = chosen[np.argsort(-s[chosen], kind="stable")]
    return _neighbours(index, np.take_along_axis(similarity, index, axis=1))


def _neighbours(index: Rows, similarity: npt.NDArray[np.float32]) -> Neighbours:
    return Neighbours(index, similarity, (1.0 - similarity).astype(np.float32))
