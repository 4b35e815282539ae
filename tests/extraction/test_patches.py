"""Grids and patches against the checkpoint's own image processor."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Siglip2ImageProcessorPil, SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

from mmcli import InputError
from mmcli.pipeline.bench.data import SIZES
from mmcli.pipeline.extraction.images import Grid, PatchSpec, image_size, naflex_grid, open_rgb, read_patches

NAFLEX = PatchSpec(side=16, budget=256, fixed=None, resample=2)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def patches_of(path: Path, spec: PatchSpec) -> tuple[Grid, np.ndarray]:
    grid = spec.grid(*image_size(path))
    out = np.empty((grid.tokens, spec.width), np.uint8)
    read_patches(path, grid, spec, out)
    return grid, out


@settings(max_examples=300)
@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.sampled_from([8, 14, 16]),
    st.sampled_from([1, 16, 64, 256, 729, 1024]),
)
def test_the_grid_is_the_processors_own(height: int, width: int, side: int, budget: int) -> None:
    wanted = get_image_size_for_max_num_patches(height, width, side, budget)
    grid = naflex_grid(height, width, side, budget)
    assert (grid.rows * side, grid.columns * side) == wanted
    assert 1 <= grid.tokens <= budget


@pytest.mark.parametrize("budget", [256, 512, 1024])
def test_the_grids_of_coco(budget: int) -> None:
    for width, height, _ in SIZES:
        wanted = get_image_size_for_max_num_patches(height, width, 16, budget)
        assert tuple(16 * side for side in naflex_grid(height, width, 16, budget)) == wanted
    assert sum(count for _, _, count in SIZES) == 757


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (333, 500), (1, 900), (900, 1), (3, 3), (17, 4000)])
def test_patches_are_the_processors_once_scaled(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "a.png"
    picture(*size).save(path)
    grid, patches = patches_of(path, NAFLEX)
    plain = Siglip2ImageProcessorPil()(images=[Image.open(path)], max_num_patches=256, return_tensors="np")
    assert tuple(plain["spatial_shapes"][0]) == tuple(grid)
    scaled = (patches / 255.0 - 0.5) / 0.5
    assert np.abs(scaled - plain["pixel_values"][0, : grid.tokens]).max() < 1.2e-7


def test_a_fixed_resolution_has_one_grid_and_its_own_filter(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture(90, 70).save(path)
    processor = SiglipImageProcessorPil(size={"height": 64, "width": 64})
    spec = PatchSpec(side=16, budget=16, fixed=Grid(4, 4), resample=int(processor.resample))
    grid, patches = patches_of(path, spec)
    plain = processor(images=[Image.open(path)], return_tensors="np")["pixel_values"][0]
    blocks = plain.reshape(3, 4, 16, 4, 16).transpose(1, 3, 2, 4, 0).reshape(16, -1)
    assert grid == (4, 4)
    assert np.abs((patches / 255.0 - 0.5) / 0.5 - blocks).max() < 1.2e-7


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_header_tells_the_size_of_the_upright_image(tmp_path: Path, orientation: int) -> None:
    path, exif = tmp_path / "a.jpg", Image.Exif()
    exif[0x0112] = orientation
    picture(40, 24).save(path, exif=exif)
    image = open_rgb(path)
    assert image_size(path) == (image.height, image.width)
    assert image.size == ((24, 40) if orientation >= 5 else (40, 24))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pillow_turns_a_tiff_by_itself(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "a.tif"
    picture(40, 24).save(path, tiffinfo={0x0112: orientation})
    image = open_rgb(path)
    assert image_size(path) == (image.height, image.width)


def test_an_image_that_changes_after_its_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture(64, 64).save(path)
    grid = NAFLEX.grid(*image_size(path))
    picture(640, 64).save(path)
    with pytest.raises(InputError, match="another image than a moment ago"):
        read_patches(path, grid, NAFLEX, np.empty((grid.tokens, NAFLEX.width), np.uint8))


@pytest.mark.parametrize(("resample", "most"), [(2, 1), (3, 2)])
@pytest.mark.parametrize("size", [(640, 480), (37, 500), (20, 20)])
def test_the_torch_resizer_is_off_by_a_level_here_and_there(tmp_path: Path, resample: int, most: int, size) -> None:
    path = tmp_path / "a.png"
    picture(*size).save(path)
    both = [
        patches_of(path, PatchSpec(side=16, budget=256, fixed=None, resample=resample, resizer=item))[1]
        for item in ("pillow", "torch")
    ]
    off = np.abs(both[0].astype(int) - both[1])
    assert off.max() <= most
    assert (off > 0).mean() < 0.02
