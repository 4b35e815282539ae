"""Whatever an image file is, RGB comes out, or one line on why not."""

import contextlib
import io
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmcli import InputError
from mmcli.pipeline.images import UnreadableImage, image_size, load_image, open_rgb

RED = (250, 10, 10)


def _bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
        server.bind(path.name)


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
        (lambda path: path.mkdir(), "a folder"),
        (os.mkfifo, "a FIFO"),
        (_bind_socket, "a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
        (lambda path: path.symlink_to("gone.jpg"), "no file"),
        (lambda path: path.symlink_to(path), "no file"),
    ],
    ids=[
        "missing",
        "empty",
        "text",
        "truncated",
        "folder",
        "fifo",
        "socket",
        "device",
        "link to nothing",
        "link to itself",
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, make, part: str) -> None:
    path = tmp_path / "bad.jpg"
    make(path)
    with pytest.raises(InputError) as caught:
        load_image(path)
    assert str(path) in str(caught.value)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_decompression_bomb_is_refused_and_a_large_photo_read(tmp_path: Path, monkeypatch) -> None:
    assert Image.MAX_IMAGE_PIXELS * 2 >= 200_000_000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6_000)
    for name in ("a.png", "a.jpg", "a.tif", "a.webp"):
        large = save(tmp_path / name, Image.new("L", (100, 120), 7))  # no more than twice that
        assert image_size(large) == (120, 100)
        assert load_image(large).shape == (120, 100, 3)
        bomb = save(tmp_path / f"b{name}", Image.new("L", (100, 121)))
        for read in (load_image, open_rgb, image_size):
            with pytest.raises(UnreadableImage, match="bomb"):
                read(bomb)


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (16, 16), (333, 500), (641, 479), (3000, 1)])
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 20}, {"keep_rgb": True}]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_has_the_same_pixels_whoever_decodes_it(tmp_path: Path, monkeypatch, size, options, mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    path = save(tmp_path / "a.jpg", Image.fromarray(noise).convert(mode), **({"quality": 90} | options))
    wanted = np.asarray(open_rgb(path))
    monkeypatch.setattr(Image.Image, "load", None)  # Pillow decodes nothing
    assert np.array_equal(load_image(path), wanted)


@pytest.mark.parametrize("damage", ["more at the end", "a wrong byte in the middle"])
def test_pillow_decides_on_a_jpeg_that_the_other_decoder_dislikes(tmp_path: Path, damage: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    whole = save(tmp_path / "a.jpg", Image.fromarray(noise)).read_bytes()
    middle = len(whole) * 2 // 3
    spoiled = whole + b"more" if damage == "more at the end" else whole[:middle] + b"\xff\xd7" + whole[middle + 2 :]
    (tmp_path / "b.jpg").write_bytes(spoiled)
    assert np.array_equal(load_image(tmp_path / "b.jpg"), np.asarray(open_rgb(tmp_path / "b.jpg")))


@pytest.mark.realdata
def test_real_jpegs_have_the_same_pixels_whoever_decodes_them(realdata: Path) -> None:
    paths = sorted(realdata.rglob("*.jpg"))[:200]
    assert paths
    assert all(np.array_equal(load_image(path), np.asarray(open_rgb(path))) for path in paths)
