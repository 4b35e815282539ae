"""A search by NumPy alone, which indexes are compared with."""

import numpy as np


def hamming_reference(
    queries: np.ndarray, codes: np.ndarray, K: int, exclude: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted by distance, then by index: one composite key."""
    distance = np.bitwise_count(queries[:, None] ^ codes[None]).sum(-1).astype(np.int64)
    key = distance * len(codes) + np.arange(len(codes))
    if exclude is not None:
        rows = np.flatnonzero(exclude >= 0)
        key[rows, exclude[rows]] = np.iinfo(np.int64).max
    index = np.argsort(key, axis=1)[:, :K]
    return index, np.take_along_axis(distance, index, axis=1)
