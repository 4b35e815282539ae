"""Where the images of a split lie below the data folder, and whether they are all there."""

import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from ... import InputError, cannot_read
from ..core.safe_paths import resolve_image

SHOWN = 3
DOWNLOAD = "unpack train2014.zip and val2014.zip from https://cocodataset.org/#download there"


def place_images(data: Path, folders: Sequence[str], filenames: Sequence[str]) -> list[str]:
    """Paths of N images relative to the data folder: below ``train2014`` or below ``images/train2014``.

    An image folder is looked up once, with its first image, so all images of a folder lie in the same place.

    Args:
        data: The data folder.
        folders: The image folder of each, as the split file names it.
        filenames: The file in it.

    Returns:
        N POSIX paths.
    """
    first = dict(zip(reversed(folders), reversed(filenames), strict=True))
    where = {folder: _place(data, folder, name) for folder, name in first.items()}
    return [(where[folder] / name).as_posix() for folder, name in zip(folders, filenames, strict=True)]


def _place(data: Path, folder: str, name: str) -> PurePosixPath:
    candidates = [PurePosixPath(folder), PurePosixPath("images", folder)]
    with_image = [place for place in candidates if (data / place / name).is_file()]
    present = [place for place in candidates if (data / place).is_dir()]
    return (with_image or present or candidates)[0]


def check_files(data: Path, paths: Sequence[str]) -> list[str]:
    """Look for every image.

    Folders are listed rather than files asked for one by one, which takes minutes on a network's disk.

    Args:
        data: The data folder.
        paths: N paths relative to it.

    Returns:
        The N paths, each under the name that its file has: macOS and some archives write letters with accents in
        another Unicode form than the lists that name them.

    Raises:
        InputError: Some are missing (how many, and the first three), or a link leads out of the data folder.
    """
    present: dict[str, dict[str, bool]] = {}
    composed: dict[str, dict[str, list[str]]] = {}
    missing = []
    on_disk = []
    for path in paths:
        folder, slash, name = path.rpartition("/")
        if folder not in present:
            # A folder that is itself a link out of the data folder shows in any of its images.
            resolve_image(data, path)
            present[folder] = _list_files(data / folder)
        if name not in present[folder] and not name.isascii():
            if folder not in composed:
                composed[folder] = _by_composed_form(present[folder])
            alike = composed[folder].get(unicodedata.normalize("NFC", name), [])
            name = alike[0] if len(alike) == 1 else name
        is_link = present[folder].get(name)
        on_disk.append(f"{folder}{slash}{name}")
        if is_link is None:
            missing.append(path)
        elif is_link:
            resolve_image(data, on_disk[-1])
    if missing:
        shown = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        raise InputError(
            "image files are missing", where=data, got=f"{len(missing):,} of {len(paths):,} missing: {shown}",
            wanted="every image of the split file", do=f"{DOWNLOAD}, or give --no-check-images",
        )  # fmt: skip
    return on_disk


def _by_composed_form(names: Iterable[str]) -> dict[str, list[str]]:
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    return alike


def _list_files(folder: Path) -> dict[str, bool]:
    """Name of every file of a folder, and whether it is a link; dangling links are left out."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_symlink() for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise cannot_read("cannot look into a folder", folder, error) from None
