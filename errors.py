"""The one error that is the user's to mend, and how a file that cannot be read becomes one."""

import codecs
import errno
import os
import re
import stat
from pathlib import Path

# Letters of what was found, of a part of an error's line, and of a line that stands in another one.
MOST_QUOTED, MOST_NAMED, MOST_WHOLE = 200, 1000, 3000
# Control characters, line ends, signs that turn the reading direction, and halves of surrogate pairs.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object, keep: str = "\t\n") -> str:
    r"""A text as it can be shown on a terminal, and in any stream that takes UTF-8.

    Args:
        text: Whatever was found.
        keep: Control characters that stay.

    Returns:
        The text with control characters as escapes; a byte of a name that is not UTF-8 is ``\xNN``.
    """

    def escape(match: re.Match[str]) -> str:
        code = ord(match[0])
        if match[0] in keep:
            return match[0]
        return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else ascii(match[0])[1:-1]

    return UNPRINTABLE.sub(escape, str(text))


def quoted(text: object, most: int = MOST_QUOTED) -> str:
    """A text as :func:`visible` shows it, in one line; one of more than ``most`` letters ends in ``...``."""
    shown = visible(str(text)[: most + 1], keep="")
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def first_line(error: object) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


class InputError(ValueError):
    """The user's input is wrong; the command line prints it as one line and exits with 2.

    The line reads ``what: where: got ..., wanted ...; do``, with the parts that were given. Control characters are
    shown as escapes, and of what was got at most 200 characters are quoted, so that an error is always one line.

    Args:
        what: What is wrong, in a few words.
        where: The file, folder, option or row it was found in.
        got: What stood there.
        wanted: What should stand there.
        do: The command or the step that mends it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        wanted: object = None,
        do: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.wanted, self.do = what, where, got, wanted, do
        line = quoted(" ".join(what.split()), MOST_WHOLE)
        if where is not None:
            line += f": {quoted(where, MOST_NAMED)}"
        parts = [] if got is None else [f"got {quoted(got)}"]
        parts += [] if wanted is None else [f"wanted {quoted(' '.join(str(wanted).split()), MOST_NAMED)}"]
        if parts:
            line += ": " + ", ".join(parts)
        if do is not None:
            line += f"; {quoted(' '.join(do.split()), MOST_NAMED)}"
        super().__init__(line)


# What the system says of a path at which no file can be; anything else it says is about the system, not the file.
NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def cannot_read(
    what: str, path: object, error: Exception, *, wanted: object = None, do: str | None = None
) -> InputError:
    """The error to raise where a file could not be read.

    A file that is not there, one that may not be read, and trouble of the file system are told apart.

    Args:
        what: What could not be done, as in ``cannot read captions``.
        path: The file.
        error: What was raised.
        wanted: What should be there.
        do: What mends it where the file is not there or holds something else.
    """
    got: object = str(error) or type(error).__name__
    if isinstance(error, UnicodeDecodeError):
        got = f"text that is not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start:,})"
    elif isinstance(error, OSError) and error.errno in NOT_THERE:
        got = "a link that leads nowhere" if os.path.islink(str(path)) else "no such file"  # noqa: PTH114 - never raises
    elif isinstance(error, PermissionError):
        got, do = "no permission to read it", "change its permissions (chmod), or ask its owner"
    elif isinstance(error, OSError) and error.errno is not None:
        got, do = error.strerror or error, "run the command again when the file system answers"
    return InputError(what, where=path, got=got, wanted=wanted, do=do)


def file_kind(path: Path) -> str | None:
    """What stands under a path where it is no regular file, as in ``a FIFO``; None for a file.

    Raises:
        OSError: Nothing is there, or the system does not let one look.
    """
    mode = path.stat().st_mode
    return None if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "no file")


def check_file(path: Path, what: str, *, wanted: object = None, do: str | None = None) -> None:
    """Refuse what is no regular file before it is opened: a FIFO would be waited for without end.

    Raises:
        InputError: As :func:`cannot_read` makes it of the same arguments: nothing is there, or a folder, a FIFO, a
            device or a socket, or the system does not let one look.
    """
    try:
        kind = file_kind(path)
    except (OSError, ValueError) as error:  # a NUL in a path is a ValueError
        raise cannot_read(what, path, error, wanted=wanted, do=do) from None
    if kind is not None:
        raise InputError(what, where=path, got=kind, wanted=wanted or "a file", do=do)


def read_text(path: Path, what: str, *, wanted: object = None, do: str | None = None) -> str:
    """The text of a file in UTF-8, or in UTF-16 where it begins with that encoding's mark.

    Raises:
        InputError: See :func:`check_file`, or it cannot be read, or is in another encoding.
    """
    check_file(path, what, wanted=wanted, do=do)
    try:
        data = path.read_bytes()
        is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise cannot_read(what, path, error, wanted=wanted, do="save it as UTF-8") from None
    except OSError as error:
        raise cannot_read(what, path, error, wanted=wanted, do=do) from None
