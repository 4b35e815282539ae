"""What a picture's metadata hold never decides whether its pixels are read, nor what they are."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from mmcli.pipeline.extraction.images import (
    TURNS,
    PatchSpec,
    UnreadableImage,
    image_size,
    load_image,
    open_rgb,
    read_patches,
)

# Three colours in the corners, so that every orientation gives another picture; large blocks, so that JPEG keeps them.
PIXELS = np.zeros((32, 64, 3), np.uint8)
PIXELS[:16, :16], PIXELS[:16, 48:], PIXELS[16:, :16] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
PICTURE = Image.fromarray(PIXELS)


def shorts(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}H", *values)


def longs(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}L", *values)


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of one directory; an entry is tag, type, count and its value or, where longer than four bytes, what it is."""
    head, extra, place = struct.pack("<H", len(entries)), b"", 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, data in sorted(entries):
        here = data.ljust(4, b"\0") if len(data) <= 4 else longs(place + len(extra))
        head += struct.pack("<HHL", tag, kind, count) + here
        extra += data if len(data) > 4 else b""
    return b"II*\0" + longs(8) + head + longs(0) + extra


def turn(value: int) -> tuple[int, int, int, bytes]:
    return (0x0112, 3, 1, shorts(value))


def upright(orientation: int) -> np.ndarray:
    method = TURNS.get(orientation)
    return PIXELS if method is None else np.asarray(PICTURE.transpose(method))


def check(path: Path, orientation: int = 1, tolerance: int = 12) -> None:
    """Every way to read the picture gives its upright pixels, with no warning."""
    wanted = upright(orientation).astype(int)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert image_size(path) == wanted.shape[:2]
        for pixels in (np.asarray(open_rgb(path)), load_image(path)):
            assert pixels.shape == wanted.shape
            assert np.abs(pixels.astype(int) - wanted)[4:-4, 4:-4].mean() < tolerance
    assert [str(item.message) for item in caught] == []


def jpeg(*segments: bytes, **options: object) -> bytes:
    """The picture as JPEG with further segments behind its first."""
    stream = io.BytesIO()
    PICTURE.save(stream, "JPEG", quality=95, **options)
    return stream.getvalue()[:2] + b"".join(segments) + stream.getvalue()[2:]


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def png(*chunks: bytes, behind: bool = False) -> bytes:
    stream = io.BytesIO()
    PICTURE.save(stream, "PNG")
    whole = stream.getvalue()
    place = len(whole) - 12 if behind else 33  # before IEND, or behind IHDR
    return whole[:place] + b"".join(chunks) + whole[place:]


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    return (
        struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data) if crc is None else crc)
    )


ODD_EXIF = {
    "software rational": (305, 5, 1, longs(9, 1)),
    "software float": (305, 11, 1, struct.pack("<f", 1.5)),
    "maker rational": (0x010F, 5, 1, longs(7, 1)),
    "resolution text": (282, 2, 4, b"72\0\0"),
    "resolution bytes": (282, 7, 4, b"abcd"),
    "resolution of two": (282, 5, 2, longs(72, 1, 72, 1)),
    "resolution by zero": (282, 5, 1, longs(72, 0)),
    "resolution not a number": (282, 12, 1, struct.pack("<d", float("nan"))),
    "unit text": (296, 2, 2, b"2\0"),
    "unit too large": (296, 4, 1, longs(70_000)),
    "pointer behind the end": (0x8769, 4, 1, longs(99_999)),
    "pointer to itself": (0x8769, 4, 1, longs(8)),
    "pointer text": (0x8825, 2, 4, b"abc\0"),
    "count behind the end": (0x010F, 2, 0xFFFFFFF0, longs(8)),
    "unknown type": (0x010F, 99, 1, longs(8)),
    "half a date": (306, 2, 20, b"2029:\xff\xfe\xfd".ljust(20, b"\0")),
}


@pytest.mark.parametrize("entry", ODD_EXIF.values(), ids=ODD_EXIF)
@pytest.mark.parametrize("orientation", [1, 6])
def test_odd_exif_of_a_jpeg_does_not_matter(tmp_path: Path, entry, orientation: int) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(segment(0xE1, b"Exif\0\0" + exif(turn(orientation), entry))))
    check(path, orientation)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
def test_every_orientation_of_every_format(tmp_path: Path, suffix: str, orientation: int) -> None:
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path, info = tmp_path / f"a.{suffix}", Image.Exif()
    info[0x0112] = orientation
    PICTURE.save(path, exif=info, **({"quality": 95} if suffix in {"jpg", "avif"} else {}))
    check(path, orientation)


ODD_ORIENTATION = {
    "zero": turn(0),
    "nine": turn(9),
    "huge": (0x0112, 4, 1, longs(2**32 - 1)),
    "text": (0x0112, 2, 2, b"6\0"),
    "bytes": (0x0112, 7, 1, b"\x06"),
    "not a number": (0x0112, 12, 1, struct.pack("<d", float("nan"))),
    "none": (0x0112, 3, 0, b""),
}


@pytest.mark.parametrize("entry", ODD_ORIENTATION.values(), ids=ODD_ORIENTATION)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_an_orientation_that_is_none_leaves_the_picture_as_it_is(tmp_path: Path, entry, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    PICTURE.save(path, "WEBP", lossless=True, exif=exif(entry))
    if suffix == "tif":
        path.write_bytes(tiff(entry))
    elif suffix == "jpg":
        path.write_bytes(jpeg(segment(0xE1, b"Exif\0\0" + exif(entry))))
    elif suffix == "png":
        path.write_bytes(png(chunk(b"eXIf", exif(entry))))
    check(path)


@pytest.mark.parametrize(
    "data",
    [b"", b"II", b"II*\0", b"II*\0\xff\xff\xff\xff", b"nonsense" * 9, exif(turn(6))[:15], exif(turn(1))[:-3]],
    ids=["nothing", "two bytes", "no directory", "directory behind the end", "nonsense", "half an entry", "cut"],
)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_that_is_none_does_not_matter(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "jpg":
        path.write_bytes(jpeg(segment(0xE1, b"Exif\0\0" + data)))
    elif suffix == "png":
        path.write_bytes(png(chunk(b"eXIf", data)))
    else:
        PICTURE.save(path, exif=data or b"x", lossless=True)
    check(path)


ODD_SEGMENTS = {
    "two of exif": segment(0xE1, b"Exif\0\0" + exif(turn(1))) + segment(0xE1, b"Exif\0\0" + exif(turn(6))),
    "xmp that is no text": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"\xff\xfe" * 50),
    "profile in a thousand parts": segment(0xE2, b"ICC_PROFILE\0\xff\xff" + b"x" * 50),
    "profile of nothing": segment(0xE2, b"ICC_PROFILE\0"),
    "other images that are not there": segment(
        0xE2, b"MPF\0" + exif((0xB001, 4, 1, longs(2)), (0xB002, 7, 32, b"\xff" * 32))
    ),
    "other images that are none": segment(0xE2, b"MPF\0MM\0*\0\0\0\xff"),
    "other images, their number text": segment(0xE2, b"MPF\0" + exif((0xB001, 2, 4, b"abc\0"))),
    "photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\xff\xff"),
    "comment": segment(0xFE, b"\xff\xfe\0" * 9),
    "comments of a megabyte": segment(0xFE, b"x" * 65_000) * 16,
}


@pytest.mark.parametrize("segments", ODD_SEGMENTS.values(), ids=ODD_SEGMENTS)
def test_odd_segments_of_a_jpeg_do_not_matter(tmp_path: Path, segments: bytes) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(segments))
    check(path)


@pytest.mark.parametrize("length", [5, 8, 11, 13])
def test_a_jfif_header_that_is_cut_short_does_not_matter(tmp_path: Path, length: int) -> None:
    path, whole = tmp_path / "a.jpg", jpeg()
    assert whole[2:11] == b"\xff\xe0\x00\x10JFIF\0"
    path.write_bytes(whole[:2] + segment(0xE0, whole[6 : 6 + length]) + whole[20:])
    check(path)


def packed(n_bytes: int) -> bytes:
    return zlib.compress(bytes(n_bytes))


ODD_CHUNKS: dict[str, Callable[[], bytes]] = {
    "large profile": lambda: chunk(b"iCCP", b"big\0\0" + packed(2_000_000)),
    "profile that is none": lambda: chunk(b"iCCP", b"big\0\0" + b"not packed"),
    "profile of another method": lambda: chunk(b"iCCP", b"big\0\x07" + packed(9)),
    "large packed text": lambda: chunk(b"zTXt", b"workflow\0\0" + packed(2_000_000)),
    "packed text of another method": lambda: chunk(b"zTXt", b"workflow\0\x07" + packed(9)),
    "packed text that is none": lambda: chunk(b"zTXt", b"workflow\0\0" + b"\xff" * 99),
    "large text of unicode": lambda: chunk(b"iTXt", b"workflow\0\1\0\0\0" + packed(2_000_000)),
    "text of unicode, cut": lambda: chunk(b"iTXt", b"workflow"),
    "many texts": lambda: chunk(b"zTXt", b"workflow\0\0" + packed(1_000_000)) * 70,
    "text with another checksum": lambda: chunk(b"tEXt", b"key\0value", crc=1),
    "date of two bytes": lambda: chunk(b"tIME", b"ab"),
    "density of one byte": lambda: chunk(b"pHYs", b"a"),
    "colours of one byte": lambda: chunk(b"cHRM", b"a"),
    "gamma of one byte": lambda: chunk(b"gAMA", b"a"),
    "intent of nothing": lambda: chunk(b"sRGB", b""),
    "animation of no frames": lambda: chunk(b"acTL", bytes(8)),
    "animation of one byte": lambda: chunk(b"acTL", b"a"),
    "somebody's own": lambda: chunk(b"prVt", b"\xff" * 9),
}


@pytest.mark.parametrize("make", ODD_CHUNKS.values(), ids=ODD_CHUNKS)
@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
def test_odd_chunks_of_a_png_do_not_matter(tmp_path: Path, make, behind: bool) -> None:
    for orientation in (1, 6):
        path = tmp_path / f"{orientation}.png"
        path.write_bytes(png(make(), chunk(b"eXIf", exif(turn(orientation))), behind=behind))
        check(path, orientation)


@pytest.mark.parametrize("more", [b"\n", b"1234567", b"12345678", b"text" * 9], ids=len)
def test_bytes_behind_the_end_of_a_png_do_not_matter(tmp_path: Path, more: bytes) -> None:
    (tmp_path / "a.png").write_bytes(png(ODD_CHUNKS["large packed text"]()) + more)
    check(tmp_path / "a.png")


def tiff(*entries: tuple[int, int, int, bytes]) -> bytes:
    """The picture as a plain TIFF with further entries."""
    shape = [
        (256, 3, 1, shorts(64)),
        (257, 3, 1, shorts(32)),
        (258, 3, 3, shorts(8, 8, 8)),
        (259, 3, 1, shorts(1)),
        (262, 3, 1, shorts(2)),
        (277, 3, 1, shorts(3)),
        (278, 3, 1, shorts(32)),
    ]
    strip = [(279, 4, 1, longs(PIXELS.size)), (273, 4, 1, longs(0))]
    start = len(exif(*shape, *strip, *entries))
    strip[1] = (273, 4, 1, longs(start))
    return exif(*shape, *strip, *entries) + PIXELS.tobytes()


ODD_TAGS = {
    **ODD_EXIF,
    "xmp text": (700, 2, 8, b"<x>abc</"),
    "xmp number": (700, 3, 1, shorts(7)),
    "xmp with another orientation": (700, 1, 20, b'tiff:Orientation="8"'),
    "profile number": (34675, 3, 1, shorts(7)),
    "iptc number": (33723, 3, 1, shorts(7)),
}


@pytest.mark.parametrize("entry", ODD_TAGS.values(), ids=ODD_TAGS)
@pytest.mark.parametrize("unit", [2, 3])
def test_odd_tags_of_a_tiff_do_not_matter(tmp_path: Path, entry, unit: int) -> None:
    for orientation in (1, 6):
        path = tmp_path / f"{orientation}.tif"
        more = [] if entry[0] == 296 else [(296, 3, 1, shorts(unit)), (283, 5, 1, longs(72, 1))]
        path.write_bytes(tiff(turn(orientation), entry, *more))
        check(path, orientation, tolerance=1)


@pytest.mark.parametrize("kind", [b"EXIF", b"XMP ", b"ICCP"])
def test_odd_chunks_of_a_webp_do_not_matter(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.webp"
    PICTURE.save(path, lossless=True, exif=exif(turn(6)), xmp=b"<x/>", icc_profile=b"profile")
    whole = bytearray(path.read_bytes())
    place = whole.index(kind)
    (length,) = struct.unpack_from("<L", whole, place + 4)
    whole[place + 8 : place + 8 + length] = b"\xff" * length
    path.write_bytes(whole)
    check(path, 1 if kind == b"EXIF" else 6, tolerance=1)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
@pytest.mark.parametrize("entry", [*ODD_EXIF.values(), turn(1)], ids=[*ODD_EXIF, "another orientation"])
def test_odd_exif_of_an_avif_does_not_matter(tmp_path: Path, entry) -> None:
    """The container says how the picture is turned."""
    path, filler = tmp_path / "a.avif", b"?" * 99
    PICTURE.save(path, quality=95, exif=exif(turn(6), (0x010F, 7, len(filler), filler)))
    data = path.read_bytes()
    start, stop = data.index(b"II*\0"), data.index(filler) + len(filler)
    path.write_bytes(data[:start] + exif(entry).ljust(stop - start, b"\0") + data[stop:])
    check(path, 6)


def test_metadata_of_damaged_pixels_do_not_save_them(tmp_path: Path) -> None:
    """Without metadata the picture is tried once more, and is as damaged as before."""
    files = {
        "a.jpg": jpeg(segment(0xE1, b"Exif\0\0" + exif(turn(6), ODD_EXIF["software rational"])))[:-400],
        "a.png": png(ODD_CHUNKS["large packed text"]())[:-60],
        "b.png": png(ODD_CHUNKS["large packed text"]()).replace(b"IDAT", b"IDAT\0", 1),
        "a.tif": tiff(turn(6), ODD_TAGS["xmp text"])[:-400],
    }
    for name, data in files.items():
        path = tmp_path / name
        path.write_bytes(data)
        for read in (open_rgb, load_image):
            with pytest.raises(UnreadableImage, match=f"{name}: got a .*; replace the file"):
                read(path)


@pytest.mark.parametrize("resizer", ["pillow", "torch"])
def test_both_resizers_turn_and_read_the_same(tmp_path: Path, resizer) -> None:
    spec = PatchSpec(side=16, budget=8, fixed=None, resample=2, resizer=resizer)
    patches = []
    for name, data in {
        "odd.jpg": jpeg(segment(0xE1, b"Exif\0\0" + exif(turn(6), ODD_EXIF["maker rational"]))),
        "plain.jpg": jpeg(segment(0xE1, b"Exif\0\0" + exif(turn(6)))),
    }.items():
        (tmp_path / name).write_bytes(data)
        grid = spec.grid(*image_size(tmp_path / name))
        assert (grid.rows, grid.columns) == (4, 2)
        out = np.empty((grid.tokens, spec.width), np.uint8)
        read_patches(tmp_path / name, grid, spec, out)
        patches.append(out)
    assert np.array_equal(*patches)
