"""Which shards were found whole before: ``.checked.json``, a note that a reader leaves beside them.

Checking a file's SHA-256 takes several times as long as reading it, and a store is read far more often than it
changes. So whoever writes a store, or loads it and finds a shard right, notes the file's size, inode, times and mark
(``direct.py``). As long as a file has these it is read once, and its mark is compared; anything else is checked in full
again. A change of content moves the time of change (``ctime``), which nobody can set back; what does not pass through
the file system, such as a disk that forgets, shows in the mark. The note only ever saves time: without it, or where it
cannot be written, all is checked.
"""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .direct import Span, mark_of, spans
from .key import digest_of
from .layout import CHECKED, temporary_name
from .metadata import ShardEntry, StoreManifest
from .places import is_remote
from .strict_json import parse_json

_log = logging.getLogger(__name__)

_FORMAT, _VERSION = "mmcli-checked", 1
# Times of a file move in steps of some milliseconds, of two seconds at worst: a file that changed so recently may
# change once more under the same time, so it is not noted.
SETTLED_NS = 2_500_000_000


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """What the file system says of a file: it changes whenever the content does."""

    bytes: int
    inode: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """The stamp in what ``stat`` gave."""
        return cls(bytes=status.st_size, inode=status.st_ino, mtime_ns=status.st_mtime_ns, ctime_ns=status.st_ctime_ns)

    @property
    def settled(self) -> bool:
        """Whether a change from now on would show."""
        return time.time_ns() - max(self.mtime_ns, self.ctime_ns) > SETTLED_NS


@dataclass(frozen=True, kw_only=True)
class Record:
    """A shard that was found whole.

    Attributes:
        stamp: Its file's, from before it was read.
        sha256: Of the file; what the manifest says.
        starts: Where each of its datasets starts in the file, in bytes.
        mark: Of its content.
    """

    stamp: Stamp
    sha256: str
    starts: Mapping[str, int]
    mark: int

    @classmethod
    def of(cls, entry: ShardEntry, stamp: Stamp, data: bytes, views: Mapping[str, NDArray[Any]]) -> Self:
        """The record of a shard that was just found whole.

        Args:
            entry: Its line in the manifest.
            stamp: Its file's.
            data: The whole file.
            views: Its datasets, as views of ``data``.
        """
        base = np.frombuffer(data, np.uint8).ctypes.data
        places = {name: (values.ctypes.data - base, values.nbytes) for name, values in views.items()}
        starts = {name: start for name, (start, _) in places.items()}
        return cls(stamp=stamp, sha256=entry.sha256, starts=starts, mark=mark_of(data, spans(len(data), places)))

    def cut(self, entry: ShardEntry, manifest: StoreManifest) -> tuple[Span, ...]:
        """The file's datasets, and what lies between.

        Raises:
            ValueError, KeyError: The record is not of this shard.
        """
        wanted = manifest.layout.datasets(entry.part, entry.rows)
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in wanted.items()}
        return spans(entry.bytes, {name: (self.starts[name], size) for name, size in sizes.items()})


def stamp_of(path: Path) -> Stamp | None:
    """A file's stamp; None where there is no file, or it is not of this machine."""
    if is_remote(path):
        return None
    try:
        return Stamp.of(path.stat())
    except OSError:
        return None


def read_records(folder: Path, manifest: StoreManifest) -> dict[str, Record]:
    """What is noted of the shards of this very store, by file name; nothing where the note is absent or unsound."""
    if is_remote(folder):
        return {}
    try:
        document = parse_json((folder / CHECKED).read_bytes())
        checksum = document.pop("checksum")
        if checksum != digest_of(document) or document["store"] != _identity(manifest):
            return {}
        found = {
            name: Record(
                stamp=Stamp(**one["stamp"]),
                sha256=one["sha256"],
                starts={key: int(value) for key, value in one["starts"].items()},
                mark=one["mark"],
            )
            for name, one in document["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    wanted = {entry.file: entry.sha256 for entry in manifest.shards}
    return {name: record for name, record in found.items() if wanted.get(name) == record.sha256}


def write_records(folder: Path, manifest: StoreManifest, records: Mapping[str, Record]) -> None:
    """Leave a note; a folder that cannot be written to stays without."""
    document = {
        "store": _identity(manifest),
        "files": {
            name: {"stamp": asdict(one.stamp), "sha256": one.sha256, "starts": dict(one.starts), "mark": one.mark}
            for name, one in sorted(records.items())
        },
    }
    text = json.dumps(document | {"checksum": digest_of(document)})
    temporary = folder / temporary_name(CHECKED)
    try:
        try:
            temporary.unlink(missing_ok=True)
            with temporary.open("x", encoding="utf-8") as stream:
                stream.write(text)
            temporary.replace(folder / CHECKED)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        _log.debug("no note of checked shards: %s", error)


def _identity(manifest: StoreManifest) -> dict[str, Any]:
    """Everything outside a shard that its check depends on."""
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "digest": manifest.key.digest,
        "text_digest": manifest.key.text_digest,
        "layout": asdict(manifest.layout),
    }
