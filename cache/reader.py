"""Reads a finished store: its key and index at once, its arrays on request."""

import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .errors import RESUME, StoreDamaged, StoreError, StoreMissing
from .folder import key_digest, looks_like_store, read_checked, unfinished
from .index import ID, image_ids, parse_index
from .key import StoreKey
from .layout import MANIFEST, PARTS, Part, Shard
from .metadata import ShardEntry, StoreManifest, read_manifest
from .parquet import open_parquet
from .places import place
from .shards import Arrays, ShardBroken, first_bad_row, view_shard

_log = logging.getLogger(__name__)

# Threads: hashing is the slow part, and as many shards are in memory at once.
READERS = min(4, os.cpu_count() or 1)
REDO = "run `mmcli extract` again, it redoes only that shard"
EXTRACT = "run `mmcli extract` first, or name a store elsewhere"


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Every array of a store, in index order.

    Attributes:
        v_img: Raw image embeddings, ``(N, D)``, float16 or float32 as stored.
        v_txt: Raw caption embeddings, ``(N, n_captions_max, D)``, same dtype; rows of missing captions are zero.
        norm_img: Their L2 norms, taken before the cast, ``(N,)`` float32.
        norm_txt: ``(N, n_captions_max)`` float32; 0 for missing captions.
        n_captions: Real captions of each image, ``(N,)`` uint8; they come first.
    """

    v_img: NDArray[Any]
    v_txt: NDArray[Any]
    norm_img: NDArray[np.float32]
    norm_txt: NDArray[np.float32]
    n_captions: NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class Store:
    """A store whose extraction is finished, opened for reading.

    Attributes:
        folder: Where it is.
        manifest: What its ``manifest.json`` says.
        index_file: The content of its ``index.parquet``, whose checksum is right.
        ids: Its image ids, ``(N,)`` int64, read-only.
    """

    folder: Path
    manifest: StoreManifest
    index_file: bytes = field(repr=False)
    ids: NDArray[np.int64] = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a store: reads manifest and index, looks that every shard is there.

        Args:
            folder: The store's folder; :func:`~mmcli.cache.places.place` makes one of a URL.

        Raises:
            StoreMissing: There is no folder, or it is not a store.
            StoreUnfinished: Extraction was stopped.
            StoreMismatch: It is of another format version.
            StoreDamaged: The manifest or the index is not readable, a shard is missing or has a wrong size.
        """
        folder = place(folder)
        manifest = _manifest_of(folder)
        for entry in manifest.shards:
            path = folder / entry.file
            size = path.stat().st_size if path.is_file() else None
            if size != entry.bytes:
                got = "no file" if size is None else f"{size} bytes"
                raise StoreDamaged("a damaged shard", where=path, got=got, wanted=f"{entry.bytes} bytes", do=REDO)
        try:
            data = read_checked(folder, manifest.index)
            ids = image_ids(parse_index(data, manifest.layout, ()))
        except (ShardBroken, ValueError) as error:
            raise _damaged_index(folder, manifest, error) from error
        return cls(folder=folder, manifest=manifest, index_file=data, ids=ids)

    @cached_property
    def index(self) -> pa.Table:
        """One row per image, in order, with ``shard`` and ``row`` of its embeddings.

        Raises:
            StoreDamaged: It is not readable.
        """
        return self.columns()

    @property
    def column_names(self) -> list[str]:
        """Names of the columns of the index."""
        return list(open_parquet(self.index_file).schema_arrow.names)

    def columns(self, names: Sequence[str] | None = None) -> pa.Table:
        """Some columns of the index, which is quicker than all where captions are not wanted.

        Args:
            names: Which; a name that is not there is left out. ``image_id``, ``shard`` and ``row`` come too.

        Raises:
            StoreDamaged: They are not readable.
        """
        try:
            return parse_index(self.index_file, self.manifest.layout, names)
        except ValueError as error:
            raise _damaged_index(self.folder, self.manifest, error) from error

    @property
    def key(self) -> StoreKey:
        """The key: everything that its numbers depend on."""
        return self.manifest.key

    @property
    def digest(self) -> str:
        """SHA-256 of its key, in hex."""
        return self.key.digest

    @property
    def text_digest(self) -> str:
        """SHA-256, in hex, of what its caption embeddings depend on."""
        return self.key.text_digest

    @property
    def n_images(self) -> int:
        """Number of images in the store, N."""
        return self.manifest.layout.n_images

    @property
    def width(self) -> int:
        """Width of an embedding, D."""
        return self.manifest.layout.width

    @property
    def n_captions_max(self) -> int:
        """Captions that the store keeps of an image."""
        return self.manifest.layout.n_captions_max

    @property
    def created(self) -> str:
        """When it was finished: UTC, ISO 8601 with microseconds."""
        return self.manifest.created

    @property
    def skipped(self) -> Mapping[int, str]:
        """Rows without an image embedding (theirs is zero), and why."""
        return self.manifest.skipped

    @property
    def extra(self) -> dict[str, Any]:
        """What the writer kept beside the arrays: library versions, device and the like."""
        return self.manifest.extra

    def load(self) -> Embeddings:
        """Every embedding, in index order; every file is compared with its checksum and looked through for NaN.

        Raises:
            StoreDamaged: A shard is not what it was when it was written, or holds a NaN.
        """
        layout, arrays = self.manifest.layout, Arrays()
        for part in PARTS:
            for name, (dtype, shape) in layout.datasets(part, layout.n_images).items():
                if name != ID:
                    arrays[name] = np.empty(shape, dtype.newbyteorder("="))

        def copy(entry: ShardEntry) -> None:
            for name, values in self._read(entry, check=True).items():
                if name != ID:
                    arrays[name][entry.shard.start : entry.shard.stop] = values

        with ThreadPoolExecutor(READERS) as pool:
            try:
                for _ in pool.map(copy, self.manifest.shards):
                    pass
            finally:
                pool.shutdown(cancel_futures=True)
        return Embeddings(**arrays)

    def shards(self, part: Part, *, check: bool = True) -> Iterator[tuple[Shard, Arrays]]:
        """The shards of a part one after another, so that a store of any size is read in the memory of a few.

        Image and text shards are of the same rows: ``zip`` of both gives all arrays of a range of rows.

        Args:
            part: ``image`` or ``text``.
            check: Compare every file with its checksum, and look for NaN and infinities.

        Yields:
            Which rows, and the datasets of the shard by name, ``(n, ...)``, read-only.

        Raises:
            StoreDamaged: See :meth:`load`.
        """
        entries = [entry for entry in self.manifest.shards if entry.part == part]
        ahead = min(2, READERS)
        waiting: deque[Future[Arrays]] = deque()
        with ThreadPoolExecutor(ahead) as pool:
            try:
                for number, entry in enumerate(entries):
                    for later in entries[number + len(waiting) : number + ahead + 1]:
                        waiting.append(pool.submit(self._read, later, check=check))
                    yield entry.shard, waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _read(self, entry: ShardEntry, *, check: bool) -> Arrays:
        """The datasets of one shard, as read-only views of its file's bytes."""
        shard, path = entry.shard, self.folder / entry.file
        try:
            data = read_checked(self.folder, entry) if check else path.read_bytes()
            arrays = view_shard(data, shard, self.manifest.layout, key_digest(self.key, shard))
            if not np.array_equal(arrays[ID], self.ids[shard.start : shard.stop]):
                raise ShardBroken("its image ids are not those of the index")
            for name, values in arrays.items() if check else ():
                if values.dtype.kind == "f" and (row := first_bad_row(values)) is not None:
                    raise ShardBroken(f"NaN or infinity in {name} row {row}, image id {self.ids[shard.start + row]}")
        except (ShardBroken, OSError) as error:
            raise StoreDamaged("a damaged shard", where=path, got=error, do=REDO) from error
        return arrays


def list_stores(root: Path) -> list[Path]:
    """Finished stores directly below a folder, the one that was extracted last at the end; empty without that folder.

    An extraction that finds its store finished counts: what was asked for last is what the next command reads.

    A store whose manifest cannot be read, or of another format version, is left out with a warning in the log.
    """
    dated = []
    for folder in _folders(root):
        try:
            read_manifest(folder)
            dated.append(((folder / MANIFEST).stat().st_mtime_ns, folder.name, folder))
        except FileNotFoundError:
            continue
        except StoreError as error:
            _log.warning("left out: %s", error)
    return [folder for _, _, folder in sorted(dated)]


def newest_store(root: Path) -> Path:
    """The finished store below a folder that was extracted last.

    Raises:
        StoreMissing: There is none; says which unfinished ones there are.
    """
    stores = list_stores(root)
    if stores:
        return stores[-1]
    rest = [folder for folder in _folders(root) if looks_like_store(folder)]
    bare = [folder.name for folder in rest if not (folder / MANIFEST).exists()]
    unreadable = [folder.name for folder in rest if (folder / MANIFEST).exists()]
    kinds = (("unfinished", bare), ("unreadable", unreadable))
    got = "; ".join(f"{kind} {', '.join(names)}" for kind, names in kinds if names)
    raise StoreMissing("no finished store", where=root, got=got or None, do=RESUME if got else EXTRACT)


def _manifest_of(folder: Path) -> StoreManifest:
    if not folder.is_dir():
        raise StoreMissing("no such store", where=folder, do=EXTRACT)
    try:
        return read_manifest(folder)
    except FileNotFoundError:
        if looks_like_store(folder):
            raise unfinished(folder) from None
        raise StoreMissing("not a store", where=folder, got=f"no {MANIFEST}", do=EXTRACT) from None


def _damaged_index(folder: Path, manifest: StoreManifest, error: Exception) -> StoreDamaged:
    return StoreDamaged("a damaged index", where=folder / manifest.index.file, got=error, do=RESUME)


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
