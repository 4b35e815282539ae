"""Files that are whole or absent: written under a temporary name, synced, then renamed."""

import errno
import os
import shlex
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from .. import NOT_THERE, InputError, check_file


def check_input(path: Path, kind: str, *, wanted: str, do: str | None = None) -> None:
    """Refuse what is no regular file before it is opened, and say whether it is missing or cannot be looked at.

    Args:
        path: The file.
        kind: What it should hold, for the error.
        wanted: The same in more words.
        do: What mends it.

    Raises:
        InputError: No such file, a folder, a FIFO, a device or a socket; or the system does not let one look.
    """
    try:
        is_missing = not stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        is_missing = error.errno in NOT_THERE
    except ValueError:  # a NUL in the path
        is_missing = True
    check_file(path, f"no {kind}" if is_missing else f"cannot read the {kind}", wanted=wanted, do=do)


def make_folder(folder: Path) -> None:
    """Make a folder to write into, with its parents.

    Raises:
        InputError: A file stands there, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from None


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, sync it, and rename it into place.

    A kill at any moment leaves the old file or the new one, never a part.

    Args:
        path: The final name; its folder is made when absent.
        write: Writes the content to the path that it is given.

    Raises:
        InputError: No folder can be made there, no room is left, or writing is not allowed.
    """
    make_folder(path.parent)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            temporary.chmod(0o666 & ~_umask())
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def unwritable(path: Path, error: Exception) -> InputError:
    """The error to raise where the system does not let a file or a folder be written or removed."""
    number = getattr(error, "errno", None)
    first = {errno.ENOSPC: "free some room", errno.EDQUOT: "free some room", errno.EACCES: "ask for leave to write"}
    return InputError(
        "cannot write", where=path, got=getattr(error, "strerror", None) or error,
        do=", or ".join([*([first[number]] if number in first else []), "name another --out"]),
    )  # fmt: skip


def _umask() -> int:
    """The process's umask: a temporary file is private, the final one is like any other."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def command(*words: object) -> str:
    """A command of ``mmcli`` as a shell takes it: ``mmcli knn-eval --run 'my run'``."""
    return shlex.join(["mmcli", *map(str, words)])
