"""Shards of a finished store one after another: read and hashed by a few threads ahead of whoever uses them."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import StoreDamaged
from .index import ID
from .layout import Part, Shard
from .metadata import ShardEntry, StoreManifest
from .shards import Arrays, ShardBroken, first_bad_row, view_shard
from .sweep import key_digest, read_checked

REDO = "run `mmcli extract` again, it redoes only that shard"
READERS = 4


def read_ahead(
    folder: Path, entries: Iterable[ShardEntry], *, check: bool, readers: int = READERS
) -> Iterator[tuple[ShardEntry, bytes]]:
    """Files in order, read and hashed by a few threads ahead of the one that copies: hashing is the slow part.

    Args:
        folder: The store.
        entries: Its files.
        check: Compare each with its checksum.
        readers: Threads at most; so many files and one more are in memory.

    Raises:
        StoreDamaged: A file is absent, or is not what its checksum says.
    """
    waiting: deque[tuple[ShardEntry, Future[bytes]]] = deque()
    workers = min(readers, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        try:
            for entry in entries:
                waiting.append((entry, pool.submit(read_entry, folder, entry, check=check)))
                if len(waiting) > workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def read_entry(folder: Path, entry: ShardEntry, *, check: bool) -> bytes:
    """A file of the store, compared with its checksum where that is asked for.

    Raises:
        StoreDamaged: It is absent, or is not what its checksum says.
    """
    try:
        return read_checked(folder, entry) if check else (folder / entry.file).read_bytes()
    except (ShardBroken, OSError) as error:
        raise damaged(folder, entry, error) from error


def stream(
    folder: Path, manifest: StoreManifest, ids: NDArray[np.int64], part: Part, *, check: bool
) -> Iterator[tuple[Shard, Arrays]]:
    """Every shard of a part, in order, with its datasets as read-only views of the file's bytes.

    Args:
        folder: The store.
        manifest: Its manifest.
        ids: Its image ids, ``(N,)`` int64.
        part: Which shards.
        check: Compare every file with its checksum, and look for NaN and infinities.

    Raises:
        StoreDamaged: A shard is not what it was when it was written, or holds a NaN.
    """
    entries = [entry for entry in manifest.shards if entry.part == part]
    for entry, data in read_ahead(folder, entries, check=check, readers=2):
        shard = entry.shard
        try:
            arrays = view_shard(data, shard, manifest.layout, key_digest(manifest.key, shard))
            if not np.array_equal(arrays[ID], ids[shard.start : shard.stop]):
                raise ShardBroken("its image ids are not those of the index")
            if check:
                check_finite(shard, arrays, ids)
        except ShardBroken as error:
            raise damaged(folder, entry, error) from error
        yield shard, arrays


def check_finite(shard: Shard, arrays: Arrays, ids: NDArray[np.int64]) -> None:
    """Look for NaN and infinities in the datasets of a shard.

    Raises:
        ShardBroken: There is one; the row and the image id are named.
    """
    for name, values in arrays.items():
        if values.dtype.kind == "f" and (row := first_bad_row(values)) is not None:
            raise ShardBroken(f"NaN or infinity in {name} row {row}, image id {ids[shard.start + row]}")


def damaged(folder: Path, entry: ShardEntry, error: Exception) -> StoreDamaged:
    """The error for a shard that is not what the manifest says."""
    return StoreDamaged("a damaged shard", where=folder / entry.file, got=error, do=REDO)
