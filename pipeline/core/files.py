"""Files and folders that are whole or absent: written under a temporary name, synced, then renamed.

Everything has the permissions that the umask gives to a new file, whatever the library that writes it prefers. A
temporary name says which process of which machine writes it, so that what a killed one left can be removed while
others write.
"""

import errno
import hashlib
import os
import re
import secrets
import shlex
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PosixPath, PurePosixPath

from safetensors import SafetensorError

from ...cache import files, layout
from ...cache.files import publish, sync_file
from ...errors import NOT_THERE, InputError, check_file

remove_leftovers, final_name = files.remove_leftovers, layout.final_name
NAME_BYTES = 100  # of a file's own name in that of its temporary one; a name may have 255


def check_input(path: Path, kind: str, *, wanted: str, do: str | None = None) -> None:
    """Refuse what is no regular file before it is opened, and say whether it is missing or cannot be looked at.

    ``kind`` says what the file should hold, ``wanted`` says so in more words, and ``do`` is what mends it.

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


def check_name(path: str | Path) -> None:
    """Refuse a path that is not UTF-8: files that say where something lies could not be written.

    Raises:
        InputError: It is not.
    """
    try:
        os.fsencode(path).decode("utf-8")  # also where the locale knows no such letters
    except UnicodeError:
        raise InputError("a name that is not UTF-8", where=path, wanted="a folder with another name") from None


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
    """Let ``write`` fill a file in a scratch folder beside ``path``, sync it, and rename it into place.

    The folder is there for what libraries leave when they are killed: safetensors writes under a name of its own first.

    A kill at any moment leaves the old file or the new one, never a part.

    Args:
        path: The final name; its folder is made when absent.
        write: Writes the content to the path that it is given.

    Raises:
        InputError: No folder can be made there, no room is left, or writing is not allowed.
    """
    make_folder(path.parent)
    with _scratch(path, path.parent) as (scratch, mode):
        write(scratch / "new")
        _set_mode(scratch / "new", mode)
        publish(scratch / "new", path)


def write_new(path: Path, text: str) -> None:
    """Write UTF-8 text under a name that nothing has, whole or not at all; of several processes one can.

    Raises:
        FileExistsError: Something is there.
        OSError: It cannot be written.
    """
    temporary = path.with_name(_temporary_name(path.name))
    try:
        _create(temporary)
        temporary.write_text(text, encoding="utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except (OSError, AttributeError):  # a file system without hard links
            with path.open("x", encoding="utf-8") as stream:
                stream.write(text)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def append_text(path: Path, text: str) -> None:
    """Add UTF-8 text to the end of a file.

    Raises:
        InputError: It cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise unwritable(path, error) from error


def write_folder(
    folder: Path, fill: Callable[[Path], object], *, last: Sequence[str] = (), alone: bool = False
) -> None:
    """Let ``fill`` write files into a scratch folder, then put them in place.

    A new folder appears at once. In one that is there every file is replaced in one step, and each is the old or the
    new one at any moment; what else lies there stays.

    Args:
        folder: The final folder.
        fill: Writes into the folder that it is given.
        last: Relative names to put in place after all others, in this order.
        alone: Whether nobody else can be writing there.

    Raises:
        InputError: No room is left, or writing is not allowed.
    """
    make_folder(folder.parent)
    # Inside what is there: it may be a mount of its own, or a link.
    place = folder if folder.is_dir() else folder.parent
    remove_leftovers(place, lambda left: left == _short(folder.name or "folder"), alone=alone)
    with _scratch(folder, place) as (scratch, mode):
        fill(scratch)
        names = sorted(path.relative_to(scratch).as_posix() for path in scratch.rglob("*") if path.is_file())
        for name in names:
            _set_mode(scratch / name, mode)
        if not folder.exists():
            for name in names:
                with (scratch / name).open("rb") as stream:
                    sync_file(stream.fileno())
            scratch.rename(folder)
            return
        for name in sorted(names, key=lambda name: last.index(name) if name in last else -1):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            publish(scratch / name, folder / name)


def refuse_existing(path: Path, is_ours: Callable[[Path], bool], *, force: bool, what: str, option: str) -> None:
    """Refuse to write a file over what is there, unless it is one of the same kind that may be replaced.

    Args:
        path: The file that is to be written.
        is_ours: Whether a file says by its content that it is one that we wrote, of this kind.
        force: Replace one that is.
        what: What such a file is called, for the error.
        option: The option that names the file.

    Raises:
        InputError: Something else is there, or ``force`` is not given.
    """
    if not path.exists() and not path.is_symlink():
        return
    wrong, got, wanted, do = "the file is there", what, "a new file", f"give another {option}, or --force to replace it"
    if not path.is_file() or not is_ours(path):
        wrong, got = "will not replace what mmcli did not write", "a folder" if path.is_dir() else "another file"
        wanted, do = f"a new file, or {what}", f"give another {option}"
    elif force:
        return
    raise InputError(wrong, where=path, got=got, wanted=wanted, do=do)


def remove_leftovers_of(path: Path) -> None:
    """Remove what killed processes left of one file; nobody else can be writing it."""
    remove_leftovers(path.parent, lambda name: name == _short(path.name), alone=True)


def unwritable(path: Path, error: Exception) -> InputError:
    """The error to raise where the system does not let a file or a folder be written or removed.

    It names no option: which one says where to write, if any, differs from command to command.
    """
    advice = {
        errno.ENOSPC: "free some room, or write to another disk",
        errno.EDQUOT: "free some room, or write elsewhere",
        errno.EACCES: "check the permissions of the folder, or write elsewhere",
        errno.EROFS: "work on a copy that can be written",
        errno.EEXIST: "move away what is there, or write elsewhere",
        errno.ENOTDIR: "move away what is there, or write elsewhere",
    }
    return InputError(
        "cannot write",
        where=path,
        got=getattr(error, "strerror", None) or error,
        do=advice.get(getattr(error, "errno", None) or 0, "see whether the folder is there and can be written"),
    )


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Errors of the system while a file or a folder is written or removed become one line."""
    try:
        yield
    except OSError as error:
        raise unwritable(Path(error.filename or path), error) from None


@contextmanager
def _scratch(path: Path, place: Path) -> Iterator[tuple[Path, int]]:
    """A folder in ``place`` to write ``path`` in, gone at the end; and the permissions that a new file has there."""
    scratch = place / _temporary_name(path.name or "folder")
    try:
        try:
            scratch.mkdir()
            mode = _create(scratch / "new")
            (scratch / "new").unlink()
            yield scratch, mode
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error


def _temporary_name(name: str) -> str:
    return layout.temporary_name(f"{_short(name)}.{secrets.token_hex(4)}")


def _short(name: str) -> str:
    """A name as it stands in that of its temporary file; a long one is cut, with a digest that tells it from others."""
    whole = os.fsencode(name)
    if len(whole) <= NAME_BYTES:
        return whole.decode(errors="ignore")
    return f"{whole[:NAME_BYTES].decode(errors='ignore')}-{hashlib.sha256(whole).hexdigest()[:8]}"


def _create(path: Path) -> int:
    """Make a new empty file; the permissions that it has by the umask, or by what the folder prescribes."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def _set_mode(path: Path, mode: int) -> None:
    """Give a file that a library wrote the permissions of any new file."""
    if stat.S_IMODE(path.stat().st_mode) != mode:
        with suppress(PermissionError):  # a file system that has its own permissions
            path.chmod(mode)


def command(*words: object) -> str:
    """A command of ``mmcli`` as a shell takes it: ``mmcli knn-eval --run 'my run'``."""
    return shlex.join(["mmcli", *map(str, words)])


# A path must stay below the data folder on every system: not absolute, no drive, no backslash, no step up.
UNSAFE_PATH = r"^\s*$|^/|^[A-Za-z]:|\\|(^|/)\.\.(/|$)|\x00"
SAFE_PATH = "a path relative to the data folder, with forward slashes and without '..'"


class LinkedFolder(PosixPath):
    """A data folder whose image files may be links to anywhere, as those of DVC, git-annex and the hub's cache are.

    Processes that read images are given it as any other path, so that they need no further argument.
    """


def is_inside(relative: str) -> bool:
    """Whether a manifest's path stays below the data folder, as far as its text tells."""
    return re.search(UNSAFE_PATH, relative) is None


def resolve_image(root: Path, relative: str) -> Path:
    """The image file of a manifest's path, which never lies outside the data folder.

    A path that is absolute or steps up is refused, and so is one that a symbolic link leads out of the folder.
    The data folder itself may be a link, and so may its image folder (the first part of the path, or the second below
    ``images``), as is usual for data sets that several people share; then the image has to stay below what that folder
    links to, or in the data folder. In a :class:`LinkedFolder` the image file itself may be a link to anywhere.

    Args:
        root: The data folder.
        relative: The path from a manifest.

    Returns:
        ``root / relative``, not followed; the file need not exist.

    Raises:
        InputError: The path leaves the data folder.
    """
    parts = PurePosixPath(relative).parts
    if not is_inside(relative) or not parts:
        raise InputError("an image path leaves the data folder", where=root, got=repr(relative), wanted=SAFE_PATH)
    joined = root.joinpath(*parts)
    try:
        target = joined.parent.resolve() if isinstance(root, LinkedFolder) else joined.resolve()
        if not any(target.is_relative_to(base.resolve()) for base in _bases(root, parts)):
            raise InputError(
                "an image is a link out of the data folder",
                where=joined,
                got=target,
                wanted=f"a file below {root}",
                do="give --follow-links where such links are meant, copy the file, or link its whole folder",
            )
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # ValueError: NUL, or half a pair of surrogates
        raise InputError("cannot follow an image path", where=ascii(str(joined)), got=error) from None
    return joined


def _bases(root: Path, parts: tuple[str, ...]) -> list[Path]:
    """The folders an image may lie below: the data folder and its image folder, which may be a link."""
    depth = 2 if parts[0] == "images" and len(parts) > 2 else 1
    return [root, *(root.joinpath(*parts[: i + 1]) for i in range(min(depth, len(parts) - 1)))]


# What a picture that a person asked for says of its maker, which tells it from any other before it is replaced.
DRAWN = {"Software": "mmcli"}


def is_drawn(path: Path) -> bool:
    """Whether a file is a PNG picture that mmcli drew."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            return bool(image.info.get("Software") == DRAWN["Software"])
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
