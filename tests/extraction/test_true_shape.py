"""Towers of SigLIP2 base's true shape, with a tokenizer of 256,000 entries: the numbers of a plain transformers loop."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from mmcli.pipeline.bench.data import draw_photographs
from mmcli.pipeline.extraction.encoder import Encoder

WIDTH, VOCABULARY = 768, 256_000
TEXTS = ["a dog", "Two CATS on a sofa, next to a window", "ein Fahrrad", "自転車", "a " * 100]
pytestmark = pytest.mark.realdata


@pytest.fixture(scope="module", params=[2, pytest.param(12, marks=pytest.mark.slow)], ids=lambda n: f"{n} layers")
def checkpoint(
    request: pytest.FixtureRequest, realdata: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A checkpoint whose configuration says what a published one says, with random weights of a seed."""
    folder = tmp_path_factory.mktemp("base")
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 3072,
        "num_hidden_layers": request.param,
        "num_attention_heads": 12,
    }
    config = transformers.Siglip2Config(text_config={**tower, "vocab_size": VOCABULARY}, vision_config=tower)
    with torch.device("meta"):
        model = transformers.Siglip2Model(config)
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.03, generator=generator)
    for name, buffer in model.named_buffers():
        assert name.endswith("position_ids")
        buffer.copy_(torch.arange(buffer.shape[-1])[None])
    model.save_pretrained(folder)
    del model
    transformers.Siglip2ImageProcessorPil().save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(realdata / "siglip2_tokenizer").save_pretrained(folder)
    yield folder
    (folder / "model.safetensors").unlink()
    gc.collect()


@torch.inference_mode()
def plain(
    folder: Path, images: list[Image.Image], budgets: tuple[int, ...]
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """What a first script computes: an image at a time for every budget, and texts in one batch."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    v_img = {}
    for budget in budgets:
        batches = [processor(images=[image], max_num_patches=budget, return_tensors="pt") for image in images]
        v_img[budget] = np.concatenate([model.get_image_features(**batch).pooler_output.numpy() for batch in batches])
    ids = tokenizer(
        TEXTS, padding="max_length", padding_side="right", truncation=True, max_length=64, return_tensors="pt"
    )
    return v_img, model.get_text_features(input_ids=ids.input_ids).pooler_output.numpy()


def close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Equal to 1e-5 of the largest value."""
    return bool(np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max())


def test_embeddings_are_those_of_a_plain_loop(checkpoint: Path, tmp_path: Path) -> None:
    budgets = (64, 256, 1024)
    images = [Image.open(path).convert("RGB") for path in sorted(draw_photographs(tmp_path / "images", 2).iterdir())]
    v_img, v_txt = plain(checkpoint, images, budgets)
    encoder = Encoder.load(str(checkpoint), device=torch.device("cpu"))
    assert encoder.width == WIDTH
    for budget in budgets:
        encoder.spec = replace(encoder.spec, budget=budget)
        assert close(encoder.encode_images([np.asarray(image) for image in images]), v_img[budget])
    assert close(encoder.encode_texts(TEXTS), v_txt)
    assert np.linalg.matrix_rank(v_txt) == len(TEXTS)
