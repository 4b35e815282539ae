"""Files that are whole or absent: written under a temporary name, synced, checked, then renamed.

Several writers may fill one store, each with its own stripe, so a temporary name has the process in it. A temporary
file may be a hard link to a shard of another store (text shards are shared), so it is never opened for writing: it is
removed and created anew.

A folder that is reached by a URL has objects that appear whole under their names: they are written, read back and
compared. It has no locks: two writers of one store are not kept apart there, but write the same bytes.
"""

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from .errors import RESUME, StoreError
from .layout import LOCK, LOCK_NAME, STORE_FILE, TEMPORARY, temporary_name, this_host
from .locks import SOFT
from .places import is_remote

Check = Callable[[bytes], object]
Checked = TypeVar("Checked")
# What the system says where a file system cannot sync a folder, or does not let it be opened: CIFS, some FUSE, Windows.
NO_SYNC = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EACCES,
    errno.EPERM,
    errno.EBADF,
    errno.EISDIR,
}


def write_whole(path: Path, data: bytes, check: Check | None = None) -> None:
    """Put ``data`` under ``path``: a kill at any moment leaves the old file or the new one, never a part.

    Args:
        path: The final name.
        data: The whole content.
        check: Called with what is read back from the closed temporary file, before the rename; raises to refuse it.

    Raises:
        StoreError: The disk is full, or the folder is not writable.
    """
    if is_remote(path):
        _write_object(path, data, check)
        return
    try:
        with replacing(path) as temporary:
            with temporary.open("xb") as stream:
                _fill(stream, data)
            if check is not None:
                check(temporary.read_bytes())
    except OSError as error:
        raise _cannot_write(path, error) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name, under which a file is made anew that takes the place of ``path`` at the end, synced.

    After an error it is removed, and what lies under ``path`` stays.
    """
    temporary = path.with_name(temporary_name(path.name))
    try:
        temporary.unlink(missing_ok=True)
        yield temporary
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Give a whole file its final name: it is synced, renamed, and the folder synced."""
    with temporary.open("rb") as stream:
        sync_file(stream.fileno())
    os.replace(temporary, path)  # noqa: PTH105 - one place that renames, by its plain name
    sync_folder(path.parent)


def adopt(source: Path, path: Path, check: Callable[[bytes], Checked]) -> Checked:
    """Take a file of another store: a hard link where the file system has them, else a copy.

    Args:
        source: The file to take; it is only read.
        path: The final name.
        check: Called with the bytes that will stand there, before the rename; raises to refuse them.

    Returns:
        What ``check`` returned.

    Raises:
        OSError: The file cannot be read, linked or copied.
    """
    if is_remote(path) or is_remote(source):
        data = source.read_bytes()
        checked = check(data)
        write_whole(path, data)
        return checked
    with replacing(path) as temporary:
        try:
            os.link(source.resolve(), temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        # The name that is checked is the one that is renamed: the source may be replaced in between.
        return check(temporary.read_bytes())


def remove(path: Path) -> None:
    """Delete a file if it is there, and make that last."""
    if path.is_file() or path.is_symlink():
        path.unlink()
        sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder that lasts; one of objects needs no making."""
    if not is_remote(folder) and not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)


def remove_temporaries(folder: Path, *, alone: bool) -> None:
    """Delete what a killed writer left half-written, and the empty lock files of stripes when there are none.

    Where other writers may be there (not ``alone``) only files of dead processes of this machine go.
    """
    if is_remote(folder):
        return
    remove_leftovers(folder, lambda name: STORE_FILE.fullmatch(name) is not None, alone=alone)
    for path in folder.iterdir() if alone else []:
        if path.name not in {LOCK, LOCK + SOFT} and LOCK_NAME.fullmatch(path.name):
            path.unlink(missing_ok=True)  # a stripe's writer takes the main lock first, so nobody holds this one


def remove_leftovers(folder: Path, is_ours: Callable[[str], bool], *, alone: bool = False) -> None:
    """Remove temporary files and scratch folders that killed processes left in a folder.

    ``is_ours`` says whether we write a file or folder of a name there. Where others may be writing (not ``alone``) only
    what dead processes of this machine left goes. What may not be looked at or removed stays: it is in nobody's way.
    """
    with suppress(OSError):
        for path in list(folder.iterdir()) if folder.is_dir() else []:
            temporary = TEMPORARY.fullmatch(path.name)
            with suppress(OSError):
                if temporary is None or path.is_symlink() or not is_ours(temporary["name"]):
                    continue
                if not alone and not is_dead(temporary["host"], int(temporary["pid"])):
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def is_dead(host: str, pid: int) -> bool:
    """Whether a process that left its name is gone for sure; not where it is of another machine or container."""
    if host != this_host() or sys.platform == "win32":  # which has no signal that only asks
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def sync_folder(folder: Path) -> None:
    """Make renames and deletions in a folder survive a power cut, where the file system can."""
    if is_remote(folder):
        return
    try:
        handle = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def sync_file(handle: int) -> None:
    """Make what was written to an open file survive a power cut, where the file system can."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def _write_object(path: Path, data: bytes, check: Check | None) -> None:
    """Write an object, read it back and compare; one that is not as it should be is removed."""
    try:
        path.write_bytes(data)
        written = path.read_bytes()
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        if check is not None:
            check(written)
        if written != data:
            raise StoreError("it gave back something else than was written", where=path, do=RESUME)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _cannot_write(path: Path, error: OSError) -> StoreError:
    return StoreError("cannot write", where=path, got=error.strerror or str(error), do=f"mend it and {RESUME}")


def _fill(stream: BinaryIO, data: bytes) -> None:
    stream.write(data)
