"""Files that are whole or absent: written under a temporary name, synced, checked, then renamed.

Several writers may fill one store, each with its own stripe, so a temporary name has the process in it. A temporary
file may be a hard link to a shard of another store (text shards are shared), so it is never opened for writing: it is
removed and created anew.

A folder that is reached by a URL has objects that appear whole under their names: they are written, read back and
compared. It has no locks: two writers of one store are not kept apart there, but write the same bytes.
"""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from .errors import RESUME, StoreBusy, StoreError
from .layout import LOCK, LOCK_NAME, TEMPORARY_NAME, temporary_name, this_host
from .places import is_remote

Check = Callable[[bytes], object]
NO_LOCK = -1


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
    temporary = path.with_name(temporary_name(path.name))
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as stream:
            _fill(stream, data)
            stream.flush()
            os.fsync(stream.fileno())
        if check is not None:
            check(temporary.read_bytes())
        _rename(temporary, path)
    except OSError as error:
        raise StoreError(
            "cannot write", where=path, got=error.strerror or str(error), do=f"mend it and {RESUME}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def adopt(source: Path, path: Path, check: Check) -> None:
    """Take a file of another store: a hard link where the file system has them, else a copy.

    Args:
        source: The file to take; it is only read.
        path: The final name.
        check: Called with the bytes that will stand there, before the rename; raises to refuse them.

    Raises:
        OSError: The file cannot be read, linked or copied.
    """
    if is_remote(path) or is_remote(source):
        write_whole(path, source.read_bytes(), check)
        return
    temporary = path.with_name(temporary_name(path.name))
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source.resolve(), temporary)
        except OSError:
            with source.open("rb") as old, temporary.open("xb") as new:
                shutil.copyfileobj(old, new)
        # The name that is checked is the one that is renamed: the source may be replaced in between.
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        check(temporary.read_bytes())
        _rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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

    Args:
        folder: The store's folder.
        alone: Whether no other writer can be there; otherwise only files of dead processes of this machine go.
    """
    if is_remote(folder):
        return
    for path in folder.iterdir():
        found = TEMPORARY_NAME.fullmatch(path.name)
        if found is not None and (alone or _is_dead(found["host"], int(found["pid"]))):
            path.unlink(missing_ok=True)
        elif alone and path.name != LOCK and LOCK_NAME.fullmatch(path.name):
            path.unlink(missing_ok=True)  # a stripe's writer takes the main lock first, so nobody holds this one


def _is_dead(host: str, pid: int) -> bool:
    if host != this_host():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def sync_folder(folder: Path) -> None:
    """Make renames and deletions in a folder survive a power cut."""
    if is_remote(folder):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(folder: Path, name: str = LOCK, *, shared: bool = False, wait: bool = False) -> int:
    """Take a lock of a store; the kernel frees it when the process ends, however it ends.

    Args:
        folder: The store's folder.
        name: The lock's file.
        shared: Let others share it.
        wait: Wait for it rather than give up.

    Returns:
        The lock, for :func:`unlock`.

    Raises:
        StoreBusy: Another writer holds it.
        OSError: The file system has no locks.
    """
    if is_remote(folder):
        return NO_LOCK
    handle = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        os.close(handle)
        raise StoreBusy(
            "another process writes this store",
            where=folder,
            do="wait until it ends, or stop it; what it wrote is kept",
        ) from error
    except OSError:
        os.close(handle)
        raise
    return handle


def unlock(handle: int) -> None:
    """Free a lock, also where a forked child still holds a copy of the handle."""
    if handle == NO_LOCK:
        return
    fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def _write_object(path: Path, data: bytes, check: Check | None) -> None:
    """Write an object, read it back and compare; one that is not as it should be is removed."""
    try:
        path.write_bytes(data)
        written = path.read_bytes()
    except OSError as error:
        raise StoreError(
            "cannot write", where=path, got=error.strerror or str(error), do=f"mend it and {RESUME}"
        ) from error
    try:
        if check is not None:
            check(written)
        if written != data:
            raise StoreError("it gave back something else than was written", where=path, do=RESUME)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _fill(stream: BinaryIO, data: bytes) -> None:
    stream.write(data)


def _rename(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)  # noqa: PTH105 - one place that renames, by its plain name
    sync_folder(path.parent)
