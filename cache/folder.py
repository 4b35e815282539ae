"""What lies in a store's folder: whose it is, which shards are whole, and what has to be written again."""

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .errors import StoreDamaged, StoreError, StoreMismatch, StoreUnfinished
from .files import remove, sync_folder
from .index import index_bytes, parse_index
from .key import StoreKey
from .layout import CHECKED, INDEX, KEY, LOCK_NAME, MANIFEST, SHARD_NAME, STORE_FILE, Layout, Shard, final_name
from .metadata import FileEntry, ShardEntry, StoreManifest, is_ours, read_key, read_manifest
from .places import entries, is_remote
from .shards import Arrays, OtherKey, ShardBroken, decode_shard, is_our_shard

REPLACE = "name another folder with --out, or replace this store with --force"


@dataclass(frozen=True)
class DamagedShard:
    """A file of the store that is not what it should be, and why."""

    name: str
    reason: str


class WholeShard(NamedTuple):
    """A shard that is as it should be: its line in the manifest, and the rows of the store that were skipped."""

    entry: ShardEntry
    skipped: tuple[int, ...] = ()

    @classmethod
    def of(cls, data: bytes, shard: Shard, arrays: Arrays) -> Self:
        """Describe a shard by its file and its datasets; rows whose image has no embedding were skipped."""
        is_text = shard.part == "text"
        entry = ShardEntry(
            file=shard.name,
            rows=shard.n_rows,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            part=shard.part,
            number=shard.number,
            first_row=shard.start,
            captions=int(arrays["n_captions"].sum(dtype=np.int64)) if is_text else 0,
        )
        empty = () if is_text else np.flatnonzero(arrays["norm_img"] == 0)
        return cls(entry, tuple(int(row) + shard.start for row in empty))


@dataclass(frozen=True, kw_only=True)
class FolderState:
    """What a folder says of itself.

    Attributes:
        manifest: Its manifest, where it is sound.
        identity: Key and layout, from the manifest or from ``key.json``; None where neither is sound.
        damaged: Documents that are there and are not sound.
    """

    manifest: StoreManifest | None
    identity: tuple[StoreKey, Layout] | None
    damaged: tuple[DamagedShard, ...] = ()


def key_digest(key: StoreKey, shard: Shard) -> str:
    """The digest that a shard carries: image shards the store's, text shards the one that siblings share."""
    return key.digest if shard.part == "image" else key.text_digest


def check_shard(data: bytes, shard: Shard, layout: Layout, key: StoreKey, ids: NDArray[np.int64]) -> WholeShard:
    """Read a shard's file, check its own checksums, and its image ids against those of the whole store, ``(N,)``.

    Raises:
        ShardBroken: It is not that shard.
    """
    arrays = decode_shard(data, shard, layout, key_digest(key, shard))
    if not np.array_equal(arrays["image_id"], ids[shard.start : shard.stop]):
        raise ShardBroken("its image ids are not those of the index")
    return WholeShard.of(data, shard, arrays)


def read_checked(folder: Path, entry: FileEntry) -> bytes:
    """A file that the manifest lists.

    Raises:
        ShardBroken: It is absent, or is not what its checksum says.
    """
    try:
        data = (folder / entry.file).read_bytes()
    except OSError as error:
        raise ShardBroken(error.strerror or str(error)) from error
    if len(data) != entry.bytes:
        raise ShardBroken(f"it has {len(data)} bytes, not {entry.bytes}")
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise ShardBroken("the file is not what its checksum says")
    return data


def identify(folder: Path, key: StoreKey, *, cleared: bool = False) -> FolderState:
    """Check that a folder belongs to a store of this key.

    Args:
        folder: An existing folder.
        key: The key that is to be written.
        cleared: Whether a store was just removed from it; files beside it stay.

    Raises:
        StoreMismatch: It holds another key, another format version, or files of something else.
    """
    manifest, identity, damaged = None, None, []
    for name in (MANIFEST, KEY):
        try:
            if name == MANIFEST:
                manifest = read_manifest(folder)
                identity = (manifest.key, manifest.layout)
            else:
                identity = identity or read_key(folder)
        except FileNotFoundError:
            pass
        except StoreDamaged as error:
            damaged.append(DamagedShard(name, str(error.got)))
    if identity is None and not cleared:
        _refuse_foreign(folder)
    elif identity is not None and identity[0] != key:
        stored = identity[0]
        only_revision = stored.commit is not None and replace(stored, revision=key.revision) == key
        advice = f"give --revision {stored.commit} to resume it, " if only_revision else ""
        raise StoreMismatch(
            "the folder holds a store of another key",
            where=folder,
            got="; ".join(stored.diff(key)),
            do=advice + REPLACE,
        )
    return FolderState(manifest=manifest, identity=identity, damaged=tuple(damaged))


def looks_like_store(folder: Path) -> bool:
    """Whether a folder has files of a store, finished or not, sound or not."""
    return any(is_ours(folder / name) for name in (KEY, MANIFEST)) or any(
        SHARD_NAME.fullmatch(path.name) for path in entries(folder)
    )


def is_store_of_ours(folder: Path) -> bool:
    """Whether a file in a folder says that it is of a store; a name alone is no proof."""
    if any(is_ours(folder / name) for name in (KEY, MANIFEST)):
        return True
    return any(is_our_shard(path) for path in entries(folder) if SHARD_NAME.fullmatch(path.name))


def sort_shards(
    folder: Path, key: StoreKey, layout: Layout, ids: NDArray[np.int64], state: FolderState, shards: Sequence[Shard]
) -> tuple[dict[Shard, WholeShard], list[DamagedShard]]:
    """Sort some shards of a folder into whole and damaged ones; absent ones are in neither.

    Raises:
        StoreMismatch: Nothing says whose the folder is but its shards, and they are of another key.
    """
    listed: Mapping[Shard, ShardEntry] = (
        {entry.shard: entry for entry in state.manifest.shards} if state.manifest else {}
    )
    whole: dict[Shard, WholeShard] = {}
    damaged: list[DamagedShard] = []
    for shard in shards:
        path = folder / shard.name
        if not path.exists() and not path.is_symlink():
            continue
        try:
            # The manifest's checksum comes first: it spares HDF5 a file that is known to be bad.
            data = read_checked(folder, listed[shard]) if shard in listed else path.read_bytes()
            whole[shard] = check_shard(data, shard, layout, key, ids)
        except OtherKey as error:
            if state.identity is None:
                raise StoreMismatch(
                    "the folder holds shards of another key", where=path, got=error, do=REPLACE
                ) from error
            damaged.append(DamagedShard(shard.name, str(error)))
        except (ShardBroken, OSError) as error:
            damaged.append(DamagedShard(shard.name, str(error)))
    return whole, damaged


def index_is(folder: Path, manifest: StoreManifest | None, table: pa.Table) -> bool:
    """Whether a finished store's index says what ``table`` says.

    Raises:
        ShardBroken: It is not sound.
    """
    if manifest is None:
        return False
    try:
        written = parse_index(read_checked(folder, manifest.index), manifest.layout)
    except ValueError as error:
        raise ShardBroken(str(error)) from error
    # Both as read from parquet: what it cannot express must not make every index look changed.
    wanted = parse_index(index_bytes(table), manifest.layout)
    return bool(written.equals(wanted, check_metadata=True))


def discard(folder: Path) -> bool:
    """Remove the files of a store, and nothing else in its folder.

    Returns:
        Whether there was a store.

    Raises:
        StoreMismatch: A file with a name of ours is not of this store; nothing is removed then.
    """
    if not is_store_of_ours(folder):
        return False
    is_of_store = _is_of(folder)
    shards = [path for path in sorted(entries(folder)) if SHARD_NAME.fullmatch(path.name)]
    if foreign := [path for path in shards if not is_of_store(path)]:
        raise StoreMismatch(
            "will not replace what mmcli did not write",
            where=foreign[0],
            got="a file that is not of the store",
            do="move it away, or name another folder with --out",
        )
    # The manifest first: a store that is half removed must not be readable. The key last: it says whose the files are.
    remove(folder / MANIFEST)
    for path in (*shards, folder / INDEX, folder / CHECKED, folder / KEY):
        if not is_remote(path):
            path.unlink(missing_ok=True)
        elif path.exists():
            path.unlink()
    sync_folder(folder)
    return True


def _is_of(folder: Path) -> Callable[[Path], bool]:
    """Which files with a shard's name are shards of a folder's store: those that its manifest or key has, by number.

    Where both are damaged every such name is, and where neither is there the files say it themselves.
    """
    layout = None
    with contextlib.suppress(OSError, StoreError):
        layout = read_key(folder)[1]
    with contextlib.suppress(OSError, StoreError):
        layout = read_manifest(folder).layout
    if layout is not None:
        n_shards = len(range(0, layout.n_images, layout.shard_rows))
        return lambda path: int(path.stem.rpartition("-")[2]) < n_shards or is_our_shard(path)
    if any(is_ours(folder / name) for name in (KEY, MANIFEST)):
        return lambda _path: True
    return is_our_shard


def check_layout(folder: Path, stored: Layout, wanted: Layout) -> None:
    """Refuse a folder whose store has the same key and another shape.

    Raises:
        StoreMismatch: The shapes differ, other than in rows per shard.
    """
    for name, label in (("n_images", "images"), ("width", "width"), ("n_captions_max", "captions per image")):
        got, want = getattr(stored, name), getattr(wanted, name)
        if got != want:
            raise StoreMismatch(
                "the folder holds a store of another shape", where=folder, got=f"{label} {got}", wanted=want, do=REPLACE
            )


def unfinished(folder: Path) -> StoreUnfinished:
    """The error for a folder without a manifest."""
    return StoreUnfinished(
        "an unfinished store", where=folder, got=f"no {MANIFEST}", do="run `mmcli extract` again, it resumes"
    )


def _refuse_foreign(folder: Path) -> None:
    """A folder of something else is not written into, and a file with a name of ours is not overwritten."""
    names = sorted(path.name for path in entries(folder))
    names = [name for name in names if not (LOCK_NAME.fullmatch(name) or STORE_FILE.fullmatch(final_name(name)))]
    if set(names) - {CHECKED} and not is_store_of_ours(folder):
        raise StoreMismatch(
            "the folder holds files that are not of a store",
            where=folder,
            got=", ".join(names[:3]),
            wanted="a new or empty folder, or a store",
            do="name another folder with --out",
        )
