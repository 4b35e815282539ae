"""Tag images and say why; by :class:`~mmcli.pipeline.tagging.tagger.Tagger`, as anybody may from Python."""

import csv
import io
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image
from rich.console import RenderableType

from ...cache.strict_json import parse_json
from ...errors import InputError, cannot_read, quoted, read_text
from ..core.files import SAFE_PATH, LinkedFolder, is_inside, resolve_image
from ..core.progress import Progress
from .encode import BATCH
from .explain import PANELS, SHOWN_VOTERS, check_panel, draw, show
from .tagger import Tagger
from .voting import Tagging

# Formats of pictures; Pillow also opens films, icons, documents and arrays.
FORMATS = {
    "AVIF",
    "BMP",
    "DIB",
    "GIF",
    "HEIF",
    "JPEG",
    "JPEG2000",
    "JXL",
    "MPO",
    "PNG",
    "PPM",
    "QOI",
    "TGA",
    "TIFF",
    "WEBP",
}
FORMS = 'JSON lines {"path": ..., "caption": ...}, or CSV with columns path and caption'
# What systems leave in folders of pictures, beside files whose names begin with a dot.
LEFT_BY_SYSTEMS = {"__MACOSX", "Thumbs.db", "ehthumbs.db", "desktop.ini", "@eaDir", "$RECYCLE.BIN"}
MOST_LISTED = 5  # names in a note

_Names = dict[Path, dict[str, list[str]]]  # of folders that were listed: names by their composed Unicode form


class Request(NamedTuple):
    """One image to tag, and its caption where there is one."""

    path: Path
    caption: str | None


class _Line(NamedTuple):
    number: int
    path: str
    caption: str


class _Contents(NamedTuple):
    """What a folder holds: its images, by name, and the names of what a person may expect to be tagged, but is not."""

    images: list[Path]
    others: list[str]


def gather(
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
        caption: Of the one image.
        captions: JSON lines or CSV. Its paths are relative to a folder that was given, or to the file's own, and never
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
    if caption is not None and not _is_unicode(caption):
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
    lines = list(_lines(captions))
    if not images:
        root = LinkedFolder(captions.parent) if follow_links else captions.parent
        names: _Names = {}
        return [Request(_place(root, line, captions, names), line.caption) for line in lines]
    bases = [*(image for image in images if image.is_dir()), captions.parent]
    captions_by_file = _by_file(lines, bases, captions)
    texts = [captions_by_file.get(_location(file), captions_by_file.get(file.resolve())) for file in files]
    if all(text is None for text in texts):
        raise InputError(
            "captions of other images",
            where=captions,
            got=f"no line for {quoted(files[0], 90)}, but one for {quoted(lines[0].path, 60)}",
            wanted="paths of the images that were named",
            do=f"write them as they are below {bases[0]}",
        )
    return [Request(file, text) for file, text in zip(files, texts, strict=True)]


def _files(image: Path, captions: Path | None, notes: list[str] | None) -> list[Path]:
    """A file as it is, a folder as the images in it, by name."""
    try:
        if not image.is_dir():
            return [image]
        contents = _contents(image, captions)
    except (OSError, ValueError) as error:  # a NUL in a path is a ValueError
        raise cannot_read("cannot look into a folder", image, error) from None
    left = f"left out of {quoted(image)}: {_listed(contents.others)}" if contents.others else None
    if not contents.images:
        raise InputError(
            "a folder without images",
            where=image,
            got=left or "none",
            wanted=f"files {', '.join(sorted(_suffixes()))}",
            do="name the folder or the files that hold the images",
        )
    if left is not None and notes is not None:
        notes.append(left)
    return contents.images


def _contents(folder: Path, captions: Path | None) -> _Contents:
    contents = _Contents([], [])
    mine = None if captions is None else _location(captions)
    for path in sorted(folder.iterdir()):
        is_image = path.suffix.lower() in _suffixes()
        if path.name.startswith("._") or path.name in LEFT_BY_SYSTEMS or (path.name.startswith(".") and not is_image):
            continue
        if path.is_dir():
            contents.others.append(f"the folder {path.name}")
        elif is_image and not path.name.startswith(".") and (path.is_file() or not path.exists()):
            contents.images.append(path)  # a link that leads nowhere is an image that cannot be read
        elif mine is None or _location(path) != mine:
            contents.others.append(path.name)
    return contents


@cache
def _suffixes() -> frozenset[str]:
    """Suffixes, in lower case, of the pictures that Pillow reads here, with the plugins that it has."""
    Image.init()
    return frozenset(
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and (kind in FORMATS or suffix == ".apng")
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(quoted(name, 60) for name in names[:MOST_LISTED])
    return shown if len(names) <= MOST_LISTED else f"{shown} and {len(names) - MOST_LISTED:,} more"


def _location(file: Path) -> Path:
    """A file's own place, not followed: two links to one blob are two images."""
    return file.parent.resolve() / file.name


def _by_file(lines: Sequence[_Line], bases: Sequence[Path], captions: Path) -> Mapping[Path, str]:
    """The caption of every file that a line may mean; below the first folder that has such a file."""
    captions_by_file: dict[Path, str] = {}
    names: _Names = {}
    for line in lines:
        if not is_inside(line.path):
            raise InputError(
                "an image path leaves the data folder",
                where=f"{captions}, line {line.number}",
                got=repr(line.path),
                wanted=SAFE_PATH,
            )
        places = [_spelled(base, line, captions, names) for base in bases]
        place = next((place for place in places if os.path.lexists(place)), places[0])
        if captions_by_file.setdefault(_location(place), line.caption) != line.caption:
            raise InputError(
                "two captions of one image", where=f"{captions}, line {line.number}", got=line.path, wanted="one"
            )
    return captions_by_file


def _spelled(base: Path, line: _Line, captions: Path, names: _Names) -> Path:
    """The file that a line means, under the name it has: as it is written, or in another Unicode form.

    Args:
        base: The folder that the line's path is relative to.
        line: The line.
        captions: The file of captions, for the error.
        names: Folders that were listed before: names by their composed form.

    Raises:
        InputError: Several names differ from the line's in their Unicode form alone.
    """
    place = base / line.path
    if os.path.lexists(place) or line.path.isascii():
        return place
    place = base
    for part in Path(line.path).parts:
        if os.path.lexists(place / part) or part.isascii():
            place /= part
            continue
        if place not in names:
            names[place] = {}
            for file in sorted(place.iterdir()) if os.access(place, os.R_OK) and place.is_dir() else ():
                names[place].setdefault(unicodedata.normalize("NFC", file.name), []).append(file.name)
        alike = names[place].get(unicodedata.normalize("NFC", part), [part])
        if len(alike) > 1:
            raise InputError(
                "several files whose names differ in their Unicode form alone",
                where=f"{captions}, line {line.number}",
                got=", ".join(map(ascii, alike)),
                wanted="the name as one of them has it",
            )
        place /= alike[0]
    return place


def _place(base: Path, line: _Line, captions: Path, names: _Names) -> Path:
    try:
        if is_inside(line.path):
            path = _spelled(base, line, captions, names)
            return resolve_image(base, path.relative_to(base).as_posix())
        return resolve_image(base, line.path)
    except InputError as error:
        raise InputError(f"{captions}, line {line.number}: {error}") from None


def _lines(captions: Path) -> Iterator[_Line]:
    text = read_text(captions, "cannot read captions", wanted=FORMS, do="check the path")
    rows = _csv(text, captions) if captions.suffix.lower() == ".csv" else _json_lines(text, captions)
    count = 0
    for count, (number, row) in enumerate(rows, 1):  # noqa: B007 - says whether there was any
        path, caption = (row.get(name) if isinstance(row, dict) else None for name in ("path", "caption"))
        if not (isinstance(path, str) and path.strip() and isinstance(caption, str)):
            got = f"path {path!r:.90}, caption {caption!r:.90}" if isinstance(row, dict) else type(row).__name__
            raise _wrong(captions, number, got)
        if not _is_unicode(caption):
            raise _wrong(captions, number, f"a caption with half a surrogate pair: {caption!a}")
        if not _is_name(path):
            raise _wrong(captions, number, f"a path with half a surrogate pair: {path!a}")
        yield _Line(number, path, caption)
    if not count:
        raise InputError("no captions", where=captions, got="an empty file", wanted=FORMS)


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold a text: half a surrogate pair it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_name(text: str) -> bool:
    """Whether a file can have a name; Python shows bytes that are not UTF-8 as halves of surrogate pairs."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


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


@dataclass(frozen=True, kw_only=True)
class PredictResult:
    """Images with their tags.

    Attributes:
        tagger: What tagged them.
        index: The index file, where one was named.
        k: Neighbours that voted.
        images: A tagging an image that could be read.
        skipped: Why the others could not.
        voters: Neighbours shown a tag.
        panel: The picture that was drawn.
        notes: What a person should know.
    """

    tagger: Tagger
    index: Path | None
    k: int
    images: tuple[Tagging, ...]
    skipped: tuple[str, ...]
    voters: int
    panel: Path | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """One JSON object; ``category_names`` is the order of every ``scores``."""
        voters = self.tagger.voters
        return {
            "run": str(self.tagger.run.folder),
            "index": None if self.index is None else str(self.index),
            "n_index": len(voters.index),
            "bits": voters.index.bits,
            "K": self.k,
            "distance_metric": voters.knn.distance_metric,
            "voting_strategy": voters.knn.voting_strategy,
            "tau": voters.knn.tau,
            "theta": voters.knn.theta,
            "panel": None if self.panel is None else str(self.panel),
            "notes": list(self.notes),
            "skipped": list(self.skipped),
            "category_names": list(self.tagger.category_names),
            "images": [one.to_json() for one in self.images],
        }

    def summary(self) -> list[RenderableType]:
        """What a person reads."""
        parts: list[RenderableType] = []
        for one in self.images:
            parts += [show(one, voters=self.voters), ""]
        parts += [f"note: {note}" for note in self.notes]
        if self.skipped:
            parts += [f"{len(self.skipped):,} images could not be read:", *(f"  {why}" for why in self.skipped)]
        voters = self.tagger.voters
        how = (
            f"{self.k} neighbours of {len(voters.index):,}, {voters.knn.distance_metric}, {voters.knn.voting_strategy}"
        )
        parts.append(f"{how} vote; from {self.index or self.tagger.run.folder}")
        return parts if self.panel is None else [*parts, f"wrote {self.panel}"]


def predict(
    tagger: Tagger,
    requests: Sequence[Request],
    *,
    k: int | None = None,
    top: int = 5,
    data: Path,
    on_error: Literal["stop", "skip"] = "stop",
    voters: int = SHOWN_VOTERS,
    panel: Path | None = None,
    force: bool = False,
    index: Path | None = None,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> PredictResult:
    """Tag images.

    Args:
        tagger: What tags them.
        requests: Images and captions.
        k: Neighbours that vote; as the run is configured when not given.
        top: Tags of an image at most.
        data: The folder that paths of neighbours are relative to; an image of the index that lies there does not vote
            for itself.
        on_error: Whether an image that cannot be read stops everything, or is left out.
        voters: Neighbours shown a tag.
        panel: A picture to draw.
        force: Replace a picture of ours that is there.
        index: The index file, to be named in the result.
        notes: What a person should know of the requests, such as files of a folder that are left out.
        progress: Who to tell.

    Raises:
        InputError: An image cannot be read, a caption is missing, or k is larger than the index.
    """
    check_panel(panel, force=force)
    tagger.encoder.check_captions([one.path for one in requests], [one.caption for one in requests])
    ids = _own_ids(tagger, requests, data)
    found, bad = _tag(tagger, requests, ids, k, top, on_error, progress or Progress())
    notes = (*tagger.notes, *notes)
    if panel is not None:
        draw(panel, found, data=data)
        if len(found) > PANELS:
            notes += (f"{panel} shows the first {PANELS} of {len(found):,} images",)
    own = sum(known is not None for known in ids)
    if own:
        notes += (f"{own:,} of the images are in the index themselves, and did not vote for themselves",)
    return PredictResult(
        tagger=tagger,
        index=index,
        k=tagger.voters.knn.K if k is None else k,
        images=tuple(found),
        skipped=tuple(bad[row] for row in sorted(bad)),
        voters=voters,
        panel=panel,
        notes=notes,
    )


def _tag(
    tagger: Tagger,
    requests: Sequence[Request],
    ids: Sequence[int | None],
    k: int | None,
    top: int,
    on_error: Literal["stop", "skip"],
    progress: Progress,
) -> tuple[list[Tagging], dict[int, str]]:
    """Taggings of the images that can be read, and why the others cannot; at least one can."""
    found: list[Tagging] = []
    bad: dict[int, str] = {}
    with progress.task("images", len(requests)) as task:
        for start in range(0, len(requests), BATCH):
            part = requests[start : start + BATCH]
            unreadable: dict[int, str] | None = None if on_error == "stop" else {}
            found += tagger.predict(
                [one.path for one in part],
                [one.caption for one in part],
                k,
                top,
                image_ids=ids[start : start + BATCH],
                unreadable=unreadable,
            )
            bad |= {start + at: why for at, why in (unreadable or {}).items()}
            task.advance(len(part))
    if not found:
        raise InputError(f"no image that can be read, and this is the first: {bad[0]}")
    return found, bad


def _own_ids(tagger: Tagger, requests: Sequence[Request], data: Path) -> list[int | None]:
    """The id of every image that is a sample of the index: the same file below the data folder."""
    root = data.resolve()
    files = [one.path.resolve() for one in requests]
    inside = [file.relative_to(root).as_posix() if file.is_relative_to(root) else None for file in files]
    if not any(inside):
        return [None] * len(files)
    index = tagger.voters.index
    known = {path: int(at) for path, at in zip(index.paths.to_pylist(), index.image_id, strict=True) if path}
    return [None if path is None else known.get(path) for path in inside]
