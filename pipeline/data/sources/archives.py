"""Images in tar or zip files, such as webdataset's shards, listed without unpacking them."""

import re
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from ....errors import InputError, cannot_read
from .folders import UNREADABLE, Described, image_suffixes, parse_description, samples_of_names
from .samples import Samples, split_name

Reader = Callable[[], bytes]


def read_archives(files: list[Path], root: Path) -> Samples:
    """The samples of archives; the path of an image is the archive's, a slash, and its name in it.

    ``name.txt`` and ``name.json`` beside ``name.jpg`` in the same archive are its captions and tags.

    Args:
        files: Archives below the data folder.
        root: The data folder.

    Raises:
        InputError: An archive cannot be read, or has no image.
    """
    suffixes = image_suffixes()
    names: list[str] = []
    others: list[str] = []
    texts: dict[str, str] = {}
    prefixes = [file.relative_to(root).as_posix() for file in files]
    for file, prefix in zip(files, prefixes, strict=True):
        for member, read in _members(file).items():
            suffix = PurePosixPath(member).suffix.casefold()
            if suffix in suffixes:
                names.append(f"{prefix}/{member}")
            elif suffix in {".txt", ".json"}:
                texts[f"{prefix}/{member}"] = _decoded(read, file, member)
            else:
                others.append(member)
    if not names:
        raise InputError("no images in the archive", where=files[0], wanted=f"{', '.join(sorted(suffixes)[:6])}, ...")

    def beside(name: str) -> Described:
        stem = name[: -len(PurePosixPath(name).suffix)]
        parts = [(suffix, texts[stem + suffix]) for suffix in (".txt", ".json") if stem + suffix in texts]
        captions: list[str] = []
        tags: list[str] = []
        for suffix, text in parts:
            try:
                more_captions, more_tags = parse_description(suffix, text)
            except ValueError as error:
                raise cannot_read(UNREADABLE, stem + suffix, error) from None
            captions, tags = captions + more_captions, tags + more_tags
        return (captions, tags) if parts else None

    samples = samples_of_names(root, names, beside, lambda name: _folders(name, prefixes))
    shown = ", ".join(file.name for file in files[:3]) + (", ..." if len(files) > 3 else "")
    notes = [*samples.notes, f"images are read in place from {shown}"]
    if others:
        more = ", ..." if len(others) > 3 else ""
        notes.append(f"{len(others):,} files of other kinds are not read: {', '.join(others[:3])}{more}")
    return replace(samples, notes=tuple(notes))


def _folders(name: str, prefixes: list[str]) -> tuple[str, ...]:
    """The folders that an image lies in: the split in the name of its archive, and the folders inside."""
    prefix = next(prefix for prefix in prefixes if name.startswith(f"{prefix}/"))
    words = re.findall("[a-z]+", PurePosixPath(prefix).stem.casefold())
    split = next((word for word in words if split_name(word)), None)
    inside = PurePosixPath(name[len(prefix) + 1 :]).parts[:-1]
    return (split, *inside) if split else inside


def _members(file: Path) -> dict[str, Reader]:
    """What an archive holds, by name, with how to read it; only regular files whose names stay inside."""
    try:
        if zipfile.is_zipfile(file):
            archive = zipfile.ZipFile(file)
            names = [item.filename for item in archive.infolist() if not item.is_dir()]
            return {name: partial(archive.read, name) for name in names if _is_safe(name)}
        with tarfile.open(file) as listing:
            members = [member for member in listing.getmembers() if member.isfile() and _is_safe(member.name)]
        return {member.name: _tar_reader(file, member) for member in members}
    except (tarfile.TarError, zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise cannot_read("cannot read the archive", file, error, wanted="a whole tar or zip file") from None


def _tar_reader(file: Path, member: tarfile.TarInfo) -> Reader:
    def read() -> bytes:
        with file.open("rb") as stream:
            stream.seek(member.offset_data)
            return stream.read(member.size)

    return read


def _is_safe(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return not name.startswith("/") and ".." not in parts and not any(part.startswith(".") for part in parts[-1:])


def _decoded(read: Reader, file: Path, member: str) -> str:
    try:
        return read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise cannot_read(UNREADABLE, f"{file}/{member}", error) from None
