"""Where a store is: a folder of this machine, or one that fsspec reaches by a URL (``s3://``, ``gs://``, ``memory://``).

A URL becomes a ``UPath`` of universal_pathlib, which has the methods of ``Path`` that a store needs; it is imported for
URLs only. ``file://`` is a folder of this machine as any other.
"""

import re
from pathlib import Path
from typing import cast
from urllib.parse import unquote, urlsplit

from .errors import StoreError

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
INSTALL = "pip install -c constraints.txt -e '.[remote]', and fsspec's own package for that kind of URL, such as s3fs"


def place(where: str | Path) -> Path:
    """The folder that a path or a URL names.

    Args:
        where: Text from a user, or a folder that this function gave before.

    Returns:
        A ``Path`` of this machine, or what stands for one elsewhere; :func:`is_remote` tells.

    Raises:
        StoreError: A URL that nothing here can reach.
    """
    if not isinstance(where, str):
        return where
    if URL.match(where) is None:
        return Path(where)
    if where.lower().startswith("file://"):
        parts = urlsplit(where)
        if parts.netloc not in {"", "localhost"}:
            raise StoreError("not a folder of this machine", where=where, wanted="file:///absolute/path")
        return Path(unquote(parts.path))
    try:
        from upath import UPath

        folder = UPath(where)
        if isinstance(folder, Path):  # what UPath makes of a URL that it does not know
            raise ValueError("no such kind of URL")
        folder.fs  # noqa: B018 - finds out now whether the package for that kind of URL is there
    except (ImportError, ValueError) as error:
        raise StoreError("cannot reach a URL", where=where, got=error, do=INSTALL) from None
    return cast("Path", folder)


def is_remote(folder: Path) -> bool:
    """Whether a folder is reached by a URL: it has no locks, no renames and no syncing."""
    return not isinstance(folder, Path)


def entries(folder: Path) -> list[Path]:
    """What is in a folder; nothing where there is none, as an empty one does not exist in a store of objects."""
    return list(folder.iterdir()) if folder.is_dir() else []
