"""Whatever an image file is, RGB comes out, or one line on why not."""

import contextlib
import errno
import io
import os
import pickle
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from mmcli import InputError
from mmcli.pipeline.extraction.images import (
    Grid,
    PatchSpec,
    UnreadableImage,
    image_size,
    load_image,
    open_rgb,
    read_patches,
)

RED = (250, 10, 10)


def pillow_pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


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
    wanted = pillow_pixels(path)
    monkeypatch.setattr(Image.Image, "load", None)  # Pillow decodes nothing
    assert np.array_equal(load_image(path), wanted)


@pytest.mark.parametrize("more", ["behind the end", "before the end"])
def test_superfluous_bytes_of_a_jpeg_do_not_matter(tmp_path: Path, more: str) -> None:
    whole = _jpeg()
    spoiled = whole + b"more" if more == "behind the end" else whole[:-2] + bytes(9) + whole[-2:]
    (tmp_path / "a.jpg").write_bytes(spoiled)
    assert np.array_equal(load_image(tmp_path / "a.jpg"), pillow_pixels(tmp_path / "a.jpg"))


@pytest.mark.parametrize("resizer", ["pillow", "torch"])
def test_a_jpeg_cut_off_before_an_end_marker_is_refused(tmp_path: Path, resizer) -> None:
    """Pillow gives grey for the missing part and says nothing."""
    (tmp_path / "a.jpg").write_bytes(_jpeg()[:3000] + b"\xff\xd9")
    assert pillow_pixels(tmp_path / "a.jpg").shape == (64, 64, 3)
    spec = PatchSpec(side=16, budget=16, fixed=None, resample=2, resizer=resizer)
    out = np.empty((16, spec.width), np.uint8)
    for read in (load_image, open_rgb, lambda path: read_patches(path, Grid(4, 4), spec, out)):
        with pytest.raises(UnreadableImage, match="premature end"):
            read(tmp_path / "a.jpg")


@pytest.mark.realdata
def test_real_jpegs_have_the_same_pixels_whoever_decodes_them(realdata: Path) -> None:
    paths = sorted(realdata.rglob("*.jpg"))[:200]
    assert paths
    assert all(np.array_equal(load_image(path), pillow_pixels(path)) for path in paths)


OF_THE_SYSTEM = (
    errno.ESTALE,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.EAGAIN,
    errno.EINTR,
    errno.EACCES,
    errno.EPERM,
    errno.EHOSTDOWN,
    errno.EBUSY,
)


@pytest.mark.parametrize("number", OF_THE_SYSTEM, ids=errno.errorcode.get)
@pytest.mark.parametrize("where", ["stat", "open", "decode"])
def test_an_error_of_the_system_says_nothing_about_the_file(tmp_path, monkeypatch, number: int, where: str) -> None:
    path = save(tmp_path / "a.jpg", Image.new("RGB", (8, 8)))

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(
        *{"stat": (Path, "stat"), "open": (Image, "open"), "decode": (Image.Image, "load")}[where], fail
    )
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    monkeypatch.setattr("simplejpeg.decode_jpeg", fail)
    for read in (open_rgb, load_image) if where == "decode" else (open_rgb, load_image, image_size):
        with pytest.raises(InputError) as caught:
            read(path)
        assert not isinstance(caught.value, UnreadableImage)
        permission = "no permission to read it" if number in {errno.EACCES, errno.EPERM} else os.strerror(number)
        assert f"cannot read an image: {path}: got {permission}, wanted a whole image file; " in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # as it comes from a process


def test_too_little_memory_says_nothing_about_the_file(tmp_path: Path, monkeypatch) -> None:
    path = save(tmp_path / "a.png", Image.new("RGB", (8, 8)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: bytes(2**62))
    with pytest.raises(InputError, match="got too little memory") as caught:
        open_rgb(path)
    assert not isinstance(caught.value, UnreadableImage)


@pytest.mark.parametrize(
    "error",
    [
        OSError("image file is truncated"),
        OSError(errno.EINVAL, "Invalid argument"),
        SyntaxError("broken"),
        struct.error("short"),
        ValueError("x"),
        OverflowError("x"),
        TypeError("x"),
        AttributeError("x"),
        KeyError(9),
        IndexError(),
        zlib.error("x"),
        EOFError(),
        RuntimeError("x"),
        RecursionError(),
        AssertionError(),
        ZeroDivisionError("x"),
        NotImplementedError(),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"),
        SystemError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_whatever_a_decoder_raises_is_a_damaged_file(
    tmp_path: Path, monkeypatch, error: Exception, suffix: str
) -> None:
    path = save(tmp_path / f"a.{suffix}", Image.new("CMYK" if suffix == "jpg" else "RGB", (8, 8)))

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    for read in (open_rgb, load_image):
        with pytest.raises(UnreadableImage, match=rf"{path.name}: got a damaged file \(.+\), wanted"):
            read(path)


def test_what_pillow_logs_is_not_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "a.tif", Image.new("RGB", (8, 8)))
    data = bytearray(path.read_bytes())
    place = data.index(struct.pack("<HHLH", 277, 3, 1, 3))  # samples of a pixel
    data[place + 8 : place + 10] = struct.pack("<H", 9000)
    path.write_bytes(data)
    with pytest.raises(UnreadableImage):
        open_rgb(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
def test_what_libtiff_complains_of_is_not_printed(tmp_path: Path, compression: str, capfd) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    path = save(tmp_path / "a.tif", Image.fromarray(noise), compression=compression)
    data = path.read_bytes()
    path.write_bytes(data[:1000] + bytes(900) + data[1900:])
    for read in (open_rgb, load_image):
        with pytest.raises(UnreadableImage):
            read(path)
    assert capfd.readouterr() == ("", "")


GREY = np.array([[0, 4095, 65535], [257 * 128, 1, 30_000]], np.uint16)


@pytest.mark.parametrize(
    "kind", ["png", "tif", "tif, high bytes first", "tif, white is zero", "tif of 12 bits", "pgm", "jp2"]
)
def test_grey_of_more_than_eight_bits_is_scaled(tmp_path: Path, kind: str) -> None:
    suffix = kind[:3]
    path, wanted = tmp_path / f"a.{suffix}", (GREY >> 8).astype(int)
    if kind == "pgm":
        path.write_bytes(b"P5 3 2 65535\n" + GREY.astype(">u2").tobytes())
    elif kind == "tif of 12 bits":
        values = GREY >> 4  # two in three bytes, and a line ends with a whole byte
        rows = [[*row, 0] for row in values.tolist()]
        packed = b"".join(
            (first << 12 | second).to_bytes(3)
            for row in rows
            for first, second in zip(row[::2], row[1::2], strict=True)
        )
        strips = b"".join(packed[place : place + 5] for place in (0, 6))
        save(path, Image.fromarray(GREY))
        tags = [
            (256, 4, 3),
            (257, 4, 2),
            (258, 3, 12),
            (259, 3, 1),
            (262, 3, 1),
            (273, 4, 8 + 2 + 12 * 8 + 4),
            (278, 4, 2),
            (279, 4, 10),
        ]
        entries = b"".join(struct.pack("<HHLL", tag, form, 1, value) for tag, form, value in tags)
        path.write_bytes(b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + bytes(4) + strips)
    else:
        if kind == "tif, white is zero":
            save(path, Image.fromarray(65535 - GREY))
            path.write_bytes(
                path.read_bytes().replace(struct.pack("<HHLH", 262, 3, 1, 1), struct.pack("<HHLH", 262, 3, 1, 0))
            )
        elif kind == "tif, high bytes first":
            save(path, Image.frombytes("I;16B", (3, 2), GREY.astype(">u2").tobytes()))
        else:
            save(path, Image.fromarray(GREY))
    for pixels in (load_image(path), np.asarray(open_rgb(path))):
        assert np.abs(pixels[..., 0].astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("quality", [{"subsampling": 0}, {"subsampling": 2}])
def test_cmyk_of_photoshop_is_not_taken_for_its_negative(tmp_path: Path, quality) -> None:
    path = save(tmp_path / "a.jpg", Image.new("RGB", (16, 16), RED).convert("CMYK"), **quality)
    assert np.abs(load_image(path)[8, 8].astype(int) - RED).max() < 16
    stripped = path.read_bytes()
    comment = b"\xff\xfe" + struct.pack(">H", 9) + b"comment"
    path.write_bytes(stripped[:2] + comment + stripped[2:])
    assert np.abs(load_image(path)[8, 8].astype(int) - RED).max() < 16
    assert image_size(path) == (16, 16)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif", "mpo", "avif"])
def test_of_several_frames_the_first_is_read(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, "blue", "lime")]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert np.abs(load_image(path)[8, 8].astype(int) - RED).max() < 16
    assert image_size(path) == (16, 16)
