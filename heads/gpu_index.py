"""Exhaustive Hamming search of FAISS on a GPU, which breaks ties as it likes, put into exact order.

Symbols: Q queries, K neighbours, M candidates.
"""

import numpy as np

from ..errors import InputError
from .knn import HammingIndex
from .neighbours import Index, Neighbours, Packed, Ranked, Rows, Values, load_faiss, settle_ties

GPU_MOST = 2048  # FAISS's own limit of neighbours on a GPU


class GpuIndex(Index):
    """``GpuIndexBinaryFlat``; queries whose ties reach beyond 2,048 candidates are searched on the CPU.

    Raises:
        InputError: This FAISS knows no GPU, or there is none.
    """

    kind = "gpu"

    def __init__(self, packed: Packed) -> None:
        faiss = load_faiss()
        # Asked first: any other function of FAISS's GPU part ends the process where there is no driver.
        if not getattr(faiss, "get_num_gpus", lambda: 0)() or not hasattr(faiss, "GpuIndexBinaryFlat"):
            raise InputError(
                "no GPU for FAISS",
                where="--index",
                got="gpu",
                wanted="faiss-gpu and a CUDA device",
                do="use --index auto, which needs neither",
            )
        self._resources = faiss.StandardGpuResources()  # FAISS keeps a bare pointer to it
        self._index = faiss.GpuIndexBinaryFlat(self._resources, 8 * packed.shape[1])
        self._index.add(np.ascontiguousarray(packed))
        self._exact, self.width = HammingIndex(packed), packed.shape[1]

    def __len__(self) -> int:
        return len(self._exact)

    @property
    def n_bytes(self) -> int:
        """Twice N * B / 8: the codes on the GPU, and beside it."""
        return 2 * self._exact.n_bytes

    def _nearest(self, queries: Packed, K: int) -> Neighbours:
        def propose(rows: Rows, M: int) -> tuple[Rows, Values, Values]:
            distance, index = self._index.search(np.ascontiguousarray(queries[rows]), M)
            return index, -distance, -distance.max(axis=1)

        def exhaustive(rows: Rows) -> Ranked:
            nearest = self._exact.search(packed=queries[rows], K=K)
            return nearest.index, -nearest.distance

        index, closeness = settle_ties(len(queries), K, len(self), propose, exhaustive, most=GPU_MOST)
        return Neighbours.from_distance(index, (-closeness).astype(np.int32), 8 * self.width)
