"""Whatever an image file is, RGB comes out, or one line on why not."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmcli import InputError
from mmcli.pipeline.images import load_image

RED = (250, 10, 10)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "LA", "1", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "tif" if mode in {"CMYK", "YCbCr"} else "png"
    path = save(tmp_path / f"a.{suffix}", Image.new("RGB", (5, 3), "white").convert(mode))
    pixels = load_image(path)
    assert pixels.shape == (3, 5, 3)
    assert pixels.dtype == np.uint8
    assert pixels.min() >= 250


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (*RED, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    pixels = load_image(save(tmp_path / "a.png", image))
    assert pixels[0, 0].tolist() == list(RED)
    assert pixels[0, 1].tolist() == [255, 255, 255]


def test_transparent_palette_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([0, 0, 0, *RED] + [0] * 762)
    image.putpixel((1, 0), 1)
    pixels = load_image(save(tmp_path / "a.png", image, transparency=0))
    assert pixels[0].tolist() == [[255, 255, 255], list(RED)]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), "white")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(save(tmp_path / "a.jpg", image, exif=exif)).shape == (8, 4, 3)


def test_metadata_that_makes_no_sense_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow writes EXIF anew when it turns an image, and trips over values that do not fit their types."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.jpg", Image.new("RGB", (8, 4), "white"), exif=exif)
    for error in (struct.error("short format"), TypeError("x"), KeyError("y"), IndexError(), zlib.error("z")):

        def trip(image, error=error):
            raise error

        monkeypatch.setattr("mmcli.pipeline.images.ImageOps.exif_transpose", trip)
        with pytest.raises(InputError, match="a damaged file"):
            load_image(path)


def test_a_colour_that_means_transparent_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), (255, 0, 255))
    pixels = load_image(save(tmp_path / "a.png", image, transparency=(255, 0, 255)))
    assert pixels[0].tolist() == [list(RED), [255, 255, 255]]


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    grey = np.array([[0, 257 * 128, 65535]], np.uint16)
    pixels = load_image(save(tmp_path / "a.png", Image.fromarray(grey)))
    assert pixels[0, :, 0].tolist() == [0, 128, 255]


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, "blue")]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert np.abs(load_image(path)[0, 0].astype(int) - RED).max() < 8


def test_one_pixel_high_and_very_long(tmp_path: Path) -> None:
    assert load_image(save(tmp_path / "a.png", Image.new("RGB", (3000, 1)))).shape == (1, 3000, 3)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda path: None, "no file"),
        (lambda path: path.write_bytes(b""), "an empty file"),
        (lambda path: path.write_text("not an image"), "not an image"),
        (lambda path: path.write_bytes(_jpeg()[:600]), "damaged"),
        (lambda path: path.mkdir(), "damaged"),
    ],
    ids=["missing", "empty", "text", "truncated", "folder"],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, make, part: str) -> None:
    path = tmp_path / "bad.jpg"
    make(path)
    with pytest.raises(InputError) as caught:
        load_image(path)
    assert str(path) in str(caught.value)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factor", [1.5, 3.0])
def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    path = save(tmp_path / "bomb.png", Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(10_000 / factor))
    with pytest.raises(InputError, match="bomb"):
        load_image(path)


def _jpeg() -> bytes:
    import io

    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()
