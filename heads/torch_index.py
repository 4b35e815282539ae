"""Exact Hamming search as a matrix product of +-1 codes, on whatever device torch knows; it needs no FAISS.

Symbols: N codes of the index, Q queries, K neighbours, B bits, n codes of a chunk.
"""

import numpy as np
import torch
from torch import Tensor

from .neighbours import Index, Neighbours, Packed

CHUNK_BYTES = 1 << 30  # of a chunk of codes, unpacked, and of the keys of all its pairs with queries, on a GPU
CPU_CHUNK_BYTES = 1 << 26
QUERIES = 1024
_KEY_BYTES = 32  # of one of the K nearest of a query, while those of two chunks are merged
# Integers up to here are exact in half precision; codes longer than that are multiplied in float32.
HALF_EXACT = 2048


class TorchIndex(Index):
    """Exhaustive Hamming search, ties by index.

    ``dist = (B - b1 . b2) / 2``; the product is one of tensor cores in half precision on a GPU. Ties
    are settled by one integer key a pair, ``dist * n + index``, whose K smallest are the K first by (distance, index):
    no two keys are equal, so it does not matter which of equals ``topk`` would take.

    Args:
        packed: ``(N, B // 8)`` uint8.
        device: Where to search.
    """

    kind = "torch"

    def __init__(self, packed: Packed, device: torch.device | str = "cpu") -> None:
        self.width: int = packed.shape[1]
        self.bits: int = 8 * self.width
        self.device = torch.device(device)
        self._packed = torch.from_numpy(np.ascontiguousarray(packed)).to(self.device)
        half = self.device.type == "cuda" and self.bits <= HALF_EXACT
        self._dtype = torch.float16 if half else torch.float32

    def __len__(self) -> int:
        return len(self._packed)

    @property
    def n_bytes(self) -> int:
        """N * B / 8; a chunk is unpacked while it is searched."""
        return self._packed.numel()

    def _nearest(self, queries: Packed, K: int) -> Neighbours:
        keys = np.empty((len(queries), K), np.int64)
        with torch.inference_mode():
            most = max(1, min(QUERIES, self._memory // (_KEY_BYTES * K)))
            for start in range(0, len(queries), most):
                block = torch.from_numpy(np.ascontiguousarray(queries[start : start + most])).to(self.device)
                keys[start : start + most] = self._keys(signs(block, self._dtype), K).cpu().numpy()
        return Neighbours.from_distance(keys % len(self), (keys // len(self)).astype(np.int32), self.bits)

    def _keys(self, queries: Tensor, K: int) -> Tensor:
        """Keys ``dist * N + index`` of the K nearest ``(Q, K)`` int64, ascending."""
        N, n = len(self), self._chunk(len(queries))
        best = torch.empty((len(queries), 0), dtype=torch.int64, device=self.device)
        for start in range(0, N, n):
            chunk = signs(self._packed[start : start + n], self._dtype)
            distance = (self.bits - queries @ chunk.T).to(torch.int32) // 2
            key = distance * n + torch.arange(len(chunk), dtype=torch.int32, device=self.device)
            near = key.topk(min(K, len(chunk)), dim=1, largest=False, sorted=False).values.long()
            both = torch.cat([best, (near // n) * N + near % n + start], dim=1)
            best = both.topk(min(K, both.shape[1]), dim=1, largest=False).values
        return best.sort(dim=1).values

    @property
    def _memory(self) -> int:
        return CPU_CHUNK_BYTES if self.device.type == "cpu" else CHUNK_BYTES

    def _chunk(self, Q: int) -> int:
        """Codes a chunk: within the memory, keys below 2**31."""
        # A bit of a code is two bytes and a number while it is unpacked.
        each = 16 * Q + self.bits * (2 + self._dtype.itemsize)
        return max(1, min(len(self), self._memory // each, (2**31 - 1) // (self.bits + 1)))


def signs(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes ``(n, B)`` of -1 and +1 from packed ones ``(n, B // 8)``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, :, None] >> shifts) & 1
    return bits.flatten(1).to(dtype).mul_(2).sub_(1)
