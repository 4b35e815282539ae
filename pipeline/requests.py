"""What ``mmcli predict`` is asked: images and captions, from the command line, a folder, or a file of captions."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .. import InputError
from ..cache.strict_json import parse_json
from .safe_paths import resolve_image

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
FORMS = 'JSON lines {"path": ..., "caption": ...}, or CSV with columns path and caption'


class Request(NamedTuple):
    """One image to tag, and its caption where there is one."""

    path: Path
    caption: str | None


class _Line(NamedTuple):
    number: int
    path: str
    caption: str


def gather(images: Sequence[Path], caption: str | None, captions: Path | None) -> list[Request]:
    """Everything that is to be tagged, in order.

    Args:
        images: Files, or folders of images; none where the file of captions names them.
        caption: Of the one image.
        captions: JSON lines or CSV. Its paths are relative to a folder that was given, or to the file's own, and never
            leave it.

    Raises:
        InputError: Nothing to tag, a folder without images, or a wrong file of captions.
    """
    if caption is not None and captions is not None:
        raise InputError("two ways to give captions", got="--caption and --captions", wanted="one of them")
    if not images and captions is None:
        raise InputError(
            "nothing to tag", got="no image", wanted="IMAGE, a folder, or --captions FILE",
            do='as in mmcli predict photo.jpg --caption "a dog on a sofa"',
        )  # fmt: skip
    files = [file for image in images for file in _files(image)]
    if caption is not None and len(files) != 1:
        raise InputError(
            "one caption for several images", where="--caption", got=f"{len(files):,} images", wanted="one",
            do="give --captions FILE",
        )  # fmt: skip
    if captions is None:
        return [Request(file, caption) for file in files]
    lines = list(_lines(captions))
    if not images:
        return [Request(_place(captions.parent, line, captions), line.caption) for line in lines]
    bases = [*(image for image in images if image.is_dir()), captions.parent]
    known = _by_file(lines, bases, captions)
    if files and not any(file.resolve() in known for file in files):
        raise InputError(
            "captions of other images", where=captions, got=f"no line for {files[0]}, but one for {lines[0].path}",
            wanted="paths of the images that were named", do=f"write them as they are below {bases[0]}",
        )  # fmt: skip
    return [Request(file, known.get(file.resolve())) for file in files]


def _files(image: Path) -> list[Path]:
    """A file as it is, a folder as the images in it, by name."""
    if not image.is_dir():
        return [image]
    found = sorted(path for path in image.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise InputError(
            "a folder without images", where=image, got="none", wanted=f"files {', '.join(sorted(SUFFIXES))}"
        )
    return found


def _by_file(lines: Sequence[_Line], bases: Sequence[Path], captions: Path) -> Mapping[Path, str]:
    """The caption of every file that a line may mean; below the first folder that has such a file."""
    known: dict[Path, str] = {}
    for line in lines:
        places = [_place(base, line, captions) for base in bases]
        file = next((place for place in places if place.exists()), places[0]).resolve()
        if known.setdefault(file, line.caption) != line.caption:
            raise InputError(
                "two captions of one image", where=f"{captions}, line {line.number}", got=line.path, wanted="one"
            )
    return known


def _place(base: Path, line: _Line, captions: Path) -> Path:
    try:
        return resolve_image(base, line.path)
    except InputError as error:
        raise InputError(f"{captions}, line {line.number}: {error}") from None


def _lines(captions: Path) -> Iterator[_Line]:
    try:
        text = captions.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        got = getattr(error, "strerror", None) or "text that is not UTF-8"
        raise InputError("cannot read captions", where=captions, got=got, wanted=FORMS, do="check the path") from None
    found = _csv(text, captions) if captions.suffix.lower() == ".csv" else _json_lines(text, captions)
    count = 0
    for count, (number, row) in enumerate(found, 1):  # noqa: B007 - says whether there was any
        path, caption = (row.get(name) if isinstance(row, dict) else None for name in ("path", "caption"))
        if not (isinstance(path, str) and path.strip() and isinstance(caption, str)):
            got = f"path {path!r}, caption {caption!r}"[:120] if isinstance(row, dict) else type(row).__name__
            raise _wrong(captions, number, got)
        yield _Line(number, path, caption)
    if not count:
        raise InputError("no captions", where=captions, got="an empty file", wanted=FORMS)


def _csv(text: str, captions: Path) -> Iterator[tuple[int, object]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if reader.fieldnames is not None and not {"path", "caption"} <= set(reader.fieldnames):
            got = f"columns {', '.join(reader.fieldnames)}"[:120]
            raise _wrong(captions, 1, got, "begin the file with the line path,caption")
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise _wrong(captions, reader.line_num, str(error)) from None


def _json_lines(text: str, captions: Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                raise _wrong(captions, number, f"text that is not JSON ({error})") from None


def _wrong(captions: Path, number: int, got: str, do: str = "mend the line") -> InputError:
    return InputError("bad captions", where=f"{captions}, line {number}", got=got, wanted=FORMS, do=do)
