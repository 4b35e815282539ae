"""Data of COCO's proportions for benchmarks: a store without pictures, photographs, captions, and base-size towers.

Nothing here is real, and no figure of quality means anything: what a benchmark needs are the numbers, sizes and types
of what it reads, and labels that can be learned to some extent.

Symbols: ``N`` images, ``D`` embedding width, ``C`` classes, ``M`` captions an image.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image

from ...cache import StoreKey, StoreWriter
from ..data.coco import CATEGORIES
from ..data.manifest import SPLITS, Manifest
from ..extraction.miniature_model import make_tokenizer

N_TRAIN, N_VAL, N_TEST, WIDTH = 113_287, 5_000, 5_000, 768
CAPTIONS = 5
CHUNK = 1024  # rows of a shard, and rows that are made in one go
# Train images (restval included) of the Karpathy split that have a category, in order of category id, of 113,287.
COUNTS = np.fromstring(
    """
    61377 3115 11753 3356 2873 3819 3438 5863 2875 3982 1645 1677 660 5333 3050 3693 3997 2801 1456 1883
    2053 942 1831 2430 5271 3768 6481 2492 2269 2073 2964 1573 3785 2185 2410 2506 3327 3319 3278 7950
    2370 8582 3081 3888 3116 6556 2067 1441 1999 1546 1673 1461 1098 2834 1367 2661 12235 4252 4264 3510
    11336 3198 4386 3388 1751 2887 2025 3622 1468 2763 203 4459 2254 5035 4381 3438 860 2012 178 817
    """,
    np.int64,
    sep=" ",
)
# Width, height and number of 757 images of COCO, each counted as the nearest of these sizes.
SIZES = (
    (640, 480, 217),
    (640, 427, 217),
    (480, 640, 76),
    (427, 640, 57),
    (500, 375, 43),
    (640, 360, 31),
    (500, 333, 30),
    (612, 612, 27),
    (375, 500, 24),
    (640, 560, 13),
    (360, 640, 9),
    (333, 500, 7),
    (320, 240, 6),
)
OPENINGS = ("A photo of", "There is", "A close up of", "Somebody looks at", "The view of")
JPEG_QUALITY = 90
# Standard deviations of noise by its scale, chosen so that a file has COCO's bytes a pixel: decoding costs by these.
NOISE = {2: 40.0, 8: 25.0, 32: 14.0, 128: 9.0, 320: 12.0, 640: 20.0}


def make_full_store(
    folder: Path, *, n_train: int = N_TRAIN, n_val: int = N_VAL, n_test: int = N_TEST, width: int = WIDTH, seed: int = 0
) -> Path:
    """Write a store of full size; one that is finished already and has the same key is kept.

    Args:
        folder: Where to write.
        n_train: Train images; then come val, then test images.
        n_val: Val images.
        n_test: Test images.
        width: D.
        seed: Seed of everything.

    Returns:
        ``folder``.

    Raises:
        StoreError: The folder holds something else.
    """
    sizes = (n_train, n_val, n_test)
    labels = draw_labels(sum(sizes), seed)
    listing = _listing(labels, sizes, seed)
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
        for start, v_img, v_txt in draw_embeddings(labels, width, seed) if images or texts else ():
            if start in images:
                writer.write_image(images[start], v_img=v_img)
            if start in texts:
                writer.write_text(texts[start], v_txt=v_txt, n_captions=np.full(len(v_txt), CAPTIONS))
        return writer.finish()


def draw_labels(n: int, seed: int = 0) -> NDArray[np.uint8]:
    """Multi-hot labels ``(n, C)`` uint8; classes are independent, each as common as in COCO."""
    rng = np.random.default_rng([seed, 0])
    return (rng.random((n, len(COUNTS)), np.float32) < COUNTS / N_TRAIN).astype(np.uint8)


def draw_embeddings(
    labels: NDArray[np.uint8], width: int, seed: int
) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.float32]]]:
    """First row, ``v_img (n, D)`` and ``v_txt (n, M, D)``, chunk after chunk: directions of the classes, and noise.

    The noise lies mostly in the subspace of the classes, where it makes labels hard to tell; a caption leaves out some
    of the classes of its image.
    """
    rng = np.random.default_rng([seed, 1])
    classes = rng.standard_normal((labels.shape[1], width), np.float32) / math.sqrt(width)
    within = rng.standard_normal((8 * CHUNK, len(classes)), np.float32) @ classes * (4 / math.sqrt(len(classes)))
    pool = within + rng.standard_normal(within.shape, np.float32) / math.sqrt(width)
    for start in range(0, len(labels), CHUNK):
        rows = labels[start : start + CHUNK].astype(np.float32)
        signals = np.repeat(rows[:, None], 1 + CAPTIONS, axis=1)
        signals[:, 1:] *= rng.random((len(rows), CAPTIONS, rows.shape[1]), np.float32) < 0.6
        vectors = signals @ classes + pool[rng.integers(len(pool), size=signals.shape[:2])]
        norms = 10 * np.exp(0.12 * rng.standard_normal(signals.shape[:2], np.float32))
        vectors *= (norms / np.linalg.norm(vectors, axis=-1))[..., None]
        yield start, vectors[:, 0], vectors[:, 1:]


def _listing(labels: NDArray[np.uint8], sizes: tuple[int, ...], seed: int) -> Manifest:
    n = len(labels)
    names = [category.name for category in CATEGORIES]
    tags = [np.flatnonzero(row).tolist() for row in labels]
    # Ids like COCO's: in no order, and not from 1 on.
    ids = np.random.default_rng([seed, 2]).permutation(5 * n)[:n].astype(np.int64)
    things = [" and a ".join(names[tag] for tag in row[:2]) or "wall" for row in tags]
    return Manifest.from_columns(
        image_ids=ids,
        paths=[f"train2014/COCO_train2014_{image_id:012d}.jpg" for image_id in ids.tolist()],
        splits=np.repeat(np.array(SPLITS), sizes).tolist(),
        captions=[[f"{opening} a {thing} by the side of a road." for opening in OPENINGS] for thing in things],
        labels=tags,
        category_names=names,
        name="full-size-benchmark",
    )


def draw_photographs(folder: Path, n: int, seed: int = 0) -> Path:
    """Write ``n`` JPEGs whose sizes are drawn from COCO's, and which decode about as slowly; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    counts = np.array([count for _, _, count in SIZES])
    for number, index in enumerate(rng.choice(len(SIZES), n, p=counts / counts.sum())):
        width, height, _ = SIZES[index]
        draw_photograph(width, height, rng).save(folder / f"{number:06d}.jpg", "JPEG", quality=JPEG_QUALITY)
    return folder


def draw_photograph(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Noise of several scales, like the detail of a photograph; channels differ a little."""
    pixels = np.full((height, width, 3), 128.0)
    for scale, strength in NOISE.items():
        shape = (max(1, height * scale // 640), max(1, width * scale // 640))
        noise = rng.normal(0, strength, (*shape, 1)) + rng.normal(0, strength / 4, (*shape, 3))
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel].astype(np.float32))
            pixels[..., channel] += np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_captions(n: int) -> list[str]:
    """Captions of COCO's length, numbered so that no two are the same."""
    names = [category.name for category in CATEGORIES]
    pairs = [f"{names[number % 80]} and a {names[number // 7 % 80]}" for number in range(n)]
    return [f"{OPENINGS[number % 5]} a {pair} on road {number}" for number, pair in enumerate(pairs)]


def make_base_checkpoint(folder: Path, captions: list[str], vocabulary: int | None = None) -> Path:
    """Towers of SigLIP2 base's size, patch 16 NaFlex, with random weights and a tokenizer of their own.

    Args:
        folder: Where to write, in ``save_pretrained`` form.
        captions: What the tokenizer is trained on.
        vocabulary: Token embeddings, where there are to be more than the tokenizer needs.

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
    tokens = {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    return transformers.Siglip2Config(text_config=tokens)  # its defaults are the base size
