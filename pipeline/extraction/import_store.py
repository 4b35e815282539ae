"""A store of embeddings that another tool computed: checked against a manifest, then written like any other.

Everything is read twice, a few thousand rows at a time: once to check and to hash it, before anything is written, and
once to write it. Symbols: ``N`` images, ``D`` width, ``C`` captions of an image.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import RenderableType

from ... import __version__
from ...cache import StoreError, StoreKey, StoreWriter, is_remote
from ...cache.layout import StoredDtype
from ...errors import InputError
from ..core.interrupts import interruptible
from ..core.progress import Progress
from ..data.manifest import Manifest, read_manifest
from .vectors import Counts, Vectors, VectorTable, find_files, match, open_npy

CAPTIONS = 5


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Caption vectors of N images.

    Attributes:
        vectors: ``(R, D)``, those of one image after those of another; or ``(N, C, D)``.
        counts: Captions of each image ``(N,)``; they come first.
        slots: Whether each image has C places, filled or not.
    """

    vectors: Vectors
    counts: Counts
    slots: bool

    def read(self, start: int, stop: int, n_slots: int) -> npt.NDArray[np.float32]:
        """Captions of the images ``start`` to ``stop``, ``(n, n_slots, D)``; rows of missing ones are zero."""
        own = self.counts[start:stop]
        if self.slots:
            return self.vectors.read(start, stop)[:, :n_slots].astype(np.float32)
        first = int(self.counts[:start].sum())
        filled = np.zeros((stop - start, n_slots, self.vectors.shape[-1]), np.float32)
        filled[np.arange(n_slots) < own[:, None]] = self.vectors.read(first, first + int(own.sum()))
        return filled


def open_images(path: Path, listing: Manifest, scratch: Path) -> Vectors:
    """Image vectors ``(N, D)`` in the manifest's order.

    Args:
        path: A file, or a folder of numbered ones.
        listing: The manifest.
        scratch: Where parquet rows are put in order.

    Raises:
        InputError: Not readable, or not one vector for each image.
    """
    kind, files = find_files(path, "--images")
    if kind == ".parquet":
        table = VectorTable.open(path, files, "v_img")
        if table.depth != 1:
            raise InputError(
                "image vectors in lists", where=path, got=f"column {table.column}", wanted="one vector a row"
            )
        targets, _ = match(table, listing, np.ones(len(listing), np.int64), or_one=False)
        return table.in_order(targets, scratch)
    vectors = open_npy(path, files, (2,))
    if vectors.shape[0] != len(listing):
        raise InputError(
            "another number of images",
            where=path,
            got=f"{vectors.shape[0]} rows",
            wanted=f"{len(listing)}, one for each image of the manifest",
            do="name the manifest that they were computed from",
        )
    return vectors


def open_texts(path: Path, listing: Manifest, scratch: Path) -> Texts:
    """Caption vectors in the manifest's order; as :func:`open_images`.

    Raises:
        InputError: Not readable, or neither one caption for each image nor all of the first five.
    """
    kind, files = find_files(path, "--texts")
    every = np.array([min(len(texts), CAPTIONS) for texts in listing.captions], np.int64)
    if kind == ".parquet":
        table = VectorTable.open(path, files, "v_txt")
        targets, counts = match(table, listing, every, or_one=True)
        return Texts(vectors=table.in_order(targets, scratch), counts=counts, slots=False)
    vectors = open_npy(path, files, (2, 3))
    n_rows, n = vectors.shape[0], len(listing)
    slots = vectors.shape[1] if len(vectors.shape) == 3 else None
    if slots is not None and slots > CAPTIONS:
        raise InputError("too many captions an image", where=path, got=slots, wanted=f"at most {CAPTIONS}")
    if n_rows == n:
        counts = np.minimum(every, slots or 1)
    elif slots is None and n_rows == every.sum():
        counts = every
    else:
        wanted = f"{n}, one for each image of the manifest"
        if slots is None:
            wanted += f", or {every.sum()}, one for each of the first {CAPTIONS} captions of each"
        raise InputError(
            "another number of texts",
            where=path,
            got=f"{n_rows} rows",
            wanted=wanted,
            do="name the manifest that they were computed from",
        )
    return Texts(vectors=vectors, counts=counts, slots=slots is not None)


def check_images(images: Vectors, listing: Manifest, dtype: StoredDtype, tick: Callable[[int], object]) -> str:
    """Look at every value of the images.

    Args:
        images: ``(N, D)``.
        listing: The manifest.
        dtype: How they will be stored.
        tick: Told how many rows were looked at.

    Returns:
        SHA-256, in hex, of the content.

    Raises:
        InputError: A NaN or an infinity, a row of zeros, or values too large for ``dtype``.
    """

    def look(start: int, values: npt.NDArray[Any]) -> None:
        rows = np.arange(start, start + len(values))
        _check(images, listing, rows, rows, values[:, None], np.ones((len(values), 1), bool), dtype)
        tick(len(values))

    return images.sha256(look)


def check_texts(texts: Texts, listing: Manifest, dtype: StoredDtype, tick: Callable[[int], object]) -> str:
    """Look at every value of the captions; as :func:`check_images`.

    Raises:
        InputError: Likewise; or a vector where the manifest has no caption.
    """
    n = np.arange(len(listing))
    owners = n if texts.slots else np.repeat(n, texts.counts)

    def look(start: int, values: npt.NDArray[Any]) -> None:
        own = owners[start : start + len(values)]
        slots = values if texts.slots else values[:, None]
        counts = texts.counts[own] if texts.slots else np.ones(len(own), np.int64)
        real = np.arange(slots.shape[1]) < counts[:, None]
        _check(texts.vectors, listing, np.arange(start, start + len(own)), own, slots, real, dtype)
        tick(len(values))

    return texts.vectors.sha256(look)


def _check(
    vectors: Vectors,
    listing: Manifest,
    rows: npt.NDArray[np.int64],
    images: npt.NDArray[np.int64],
    values: npt.NDArray[Any],
    real: npt.NDArray[np.bool_],
    dtype: StoredDtype,
) -> None:
    """Refuse what no store can hold; ``values`` are ``(n, C, D)``, ``real`` ``(n, C)`` says which there should be."""
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    zero = ~(stored != 0).any(axis=2)
    problems = (
        ("NaN or infinity among the embeddings", ~np.isfinite(values).all(axis=2) & real, "compute it again"),
        ("an embedding that is zero", zero & real, "leave the image out of the manifest, or compute it again"),
        ("a caption that the manifest does not have", ~zero & ~real, "fill up with zeros, or name the right manifest"),
        ("too large for float16", ~np.isfinite(stored).all(axis=2) & real, "store it with --dtype float32"),
    )
    for what, bad, do in problems:
        if bad.any():
            row, slot = np.argwhere(bad)[0]
            at = f"{vectors.place(int(rows[row]))}, image id {listing.image_ids[images[row]]}"
            raise InputError(what, where=at if bad.shape[1] == 1 else f"{at}, caption {slot}", do=do)


SHARD_ROWS = 1024
# A key has whole numbers there, and nobody knows the other tool's.
UNKNOWN = 1


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """Everything that an import is told.

    Attributes:
        images: A ``.npy`` or ``.parquet`` file of image vectors ``(N, D)``, or a folder of numbered ones.
        texts: Likewise of captions: one an image ``(N, D)``; ``(N, C, D)``; or one row a caption, in manifest order.
        manifest: The manifest whose images they are of, in its order; parquet is matched by ``image_id``.
        name: The model that computed them.
        revision: Which revision of it; the hash of the content where nobody knows.
        out: The store's folder; below ``cache`` when not given.
        cache: The folder of all stores.
        dtype: How they are stored; as they are when not given.
        shard_rows: Images per shard.
        force: Throw an existing store in ``out`` away first.
    """

    images: Path
    texts: Path
    manifest: Path
    name: str
    revision: str | None = None
    out: Path | None = None
    cache: Path = Path("data/cache")
    dtype: StoredDtype | None = None
    shard_rows: int = SHARD_ROWS
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class ImportResult:
    """What an import did."""

    store: Path
    digest: str
    n_images: int
    n_captions: int
    width: int
    dtype: StoredDtype
    revision: str

    def to_json(self) -> dict[str, Any]:
        """One flat JSON object."""
        return vars(self) | {"store": str(self.store)}

    def summary(self) -> list[RenderableType]:
        """What a person reads at the end."""
        what = f"{self.n_images:,} images and {self.n_captions:,} captions, {self.width} wide, {self.dtype}"
        return [what, f"wrote {self.store}"]


def import_store(plan: ImportPlan, progress: Progress | None = None) -> ImportResult:
    """Make a store of embeddings that were computed elsewhere.

    Args:
        plan: What, and where to.
        progress: Who to tell.

    Raises:
        InputError: Files that cannot be read, wrong counts, widths or ids, a NaN, a zero row, or a folder that holds
            another store. Nothing was written then.
    """
    progress = progress or Progress()
    for option, value in (("--name", plan.name), ("--revision", plan.revision)):
        if value is not None and not value.strip():
            raise InputError("an empty name", where=option, wanted="the model, or its revision, that computed them")
    listing = read_manifest(plan.manifest)
    scratch = plan.cache if plan.out is None or is_remote(plan.out) else plan.out.parent
    images = open_images(plan.images, listing, scratch)
    texts = open_texts(plan.texts, listing, scratch)
    width = images.shape[-1]
    if texts.vectors.shape[-1] != width:
        raise InputError(
            "images and texts of different widths",
            where=plan.texts,
            got=texts.vectors.shape[-1],
            wanted=f"{width}, as in {plan.images}",
            do="name embeddings of one model",
        )
    key = _key(plan, listing, images, texts, progress)
    folder = plan.out or plan.cache / _folder_name(key)
    extra = {
        "mmcli": __version__,
        "data": listing.name,
        "imported": {"images": str(plan.images.resolve()), "texts": str(plan.texts.resolve())},
    }
    progress.say(f"importing {len(listing):,} images with embeddings of {key.model} into {folder}")
    with (
        _own_advice(),
        StoreWriter(
            folder,
            key,
            listing.table,
            width=width,
            n_captions_max=int(texts.counts.max()),
            shard_rows=plan.shard_rows,
            extra=extra,
            overwrite=plan.force,
        ) as writer,
        interruptible(without=["--force"]),
    ):
        _fill(writer, images, texts, progress)
        writer.finish()
    return ImportResult(
        store=folder,
        digest=key.digest,
        n_images=len(listing),
        n_captions=int(texts.counts.sum()),
        width=width,
        dtype=key.dtype,
        revision=key.revision,
    )


def _key(plan: ImportPlan, listing: Manifest, images: Vectors, texts: Texts, progress: Progress) -> StoreKey:
    """Check all values, and name what the store depends on; the hashes stand for what the other tool did."""
    wide = np.dtype(np.float32) in {images.dtype, texts.vectors.dtype}
    dtype: StoredDtype = plan.dtype or ("float32" if wide else "float16")
    with progress.task("rows checked", images.shape[0] + texts.vectors.shape[0]) as task:
        hashes = {
            "images": check_images(images, listing, dtype, task.advance),
            "texts": check_texts(texts, listing, dtype, task.advance),
        }
    digest = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    return StoreKey(
        model=plan.name,
        revision=plan.revision or f"sha256:{digest}",
        processor=json.dumps({"imported_sha256": hashes}),
        patches=UNKNOWN,
        text_length=UNKNOWN,
        dtype=dtype,
        manifest_sha256=listing.sha256,
        compute_dtype=dtype,
    )


def _fill(writer: StoreWriter, images: Vectors, texts: Texts, progress: Progress) -> None:
    missing = {part: writer.missing(part) for part in ("image", "text")}
    with progress.task("rows written", sum(shard.n_rows for shards in missing.values() for shard in shards)) as task:
        for shard in missing["image"]:
            writer.write_image(shard, v_img=images.read(shard.start, shard.stop).astype(np.float32))
            task.advance(shard.n_rows)
        for shard in missing["text"]:
            v_txt = texts.read(shard.start, shard.stop, writer.layout.n_captions_max)
            writer.write_text(shard, v_txt=v_txt, n_captions=texts.counts[shard.start : shard.stop])
            task.advance(shard.n_rows)


def _folder_name(key: StoreKey) -> str:
    """As of any store, without a patch budget that nobody knows."""
    model, _, rest = key.folder_name.rpartition(f"-p{UNKNOWN}-")
    return f"{model}-imported-{rest}"


@contextmanager
def _own_advice() -> Iterator[None]:
    """A store's errors say to extract again; here it is to import again."""
    try:
        yield
    except StoreError as error:
        if error.do is None or "mmcli extract" not in error.do:
            raise
        do = error.do.replace("mmcli extract", "mmcli cache import")
        raise type(error)(error.what, where=error.where, got=error.got, wanted=error.wanted, do=do) from error
