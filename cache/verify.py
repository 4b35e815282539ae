"""Checks everything in a store, and lists every problem instead of stopping at the first."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .encode import l2_norm
from .errors import StoreError, StoreMissing
from .folder import WholeShard, key_digest, looks_like_store, read_checked
from .index import image_ids, parse_index
from .key import StoreKey
from .layout import CHECKED, INDEX, KEY, LOCK_NAME, MANIFEST, Layout, Shard
from .metadata import ShardEntry, StoreManifest, read_key, read_manifest
from .places import place
from .reader import EXTRACT
from .shards import Arrays, ShardBroken, decode_shard, first_bad_row

Document = TypeVar("Document")
_MOST_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """The problems that :func:`verify` found in a store.

    Attributes:
        folder: The store.
        n_shards: Shards that were looked at.
        problems: One line each; empty for a store that is whole.
    """

    folder: Path
    n_shards: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the store has no problem."""
        return not self.problems


def verify(folder: Path) -> VerifyReport:
    """Check a store: checksums, counts, order of ids, NaN, zero norms, norms against vectors, key, stray files.

    Args:
        folder: A store, finished or not.

    Returns:
        Every problem found. An unfinished store is a problem; its shards are checked by what they say themselves.

    Raises:
        StoreMissing: The folder is no store at all.
    """
    folder = place(folder)
    if not folder.is_dir() or not looks_like_store(folder):
        raise StoreMissing("not a store", where=folder, do=EXTRACT)
    problems: list[str] = []
    manifest = _try(read_manifest, folder / MANIFEST, "absent, the store is unfinished", problems)
    written = _try(read_key, folder / KEY, "absent", problems)
    identity = (manifest.key, manifest.layout) if manifest else written
    if identity and written and written != identity:
        difference = "; ".join(written[0].diff(identity[0]))
        problems.append(f"{KEY}: it does not agree with {MANIFEST}: {difference}")
    n_shards = 0
    if identity is not None:
        key, layout = identity
        ids = _check_index(folder, manifest, layout, problems)
        listed = {entry.shard: entry for entry in manifest.shards} if manifest else {}
        for shard in layout.all_shards():
            n_shards += 1
            lines = _check_shard(folder, shard, listed.get(shard), layout, key, ids, manifest)
            problems += [f"{shard.name}: {line}" for line in lines]
    problems += _stray_files(folder, identity[1] if identity else None)
    return VerifyReport(folder=folder, n_shards=n_shards, problems=tuple(problems))


def norm_tolerance(norms: NDArray[np.float32], layout: Layout) -> NDArray[np.float64]:
    """How far the norm of a stored vector may be from the norm taken before the cast.

    Rounding to float16 moves a value by at most 2^-11 of itself, or by 2^-25 where it is subnormal; the norm moves by
    no more than the norm of these changes. Each norm is rounded to float32 once.

    Args:
        norms: Norms before the cast, any shape.
        layout: The store's shape.

    Returns:
        Absolute tolerances, the shape of ``norms``.
    """
    relative, absolute = (2.0**-11, 2.0**-25) if layout.dtype == "float16" else (0.0, 0.0)
    return np.asarray(norms.astype(np.float64) * (relative + 2.0**-22) + np.sqrt(layout.width) * absolute + 2.0**-140)


def _try(read: Callable[[Path], Document], path: Path, absent: str, problems: list[str]) -> Document | None:
    try:
        return read(path.parent)
    except FileNotFoundError:
        problems.append(f"{path.name}: {absent}")
    except StoreError as error:
        problems.append(f"{path.name}: {error.what}: {error.got}")
    return None


def _check_index(
    folder: Path, manifest: StoreManifest | None, layout: Layout, problems: list[str]
) -> NDArray[np.int64] | None:
    try:
        data = read_checked(folder, manifest.index) if manifest else (folder / INDEX).read_bytes()
        return image_ids(parse_index(data, layout))
    except (ShardBroken, ValueError) as error:
        problems.append(f"{INDEX}: {error}")
    except OSError as error:
        problems.append(f"{INDEX}: {error.strerror}")
    return None


def _check_shard(
    folder: Path,
    shard: Shard,
    entry: ShardEntry | None,
    layout: Layout,
    key: StoreKey,
    ids: NDArray[np.int64] | None,
    manifest: StoreManifest | None,
) -> list[str]:
    problems: list[str] = []
    try:
        data = (folder / shard.name).read_bytes()
        if entry is not None:
            data = read_checked(folder, entry)
        arrays = decode_shard(data, shard, layout, key_digest(key, shard))
    except ShardBroken as error:
        return [str(error)]
    except OSError as error:
        return [error.strerror or str(error)]
    whole = WholeShard.of(data, shard, arrays)
    if entry is not None and whole.entry != entry:
        problems.append(f"{MANIFEST} has another count of captions")
    rows = slice(shard.start, shard.stop)
    if ids is not None and not np.array_equal(arrays["image_id"], ids[rows]):
        problems.append("its image ids are not those of the index")
    # Without a manifest nothing says which rows were skipped on purpose; the store is unfinished anyway.
    skipped = whole.skipped if manifest is None else tuple(manifest.skipped)
    return problems + _check_values(shard, layout, arrays, skipped)


def _check_values(shard: Shard, layout: Layout, arrays: Arrays, skipped: tuple[int, ...]) -> list[str]:
    v, norm = ("v_img", "norm_img") if shard.part == "image" else ("v_txt", "norm_txt")
    vectors, norms = arrays[v], arrays[norm]
    for name in (v, norm):
        if (row := first_bad_row(arrays[name])) is not None:
            return [f"NaN or infinity in {name} row {row}, image id {arrays['image_id'][row]}"]
    real = np.ones(norms.shape, bool)
    problems = []
    if shard.part == "image":
        real = ~np.isin(np.arange(shard.start, shard.stop), skipped)
        problems += _rows("a skipped image has an embedding", ~real & (norms != 0), arrays)
    if shard.part == "text":
        counts = arrays["n_captions"]
        if counts.max() > layout.n_captions_max:
            problems.append(f"n_captions goes to {counts.max()}, beyond {layout.n_captions_max}")
        real = np.arange(layout.n_captions_max) < counts[:, None]
        filled = ~real & ((vectors != 0).any(axis=-1) | (norms != 0))
        problems += _rows("a missing caption that is not zero", filled, arrays)
    problems += _rows(f"{norm} is 0", real & (norms == 0), arrays)
    off = np.abs(l2_norm(vectors).astype(np.float64) - norms) > norm_tolerance(norms, layout)
    return problems + _rows(f"{norm} is not the norm of {v}", off, arrays)


def _rows(what: str, wrong: NDArray[np.bool_], arrays: Arrays) -> list[str]:
    rows = np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1))
    if not len(rows):
        return []
    named = ", ".join(f"{row} (image id {arrays['image_id'][row]})" for row in rows[:_MOST_NAMED])
    more = f" and {len(rows) - _MOST_NAMED} more" if len(rows) > _MOST_NAMED else ""
    return [f"{what}: rows {named}{more}"]


def _stray_files(folder: Path, layout: Layout | None) -> list[str]:
    if layout is None:
        return []
    names = {MANIFEST, KEY, INDEX, CHECKED, *(shard.name for shard in layout.all_shards())}
    strays = sorted({path.name for path in folder.iterdir()} - names)
    return [f"{name}: not a file of this store" for name in strays if not LOCK_NAME.fullmatch(name)]
