"""Paths that a manifest names: they never lead out of the data folder, by their text or through a link."""

import re
from pathlib import Path, PosixPath, PurePosixPath

from ... import InputError

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
                "an image is a link out of the data folder", where=joined, got=target, wanted=f"a file below {root}",
                do="give --follow-links where such links are meant, copy the file, or link its whole folder",
            )  # fmt: skip
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # ValueError: NUL, or half a pair of surrogates
        raise InputError("cannot follow an image path", where=ascii(str(joined)), got=error) from None
    return joined


def _bases(root: Path, parts: tuple[str, ...]) -> list[Path]:
    """The folders an image may lie below: the data folder and its image folder, which may be a link."""
    depth = 2 if parts[0] == "images" and len(parts) > 2 else 1
    return [root, *(root.joinpath(*parts[: at + 1]) for at in range(min(depth, len(parts) - 1)))]
