"""What a store is, in figures: where its numbers are from, its sizes, and how its norms are spread."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .index import ID
from .reader import Store

_BINS = 12


def describe(folder: Path) -> dict[str, Any]:
    """What a store is, for a person or as JSON; one shard after another is read, and only the norms are kept.

    Returns:
        Model, revision, patches, dtypes, counts, bytes, creation time; min, mean, max and standard deviation of the
        norms of images and of real captions, and their histograms (None where there are none); the skipped images.

    Raises:
        StoreError: See :meth:`Store.open` and :meth:`Store.load`.
    """
    store = Store.open(folder)
    key, manifest = store.key, store.manifest
    norm_img, norm_txt = _norms(store)
    size = {part: sum(entry.bytes for entry in manifest.shards if entry.part == part) for part in ("image", "text")}
    return {
        "folder": str(store.folder),
        **{
            name: getattr(key, name)
            for name in ("model", "revision", "patches", "text_length", "dtype", "compute_dtype")
        },
        "images": store.n_images,
        "captions": manifest.n_captions,
        "captions_per_image_max": store.n_captions_max,
        "width": store.width,
        "skipped": len(store.skipped),
        "skipped_images": _skipped(store),
        "shards": len(manifest.shards),
        "bytes": manifest.index.bytes + sum(size.values()),
        "bytes_image": size["image"],
        "bytes_text": size["text"],
        "created": store.created,
        "digest": store.digest,
        "manifest_sha256": key.manifest_sha256,
        "norm_img": _spread(norm_img),
        "norm_txt": _spread(norm_txt),
        "histogram_norm_img": _histogram(norm_img),
        "histogram_norm_txt": _histogram(norm_txt),
        "extra": store.extra,
    }


def _norms(store: Store) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Norms of the images that were not skipped, and of the real captions."""
    images = [arrays["norm_img"][arrays["norm_img"] > 0] for _, arrays in store.shards("image")]
    slots = np.arange(store.n_captions_max)
    texts = [
        arrays["norm_txt"][slots < arrays["n_captions"][:, None]] for _, arrays in store.shards("text")
    ]  # both are copies, so no shard's bytes stay in memory
    return np.concatenate(images), np.concatenate(texts)


def _skipped(store: Store) -> list[dict[str, Any]]:
    if not store.skipped:
        return []
    rows = store.index.take(list(store.skipped))
    ids = rows.column(ID).to_pylist()
    paths = rows.column("path").to_pylist() if "path" in rows.column_names else [None] * len(ids)
    return [
        {"image_id": image_id, "path": path, "row": row, "reason": reason}
        for image_id, path, (row, reason) in zip(ids, paths, store.skipped.items(), strict=True)
    ]


def _spread(norms: NDArray[np.float32]) -> dict[str, float] | None:
    if not norms.size:
        return None
    wide = norms.astype(np.float64)
    return {"min": float(wide.min()), "mean": float(wide.mean()), "max": float(wide.max()), "std": float(wide.std())}


def _histogram(norms: NDArray[np.float32]) -> dict[str, list[float] | list[int]] | None:
    """Counts in bins of equal width between the least and the greatest norm."""
    if not norms.size:
        return None
    counts, edges = np.histogram(norms.astype(np.float64), _BINS)
    return {"edges": edges.tolist(), "counts": counts.tolist()}
