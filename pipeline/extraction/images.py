"""From an image file to the uint8 patches that the image tower reads.

Worker processes import this, so it imports torch only where torch is asked to resize. Pixels stay uint8 to the device,
a quarter of the bytes of float32; scaling and normalising them is the tower's first step. The numbers are those of the
checkpoint's own processor (Pillow resizes uint8 there too).

Symbols: P patches of one image, p side of a patch in pixels, rows x columns the grid, P = rows * columns.
"""

import errno
import io
import logging
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from ...errors import NOT_THERE, InputError, cannot_read, file_kind
from ..core.archives import open_binary, split_archive
from .image_metadata import limit_to_orientation, read_orientation, strip_metadata
from .native_output import without_native_output

T = TypeVar("T")
Pixels = npt.NDArray[np.uint8]

# A photograph of the largest sensors has 200 million pixels; decoded, so many as this take a gibibyte.
MOST_PIXELS = 2**28
# Pillow refuses more than twice its limit, and only warns of what is between.
if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MOST_PIXELS // 2)
# Pillow logs some errors besides raising them, and Python prints log records that no handler takes.
logging.getLogger("PIL").addHandler(logging.NullHandler())

# How pixels are turned upright, by EXIF's orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Those whose width is the upright image's height.
ON_THE_SIDE = {5, 6, 7, 8}
# Tags of a TIFF.
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
WHOLE = "a whole image file"
# How libjpeg begins its complaint about a JPEG whose pixels end too early.
CUT_OFF = "premature end"
# What the system says where a damaged file sends the decoder before its beginning or far behind its end.
OF_BAD_OFFSETS = {errno.EINVAL, errno.EOVERFLOW, errno.EFBIG}


class UnreadableImage(InputError):  # noqa: N818 - InputError's family
    """An image that cannot be read because of what it is itself: damaged, no image, or not there."""


def load_image(path: Path) -> Pixels:
    """The RGB pixels of an image, ``(height, width, 3)`` uint8.

    The image is turned by the orientation of its EXIF; grey, palette and CMYK images are converted; transparency is
    laid on white; 16-bit grey is scaled to 8 bits (a plain conversion would clip it); of an animation the first frame
    is taken. Ordinary JPEGs are decoded by libjpeg-turbo itself, because Pillow fills the missing part of a JPEG that
    was cut off with grey and does not say so.

    Raises:
        UnreadableImage: The file is missing, empty, truncated, not an image, no regular file, or has more than 2^28
            pixels.
        InputError: The system does not let it be read.
    """
    return _read(path, _decode)


def open_rgb(path: Path) -> Image.Image:
    """The image of :func:`load_image` as Pillow's; its errors are the same."""
    return Image.fromarray(load_image(path))


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of what :func:`load_image` will give, from the file's header alone.

    Raises:
        InputError: See :func:`load_image`, as far as the header tells.
    """

    def upright(image: Image.Image, orientation: int, _file: IO[bytes]) -> tuple[int, int]:
        return (image.width, image.height) if orientation in ON_THE_SIDE else (image.height, image.width)

    return _read(path, upright)


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image that is already open as RGB, turned and converted as :func:`load_image` does it.

    Raises:
        InputError: The image cannot be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _load(image)
            return _upright(image, read_orientation(image.getexif))
    except Exception as error:  # noqa: BLE001 - decoders raise whatever the damage leads to
        raise _refusal(image, error) from None


def _read(path: Path, use: Callable[[Image.Image, int, IO[bytes]], T]) -> T:
    """Open an image and return the result of ``use``, called with the image, its orientation and the opened file."""
    try:
        kind = None if split_archive(path) else file_kind(path)
        if kind is not None:
            raise _unreadable(path, kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are about metadata, which is not read here
            try:
                # Opened here, since Pillow leaves a file open whose first bytes it cannot read.
                with open_binary(path) as stream, Image.open(stream) as image:
                    return use(image, _orientation(image), stream)
            except Exception as error:
                stripped = strip_metadata(path) if _may_be_metadata(error) else None
                if stripped is None:
                    raise
            data, orientation = stripped
            with io.BytesIO(data) as copy, Image.open(copy) as image:
                return use(image, orientation or _orientation(image), copy)
    except Exception as error:  # noqa: BLE001 - decoders raise whatever the damage leads to
        raise _refusal(path, error) from None


def _decode(image: Image.Image, orientation: int, file: IO[bytes]) -> Pixels:
    if image.format == "JPEG" and image.mode in {"RGB", "L"}:
        file.seek(0)
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(file.read(), "RGB", fastdct=False, fastupsample=False)
        except ValueError as error:
            if CUT_OFF in str(error).lower():
                raise
            file.seek(0)  # it takes exception to other files that Pillow reads: Pillow decides
        else:
            turn = TURNS.get(orientation)
            return pixels if turn is None else np.asarray(Image.fromarray(pixels).transpose(turn))
    return np.asarray(_upright(image, orientation))


def _orientation(image: Image.Image) -> int:
    """The orientation of an opened image, by which it has to be turned once it is loaded."""
    if image.format == "TIFF":
        limit_to_orientation(image)
        return 1  # Pillow turns it itself
    if image.format == "PNG" and "exif" not in image.info:
        image.load()  # EXIF may stand behind the pixels, and what is wrong with those is not to be taken for it
    return read_orientation(image.getexif)


def _may_be_metadata(error: Exception) -> bool:
    about_the_system = isinstance(error, OSError) and error.errno is not None
    return not about_the_system and not isinstance(error, InputError | Image.DecompressionBombError | MemoryError)


def _refusal(where: object, error: Exception) -> InputError:
    """The error to raise for whatever was raised on the way to the pixels."""
    refusal: InputError | None = error if isinstance(error, InputError) else None
    if isinstance(error, MemoryError):
        refusal = InputError(
            "cannot read an image", where=where, got="too little memory", do="free some, and try again"
        )
    elif isinstance(error, UnidentifiedImageError):
        is_empty = isinstance(where, Path) and where.is_file() and where.stat().st_size == 0
        refusal = _unreadable(where, "an empty file" if is_empty else "a file that is not an image")
    elif isinstance(error, OSError) and error.errno in NOT_THERE:
        refusal = _unreadable(where, "no file", "check the path and the folder, or restore the file")
    elif isinstance(error, OSError) and error.errno not in {None, *OF_BAD_OFFSETS}:
        refusal = cannot_read("cannot read an image", where, error, wanted=WHOLE)
    elif isinstance(error, Image.DecompressionBombError):
        refusal = _unreadable(where, error, f"replace it by an image of at most {MOST_PIXELS:,} pixels")
    return refusal or _unreadable(where, f"a damaged file ({str(error) or type(error).__name__})")


def _unreadable(where: object, got: object, do: str = "replace the file") -> UnreadableImage:
    return UnreadableImage("cannot read an image", where=where, got=got, wanted=WHOLE, do=do)


def _load(image: Image.Image) -> None:
    # libtiff says on stderr what Pillow raises.
    with without_native_output() if image.format == "TIFF" else nullcontext():
        image.load()


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    _load(image)
    turn = TURNS.get(orientation)
    upright = _to_rgb(image)
    return upright if turn is None else upright.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in {"I;16", "I;16B", "I;16L"} or (image.mode == "I" and image.format == "PPM"):
        return Image.fromarray(_scale_grey(image)).convert("RGB")
    if image.mode in {"I", "F"}:
        raise ValueError(f"pixels of mode {image.mode}, whose range is not known")
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _scale_grey(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Grey of 16 bits, or of the 12 that a TIFF may have, as 8 bits."""
    values, bits, is_negative = np.asarray(image), 16, False
    if image.format == "TIFF":
        tags = getattr(image, "tag_v2")  # noqa: B009 - of TIFFs alone
        bits = 12 if tags.get(BITS_PER_SAMPLE) == (12,) else 16
        is_negative = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
    grey = (values >> (bits - 8)).astype(np.uint8)
    if is_negative:
        grey = ~grey
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return grey


Resizer = Literal["pillow", "torch"]
# A part of an image: left, upper, right and lower edge, as shares of its width and height.
Box = tuple[float, float, float, float]
TORCH_MODES = {int(Image.Resampling.BILINEAR): "bilinear", int(Image.Resampling.BICUBIC): "bicubic"}
# The bounds of the search for the scale, as SigLIP2's image processor has them: other bounds may give another grid.
SCALE_MIN, SCALE_MAX, SCALE_EPS = 1e-6, 100.0, 1e-5


class Grid(NamedTuple):
    """The number of patches that an image is cut into, down and across."""

    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        """Patches of the image, P."""
        return self.rows * self.columns


@dataclass(frozen=True, kw_only=True)
class PatchSpec:
    """The settings of a checkpoint's image processor: how an image becomes patches.

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
        """The most patches that an image can have."""
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
        height: Height of the image in pixels, after EXIF orientation.
        width: Width of the image in pixels, after EXIF orientation.
        side: Side of a patch in pixels, p.
        budget: Most patches of an image.

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
        box: The part of the image that is read; the whole image when not given. Pillow resizes it always.

    Raises:
        InputError: The file cannot be decoded, or is no longer the one whose header was read.
    """
    image = load_image(path)
    height, width, _ = image.shape
    if spec.grid(height, width) != grid:
        raise InputError(
            "cannot read an image",
            where=path,
            got="another image than a moment ago",
            wanted="files that stay",
            do="run `mmcli extract` again when nothing writes the data folder",
        )
    out[...] = cut(resize(image, grid, spec, box), grid, spec.side)


def resize(image: Pixels, grid: Grid, spec: PatchSpec, box: Box | None = None) -> Pixels:
    """Pixels of an RGB image at the size of its grid, ``(rows * p, columns * p, 3)`` uint8, or at ``spec.size``.

    Args:
        image: ``(height, width, 3)`` uint8.
        grid: The image's grid.
        spec: The processor's settings.
        box: The part of the image that is resized, always by Pillow; the whole image when not given.
    """
    height, width = spec.size or (grid.rows * spec.side, grid.columns * spec.side)
    if spec.resizer == "torch" and box is None:
        return _resize_in_torch(image, height, width, TORCH_MODES[spec.resample])
    edges = None if box is None else tuple(np.multiply(box, image.shape[1::-1] * 2).tolist())
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling(spec.resample), box=edges))


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
