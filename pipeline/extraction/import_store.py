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
from ...cache import StoreError, StoreKey, StoreWriter
from ...cache.layout import StoredDtype
from ...errors import InputError
from ..core.defaults import STORES
from ..core.interrupts import interruptible
from ..core.json_result import JsonResult
from ..core.progress import Progress
from ..data.manifest import Manifest, read_manifest
from .vectors import Counts, Vectors, VectorTable, find_files, open_npy

CAPTIONS = 5


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Vectors of N images, or of their captions.

    Attributes:
        vectors: ``(R, D)``, those of one image after those of another; or ``(N, C, D)``.
        counts: Vectors of each image ``(N,)``; with C places an image they come first.
        listing: The manifest.
    """

    vectors: Vectors
    counts: Counts
    listing: Manifest

    @property
    def in_places(self) -> bool:
        """Whether each image has C places, filled or not."""
        return len(self.vectors.shape) == 3

    @property
    def width(self) -> int:
        """The width of the vectors, D."""
        return self.vectors.shape[-1]

    def read(self, start: int, stop: int, n_places: int) -> npt.NDArray[np.float32]:
        """Vectors of the images ``start`` to ``stop``, ``(n, n_places, D)``; rows of missing ones are zero."""
        counts = self.counts[start:stop]
        if self.in_places:
            return self.vectors.read(start, stop)[:, :n_places].astype(np.float32)
        first = int(self.counts[:start].sum())
        filled = np.zeros((stop - start, n_places, self.width), np.float32)
        filled[np.arange(n_places) < counts[:, None]] = self.vectors.read(first, first + int(counts.sum()))
        return filled

    def check(self, dtype: StoredDtype, tick: Callable[[int], object]) -> str:
        """Look at every value.

        Args:
            dtype: How the vectors will be stored.
            tick: Called with the number of rows that were looked at.

        Returns:
            SHA-256, in hex, of the content.

        Raises:
            InputError: A NaN or an infinity, a row of zeros, values too large for ``dtype``, or a vector where the
                manifest has no caption.
        """
        n = np.arange(len(self.listing))
        owners = n if self.in_places else np.repeat(n, self.counts)

        def look(start: int, values: npt.NDArray[Any]) -> None:
            images = owners[start : start + len(values)]
            places = values if self.in_places else values[:, None]
            counts = self.counts[images] if self.in_places else np.ones(len(images), np.int64)
            self._refuse(start, images, places, np.arange(places.shape[1]) < counts[:, None], dtype)
            tick(len(values))

        return self.vectors.sha256(look)

    def _refuse(
        self,
        start: int,
        images: npt.NDArray[np.int64],
        values: npt.NDArray[Any],
        real: npt.NDArray[np.bool_],
        dtype: StoredDtype,
    ) -> None:
        """Refuse what no store can hold; ``real`` ``(n, C)`` says which of ``values`` ``(n, C, D)`` there should be."""
        with np.errstate(over="ignore"):
            stored = values.astype(dtype)
        zero = ~(stored != 0).any(axis=2)
        for what, bad, do in (
            ("NaN or infinity among the embeddings", ~np.isfinite(values).all(axis=2) & real, "compute it again"),
            ("an embedding that is zero", zero & real, "leave the image out of the manifest, or compute it again"),
            (
                "a caption that the manifest does not have",
                ~zero & ~real,
                "fill up with zeros, or name the right manifest",
            ),
            ("too large for float16", ~np.isfinite(stored).all(axis=2) & real, "store it with --dtype float32"),
        ):
            if bad.any():
                row, place = np.argwhere(bad)[0]
                where = f"{self.vectors.place(start + int(row))}, image id {self.listing.image_ids[images[row]]}"
                raise InputError(what, where=where if bad.shape[1] == 1 else f"{where}, caption {place}", do=do)


def open_images(path: Path, listing: Manifest) -> Embedded:
    """Image vectors in the manifest's order.

    Args:
        path: A file, or a folder of numbered ones.
        listing: The manifest.

    Raises:
        InputError: Not readable, or not one vector for each image.
    """
    kind, files = find_files(path, "--images")
    each = np.ones(len(listing), np.int64)
    if kind == ".parquet":
        table = VectorTable.read(path, files, "v_img")
        if table.in_lists:
            raise InputError(
                "image vectors in lists", where=path, got=f"column {table.column}", wanted="one vector a row"
            )
        vectors, _ = table.match(listing, each, or_one=False)
    else:
        vectors = open_npy(path, files, (2,))
        if vectors.shape[0] != len(listing):
            raise _wrong_number("images", path, vectors, f"{len(listing)}, one for each image of the manifest")
    return Embedded(vectors=vectors, counts=each, listing=listing)


def open_texts(path: Path, listing: Manifest) -> Embedded:
    """Caption vectors in the manifest's order, from a file or a folder of numbered ones.

    Raises:
        InputError: Not readable, or neither one caption for each image nor all of the first five.
    """
    kind, files = find_files(path, "--texts")
    every = np.array([min(len(texts), CAPTIONS) for texts in listing.captions], np.int64)
    if kind == ".parquet":
        vectors, counts = VectorTable.read(path, files, "v_txt").match(listing, every, or_one=True)
        return Embedded(vectors=vectors, counts=counts, listing=listing)
    vectors = open_npy(path, files, (2, 3))
    places = vectors.shape[1] if len(vectors.shape) == 3 else None
    if places is not None and places > CAPTIONS:
        raise InputError("too many captions an image", where=path, got=places, wanted=f"at most {CAPTIONS}")
    if vectors.shape[0] == len(listing):
        counts = np.minimum(every, places or 1)
    elif places is None and vectors.shape[0] == every.sum():
        counts = every
    else:
        wanted = f"{len(listing)}, one for each image of the manifest"
        if places is None:
            wanted += f", or {every.sum()}, one for each of the first {CAPTIONS} captions of each"
        raise _wrong_number("texts", path, vectors, wanted)
    return Embedded(vectors=vectors, counts=counts, listing=listing)


def _wrong_number(of: str, path: Path, vectors: Vectors, wanted: str) -> InputError:
    return InputError(
        f"another number of {of}",
        where=path,
        got=f"{vectors.shape[0]} rows",
        wanted=wanted,
        do="name the manifest that they were computed from",
    )


SHARD_ROWS = 1024
# A key has whole numbers for the patch budget and the text length, and those of the other tool are not known.
UNKNOWN = 1


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """The options of an import.

    Attributes:
        images: A ``.npy`` or ``.parquet`` file of image vectors ``(N, D)``, or a folder of numbered ones.
        texts: Such a file or folder of caption vectors: one an image ``(N, D)``; ``(N, C, D)``; or one row a caption,
            in manifest order.
        manifest: The manifest whose images they are of, in its order; parquet is matched by ``image_id``.
        name: The model that computed them.
        revision: The revision of that model; a hash of the content when not given.
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
    cache: Path = STORES
    dtype: StoredDtype | None = None
    shard_rows: int = SHARD_ROWS
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class ImportResult(JsonResult):
    """The store that an import has written."""

    store: Path
    digest: str
    n_images: int
    n_captions: int
    width: int
    dtype: StoredDtype
    revision: str

    def summary(self) -> list[RenderableType]:
        """Lines for a person at the end of the command."""
        what = f"{self.n_images:,} images and {self.n_captions:,} captions, {self.width} wide, {self.dtype}"
        return [what, f"wrote {self.store}"]


def import_store(plan: ImportPlan, progress: Progress | None = None) -> ImportResult:
    """Make a store of embeddings that were computed elsewhere.

    Args:
        plan: What to import, and where to.
        progress: Progress bars; silent when not given.

    Raises:
        InputError: Files that cannot be read, wrong counts, widths or ids, a NaN, a zero row, or a folder that holds
            another store. Nothing was written then.
    """
    progress = progress or Progress()
    for option, value in (("--name", plan.name), ("--revision", plan.revision)):
        if value is not None and not value.strip():
            raise InputError("an empty name", where=option, wanted="the model, or its revision, that computed them")
    listing = read_manifest(plan.manifest)
    images, texts = open_images(plan.images, listing), open_texts(plan.texts, listing)
    if texts.width != images.width:
        raise InputError(
            "images and texts of different widths",
            where=plan.texts,
            got=texts.width,
            wanted=f"{images.width}, as in {plan.images}",
            do="name embeddings of one model",
        )
    key = _check_values(plan, images, texts, progress)
    folder = plan.out or plan.cache / _folder_name(key)
    progress.say(f"importing {len(listing):,} images with embeddings of {key.model} into {folder}")
    with _advice_to_import(), interruptible(without=["--force"]):
        _write(folder, key, plan, (images, texts), progress)
    return ImportResult(
        store=folder,
        digest=key.digest,
        n_images=len(listing),
        n_captions=int(texts.counts.sum()),
        width=images.width,
        dtype=key.dtype,
        revision=key.revision,
    )


def _check_values(plan: ImportPlan, images: Embedded, texts: Embedded, progress: Progress) -> StoreKey:
    """Check all values; the key, in which hashes stand for what the other tool did."""
    wide = np.dtype(np.float32) in {images.vectors.dtype, texts.vectors.dtype}
    dtype: StoredDtype = plan.dtype or ("float32" if wide else "float16")
    with progress.task("rows checked", images.vectors.shape[0] + texts.vectors.shape[0]) as task:
        hashes = {"images": images.check(dtype, task.advance), "texts": texts.check(dtype, task.advance)}
    digest = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    return StoreKey(
        model=plan.name,
        revision=plan.revision or f"sha256:{digest}",
        processor=json.dumps({"imported_sha256": hashes}),
        patches=UNKNOWN,
        text_length=UNKNOWN,
        dtype=dtype,
        manifest_sha256=images.listing.sha256,
        compute_dtype=dtype,
    )


def _write(
    folder: Path, key: StoreKey, plan: ImportPlan, embedded: tuple[Embedded, Embedded], progress: Progress
) -> None:
    images, texts = embedded
    extra = {
        "mmcli": __version__,
        "data": images.listing.name,
        "imported": {"images": str(plan.images.resolve()), "texts": str(plan.texts.resolve())},
    }
    with StoreWriter(
        folder,
        key,
        images.listing.table,
        width=images.width,
        n_captions_max=int(texts.counts.max()),
        shard_rows=plan.shard_rows,
        extra=extra,
        overwrite=plan.force,
    ) as writer:
        missing = {part: writer.missing(part) for part in ("image", "text")}
        total = sum(shard.n_rows for shards in missing.values() for shard in shards)
        with progress.task("rows written", total) as task:
            for shard in missing["image"]:
                writer.write_image(shard, v_img=images.read(shard.start, shard.stop, 1)[:, 0])
                task.advance(shard.n_rows)
            for shard in missing["text"]:
                v_txt = texts.read(shard.start, shard.stop, writer.layout.n_captions_max)
                writer.write_text(shard, v_txt=v_txt, n_captions=texts.counts[shard.start : shard.stop])
                task.advance(shard.n_rows)
        writer.finish()


def _folder_name(key: StoreKey) -> str:
    """The folder name of any store, without the patch budget."""
    model, _, rest = key.folder_name.rpartition(f"-p{UNKNOWN}-")
    return f"{model}-imported-{rest}"


@contextmanager
def _advice_to_import() -> Iterator[None]:
    """A store's errors say to extract again; here it is to import again."""
    try:
        yield
    except StoreError as error:
        if error.do is None or "mmcli extract" not in error.do:
            raise
        do = error.do.replace("mmcli extract", "mmcli cache import")
        raise type(error)(error.what, where=error.where, got=error.got, wanted=error.wanted, do=do) from error
