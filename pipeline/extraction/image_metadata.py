"""Metadata of image files: the orientation is read, and files whose other metadata Pillow refuses are stripped of it.

Cameras, phones and editors write metadata that break the rules of their formats, or too much of them, and Pillow
refuses some files for it. Here such a file loses its metadata, in memory, and keeps what the pixels need.
"""

import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import ExifTags, Image

from ..core.archives import open_binary

ORIENTATION = ExifTags.Base.Orientation
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What a decoder of pixels reads of a PNG; every other chunk is metadata or animation.
PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
# JPEG: start of scan, JFIF's own segment, the one that names the colours, and the first of each range of others.
SCAN, JFIF, ADOBE, APPLICATION, COMMENT = 0xDA, 0xE0, 0xEE, range(0xE0, 0xF0), 0xFE
JFIF_BYTES = 18  # of the whole segment, without a thumbnail
# TIFF: description, maker, model, resolutions, page, software, date, artist and host.
TIFF_TEXTS = {*range(269, 273), 282, 283, *range(285, 288), 296, 297, 305, 306, 315, 316}
# TIFF: XMP, copyright, IPTC, Photoshop, EXIF, ICC, GPS and interoperability.
TIFF_METADATA = TIFF_TEXTS | {700, 33432, 33723, 34377, 34665, 34675, 34853, 40965}
# An entry of no meaning: one byte under the last of the numbers that are free for private use.
TIFF_NOTHING = (65535, 1, 1, 0)
WEBP_METADATA, WEBP_FLAGS = {b"EXIF", b"XMP ", b"ICCP"}, 0x20 | 0x08 | 0x04
# AVIF: the entry of the list of items that says that one is EXIF, in the form of item numbers of 16 and of 32 bits.
AVIF_EXIF = re.compile(rb"(infe\x02.{3}.{2}.{2}|infe\x03.{3}.{4}.{2})Exif", re.DOTALL)


def read_orientation(getexif: Callable[[], Image.Exif]) -> int:
    """The orientation, 1 to 8; 1, which is upright, where there is none or none that can be read.

    Args:
        getexif: Gives the EXIF; what it raises is EXIF that cannot be read.
    """
    try:
        value = getexif().get(ORIENTATION, 1)
        return int(value) if value in range(1, 9) else 1
    except Exception:  # noqa: BLE001 - Pillow's parser raises whatever the damage leads to
        return 1


def limit_to_orientation(image: Image.Image) -> None:
    """Leave no EXIF to an opened TIFF but its orientation, by which Pillow turns it as it loads it.

    Args:
        image: A TIFF that was opened and not loaded.
    """
    tags: dict[int, object] = getattr(image, "tag_v2")  # noqa: B009 - of TIFFs alone
    for name in ("xmp", "exif"):
        image.info.pop(name, None)
    read_orientation(image.getexif)  # what this trips over is not met again: the EXIF counts as read
    exif, value = image.getexif(), tags.get(ORIENTATION)
    for tag in list(exif):
        del exif[tag]
    if value in range(1, 9):
        exif[ORIENTATION] = value


def strip_metadata(path: Path) -> tuple[bytes, int | None] | None:
    """An image file without its metadata, for a decoder that stumbled over them.

    Args:
        path: The file.

    Returns:
        The file's bytes without metadata, and the orientation that the metadata gave, which is None where the bytes
        still say it; None for a file of another format, or one that is damaged.

    Raises:
        OSError: The file cannot be read.
    """
    with open_binary(path) as stream:
        head = stream.read(16)
        strip = _stripper(head)
        if strip is None:
            return None
        data = head + stream.read()
    try:
        return strip(data)
    except (struct.error, IndexError):  # it ends too early
        return None


Stripped = tuple[bytes, int | None]


def _stripper(head: bytes) -> Callable[[bytes], Stripped] | None:
    if head.startswith(b"\xff\xd8\xff"):
        return _strip_jpeg
    if head.startswith(PNG_SIGNATURE):
        return _strip_png
    if head.startswith((b"II*\0", b"MM\0*")):
        return _strip_tiff
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _strip_webp
    return _strip_avif if head[4:12] in {b"ftypavif", b"ftypavis"} else None


def _orientation_of(exif: bytes) -> int:
    parsed = Image.Exif()

    def load() -> Image.Exif:
        parsed.load(exif)
        return parsed

    return read_orientation(load) if exif else 1


def _strip_jpeg(data: bytes) -> Stripped:
    kept, start, exif = [data[:2]], 2, b""
    while data[start] == 0xFF:
        marker = data[start + 1]
        if marker == SCAN:
            break
        if marker == 0xFF:  # a fill byte
            start += 1
            continue
        stop = start + 2 + struct.unpack_from(">H", data, start + 2)[0]
        segment = data[start:stop]
        # Pillow trips over a JFIF header that was cut short, which decoders of pixels pass over.
        is_cut = marker == JFIF and segment[4:8] == b"JFIF" and len(segment) < JFIF_BYTES
        if is_cut or marker == COMMENT or (marker in APPLICATION and marker not in {JFIF, ADOBE}):
            if not exif and segment[4:10] == b"Exif\0\0":
                exif = segment[10:]
        else:
            kept.append(segment)
        start = stop
    return b"".join([*kept, data[start:]]), _orientation_of(exif)


def _strip_png(data: bytes) -> Stripped:
    kept, start, exif, kind = [PNG_SIGNATURE], len(PNG_SIGNATURE), b"", b""
    while kind != b"IEND" and start < len(data):  # what stands behind that chunk is not part of the image
        length, kind = struct.unpack_from(">L4s", data, start)
        stop = start + 12 + length
        if kind in PNG_PIXELS:
            kept.append(data[start:stop])
        elif kind == b"eXIf" and zlib.crc32(data[start + 4 : stop - 4]) == struct.unpack_from(">L", data, stop - 4)[0]:
            exif = data[start + 8 : stop - 4]
        start = stop
    return b"".join(kept), _orientation_of(exif)


def _strip_tiff(data: bytes) -> Stripped:
    order = "<" if data[:2] == b"II" else ">"
    kept = bytearray(data)
    (start,) = struct.unpack_from(f"{order}L", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack_from(f"{order}H", data, entry)[0] in TIFF_METADATA:
            struct.pack_into(f"{order}HHLL", kept, entry, *TIFF_NOTHING)
    return bytes(kept), None


def _strip_webp(data: bytes) -> Stripped:
    kept, start, exif = [], 12, b""
    while start + 8 <= len(data):
        kind, length = struct.unpack_from("<4sL", data, start)
        stop = start + 8 + length + length % 2
        chunk = data[start:stop]
        if kind == b"VP8X":
            chunk = chunk[:8] + bytes([chunk[8] & ~WEBP_FLAGS]) + chunk[9:]
        if kind not in WEBP_METADATA:
            kept.append(chunk)
        elif kind == b"EXIF":
            exif = chunk[8:]
        start = stop
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<L", len(body)) + body, _orientation_of(exif)


def _strip_avif(data: bytes) -> Stripped:
    # The container itself says how the picture is turned, and EXIF does not count.
    return AVIF_EXIF.sub(rb"\1none", data), None
