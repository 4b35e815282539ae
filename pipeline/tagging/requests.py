"""The images that ``mmcli predict`` is to tag: files, folders, and files of captions in JSON lines or CSV."""

import csv
import io
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ...cache.strict_json import parse_json
from ...errors import InputError, cannot_read, quoted, read_text
from ..core.files import SAFE_PATH, LinkedFolder, is_inside, resolve_image

# Formats of pictures; Pillow also opens films, icons, documents and arrays.
COMMON_FORMATS = {"BMP", "DIB", "GIF", "JPEG", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP"}
FORMATS = COMMON_FORMATS | {"AVIF", "HEIF", "JPEG2000", "JXL", "QOI"}
FORMS = 'JSON lines {"path": ..., "caption": ...}, or CSV with columns path and caption'
COLUMNS = ("path", "caption")
# What systems leave in folders of pictures, beside files whose names begin with a dot.
LEFT_BY_SYSTEMS = {"__MACOSX", "Thumbs.db", "ehthumbs.db", "desktop.ini", "@eaDir", "$RECYCLE.BIN"}
MOST_LISTED = 5  # names in a note


class Request(NamedTuple):
    """One image to tag, and its caption where it has one."""

    path: Path
    caption: str | None


def read_requests(
    images: Sequence[Path],
    caption: str | None,
    captions: Path | None,
    *,
    follow_links: bool = False,
    notes: list[str] | None = None,
) -> list[Request]:
    """Everything that is to be tagged, in order.

    Args:
        images: Files, or folders of images; none where the file of captions names them.
        caption: The caption of the one image.
        captions: JSON lines or CSV. Its paths are relative to a folder in ``images``, or to the file's own, and never
            leave it. Names in another Unicode form than the file's own name are matched where only one file fits.
        follow_links: Take images that the file of captions alone names and that are links out of its folder.
        notes: A line is added for every folder of which something is left out.

    Raises:
        InputError: Nothing to tag, a folder without images, or a wrong file of captions.
    """
    if caption is not None and captions is not None:
        raise InputError("two ways to give captions", got="--caption and --captions", wanted="one of them")
    if not images and captions is None:
        raise InputError(
            "nothing to tag",
            got="no image",
            wanted="IMAGE, a folder, or --captions FILE",
            do='as in mmcli predict photo.jpg --caption "a dog on a sofa"',
        )
    if caption is not None and not _is_utf8(caption):
        raise InputError("a caption that is not UTF-8", where="--caption", got=caption, wanted="text in UTF-8")
    files = [file for image in images for file in _files(image, captions, notes)]
    if caption is not None and len(files) != 1:
        raise InputError(
            "one caption for several images",
            where="--caption",
            got=f"{len(files):,} images",
            wanted="one",
            do="give --captions FILE",
        )
    if captions is None:
        return [Request(file, caption) for file in files]
    lines = CaptionFile(captions)
    if not images:
        return lines.requests(follow_links=follow_links)
    bases = [*(image for image in images if image.is_dir()), captions.parent]
    texts = lines.captions_of(files, bases)
    if all(text is None for text in texts):
        raise InputError(
            "captions of other images",
            where=captions,
            got=f"no line for {quoted(files[0], 90)}, but one for {quoted(lines.lines[0].path, 60)}",
            wanted="paths of the images that were named",
            do=f"write them as they are below {bases[0]}",
        )
    return [Request(file, text) for file, text in zip(files, texts, strict=True)]


def _files(image: Path, captions: Path | None, notes: list[str] | None) -> list[Path]:
    """The images in a folder by name; a file as it is."""
    try:
        if not image.is_dir():
            return [image]
        files, others = _contents(image, captions)
    except (OSError, ValueError) as error:  # a NUL in a path is a ValueError
        raise cannot_read("cannot look into a folder", image, error) from None
    shown = ", ".join(quoted(name, 60) for name in others[:MOST_LISTED])
    more = f" and {len(others) - MOST_LISTED:,} more" if len(others) > MOST_LISTED else ""
    left_out = f"left out of {quoted(image)}: {shown}{more}"
    if not files:
        raise InputError(
            "a folder without images",
            where=image,
            got=left_out if others else "none",
            wanted=f"files {', '.join(sorted(_suffixes()))}",
            do="name the folder or the files that hold the images",
        )
    if others and notes is not None:
        notes.append(left_out)
    return files


def _contents(folder: Path, captions: Path | None) -> tuple[list[Path], list[str]]:
    """The images of a folder, and the names of what may be expected to be tagged, but is not."""
    files: list[Path] = []
    others: list[str] = []
    for path in sorted(folder.iterdir()):
        is_image = path.suffix.lower() in _suffixes()
        if path.name.startswith("._") or path.name in LEFT_BY_SYSTEMS or (path.name.startswith(".") and not is_image):
            continue
        if path.is_dir():
            others.append(f"the folder {path.name}")
        elif is_image and not path.name.startswith(".") and (path.is_file() or not path.exists()):
            files.append(path)  # a link that leads nowhere is an image that cannot be read
        elif captions is None or _location(path) != _location(captions):
            others.append(path.name)
    return files, others


@cache
def _suffixes() -> frozenset[str]:
    """Suffixes, in lower case, of the pictures that Pillow reads here, with the plugins that it has."""
    Image.init()
    suffixes = Image.registered_extensions().items()
    return frozenset(s for s, kind in suffixes if kind in Image.OPEN and (kind in FORMATS or s == ".apng"))


def _location(file: Path) -> Path:
    """Where a file lies, a link not followed: two links to one blob are two images."""
    return file.parent.resolve() / file.name


class Line(NamedTuple):
    """A line of a file of captions: its number, a path, and the caption of the image there."""

    number: int
    path: str
    caption: str


class CaptionFile:
    """A file of captions.

    Args:
        file: JSON lines or, by its suffix, CSV.

    Attributes:
        lines: Its lines; there is at least one.

    Raises:
        InputError: It cannot be read, has no line, or a line is wrong.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._names: dict[Path, dict[str, list[str]]] = {}  # of listed folders: names by their composed Unicode form
        text = read_text(file, "cannot read captions", wanted=FORMS, do="check the path")
        rows = _csv_rows(text, file) if file.suffix.lower() == ".csv" else _json_rows(text, file)
        self.lines = [_checked_line(file, number, row) for number, row in rows]
        if not self.lines:
            raise InputError("no captions", where=file, got="an empty file", wanted=FORMS)

    def requests(self, *, follow_links: bool) -> list[Request]:
        """A request for every line, its path relative to the folder of the file."""
        root = LinkedFolder(self._file.parent) if follow_links else self._file.parent
        return [Request(self._resolved(root, line), line.caption) for line in self.lines]

    def captions_of(self, files: Sequence[Path], bases: Sequence[Path]) -> list[str | None]:
        """The caption of each file; a line's path is relative to the first of the bases that has such a file."""
        captions: dict[Path, str] = {}
        for line in self.lines:
            if not is_inside(line.path):
                where = f"{self._file}, line {line.number}"
                raise InputError(
                    "an image path leaves the data folder", where=where, got=repr(line.path), wanted=SAFE_PATH
                )
            places = [self._spelled(base, line) for base in bases]
            place = _location(next(filter(os.path.lexists, places), places[0]))
            if captions.setdefault(place, line.caption) != line.caption:
                where = f"{self._file}, line {line.number}"
                raise InputError("two captions of one image", where=where, got=line.path, wanted="one")
        return [captions.get(_location(file), captions.get(file.resolve())) for file in files]

    def _resolved(self, root: Path, line: Line) -> Path:
        try:
            path = self._spelled(root, line).relative_to(root).as_posix() if is_inside(line.path) else line.path
            return resolve_image(root, path)
        except InputError as error:
            raise InputError(f"{self._file}, line {line.number}: {error}") from None

    def _spelled(self, base: Path, line: Line) -> Path:
        """The file that a line means, below ``base``: named as it is written, or in another Unicode form."""
        if os.path.lexists(base / line.path) or line.path.isascii():
            return base / line.path
        place = base
        for part in Path(line.path).parts:
            alike = [part]
            if not (os.path.lexists(place / part) or part.isascii()):
                alike = self._composed_names(place).get(unicodedata.normalize("NFC", part), alike)
            if len(alike) > 1:
                raise InputError(
                    "several files whose names differ in their Unicode form alone",
                    where=f"{self._file}, line {line.number}",
                    got=", ".join(map(ascii, alike)),
                    wanted="the name as one of them has it",
                )
            place /= alike[0]
        return place

    def _composed_names(self, folder: Path) -> Mapping[str, list[str]]:
        """The names in a folder by their composed Unicode form."""
        if folder not in self._names:
            names = self._names[folder] = {}
            for file in sorted(folder.iterdir()) if os.access(folder, os.R_OK) and folder.is_dir() else ():
                names.setdefault(unicodedata.normalize("NFC", file.name), []).append(file.name)
        return self._names[folder]


def _checked_line(file: Path, number: int, row: object) -> Line:
    if not isinstance(row, dict):
        raise _wrong(file, number, type(row).__name__)
    path, caption = (row.get(name) for name in COLUMNS)
    if not (isinstance(path, str) and path.strip() and isinstance(caption, str)):
        raise _wrong(file, number, f"path {path!r:.90}, caption {caption!r:.90}")
    if not _is_utf8(caption):
        raise _wrong(file, number, f"a caption with half a surrogate pair: {caption!a}")
    try:
        os.fsencode(path)  # Python shows bytes of a name that are not UTF-8 as halves of surrogate pairs
    except UnicodeEncodeError:
        raise _wrong(file, number, f"a path with half a surrogate pair: {path!a}") from None
    return Line(number, path, caption)


def _is_utf8(text: str) -> bool:
    """Whether UTF-8 can hold a text; it cannot hold half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _csv_rows(text: str, file: Path) -> Iterator[tuple[int, object]]:
    limit = csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # the limit is of all readers
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows: list[tuple[int, dict[str | None, object]]] = []
        header = reader.fieldnames or COLUMNS
        if any(header.count(name) != 1 for name in COLUMNS):
            got = f"columns {', '.join(header)}"[:120]
            raise _wrong(file, 1, got, "begin the file with the line path,caption")
        rows += ((reader.line_num, dict(row)) for row in reader)
    except csv.Error as error:
        raise _wrong(file, reader.line_num, str(error)) from None
    finally:
        csv.field_size_limit(limit)
    for number, row in rows:
        if None in row:  # where DictReader puts the fields beyond the last column
            got = f"more than {len(header)} fields"
            raise _wrong(file, number, got, "put a caption with a comma into quotes")
        yield number, row


def _json_rows(text: str, file: Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                raise _wrong(file, number, f"text that is not JSON ({error})") from None


def _wrong(file: Path, number: int, got: str, do: str = "mend the line") -> InputError:
    return InputError("bad captions", where=f"{file}, line {number}", got=got, wanted=FORMS, do=do)
