"""The towers against ``transformers``' own, padded and masked as its processor makes them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import (
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from mmcli.pipeline.extraction.encoder import tokens_of_a_pass
from mmcli.pipeline.extraction.images import Grid, PatchSpec, cut, resize
from mmcli.pipeline.extraction.towers import (
    GRIDS_KEPT,
    ImageTower,
    PixelScale,
    TextTower,
    TrainedPart,
    resize_positions,
)

SCALE = PixelScale(factor=1 / 255, mean=(0.5, 0.4, 0.6), std=(0.5, 0.6, 0.4))
STATISTICS = {"image_mean": list(SCALE.mean), "image_std": list(SCALE.std)}
# width, MLP, layers, heads, patch, positions: small, and the shapes of base, large and so400m at reduced depth
SHAPES = {
    "small": (32, 64, 3, 4, 8, 36),
    "base": (768, 3072, 1, 12, 16, 256),
    "large": (1024, 4096, 1, 16, 16, 256),
    "so400m": (1152, 4304, 1, 16, 16, 256),
}


def make(kind: str, shape: str = "small", image_size: int = 0):
    width, mlp, layers, heads, patch, positions = SHAPES[shape]
    tower = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads}
    text = tower | {
        "vocab_size": 50,
        "max_position_embeddings": 16,
        "projection_size": width,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    if kind == "siglip2":
        vision = tower | {"patch_size": patch, "num_patches": positions}
        model = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision))
    else:
        vision = tower | {"patch_size": patch, "image_size": image_size or 6 * patch}
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    for parameter in model.parameters():  # fresh biases and norms are constants, and would hide a mistake
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def images(n: int, width: int, height: int) -> list[Image.Image]:
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for _ in range(n)]


def patches_of(pictures, grid: Grid, spec: PatchSpec) -> torch.Tensor:
    return torch.from_numpy(np.stack([cut(resize(np.asarray(item), grid, spec), grid, spec.side) for item in pictures]))


def relative(ours: torch.Tensor, plain: torch.Tensor) -> float:
    return float(((ours - plain).norm(dim=-1) / plain.norm(dim=-1)).max())


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        *(("small", size) for size in [(60, 40), (40, 60), (300, 20), (48, 48)]),
        *((shape, (60, 40)) for shape in SHAPES),
    ],
)
def test_naflex_images_equal_the_padded_reference(shape: str, size: tuple[int, int]) -> None:
    model, side = make("siglip2", shape), SHAPES[shape][4]
    spec = PatchSpec(side=side, budget=40, fixed=None, resample=2)
    pictures, grid = images(3, *size), spec.grid(size[1], size[0])
    tower = ImageTower(model.vision_model, SCALE, torch.float32)
    processor = Siglip2ImageProcessorPil(patch_size=side, **STATISTICS)
    inputs = processor(images=pictures, max_num_patches=40, return_tensors="pt")
    with torch.inference_mode():
        plain = model.get_image_features(**inputs).pooler_output
    for _ in range(2):  # the second time from kept position embeddings
        assert relative(tower(patches_of(pictures, grid, spec), grid), plain) < 1e-5


@pytest.mark.parametrize("size", [48, 53])
def test_images_of_a_fixed_resolution_equal_the_reference(size: int) -> None:
    """Also where patches do not divide it, as those of 14 do not divide 384: a convolution leaves the rest out."""
    model = make("siglip", image_size=size)
    processor = SiglipImageProcessorPil(size={"height": size, "width": size}, **STATISTICS)
    spec = PatchSpec(side=8, budget=36, fixed=Grid(6, 6), resample=int(processor.resample), size=(size, size))
    pictures = images(2, 50, 30)
    with torch.inference_mode():
        plain = model.get_image_features(**processor(images=pictures, return_tensors="pt")).pooler_output
    tower = ImageTower(model.vision_model, SCALE, torch.float32)
    assert relative(tower(patches_of(pictures, Grid(6, 6), spec), Grid(6, 6)), plain) < 1e-5


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_texts_equal_the_reference_with_the_last_layer_cut(kind: str, shape: str) -> None:
    model = make(kind, shape)
    ids = torch.randint(0, 50, (5, 16), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain = model.get_text_features(input_ids=ids).pooler_output
    assert relative(TextTower(model.text_model, torch.float32)(ids), plain) < 1e-5


def test_bfloat16_points_the_same_way() -> None:
    model, grid = make("siglip2", "base"), Grid(5, 8)
    spec = PatchSpec(side=16, budget=40, fixed=None, resample=2)
    patches = patches_of(images(3, 128, 80), grid, spec)
    ids = torch.randint(0, 50, (5, 16))
    for full, half in (
        [ImageTower(model.vision_model, SCALE, dtype)(patches, grid) for dtype in (torch.float32, torch.bfloat16)],
        [TextTower(model.text_model, dtype)(ids) for dtype in (torch.float32, torch.bfloat16)],
    ):
        assert half.dtype == torch.float32
        assert torch.cosine_similarity(full, half).min() > 0.9999


@pytest.mark.parametrize("trained", [False, True])
def test_pooling_scores_are_not_rounded_before_the_softmax(trained: bool) -> None:
    """Scores of a hundred, as sharp heads have them, are half a unit off in bfloat16: their weights by two thirds."""
    model, grid = make("siglip2", "base"), Grid(5, 8)
    model.vision_model.head.probe.data *= 4000
    spec = PatchSpec(side=16, budget=40, fixed=None, resample=2)
    patches = patches_of(images(8, 128, 80), grid, spec)
    full = ImageTower(model.vision_model, SCALE, torch.float32)(patches, grid)
    if trained:
        tower = ImageTower(model.vision_model, SCALE, torch.float32, TrainedPart(first_block=1))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            half = tower(patches, grid)
    else:
        half = ImageTower(model.vision_model, SCALE, torch.bfloat16)(patches, grid)
    assert torch.cosine_similarity(full, half).min() > 0.994


@pytest.mark.parametrize("side", [4, 16])
@pytest.mark.parametrize("grid", [Grid(16, 16), Grid(5, 8), Grid(1, 40), Grid(23, 11), Grid(32, 32)])
def test_positions_are_resized_as_interpolate_does(side: int, grid: Grid) -> None:
    torch.manual_seed(0)
    ours, plain = (
        torch.randn(side * side, 24, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "12"
    )
    square = plain.view(side, side, -1).permute(2, 0, 1)[None]
    wanted = F.interpolate(square, size=(grid.rows, grid.columns), mode="bilinear", align_corners=False, antialias=True)
    wanted = wanted[0].flatten(1).T
    with torch.autocast("cpu", torch.bfloat16):  # under which the towers are trained
        resized = resize_positions(ours, grid)
    torch.testing.assert_close(resized, wanted, atol=1e-6, rtol=1e-6)
    slope = torch.randn(wanted.shape)
    resized.backward(slope)
    wanted.backward(slope)
    torch.testing.assert_close(ours.grad, plain.grad, atol=1e-5, rtol=1e-5)


def test_an_image_does_not_see_the_others_of_its_batch() -> None:
    tower = ImageTower(make("siglip2").vision_model, SCALE, torch.float32)
    spec = PatchSpec(side=8, budget=40, fixed=None, resample=2)
    patches = patches_of(images(4, 60, 40), Grid(5, 8), spec)
    together = tower(patches, Grid(5, 8))
    alone = torch.cat([tower(item[None], Grid(5, 8)) for item in patches])
    assert relative(together, alone) < 1e-5


def test_position_embeddings_of_few_grids_are_kept() -> None:
    tower = ImageTower(make("siglip2").vision_model, SCALE, torch.float32)
    for columns in range(1, GRIDS_KEPT + 10):
        tower(torch.zeros(1, columns, 192, dtype=torch.uint8), Grid(1, columns))
    assert tower._positions.cache_info().currsize == GRIDS_KEPT


@pytest.mark.parametrize(("cache", "wanted"), [(512 << 10, 1024), (2 << 20, 2048), (None, 1024)])
def test_a_cpu_takes_as_many_tokens_as_its_caches_hold(monkeypatch: pytest.MonkeyPatch, cache, wanted: int) -> None:
    defaults = {} if cache is None else {"l2_cache_size": cache}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: defaults)
    assert tokens_of_a_pass(torch.device("cpu")) == wanted
    assert tokens_of_a_pass(torch.device("cuda")) == 32768
