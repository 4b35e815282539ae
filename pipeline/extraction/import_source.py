"""What an import reads: image and caption vectors of a manifest's images, checked value by value.

Symbols: ``N`` images, ``R`` rows of vectors, ``D`` width, ``C`` captions of an image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ... import InputError
from ...cache.layout import StoredDtype
from ..data.manifest import Manifest
from .vector_files import Vectors, find_files, open_npy
from .vectors import Counts, VectorTable, match

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
            "another number of images", where=path, got=f"{vectors.shape[0]} rows",
            wanted=f"{len(listing)}, one for each image of the manifest",
            do="name the manifest that they were computed from",
        )  # fmt: skip
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
            "another number of texts", where=path, got=f"{n_rows} rows", wanted=wanted,
            do="name the manifest that they were computed from",
        )  # fmt: skip
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
