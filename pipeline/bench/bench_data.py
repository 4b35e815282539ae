"""What benchmarks run on when nothing is given: photographs of COCO's sizes, captions, towers of base size."""

from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from ..data.miniature_scenes import draw_scene
from ..data.miniature_scenes import write_captions as captions_of
from ..extraction.miniature_model import make_tokenizer
from .coco_sizes import SIZES

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
        "vocab_size": vocabulary, "max_position_embeddings": 64, "projection_size": 768, "pad_token_id": 0,
        "eos_token_id": 1, "bos_token_id": 2,
    }  # fmt: skip
    return transformers.Siglip2Config(text_config={**tower, **text}, vision_config={**tower, "num_patches": 256})
