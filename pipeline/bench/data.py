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
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image

from ...cache import StoreKey, StoreWriter
from ..data.coco import CATEGORIES
from ..data.manifest import SPLITS, Manifest
from ..data.manifest_checks import label_lists
from ..data.miniature import draw_scene
from ..data.miniature import write_captions as captions_of
from ..extraction.miniature_model import make_tokenizer

N_TRAIN, N_VAL, N_TEST, WIDTH = 113_287, 5_000, 5_000, 768
CAPTIONS = 5
CHUNK = 1024  # rows of a shard, and rows that are made at once
# Train images (restval included) of the Karpathy split that have a category, in order of category id, of 113,287.
COUNTS = (
    61377,
    3115,
    11753,
    3356,
    2873,
    3819,
    3438,
    5863,
    2875,
    3982,
    1645,
    1677,
    660,
    5333,
    3050,
    3693,
    3997,
    2801,
    1456,
    1883,
    2053,
    942,
    1831,
    2430,
    5271,
    3768,
    6481,
    2492,
    2269,
    2073,
    2964,
    1573,
    3785,
    2185,
    2410,
    2506,
    3327,
    3319,
    3278,
    7950,
    2370,
    8582,
    3081,
    3888,
    3116,
    6556,
    2067,
    1441,
    1999,
    1546,
    1673,
    1461,
    1098,
    2834,
    1367,
    2661,
    12235,
    4252,
    4264,
    3510,
    11336,
    3198,
    4386,
    3388,
    1751,
    2887,
    2025,
    3622,
    1468,
    2763,
    203,
    4459,
    2254,
    5035,
    4381,
    3438,
    860,
    2012,
    178,
    817,
)
# How embeddings are mixed: the share of a caption's classes that it names; noise in the subspace of the classes, and
# off it; the norm's mean, and its spread as the deviation of its logarithm.
NAMED, NOISE_WITHIN, NOISE_OFF, NORM, SPREAD = 0.6, 4.0, 1.0, 10.0, 0.12
POOL = 8192
OPENINGS = ("A photo of", "There is", "A close up of", "Somebody looks at", "A picture that shows", "The view of")
PLACES = (
    "on a table near the window",
    "in the middle of a busy street",
    "next to a white wall",
    "on a green field in the sun",
    "in a small room",
    "by the side of the road",
    "under a cloudy sky",
    "in front of a large building",
)
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
        v_img=v_img,
        v_txt=v_txt,
        n_captions=np.full(n, CAPTIONS, np.uint8),
        labels=labels,
        splits=np.repeat(np.array(SPLITS), sizes),
    )


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
        model="full-size-benchmark",
        revision=f"seed-{seed}",
        processor="{}",
        patches=256,
        text_length=64,
        dtype="float16",
        manifest_sha256=listing.sha256,
        compute_dtype="float32",
    )
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
        image_ids=ids,
        paths=[f"train2014/COCO_train2014_{image_id:012d}.jpg" for image_id in ids.tolist()],
        splits=splits.tolist(),
        captions=_captions(tags, seed),
        labels=tags,
        category_names=[category.name for category in CATEGORIES],
        name="full-size-benchmark",
    )


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


SIZES: tuple[tuple[int, int, int], ...] = (
    (640, 480, 169),
    (640, 427, 87),
    (480, 640, 56),
    (640, 426, 32),
    (500, 375, 28),
    (640, 428, 25),
    (640, 425, 24),
    (427, 640, 24),
    (375, 500, 17),
    (500, 333, 13),
    (640, 424, 10),
    (612, 612, 10),
    (428, 640, 7),
    (426, 640, 7),
    (640, 478, 6),
    (640, 361, 5),
    (478, 640, 5),
    (425, 640, 5),
    (640, 360, 4),
    (500, 374, 4),
    (359, 640, 4),
    (333, 500, 4),
    (640, 640, 3),
    (640, 484, 3),
    (640, 464, 3),
    (640, 457, 3),
    (640, 433, 3),
    (640, 429, 3),
    (640, 359, 3),
    (500, 334, 3),
    (479, 640, 3),
    (320, 240, 3),
    (640, 536, 2),
    (640, 512, 2),
    (640, 489, 2),
    (640, 483, 2),
    (640, 482, 2),
    (640, 481, 2),
    (640, 449, 2),
    (640, 444, 2),
    (640, 423, 2),
    (640, 421, 2),
    (640, 406, 2),
    (640, 399, 2),
    (640, 383, 2),
    (638, 640, 2),
    (621, 640, 2),
    (600, 400, 2),
    (500, 500, 2),
    (500, 400, 2),
    (500, 332, 2),
    (481, 640, 2),
    (457, 640, 2),
    (448, 336, 2),
    (423, 640, 2),
    (358, 640, 2),
    (640, 611, 1),
    (640, 605, 1),
    (640, 580, 1),
    (640, 579, 1),
    (640, 574, 1),
    (640, 573, 1),
    (640, 559, 1),
    (640, 555, 1),
    (640, 543, 1),
    (640, 539, 1),
    (640, 535, 1),
    (640, 531, 1),
    (640, 522, 1),
    (640, 513, 1),
    (640, 511, 1),
    (640, 508, 1),
    (640, 506, 1),
    (640, 500, 1),
    (640, 499, 1),
    (640, 498, 1),
    (640, 491, 1),
    (640, 488, 1),
    (640, 486, 1),
    (640, 479, 1),
    (640, 476, 1),
    (640, 474, 1),
    (640, 463, 1),
    (640, 462, 1),
    (640, 461, 1),
    (640, 459, 1),
    (640, 450, 1),
    (640, 446, 1),
    (640, 443, 1),
    (640, 442, 1),
    (640, 440, 1),
    (640, 436, 1),
    (640, 422, 1),
    (640, 420, 1),
    (640, 419, 1),
    (640, 418, 1),
    (640, 416, 1),
    (640, 414, 1),
    (640, 413, 1),
    (640, 409, 1),
    (640, 408, 1),
    (640, 407, 1),
    (640, 400, 1),
    (640, 393, 1),
    (640, 389, 1),
    (640, 388, 1),
    (640, 384, 1),
    (640, 382, 1),
    (640, 368, 1),
    (640, 366, 1),
    (640, 363, 1),
    (640, 358, 1),
    (640, 351, 1),
    (640, 349, 1),
    (640, 342, 1),
    (640, 327, 1),
    (640, 320, 1),
    (640, 315, 1),
    (640, 313, 1),
    (640, 304, 1),
    (640, 248, 1),
    (640, 229, 1),
    (640, 226, 1),
    (640, 218, 1),
    (634, 640, 1),
    (614, 461, 1),
    (600, 600, 1),
    (600, 593, 1),
    (600, 500, 1),
    (600, 450, 1),
    (591, 640, 1),
    (586, 640, 1),
    (565, 640, 1),
    (551, 640, 1),
    (550, 640, 1),
    (520, 640, 1),
    (516, 640, 1),
    (512, 640, 1),
    (500, 495, 1),
    (500, 486, 1),
    (500, 429, 1),
    (500, 423, 1),
    (500, 406, 1),
    (500, 396, 1),
    (500, 377, 1),
    (500, 370, 1),
    (500, 357, 1),
    (500, 346, 1),
    (500, 335, 1),
    (500, 313, 1),
    (500, 302, 1),
    (500, 169, 1),
    (485, 640, 1),
    (480, 360, 1),
    (474, 640, 1),
    (473, 500, 1),
    (470, 640, 1),
    (469, 469, 1),
    (461, 500, 1),
    (460, 640, 1),
    (460, 312, 1),
    (458, 640, 1),
    (455, 310, 1),
    (450, 600, 1),
    (449, 640, 1),
    (446, 640, 1),
    (444, 640, 1),
    (443, 640, 1),
    (429, 640, 1),
    (424, 640, 1),
    (416, 640, 1),
    (414, 640, 1),
    (411, 640, 1),
    (409, 640, 1),
    (409, 500, 1),
    (400, 640, 1),
    (400, 302, 1),
    (394, 500, 1),
    (389, 500, 1),
    (383, 640, 1),
    (381, 500, 1),
    (378, 640, 1),
    (376, 500, 1),
    (360, 640, 1),
    (352, 230, 1),
    (351, 500, 1),
    (336, 500, 1),
    (334, 500, 1),
    (213, 140, 1),
)


QUALITY = 90
# Standard deviations of noise at each scale, chosen so that a file has COCO's bytes a pixel: decoding costs by these.
OCTAVES = ((2, 40.0), (8, 25.0), (32, 14.0), (128, 9.0), (320, 12.0), (640, 20.0))


def draw_photographs(folder: Path, n: int, seed: int = 0) -> Path:
    """Write JPEGs whose sizes are drawn from COCO's, and which decode about as slowly.

    Args:
        folder: Where to write.
        n: How many.
        seed: Seed of sizes and pixels.

    Returns:
        ``folder``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    counts = np.array([count for _, _, count in SIZES])
    for at, which in enumerate(rng.choice(len(SIZES), n, p=counts / counts.sum())):
        width, height, _ = SIZES[which]
        _photograph(width, height, rng).save(folder / f"{at:06d}.jpg", "JPEG", quality=QUALITY)
    return folder


def _photograph(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Noise of several scales, as the detail of a photograph is."""
    pixels = np.full((height, width, 3), 128.0)
    for scale, strength in OCTAVES:
        size = (max(1, width * scale // 640), max(1, height * scale // 640))
        grey, tint = rng.normal(0, strength, size[::-1]), rng.normal(0, strength / 4, (*size[::-1], 3))
        for channel in range(3):
            layer = Image.fromarray((grey + tint[..., channel]).astype(np.float32))
            pixels[..., channel] += np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_captions(n: int, seed: int = 0) -> list[str]:
    """Captions of drawn scenes, numbered so that no two are the same."""
    texts: list[str] = []
    while len(texts) < n:
        rng = np.random.default_rng([seed, len(texts)])
        texts += captions_of(draw_scene(rng), rng, 5)
    return [f"{text} {at}" for at, text in enumerate(texts[:n])]


def make_base_checkpoint(folder: Path, captions: list[str], vocabulary: int | None = None) -> Path:
    """Towers of SigLIP2 base's size, patch 16 NaFlex, with random weights and a tokenizer of their own.

    Args:
        folder: Where to write, in ``save_pretrained`` form.
        captions: What the tokenizer is trained on.
        vocabulary: Token embeddings, where there are to be more than the tokenizer knows.

    Returns:
        ``folder``.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = make_tokenizer(captions)
    transformers.Siglip2Model(base_config(vocabulary or len(tokenizer))).save_pretrained(folder)
    transformers.Siglip2ImageProcessorPil().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def base_config(vocabulary: int) -> transformers.Siglip2Config:
    """SigLIP2 base, patch 16 NaFlex, but for the vocabulary (looking a token up costs nothing)."""
    tower = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text = {
        "vocab_size": vocabulary,
        "max_position_embeddings": 64,
        "projection_size": 768,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    return transformers.Siglip2Config(text_config={**tower, **text}, vision_config={**tower, "num_patches": 256})
