"""A store of COCO's full size without the pictures: its counts, how common its classes are, captions, embeddings.

Embeddings are made: directions of the classes that an image has, plus noise, times a length. What a benchmark needs of
them is their number, their type and labels that can be learned to some extent; no figure of quality means anything.
Classes are drawn independently, each as often as it occurs in the train images of COCO's Karpathy split.

Symbols: ``N`` images, ``D`` embedding width, ``C`` classes, ``M`` captions an image.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...cache import StoreKey, StoreWriter
from ..data.coco_categories import CATEGORIES
from ..data.manifest import SPLITS, Manifest
from ..data.manifest_checks import label_lists

N_TRAIN, N_VAL, N_TEST, WIDTH = 113_287, 5_000, 5_000, 768
CAPTIONS = 5
CHUNK = 1024  # rows of a shard, and rows that are made at once
# Train images (restval included) of the Karpathy split that have a category, in order of category id, of 113,287.
COUNTS = (
    61377, 3115, 11753, 3356, 2873, 3819, 3438, 5863, 2875, 3982, 1645, 1677, 660, 5333, 3050, 3693, 3997, 2801, 1456,
    1883, 2053, 942, 1831, 2430, 5271, 3768, 6481, 2492, 2269, 2073, 2964, 1573, 3785, 2185, 2410, 2506, 3327, 3319,
    3278, 7950, 2370, 8582, 3081, 3888, 3116, 6556, 2067, 1441, 1999, 1546, 1673, 1461, 1098, 2834, 1367, 2661, 12235,
    4252, 4264, 3510, 11336, 3198, 4386, 3388, 1751, 2887, 2025, 3622, 1468, 2763, 203, 4459, 2254, 5035, 4381, 3438,
    860, 2012, 178, 817,
)  # fmt: skip
# How embeddings are mixed: the share of a caption's classes that it names; noise in the subspace of the classes, and
# off it; the norm's mean, and its spread as the deviation of its logarithm.
NAMED, NOISE_WITHIN, NOISE_OFF, NORM, SPREAD = 0.6, 4.0, 1.0, 10.0, 0.12
POOL = 8192
OPENINGS = ("A photo of", "There is", "A close up of", "Somebody looks at", "A picture that shows", "The view of")
PLACES = (
    "on a table near the window", "in the middle of a busy street", "next to a white wall", "on a green field in the"
    " sun", "in a small room", "by the side of the road", "under a cloudy sky", "in front of a large building",
)  # fmt: skip
SEED_KEYS = {"labels": 0, "pool": 1, "mix": 2, "captions": 3}


@dataclass(frozen=True, kw_only=True)
class FullSize:
    """The arrays of a data set of full size.

    Attributes:
        v_img: ``(N, D)`` float16.
        v_txt: ``(N, M, D)`` float16.
        n_captions: ``(N,)`` uint8, all M.
        labels: Multi-hot ``(N, C)`` uint8.
        splits: ``(N,)`` of train, val or test, in this order.
    """

    v_img: NDArray[np.float16]
    v_txt: NDArray[np.float16]
    n_captions: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    splits: NDArray[np.str_]


def full_size_arrays(
    *, n_train: int = N_TRAIN, n_val: int = N_VAL, n_test: int = N_TEST, width: int = WIDTH, seed: int = 0
) -> FullSize:
    """The arrays that :func:`make_full_store` puts into a store, without a store."""
    sizes = (n_train, n_val, n_test)
    n = sum(sizes)
    labels = draw_labels(n, seed)
    v_img, v_txt = np.empty((n, width), np.float16), np.empty((n, CAPTIONS, width), np.float16)
    for rows, images, texts in _embeddings(labels, width, seed):
        v_img[rows], v_txt[rows] = images, texts
    return FullSize(
        v_img=v_img, v_txt=v_txt, n_captions=np.full(n, CAPTIONS, np.uint8), labels=labels,
        splits=np.repeat(np.array(SPLITS), sizes),
    )  # fmt: skip


def make_full_store(
    folder: Path,
    *,
    n_train: int = N_TRAIN,
    n_val: int = N_VAL,
    n_test: int = N_TEST,
    width: int = WIDTH,
    seed: int = 0,
) -> Path:
    """Write a store of full size; one that is there already and has this key is kept.

    Args:
        folder: Where to write.
        n_train: Train images; then val, then test images.
        n_val: Val images.
        n_test: Test images.
        width: D.
        seed: Seed of everything.

    Returns:
        ``folder``.

    Raises:
        StoreError: The folder holds something else.
    """
    labels = draw_labels(n_train + n_val + n_test, seed)
    listing = _listing(labels, (n_train, n_val, n_test), seed)
    key = StoreKey(
        model="full-size-benchmark", revision=f"seed-{seed}", processor="{}", patches=256, text_length=64,
        dtype="float16", manifest_sha256=listing.sha256, compute_dtype="float32",
    )  # fmt: skip
    with StoreWriter(folder, key, listing.table, width=width, n_captions_max=CAPTIONS, shard_rows=CHUNK) as writer:
        images, texts = ({shard.start: shard for shard in writer.missing(part)} for part in ("image", "text"))
        if images or texts:
            for rows, v_img, v_txt in _embeddings(labels, width, seed):
                if rows.start in images:
                    writer.write_image(images[rows.start], v_img=v_img)
                if rows.start in texts:
                    writer.write_text(texts[rows.start], v_txt=v_txt, n_captions=np.full(len(v_txt), CAPTIONS))
        return writer.finish()


def draw_labels(n: int, seed: int = 0) -> NDArray[np.uint8]:
    """Multi-hot labels ``(n, C)`` uint8, every class as common as in COCO."""
    rng = np.random.default_rng([seed, SEED_KEYS["labels"]])
    return (rng.random((n, len(COUNTS)), np.float32) < np.array(COUNTS, np.float32) / N_TRAIN).astype(np.uint8)


def _embeddings(
    labels: NDArray[np.uint8], width: int, seed: int
) -> Iterator[tuple[slice, NDArray[np.float32], NDArray[np.float32]]]:
    """Rows, ``v_img (n, D)`` and ``v_txt (n, M, D)`` float32, chunk after chunk."""
    rng = np.random.default_rng([seed, SEED_KEYS["pool"]])
    classes = _units(rng.standard_normal((labels.shape[1], width), np.float32))
    within = rng.standard_normal((POOL, len(classes)), np.float32) @ classes
    pool = NOISE_WITHIN * _units(within) + NOISE_OFF * _units(rng.standard_normal((POOL, width), np.float32))
    for start in range(0, len(labels), CHUNK):
        chunk = np.random.default_rng([seed, SEED_KEYS["mix"], start])
        own = labels[start : start + CHUNK].astype(np.float32)
        named = own[:, None] * (chunk.random((len(own), CAPTIONS, own.shape[1]), np.float32) < NAMED)
        v_img, v_txt = (_mix(signal @ classes, pool, chunk) for signal in (own, named))
        yield slice(start, start + len(own)), v_img, v_txt


def _mix(signal: NDArray[np.float32], pool: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Add noise from the pool and give every vector a norm; ``signal`` is changed in place."""
    signal += pool[rng.integers(len(pool), size=signal.shape[:-1])]
    norms = NORM * np.exp(SPREAD * rng.standard_normal(signal.shape[:-1], np.float32))
    signal *= (norms / np.sqrt(np.einsum("...d,...d->...", signal, signal)))[..., None]
    return signal


def _units(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32)


def _listing(labels: NDArray[np.uint8], sizes: tuple[int, ...], seed: int) -> Manifest:
    n = len(labels)
    rows, classes = np.nonzero(labels)
    tags = label_lists(rows, classes, n, labels.shape[1])
    # Ids as COCO's: in no order, and not from 1 on.
    ids = np.random.default_rng([seed, SEED_KEYS["labels"], 1]).permutation(5 * n)[:n].astype(np.int64)
    splits = np.repeat(np.array(SPLITS), sizes)
    return Manifest.from_columns(
        image_ids=ids, paths=[f"train2014/COCO_train2014_{image_id:012d}.jpg" for image_id in ids.tolist()],
        splits=splits.tolist(), captions=_captions(tags, seed), labels=tags,
        category_names=[category.name for category in CATEGORIES], name="full-size-benchmark",
    )  # fmt: skip


def _captions(tags: pa.ListArray, seed: int) -> Any:  # noqa: ANN401 - pyarrow has no types
    """Lists of M captions, of COCO's length (about 52 letters), no two of an image alike."""
    names = [category.name for category in CATEGORIES]
    rng = np.random.default_rng([seed, SEED_KEYS["captions"]])
    draws = rng.integers(1 << 30, size=(len(tags), CAPTIONS)).tolist()
    texts = [
        f"{OPENINGS[(row[0] + turn) % len(OPENINGS)]} {_things(own, names, draw)} {PLACES[(draw >> 8) % len(PLACES)]}."
        for own, row in zip(tags.to_pylist(), draws, strict=True)
        for turn, draw in enumerate(row)
    ]
    offsets = np.arange(0, len(texts) + 1, CAPTIONS, dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(texts))


def _things(own: list[int], names: list[str], draw: int) -> str:
    if not own:
        return "something"
    first = names[own[draw % len(own)]]
    return f"a {first}" if draw & 64 or len(own) == 1 else f"a {first} and a {names[own[(draw + 1) % len(own)]]}"
