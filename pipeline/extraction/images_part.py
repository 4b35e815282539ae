"""From an image file to RGB pixels, whatever the file is, or one clear line on why not.

Only the pixels and the number that says how to turn them count: what EXIF, profiles and text of a file hold never
decides whether it is read. A file that is damaged is an :class:`UnreadableImage`; trouble of the file system says
nothing about the file, and is an :class:`~mmcli.InputError` of another kind.
"""

import errno
import io
import logging
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from ... import NOT_THERE, InputError, cannot_read, file_kind
from .image_metadata import limit_to_orientation, pixels_alone, read_orientation
from .native_output import without_native_output

T = TypeVar("T")

# A photograph of the largest sensors has 200 million pixels; decoded, so many as this take a gibibyte.
MOST_PIXELS = 2**28
# Pillow refuses more than twice its limit, and only warns of what is between.
if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MOST_PIXELS // 2)
# It logs some errors besides raising them, and Python prints what nobody listens to.
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
# What the system says where a damaged file sends the decoder before its beginning or far behind its end.
OF_BAD_OFFSETS = {errno.EINVAL, errno.EOVERFLOW, errno.EFBIG}


class UnreadableImage(InputError):  # noqa: N818 - InputError's family
    """An image that cannot be read because of what it is itself: damaged, no image, or not there."""


def load_image(path: Path) -> npt.NDArray[np.uint8]:
    """The RGB pixels of an image, ``(height, width, 3)`` uint8; the very pixels of :func:`open_rgb`.

    A plain JPEG goes straight from libjpeg-turbo into the array, without Pillow's copies of it.
    """

    def pixels(image: Image.Image, orientation: int) -> npt.NDArray[np.uint8]:
        if image.format == "JPEG" and image.mode in {"RGB", "L"} and orientation == 1:
            data = path.read_bytes()
            try:
                decoded: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
            except ValueError:  # it takes exception to files that Pillow reads: Pillow decides
                pass
            else:
                return decoded
        return np.asarray(_upright(image, orientation))

    return _read(path, pixels)


def image_size(path: Path) -> tuple[int, int]:
    """Height and width that :func:`open_rgb` will give, from the file's header alone.

    Raises:
        InputError: As :func:`open_rgb`, as far as the header tells.
    """

    def upright(image: Image.Image, orientation: int) -> tuple[int, int]:
        return (image.width, image.height) if orientation in ON_THE_SIDE else (image.height, image.width)

    return _read(path, upright)


def open_rgb(path: Path) -> Image.Image:
    """Decode an image to RGB.

    It is turned by the orientation of its EXIF; grey, palette and CMYK images are converted; transparency is laid on
    white; 16-bit grey is scaled to 8 bits (a plain conversion would clip it); of an animation the first frame is taken.

    Args:
        path: The image file.

    Returns:
        An image of mode RGB.

    Raises:
        UnreadableImage: The file is missing, empty, truncated, not an image, no regular file, or has more than 2^28
            pixels.
        InputError: The system does not let it be read.
    """
    return _read(path, _upright)


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB, turned as its EXIF says; what :func:`open_rgb` does to an image that is open.

    Raises:
        InputError: As :func:`open_rgb`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _load(image)
            return _upright(image, read_orientation(image.getexif))
    except Exception as error:  # noqa: BLE001 - decoders raise whatever the damage leads to
        raise _refusal(image, error) from None


def _read(path: Path, use: Callable[[Image.Image, int], T]) -> T:
    """What ``use`` makes of the open image and its orientation."""
    try:
        kind = file_kind(path)
        if kind is not None:
            raise _unreadable(path, kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are of metadata, which nobody here reads
            try:
                # Opened here, since Pillow leaves a file open whose first bytes it cannot read.
                with path.open("rb") as stream, Image.open(stream) as image:
                    return use(image, _orientation(image))
            except Exception as error:
                alone = pixels_alone(path) if _may_be_metadata(error) else None
                if alone is None:
                    raise
            data, orientation = alone
            with Image.open(io.BytesIO(data)) as image:
                return use(image, orientation or _orientation(image))
    except Exception as error:  # noqa: BLE001 - decoders raise whatever the damage leads to
        raise _refusal(path, error) from None


def _orientation(image: Image.Image) -> int:
    """How an opened image has to be turned once it is loaded."""
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
        is_empty = isinstance(where, Path) and where.stat().st_size == 0
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
        raise ValueError(f"pixels of mode {image.mode}, whose range nobody knows")
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
