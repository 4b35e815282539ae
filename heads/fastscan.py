"""Hamming search with the shuffle instructions of FAISS's 4-bit fast scan: exact, and about half the time of popcounts.

A product quantiser whose sub-quantisers are the 16 patterns of 4 bits stores packed codes as they are, and its tables
hold the number of differing bits of every nibble (André, Kermarrec, Le Scouarnec 2017 give the scan). Thirty-two
codes go through one instruction at a time.

Symbols: N codes of the index, Q queries, K neighbours, B bits.
"""

from functools import cache
from typing import Any

import numpy as np

from .neighbours import Index, Neighbours, Packed, Soft, load_faiss

# FAISS rounds tables to bytes. Squared distances of +-1 nibbles are 0, 4, .. 16; one more nibble, 0 in every code, has
# a table that reaches 17, so that the scale is 255 / 17 = 15 and nothing is rounded. Sums stay below 2**16 up to here.
MAX_BITS = 1024
QUERY_BLOCK = 1 << 14
HEAP_IN_ORDER = 12  # FAISS's `implem`: every query with a heap over rows upwards, which keeps the lower id of equals
# Queries that meet a block of codes while it is in registers, a hexadecimal digit a group. FAISS chooses the groups of
# what is left over itself, for 24 queries at most, and ends the process where there are more.
FOURS = 0x4444
PATTERNS = (2 * ((np.arange(16)[:, None] >> np.arange(4)) & 1) - 1).astype(np.float32)
LONGEST = (4.0, 1.0, 0.0, 0.0)  # squared length 17


class FastScanIndex(Index):
    """Exhaustive Hamming search, ties by index.

    Raises:
        ValueError: Codes of more than :data:`MAX_BITS` bits.
    """

    kind = "fastscan"

    def __init__(self, packed: Packed) -> None:
        self.width: int = packed.shape[1]
        self.bits: int = 8 * self.width
        if self.bits > MAX_BITS:
            raise ValueError(f"codes of {self.bits} bits are too long for the fast scan, which takes {MAX_BITS}")
        self._index = _load(packed)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def n_bytes(self) -> int:
        """N * (B / 8 + 1), N rounded up to blocks of 32."""
        return -(-len(self) // 32) * 32 * (self.bits // 8 + 1)

    def _nearest(self, queries: Packed, K: int) -> Neighbours:
        index = np.empty((len(queries), K), np.int64)
        distance = np.empty((len(queries), K), np.int32)
        for start in range(0, len(queries), QUERY_BLOCK):
            rows = slice(start, start + QUERY_BLOCK)
            squared, index[rows] = self._index.search(_signs(queries[rows]), K)
            distance[rows] = np.rint(squared / 4)
        return Neighbours.from_distance(index, distance, self.bits)


def _load(packed: Packed) -> Any:  # noqa: ANN401 - faiss has no types
    """The FAISS index over packed codes, which it takes without encoding them again."""
    faiss = load_faiss()
    N, width = packed.shape
    M = 2 * width + 2
    plain = faiss.IndexPQ(4 * M, M, 4)
    centroids = np.zeros((M, 16, 4), np.float32)
    centroids[: 2 * width] = PATTERNS
    centroids[2 * width, 1:] = LONGEST
    faiss.copy_array_to_vector(centroids.ravel(), plain.pq.centroids)
    codes = np.zeros((N, width + 1), np.uint8)
    codes[:, :width] = packed
    faiss.copy_array_to_vector(codes.ravel(), plain.codes)
    plain.ntotal, plain.is_trained = N, True
    index = faiss.IndexPQFastScan(plain)
    index.implem, index.qbs = HEAP_IN_ORDER, FOURS
    return index


def _signs(packed: Packed) -> Soft:
    """Queries ``(Q, B + 8)`` of -1 and +1 in the order of the nibbles, then the two empty ones."""
    signs = np.zeros((len(packed), 8 * packed.shape[1] + 8), np.float32)
    signs[:, :-8] = 2.0 * np.unpackbits(packed, axis=1, bitorder="little") - 1.0
    return signs


@cache
def keeps_order() -> bool:
    """Whether the installed FAISS gives exact distances and the lower index of equals here.

    That is a property of FAISS's code, not of its documentation: it is tried once, on codes that nearly all tie.
    """
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 4, (3000, 8), dtype=np.uint8)
    queries = codes[:80]  # more than one round of groups
    distance = np.bitwise_count(queries[:, None] ^ codes).sum(axis=2, dtype=np.int64)
    wanted = np.argsort(distance, axis=1, kind="stable")[:, :50]
    try:
        nearest = FastScanIndex(codes).search(packed=queries, K=50)
    except (AttributeError, TypeError, RuntimeError):
        return False
    same = np.array_equal(nearest.distance, np.take_along_axis(distance, wanted, axis=1))
    return same and np.array_equal(nearest.index, wanted)
