"""Light augmentations that keep the patch grid: a random part of the image in its own aspect ratio, and a mirror image.

Draws depend on the seed, the epoch and the row alone: not on the batch, the process, or where a training went on.

Symbols: n images, P patches, p side of a patch in pixels.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..extraction.images import Box, Grid, Pixels

# The smallest part of an image, as a share of its sides: at 0.7 half of its area.
LEAST = 0.7


class Views(NamedTuple):
    """What is seen of n images.

    Attributes:
        boxes: The part of each.
        mirrored: Whether left and right are exchanged, ``(n,)``.
    """

    boxes: list[Box]
    mirrored: npt.NDArray[np.bool_]


def draw_views(rows: npt.NDArray[np.int64], *, seed: int, epoch: int) -> Views:
    """Draw a view of every image: a side uniform in [0.7, 1] of the whole, its place uniform, half of them mirrored.

    Args:
        rows: Rows of the manifest ``(n,)``.
        seed: Of the run.
        epoch: From 1 on.
    """
    drawn = np.array([np.random.default_rng((seed, epoch, int(row))).random(4) for row in rows]).reshape(-1, 4)
    side = LEAST + (1 - LEAST) * drawn[:, 0]
    left, upper = (1 - side) * drawn[:, 1], (1 - side) * drawn[:, 2]
    edges = np.stack([left, upper, left + side, upper + side], axis=1)
    return Views([(a, b, min(c, 1.0), min(d, 1.0)) for a, b, c, d in edges.tolist()], drawn[:, 3] < 0.5)


def flip(pixels: Pixels, grid: Grid, mirrored: npt.NDArray[np.bool_]) -> Pixels:
    """Patches ``(n, P, 3 p^2)`` uint8 in which some images are mirrored."""
    if not mirrored.any():
        return pixels
    side = round((pixels.shape[-1] / 3) ** 0.5)
    seen = pixels[mirrored].reshape(-1, grid.rows, grid.columns, side, side, 3)
    out = pixels.copy()
    out[mirrored] = seen[:, :, ::-1, :, ::-1].reshape(-1, grid.tokens, 3 * side**2)
    return out
