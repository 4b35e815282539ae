"""All arrays of a store at once: every shard straight into its rows, and nothing taken on trust.

A shard that was found whole before and has not changed since is read in one pass (``direct.py``); any other is read,
its SHA-256 compared, parsed, copied and looked through for NaN, and then noted (``checked.py``).
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .checked import Record, Stamp, read_records, stamp_of, write_records
from .direct import read_spans
from .index import ID
from .layout import PARTS, Layout
from .metadata import ShardEntry, StoreManifest
from .shards import Arrays, ShardBroken, view_shard
from .stream import READERS, check_finite, damaged, read_entry
from .sweep import key_digest

Got = TypeVar("Got")


def load_arrays(folder: Path, manifest: StoreManifest, ids: NDArray[np.int64], *, check: bool) -> Arrays:
    """Every dataset of a store but the image ids, in index order.

    Args:
        folder: The store.
        manifest: Its manifest.
        ids: Its image ids, ``(N,)`` int64.
        check: Compare every file with its checksum, and look for NaN and infinities.

    Returns:
        Name of a dataset to its values, ``(N, ...)``, in the machine's byte order.

    Raises:
        StoreDamaged: A shard is not what it was when it was written, or holds a NaN.
    """
    arrays = _allocate(manifest.layout)
    known, rest = read_records(folder, manifest), list(manifest.shards)
    if known:
        quick = _all(lambda e: e.file in known and _reread(folder, manifest, ids, e, known[e.file], arrays), rest)
        rest = [entry for entry, done in zip(rest, quick, strict=True) if not done]
    read = _all(lambda entry: _read(folder, manifest, ids, entry, arrays, check=check), rest)
    fresh = {entry.file: record for entry, record in zip(rest, read, strict=True) if record is not None}
    if fresh:
        write_records(folder, manifest, known | fresh)
    return arrays


def _all(read: Callable[[ShardEntry], Got], entries: list[ShardEntry]) -> list[Got]:
    """Call a function on every shard, a few at a time; the first error in their order ends it."""
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
        try:
            return list(pool.map(read, entries))
        finally:
            pool.shutdown(cancel_futures=True)


def _reread(
    folder: Path, manifest: StoreManifest, ids: NDArray[np.int64], entry: ShardEntry, record: Record, arrays: Arrays
) -> bool:
    """Read a shard that was found whole before into its rows; false where anything is not as it was then."""
    rows = slice(entry.first_row, entry.first_row + entry.rows)
    wanted = manifest.layout.datasets(entry.part, entry.rows)
    own = {ID: np.empty(entry.rows, wanted[ID][0])} | {n: arrays[n][rows] for n in wanted if n != ID}
    if any(own[name].dtype != dtype for name, (dtype, _) in wanted.items()):
        return False  # a machine of the other byte order: values have to be turned round
    try:
        cut = record.cut(entry, manifest)
        handle = os.open(folder / entry.file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        try:
            if Stamp.of(os.fstat(handle)) != record.stamp or read_spans(handle, cut, own) != record.mark:
                return False
        finally:
            os.close(handle)
    except (OSError, ValueError, KeyError):
        return False
    return bool(np.array_equal(own[ID], ids[rows]))


def _read(
    folder: Path, manifest: StoreManifest, ids: NDArray[np.int64], entry: ShardEntry, arrays: Arrays, *, check: bool
) -> Record | None:
    """Read and check a shard in full; gives back what can be noted of it."""
    shard, path = entry.shard, folder / entry.file
    before = stamp_of(path) if check else None
    noted = before is not None and before.settled
    data = read_entry(folder, entry, check=check)
    try:
        views = view_shard(data, shard, manifest.layout, key_digest(manifest.key, shard))
        if not np.array_equal(views[ID], ids[shard.start : shard.stop]):
            raise ShardBroken("its image ids are not those of the index")
        if check:
            check_finite(shard, views, ids)
    except ShardBroken as error:
        raise damaged(folder, entry, error) from error
    for name, values in views.items():
        if name != ID:
            arrays[name][shard.start : shard.stop] = values
    if before is None or not noted or stamp_of(path) != before:
        return None
    return Record.of(entry, before, data, views)


def _allocate(layout: Layout) -> Arrays:
    arrays: Arrays = {}
    for part in PARTS:
        for name, (dtype, shape) in layout.datasets(part, layout.n_images).items():
            if name != ID:
                arrays[name] = np.empty(shape, dtype.newbyteorder("="))
    return arrays
