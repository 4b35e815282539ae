"""Pictures as a caller has them (paths, arrays, Pillow's images) to raw embeddings, in batches of one grid."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ... import InputError
from ..extraction.encoder import Encoder, Floats
from ..extraction.images import Grid, PatchSpec, Pixels, cut, resize
from ..extraction.images_part import UnreadableImage, open_rgb, upright_rgb
from ..extraction.planner import plan

Picture = str | PathLike[str] | Image.Image | npt.NDArray[Any]
CHUNK = 256  # pictures whose patches are in memory at once: 48 MiB of them at 256 patches


def read_rgb(picture: Picture) -> Image.Image:
    """An RGB image, upright.

    Args:
        picture: A path, an image of Pillow, or an array ``(height, width)`` or ``(height, width, 3 or 4)`` uint8.

    Raises:
        InputError: It cannot be read, or is none of these.
    """
    if isinstance(picture, np.ndarray):
        shape = picture.shape
        fits = picture.ndim == 2 or (picture.ndim == 3 and shape[2] in {3, 4})
        if picture.dtype != np.uint8 or not fits or not picture.size:
            raise InputError(
                "not an image", got=f"an array {shape} of {picture.dtype}",
                wanted="(height, width) or (height, width, 3 or 4) of uint8", do="scale it to 0..255, channels last",
            )  # fmt: skip
        return upright_rgb(Image.fromarray(np.ascontiguousarray(picture)))
    if isinstance(picture, Image.Image):
        return upright_rgb(picture)
    if not isinstance(picture, str | PathLike):
        raise InputError(
            "not an image", got=type(picture).__name__, wanted="a path, an array of uint8, or an image of Pillow"
        )
    return open_rgb(Path(picture))


def embed_images(encoder: Encoder, pictures: Sequence[Picture], *, unreadable: dict[int, str] | None = None) -> Floats:
    """Raw embeddings of pictures, made as an extraction makes them.

    Args:
        encoder: The towers.
        pictures: N of them.
        unreadable: Where given, a picture that cannot be read is noted here with the reason, and its row is zero.

    Returns:
        ``(N, D)`` float32, before L2 normalisation.

    Raises:
        InputError: One cannot be read, and ``unreadable`` is not given.
    """
    out = np.zeros((len(pictures), encoder.width), np.float32)
    for start in range(0, len(pictures), CHUNK):
        chunk: dict[int, tuple[Grid, Pixels]] = {}
        for row, picture in enumerate(pictures[start : start + CHUNK]):
            try:
                chunk[row] = _cut(read_rgb(picture), encoder.spec)
            except UnreadableImage as error:
                if unreadable is None:
                    raise
                unreadable[start + row] = str(error)
        grids = [chunk[row][0] if row in chunk else None for row in range(len(pictures[start : start + CHUNK]))]
        for batch in plan(grids, tokens=encoder.batch_tokens):
            rows = np.array(batch.rows)
            pixels = np.stack([chunk[row][1] for row in batch.rows])
            with torch.inference_mode():
                out[start + rows] = encoder.image_features(pixels, batch.grid).cpu().numpy()
    return out


def _cut(image: Image.Image, spec: PatchSpec) -> tuple[Grid, Pixels]:
    grid = spec.grid(image.height, image.width)
    return grid, cut(resize(image, grid, spec), grid, spec.side)
