"""From an image file to RGB pixels, whatever the file is, or one clear line on why not."""

import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from .. import InputError

T = TypeVar("T")

# What Pillow and its parsers of metadata raise on a file that is not what it says.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, struct.error, zlib.error)
# EXIF orientations whose width is the upright image's height.
EXIF_ORIENTATION, ON_THE_SIDE = 0x0112, {5, 6, 7, 8}


def load_image(path: Path) -> npt.NDArray[np.uint8]:
    """The RGB pixels of an image, ``(height, width, 3)`` uint8; the very pixels of :func:`open_rgb`.

    A plain JPEG goes straight from libjpeg-turbo into the array, without Pillow's copies of it.
    """

    def pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
        if image.format == "JPEG" and image.mode in {"RGB", "L"} and not _turned(image):
            try:
                decoded: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(
                    path.read_bytes(), "RGB", fastdct=False, fastupsample=False
                )
            except ValueError:  # it takes exception to files that Pillow reads: Pillow decides
                pass
            else:
                return decoded
        return np.asarray(upright_rgb(image))

    return _opened(path, pixels)


def image_size(path: Path) -> tuple[int, int]:
    """Height and width that :func:`open_rgb` will give, from the file's header alone.

    Raises:
        InputError: As :func:`open_rgb`, as far as the header tells.
    """

    def upright(image: Image.Image) -> tuple[int, int]:
        # Pillow turns the size of a TIFF by itself when it opens it.
        turned = image.format != "TIFF" and image.getexif().get(EXIF_ORIENTATION) in ON_THE_SIDE
        return (image.width, image.height) if turned else (image.height, image.width)

    return _opened(path, upright)


def open_rgb(path: Path) -> Image.Image:
    """Decode an image to RGB.

    EXIF orientation is applied; grey, palette and CMYK images are converted; transparency is laid on white;
    16-bit grey is scaled to 8 bits (a plain conversion would clip it); of an animation the first frame is taken.

    Args:
        path: The image file.

    Returns:
        An image of mode RGB.

    Raises:
        InputError: The file is missing, empty, truncated, not an image, or larger than Pillow's bomb limit.
    """
    return _opened(path, upright_rgb)


def _opened(path: Path, use: Callable[[Image.Image], T]) -> T:
    """What ``use`` makes of the open image; whatever Pillow complains of becomes one line."""
    try:
        with warnings.catch_warnings():
            # Between one and two times the limit Pillow only warns; such an image is still a mistake here.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return use(image)
    except FileNotFoundError:
        raise _refuse(path, "no file", "check the path and the folder, or restore the file") from None
    except UnidentifiedImageError:
        got = "an empty file" if path.stat().st_size == 0 else "a file that is not an image"
        raise _refuse(path, got, "replace the file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _refuse(path, str(error), "replace the file by a smaller image") from None
    except UNREADABLE as error:
        raise _refuse(path, f"a damaged file ({error})", "replace the file") from None


def _turned(image: Image.Image) -> bool:
    return bool(image.getexif().get(EXIF_ORIENTATION, 1) != 1)


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB, turned as its EXIF says; what :func:`open_rgb` does to an image that is open.

    Raises:
        ValueError: Pixels whose range nobody knows; a damaged file raises any of :data:`UNREADABLE`.
    """
    image.load()
    # Most images have no orientation, and turning one by nothing copies it.
    return _to_rgb(ImageOps.exif_transpose(image) if _turned(image) else image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in {"I", "F"}:
        raise ValueError(f"pixels of mode {image.mode}, whose range nobody knows")
    if image.mode in {"I;16", "I;16B", "I;16L"}:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _refuse(path: Path, got: str, do: str) -> InputError:
    return InputError("cannot read an image", where=path, got=got, wanted="a whole image file", do=do)
