"""From an image file to the uint8 patches that the image tower reads.

Worker processes import this, so it imports torch only where torch is asked to resize. Pixels stay uint8 to the device,
a quarter of the bytes of float32; scaling and normalising them is the tower's first step. The numbers are those of the
checkpoint's own processor (Pillow resizes uint8 there too).

Symbols: P patches of one image, p side of a patch in pixels, rows x columns the grid, P = rows * columns.
"""

import math
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from ... import InputError
from .images_part import load_image, open_rgb

Pixels = npt.NDArray[np.uint8]
Resizer = Literal["pillow", "torch"]
# A part of an image: left, upper, right and lower edge, as shares of its width and height.
Box = tuple[float, float, float, float]
TORCH_MODES = {int(Image.Resampling.BILINEAR): "bilinear", int(Image.Resampling.BICUBIC): "bicubic"}
# The bounds of the search for the scale, as SigLIP2's image processor has them: other bounds may give another grid.
SCALE_MIN, SCALE_MAX, SCALE_EPS = 1e-6, 100.0, 1e-5


class Grid(NamedTuple):
    """How many patches an image is cut into, down and across."""

    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        """P."""
        return self.rows * self.columns


@dataclass(frozen=True, kw_only=True)
class PatchSpec:
    """What a checkpoint's image processor does to an image before the tower sees it.

    Attributes:
        side: p, pixels of a patch's side.
        budget: Most patches of an image, for NaFlex checkpoints.
        fixed: The one grid of a fixed-resolution checkpoint; None for NaFlex.
        size: Height and width that its images are resized to. Where patches do not divide it, what is left at the right
            and below is not looked at, as by a convolution whose stride is its kernel.
        resample: Pillow's number of the resampling filter.
        resizer: ``pillow`` gives the numbers of the checkpoint's own processor. ``torch`` is 2.5 times as fast, has
            vector instructions, and is off by one level of 255 in about one value of 700; it knows the bilinear and
            the bicubic filter.
    """

    side: int
    budget: int
    fixed: Grid | None
    resample: int
    resizer: Resizer = "pillow"
    size: tuple[int, int] | None = None

    @property
    def width(self) -> int:
        """Values of one patch, 3 p^2."""
        return 3 * self.side**2

    @property
    def most_tokens(self) -> int:
        """The largest P."""
        return self.budget if self.fixed is None else self.fixed.tokens

    def grid(self, height: int, width: int) -> Grid:
        """The grid of an image of ``height`` x ``width`` pixels."""
        return self.fixed or naflex_grid(height, width, self.side, self.budget)


@lru_cache(maxsize=1 << 16)
def naflex_grid(height: int, width: int, side: int, budget: int) -> Grid:
    """The largest grid of at most ``budget`` patches that keeps the aspect ratio (Tschannen et al. 2025, section 2.4).

    Each side is scaled by one factor and rounded up to whole patches; the factor is found by bisection, in the very
    steps of SigLIP2's image processor, because another search may end on the other side of a rounding.

    Args:
        height: Pixels of the image, after EXIF orientation.
        width: Likewise.
        side: p.
        budget: Most patches.

    Returns:
        The grid, of at least one patch and at most ``budget``.
    """

    def scaled(scale: float, size: int) -> int:
        return max(side, math.ceil(size * scale / side) * side)

    low, high = SCALE_MIN, SCALE_MAX
    while high - low >= SCALE_EPS:
        scale = (low + high) / 2
        if (scaled(scale, height) / side) * (scaled(scale, width) / side) <= budget:
            low = scale
        else:
            high = scale
    return Grid(scaled(low, height) // side, scaled(low, width) // side)


def read_patches(path: Path, grid: Grid, spec: PatchSpec, out: Pixels, box: Box | None = None) -> None:
    """Decode an image, resize it to its grid and cut it into patches.

    Args:
        path: The image file.
        grid: Its grid, planned from the header.
        spec: The processor's settings.
        out: Where to write: ``(P, 3 p^2)`` uint8; a patch is ``(p, p, 3)`` row-major, as the processor's.
        box: The part of the image that is read; all of it when not given. Pillow resizes it, whatever the resizer.

    Raises:
        InputError: The file cannot be decoded, or is no longer the one whose header was read.
    """
    image = open_rgb(path) if spec.resizer == "pillow" or box is not None else load_image(path)
    if spec.grid(*_size(image)) != grid:
        raise InputError(
            "cannot read an image", where=path, got="another image than a moment ago", wanted="files that stay",
            do="run `mmcli extract` again when nothing writes the data folder",
        )  # fmt: skip
    out[...] = cut(resize(image, grid, spec) if box is None else _resize_part(image, box, grid, spec), grid, spec.side)


def _resize_part(image: Any, box: Box, grid: Grid, spec: PatchSpec) -> Pixels:  # noqa: ANN401
    height, width = spec.size or (grid.rows * spec.side, grid.columns * spec.side)
    edges = (box[0] * image.width, box[1] * image.height, box[2] * image.width, box[3] * image.height)
    return np.asarray(image.resize((width, height), Image.Resampling(spec.resample), box=edges))


def resize(image: Image.Image | Pixels, grid: Grid, spec: PatchSpec) -> Pixels:
    """Pixels of an RGB image at the size of its grid, ``(rows * p, columns * p, 3)`` uint8, or at ``spec.size``.

    The image may be an array ``(height, width, 3)`` uint8; torch is spared a copy if it is, Pillow if it is Pillow's.
    """
    height, width = spec.size or (grid.rows * spec.side, grid.columns * spec.side)
    if spec.resizer == "torch":
        return _resize_in_torch(np.asarray(image), height, width, TORCH_MODES[spec.resample])
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return np.asarray(image.resize((width, height), Image.Resampling(spec.resample)))


def _size(image: Image.Image | Pixels) -> tuple[int, int]:
    return (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]


def _resize_in_torch(pixels: Pixels, height: int, width: int, mode: str) -> Pixels:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the array of an image is read-only, and is only read
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(tensor, (height, width), mode=mode, align_corners=False, antialias=True)
    channels_last: Pixels = resized[0].permute(1, 2, 0).numpy()
    return channels_last


def cut(pixels: Pixels, grid: Grid, side: int) -> Pixels:
    """Patches in reading order ``(P, 3 p^2)`` of pixels, at least ``(rows * p, columns * p, 3)``."""
    blocks = (
        pixels[: grid.rows * side, : grid.columns * side]
        .reshape(grid.rows, side, grid.columns, side, 3)
        .transpose(0, 2, 1, 3, 4)
    )
    return blocks.reshape(grid.tokens, 3 * side**2)
