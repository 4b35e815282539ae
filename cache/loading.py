"""The shards of a finished store: read by a few threads, and compared with everything that is said about them."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import StoreDamaged
from .folder import key_digest, read_checked
from .index import ID
from .layout import PARTS, Part, Shard
from .metadata import ShardEntry, StoreManifest
from .shards import Arrays, ShardBroken, first_bad_row, view_shard

REDO = "run `mmcli extract` again, it redoes only that shard"
# Threads: hashing is the slow part, and as many shards are in memory at once.
READERS = min(4, os.cpu_count() or 1)


def load_arrays(folder: Path, manifest: StoreManifest, ids: NDArray[np.int64]) -> Arrays:
    """Every dataset of a store but the image ids, in index order, with everything checked.

    Args:
        folder: The store.
        manifest: Its manifest.
        ids: Its image ids, ``(N,)`` int64.

    Returns:
        Name of a dataset to its values, ``(N, ...)``, in the machine's byte order.

    Raises:
        StoreDamaged: A shard is not what it was when it was written, or holds a NaN.
    """
    arrays: Arrays = {}
    for part in PARTS:
        for name, (dtype, shape) in manifest.layout.datasets(part, manifest.layout.n_images).items():
            if name != ID:
                arrays[name] = np.empty(shape, dtype.newbyteorder("="))

    def copy(entry: ShardEntry) -> None:
        for name, values in _read(folder, manifest, ids, entry, check=True).items():
            if name != ID:
                arrays[name][entry.shard.start : entry.shard.stop] = values

    with ThreadPoolExecutor(READERS) as pool:
        try:
            for _ in pool.map(copy, manifest.shards):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
    return arrays


def stream(
    folder: Path, manifest: StoreManifest, ids: NDArray[np.int64], part: Part, *, check: bool
) -> Iterator[tuple[Shard, Arrays]]:
    """Every shard of one part (``image`` or ``text``), in order; a few are read ahead of whoever uses them.

    Args:
        folder: The store.
        manifest: Its manifest.
        ids: Its image ids, ``(N,)`` int64.
        part: Which shards.
        check: Compare every file with its checksum, and look for NaN and infinities.

    Yields:
        Which rows, and the datasets of the shard by name, as read-only views of the file's bytes.

    Raises:
        StoreDamaged: A shard is not what it was when it was written, or holds a NaN.
    """
    waiting: deque[tuple[Shard, Future[Arrays]]] = deque()
    with ThreadPoolExecutor(min(2, READERS)) as pool:
        try:
            for entry in manifest.shards:
                if entry.part != part:
                    continue
                waiting.append((entry.shard, pool.submit(_read, folder, manifest, ids, entry, check=check)))
                if len(waiting) > min(2, READERS):
                    shard, future = waiting.popleft()
                    yield shard, future.result()
            while waiting:
                shard, future = waiting.popleft()
                yield shard, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _read(folder: Path, manifest: StoreManifest, ids: NDArray[np.int64], entry: ShardEntry, *, check: bool) -> Arrays:
    """Read one shard; see :func:`load_arrays`."""
    shard = entry.shard
    try:
        data = read_checked(folder, entry) if check else (folder / entry.file).read_bytes()
        arrays = view_shard(data, shard, manifest.layout, key_digest(manifest.key, shard))
        if not np.array_equal(arrays[ID], ids[shard.start : shard.stop]):
            raise ShardBroken("its image ids are not those of the index")
        for name, values in arrays.items() if check else ():
            if values.dtype.kind == "f" and (row := first_bad_row(values)) is not None:
                raise ShardBroken(f"NaN or infinity in {name} row {row}, image id {ids[shard.start + row]}")
    except (ShardBroken, OSError) as error:
        raise StoreDamaged("a damaged shard", where=folder / entry.file, got=error, do=REDO) from error
    return arrays
