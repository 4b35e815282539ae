"""Locks between processes: the kernel's where the file system has locks, else a file with the holder's name.

The kernel frees its lock when the holder ends, however it ends. The file that stands for a lock elsewhere (NFS or
Lustre without locks, a Python without ``fcntl``) is removed by the next who asks, where its process is of this machine
and gone; one of another machine has to be removed by hand, and the error names it. :mod:`filelock` does both.
"""

import contextlib
import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import BaseFileLock

# What the system says where there are no locks.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
# The ending of the file that stands for a lock: one that a kernel's lock left behind is empty, and says nothing.
SOFT = ".holder"


class LockHeld(Exception):  # noqa: N818 - nobody sees it: whoever asked says what is in use
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
        wait_s: Seconds to wait for who holds it.

    Returns:
        The lock; its ``release()`` gives it back.

    Raises:
        LockHeld: Another process holds it.
        OSError: The folder cannot be written.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # filelock warns of what this function handles
        import filelock
    kinds: list[type[BaseFileLock]] = [filelock.FileLock, filelock.SoftFileLock]
    if filelock.FileLock is filelock.SoftFileLock:
        del kinds[0]
    for kind in kinds:
        soft = kind is filelock.SoftFileLock
        name = path.with_name(path.name + SOFT) if soft else path
        lock = kind(name, timeout=wait_s, thread_local=False, fallback_to_soft=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise _held(name, getattr(lock, "pid", None) if soft else None) from None
        except OSError as error:
            if soft or error.errno not in NO_LOCKS:
                raise
        else:
            return lock
    raise AssertionError("a soft lock is taken or refused")


@contextmanager
def locked(path: Path, *, wait_s: float = 0.0, keep: bool = True) -> Iterator[None]:
    """Hold the lock of a file name.

    Args:
        path: The lock's file.
        wait_s: Seconds to wait for who holds it.
        keep: Leave its empty file behind; else it is removed before the lock is given back.

    Raises:
        LockHeld: Another process holds it.
        OSError: The folder cannot be written.
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


def _held(name: Path, pid: int | None) -> LockHeld:
    wait = "wait until it ends, or stop it"
    return LockHeld(wait if pid is None else f"{wait}; if process {pid} is gone, remove {name}")
