"""Locks between processes: the kernel's where the file system has locks, else a file with the holder's name.

The kernel frees its lock when the holder ends, however it ends. The file that stands for a lock elsewhere (NFS or
Lustre without locks, a Python without ``fcntl``) is removed by the next who asks, where its process is of this machine
and gone; one of another machine has to be removed by hand, and the error names it. :mod:`filelock` does both.
"""

import contextlib
import errno
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import StoreError

if TYPE_CHECKING:
    from filelock import BaseFileLock

# What the system says where there are no locks.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
# The ending of the file that stands for a lock: one that a kernel's lock left behind is empty, and says nothing.
SOFT = ".holder"


class LockHeld(Exception):  # noqa: N818 - callers turn it into an error that says what is in use
    """Another process holds a lock.

    Attributes:
        do: What a person can do about it.
    """

    def __init__(self, do: str) -> None:
        super().__init__(do)
        self.do = do


def take_lock(path: Path, *, wait_s: float = 0.0) -> "BaseFileLock":
    """Take the lock of a file name.

    Args:
        path: The lock's file; its folder has to be there.
        wait_s: Seconds to wait until its holder gives it back.

    Returns:
        The lock; its ``release()`` gives it back.

    Raises:
        LockHeld: Another process holds it.
        StoreError: A file with content, a link or a folder has that name; it is somebody's own and stays.
        OSError: The folder cannot be written.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # filelock warns of what this function handles
        import filelock
    _refuse_foreign(path)
    if filelock.FileLock is not filelock.SoftFileLock:
        lock: BaseFileLock = filelock.FileLock(path, timeout=wait_s, thread_local=False, fallback_to_soft=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise LockHeld("wait until it ends, or stop it") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        else:
            return lock
    holder = path.with_name(path.name + SOFT)
    lock = filelock.SoftFileLock(holder, timeout=wait_s, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        pid = lock.pid
        gone = "" if pid is None else f"; if process {pid} is gone, remove {holder}"
        raise LockHeld(f"wait until it ends, or stop it{gone}") from None
    return lock


@contextmanager
def locked(path: Path, *, wait_s: float = 0.0, keep: bool = True) -> Iterator[None]:
    """Hold the lock of a file name; raises what :func:`take_lock` raises.

    Args:
        path: The lock's file.
        wait_s: Seconds to wait until its holder gives it back.
        keep: Leave its empty file behind; else it is removed before the lock is given back.
    """
    lock = take_lock(path, wait_s=wait_s)
    try:
        yield
    finally:
        try:
            if not keep:  # whoever opened the file just now sees that it has no name any more, and makes another
                with contextlib.suppress(OSError):  # an empty file that stays is no harm
                    path.unlink(missing_ok=True)
        finally:
            lock.release()


def _refuse_foreign(path: Path) -> None:
    """A lock's file is empty: anything else of its name was not made here."""
    with contextlib.suppress(FileNotFoundError):
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size:
            raise StoreError(
                "a file is where the lock of this folder goes",
                where=path,
                got="a file that mmcli did not write",
                wanted="no such file",
                do="move it away, or name another folder",
            )
