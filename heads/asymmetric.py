"""Asymmetric search: the query keeps its soft code, the index keeps bits.

Symbols: N codes of the index, Q queries, K neighbours, B bits, b hard code, h soft code, w weights of a query's bits.
"""

import numpy as np
import numpy.typing as npt

from .cosine import normalise
from .neighbours import Index, Neighbours, Packed, Ranked, Rows, Soft, compare_with_all, load_faiss, settle_ties

# float32 holds every whole number up to here, so sums of whole weights come out the same in any order.
EXACT = 1 << 24

Weights = npt.NDArray[np.float32]


class AsymmetricIndex(Index):
    """Exhaustive search of packed codes by the cosine of the query's soft code with each hard code.

    ``s = h . b / (|h| sqrt(B))``: the query is not binarised, the index is (Gordo, Perronnin, Gong and Lazebnik 2014,
    "Asymmetric Distances for Binary Embeddings"). The index does not grow, and a part of the accuracy
    that binarising the query loses is recovered.

    FAISS's product quantiser scans the codes: its 256 centroids of eight dimensions are the patterns of a byte, so its
    table of a byte holds the share of the sum that each pattern has. A query's weights are rounded to whole numbers
    (18 bits of them at B = 64), for which float32 sums are exact: equal codes tie exactly, on every machine and number
    of threads, and ties are settled by index.
    """

    kind, reads = "pq", "soft"

    def __init__(self, packed: Packed) -> None:
        self._packed = np.ascontiguousarray(packed)
        self.bits = self.width = 8 * packed.shape[1]
        faiss = load_faiss()
        self._index = faiss.IndexPQ(self.bits, packed.shape[1], 8, faiss.METRIC_INNER_PRODUCT)
        patterns = 2.0 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.float32) - 1.0
        faiss.copy_array_to_vector(np.tile(patterns.ravel(), packed.shape[1]), self._index.pq.centroids)
        self._index.is_trained = True
        self._index.add_sa_codes(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    @property
    def n_bytes(self) -> int:
        """N * B / 8."""
        return self._packed.nbytes

    def _nearest(self, queries: Soft, K: int) -> Neighbours:
        weights = whole_weights(queries)

        def propose(rows: Rows, M: int) -> tuple[Rows, Soft, Soft]:
            scores, candidates = self._index.search(weights[rows], M)
            return candidates, scores, scores[:, -1]

        def score(part: Weights, rows: slice) -> Weights:
            return part @ (2.0 * np.unpackbits(self._packed[rows], axis=1).astype(np.float32) - 1.0).T

        def exhaustive(rows: Rows) -> Ranked:
            return compare_with_all(weights[rows], K, len(self), score)

        index, scores = settle_ties(len(queries), K, len(self), propose, exhaustive)
        n = np.sqrt(np.square(weights.astype(np.float64)).sum(axis=1, keepdims=True) * self.bits)
        return Neighbours.from_similarity(index, (scores / np.where(n > 0, n, 1.0)).clip(-1.0, 1.0).astype(np.float32))


def whole_weights(soft: Soft) -> Weights:
    """Soft codes ``(Q, B)`` as whole numbers in float32, as large as their sums stay exact.

    A row is scaled so that its largest value becomes ``2^24 / B``; a row of zeros stays zero.

    Raises:
        ValueError: A value is not finite.
    """
    unit = normalise(soft).astype(np.float64)
    largest = np.abs(unit).max(axis=1, keepdims=True)
    weights: Weights = np.rint(unit * (EXACT // soft.shape[1] / np.where(largest > 0, largest, 1.0))).astype(np.float32)
    return weights
