"""The one rule by which anything that lies in a folder already is removed or replaced, for every command.

A folder is ours only where a marker in it says so by its content, never by its name alone, and then file by file: what
the marker lists, or where it lists nothing what exactly fits the names that the command writes. All else is somebody's
own: it is never removed and never written over, and where it stands in our way the command refuses in one line. A link
is somebody's own too, unless a name says otherwise: it is not followed, and what it points to is never touched.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple


class Contents(NamedTuple):
    """What lies in a folder, as names relative to it with forward slashes, in order: files and links, not folders."""

    ours: tuple[str, ...]
    foreign: tuple[str, ...]


def contents(
    folder: Path, is_ours: Callable[[str], bool], may_be_link: Callable[[str], bool] | None = None
) -> Contents:
    """Sort what lies in a folder, at any depth, into ours and somebody's own.

    Args:
        folder: The folder; a link to one is followed, links in it are not.
        is_ours: Whether a file of this relative name is one that we wrote.
        may_be_link: Whether one of ours may be a link; none may when not given.

    Raises:
        OSError: A folder cannot be listed.
    """
    ours: list[str] = []
    foreign: list[str] = []
    for name in sorted(_names(folder, "")):
        linked = (folder / name).is_symlink()
        taken = is_ours(name) and (not linked or (may_be_link is not None and may_be_link(name)))
        (ours if taken else foreign).append(name)
    return Contents(tuple(ours), tuple(foreign))


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove files by their relative names, and the folders below that are empty then.

    Args:
        folder: The folder itself stays.
        names: Relative names, as :func:`contents` lists them.

    Raises:
        OSError: One cannot be removed.
    """
    names = sorted(names)
    for name in names:
        (folder / name).unlink(missing_ok=True)
    parents = {parent for name in names for parent in Path(name).parents if parent.name}
    for parent in sorted(parents, key=lambda parent: -len(parent.parts)):
        if (folder / parent).is_dir() and not any((folder / parent).iterdir()):
            (folder / parent).rmdir()


def _names(folder: Path, prefix: str) -> list[str]:
    names = []
    with os.scandir(folder) as listing:
        for entry in listing:
            if entry.is_dir(follow_symlinks=False):
                names += _names(Path(entry.path), f"{prefix}{entry.name}/")
            else:
                names.append(prefix + entry.name)
    return names
