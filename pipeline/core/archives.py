"""Files inside tar and zip archives, read in place: a path may lead through an archive, as in ``shard.tar/000.jpg``."""

import errno
import functools
import io
import os
import tarfile
import threading
import zipfile
import zlib
from pathlib import Path
from typing import IO, NamedTuple

SUFFIXES = (".tar", ".zip")
_zip_lock = threading.Lock()


class UnreadableArchive(ValueError):  # noqa: N818 - what it is
    """An archive that is damaged, or packed in a way that is not read."""


class _Archive(NamedTuple):
    """An archive on the path, and the name in it."""

    file: Path
    member: str


def split_archive(path: Path) -> _Archive | None:
    """The archive that a path leads through, and the name in it; ``None`` where there is none."""
    for parent in path.parents:
        if parent.suffix.casefold() in SUFFIXES and parent.is_file():
            return _Archive(parent, path.relative_to(parent).as_posix())
    return None


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading, or a member of an archive.

    Raises:
        OSError: There is no such file, or the archive has no such member.
        UnreadableArchive: The archive is damaged, or packed in a way that is not read.
    """
    archive = split_archive(path)
    if archive is None:
        return path.open("rb")
    file = archive.file
    try:
        if file.suffix.casefold() == ".zip":
            with _zip_lock:
                return io.BytesIO(_open_zip(file, file.stat().st_mtime_ns, os.getpid()).read(archive.member))
        offset, size = _tar_members(file, file.stat().st_mtime_ns)[archive.member]
    except KeyError:
        raise FileNotFoundError(errno.ENOENT, "no such member of the archive", str(path)) from None
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, NotImplementedError, RuntimeError, ValueError) as error:
        raise UnreadableArchive(f"an archive that cannot be read: {error}") from None
    with file.open("rb") as stream:
        stream.seek(offset)
        return io.BytesIO(stream.read(size))


@functools.lru_cache(maxsize=16)
def _open_zip(file: Path, _changed: int, _process: int) -> zipfile.ZipFile:
    """An archive that stays open: its directory is read once a process."""
    return zipfile.ZipFile(file)


@functools.lru_cache(maxsize=256)
def _tar_members(file: Path, _changed: int) -> dict[str, tuple[int, int]]:
    """Offset and size of every member by its name; read once."""
    with tarfile.open(file, "r:") as listing:
        return {member.name: (member.offset_data, member.size) for member in listing if member.isfile()}
