"""From raw embeddings to the arrays of a shard: checked, with norms taken before the cast."""

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import StoreError
from .layout import Layout, Shard
from .shards import Arrays, first_bad_row

Floats = NDArray[np.float32]


def l2_norm(values: NDArray[Any]) -> NDArray[np.float32]:
    """Euclidean norms over the last axis, summed in float64 and rounded once.

    Args:
        values: ``(..., D)`` floats.

    Returns:
        ``(...)`` float32; infinite where the norm is too large for it.
    """
    wide = values.astype(np.float64)
    with np.errstate(over="ignore"):
        return np.asarray(np.sqrt(np.einsum("...d,...d->...", wide, wide))).astype(np.float32)


def image_arrays(
    shard: Shard, layout: Layout, ids: NDArray[np.int64], v_img: Floats, skipped: Collection[int] = ()
) -> Arrays:
    """The datasets of an image shard.

    Args:
        shard: Which rows.
        layout: The store's shape.
        ids: Image ids of the whole store, ``(N,)`` int64.
        v_img: Raw embeddings, ``(n, D)`` float32.
        skipped: Rows of the shard that have no embedding; they are zero, and no other row is.

    Raises:
        StoreError: A wrong shape or dtype, or values that cannot be stored.
    """
    _check_floats("v_img", v_img, shard, (shard.n_rows, layout.width))
    shard_ids = ids[shard.start : shard.stop]
    stored, norms = _cast("v_img", v_img, shard, layout, shard_ids)
    wrong = (norms == 0) != np.isin(np.arange(shard.n_rows), list(skipped))
    if wrong.any():
        row = int(wrong.argmax())
        raise StoreError(
            "an embedding is zero" if norms[row] == 0 else "a skipped image has an embedding",
            where=_row_name("v_img", shard, row, shard_ids),
            wanted="zeros for skipped images, and for no other",
        )
    return {"image_id": shard_ids, "v_img": stored, "norm_img": norms}


def text_arrays(
    shard: Shard, layout: Layout, ids: NDArray[np.int64], v_txt: Floats, n_captions: NDArray[np.integer[Any]]
) -> Arrays:
    """The datasets of a text shard; the first arguments are as for :func:`image_arrays`.

    ``v_txt`` are raw embeddings ``(n, n_captions_max, D)`` float32, whose rows of missing captions are zero;
    ``n_captions`` are the real captions of each image, ``(n,)`` integers.

    Raises:
        StoreError: See :func:`image_arrays`, or a count out of range, or a missing caption that is not zero.
    """
    most = layout.n_captions_max
    _check_floats("v_txt", v_txt, shard, (shard.n_rows, most, layout.width))
    counts = np.asarray(n_captions)
    if counts.shape != (shard.n_rows,) or counts.dtype.kind not in "iu" or counts.min() < 0 or counts.max() > most:
        raise StoreError(
            "bad n_captions",
            where=shard.name,
            got=f"{counts.dtype} {counts.shape}",
            wanted=f"{shard.n_rows} whole numbers from 0 to {most}",
        )
    shard_ids = ids[shard.start : shard.stop]
    absent = np.arange(most) >= counts[:, None]
    filled = (v_txt != 0).any(axis=2) & absent
    if filled.any():
        row = int(filled.any(axis=1).argmax())
        raise StoreError(
            "a missing caption has an embedding",
            where=_row_name("v_txt", shard, row, shard_ids),
            got=f"n_captions {counts[row]}",
            wanted="zeros from there on",
        )
    stored, norms = _cast("v_txt", v_txt, shard, layout, shard_ids)
    return {"image_id": shard_ids, "v_txt": stored, "norm_txt": norms, "n_captions": counts.astype(np.uint8)}


def _check_floats(name: str, values: Floats, shard: Shard, shape: tuple[int, ...]) -> None:
    dtype, got = getattr(values, "dtype", type(values).__name__), getattr(values, "shape", ())
    if dtype != np.float32 or got != shape:
        raise StoreError(f"bad {name}", where=shard.name, got=f"{dtype} {got}", wanted=f"float32 {shape}")


def _cast(
    name: str, values: Floats, shard: Shard, layout: Layout, ids: NDArray[np.int64]
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    values = np.ascontiguousarray(values)
    if (row := first_bad_row(values)) is not None:
        raise StoreError(
            "an embedding is not finite",
            where=_row_name(name, shard, row, ids),
            got="NaN or infinity",
            do="look at that image and its captions; in half precision, try another device or compute dtype",
        )
    norms = l2_norm(values)
    if (row := first_bad_row(norms)) is not None:
        raise StoreError("an embedding's norm is too large for float32", where=_row_name(name, shard, row, ids))
    with np.errstate(over="ignore"):
        stored = values.astype(np.dtype(layout.dtype))
    if (row := first_bad_row(stored)) is not None:
        raise StoreError(
            "an embedding is too large for float16",
            where=_row_name(name, shard, row, ids),
            got=f"{np.abs(values[row]).max():.6g}",
            wanted="at most 65504",
            do="extract with `--dtype float32`",
        )
    return stored, norms


def _row_name(name: str, shard: Shard, row: int, ids: NDArray[np.int64]) -> str:
    return f"{shard.name}, {name} row {row}, image id {ids[row]}"
