"""The two readable files of a store: ``manifest.json``, written last, and ``key.json``, written first.

Both are sealed: ``checksum`` is the SHA-256 of the canonical JSON of everything else in the file, so a digit that
changed on the disk, or by hand, is found.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self, TypeVar

from .errors import RESUME, StoreDamaged, StoreError, StoreMismatch
from .key import StoreKey, digest_of
from .layout import FORMAT, FORMAT_VERSION, INDEX, KEY, MANIFEST, PARTS, Layout, Part, Shard
from .strict_json import parse_json

_LARGEST = 2**63


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file as the manifest knows it."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardEntry(FileEntry):
    """A shard as the manifest knows it. ``captions`` counts the real captions of a text shard; 0 in an image shard."""

    part: Part
    number: int
    first_row: int
    captions: int

    @property
    def shard(self) -> Shard:
        """The rows of the store that it holds."""
        return Shard(self.part, self.number, self.first_row, self.first_row + self.rows)


Entry = TypeVar("Entry", bound=FileEntry)
Parsed = TypeVar("Parsed")


@dataclass(frozen=True, kw_only=True)
class StoreManifest:
    """The content of a store's ``manifest.json``.

    Attributes:
        key: The store's key.
        layout: The store's shape.
        index: The index file.
        shards: Every shard: image shards, then text shards, each part in order.
        created: When the store was finished: UTC, ISO 8601 with microseconds.
        extra: What the writer keeps beside the arrays: library versions, device and the like.
        skipped: Rows without an image embedding, rising, and why.
    """

    key: StoreKey
    layout: Layout
    index: FileEntry
    shards: tuple[ShardEntry, ...]
    created: str
    extra: dict[str, Any]
    skipped: Mapping[int, str] = field(default_factory=dict)

    @property
    def n_captions(self) -> int:
        """Real captions in the store."""
        return sum(entry.captions for entry in self.shards)

    def to_dict(self) -> dict[str, Any]:
        """The document, not yet sealed."""
        return _head(self.key) | {
            "created": self.created,
            "counts": {"captions": self.n_captions} | _counts(self.layout),
            "extra": self.extra,
            "index": asdict(self.index),
            "shards": [asdict(entry) for entry in self.shards],
            "skipped": [{"row": row, "reason": reason} for row, reason in self.skipped.items()],
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """The manifest that :meth:`to_dict` wrote.

        Raises:
            StoreError, KeyError, TypeError, ValueError: It is not one.
        """
        key, counts = _key(document), document["counts"]
        layout = _layout(key, counts)
        if len(document["shards"]) != 2 * layout.n_shards:  # said before a list of all shards is made
            raise ValueError("its list of shards does not cover the rows")
        manifest = cls(
            key=key,
            layout=layout,
            index=_entry(FileEntry, document["index"]),
            shards=tuple(_entry(ShardEntry, entry) for entry in document["shards"]),
            created=datetime.fromisoformat(document["created"]).isoformat(timespec="microseconds"),
            extra=dict(document["extra"]),
            skipped={line["row"]: line["reason"] for line in document["skipped"]},
        )
        # File names are derived, never trusted: a name in the document cannot lead out of the folder.
        names = [(entry.shard, entry.file) for entry in manifest.shards]
        if names != [(shard, shard.name) for shard in layout.all_shards()]:
            raise ValueError("its list of shards does not cover the rows in order")
        if (manifest.index.file, manifest.index.rows) != (INDEX, layout.n_images):
            raise ValueError("its index is another file or has other rows")
        for entry in manifest.shards:
            if entry.bytes < (least := layout.n_bytes(entry.part, entry.rows)):
                raise ValueError(f"{entry.file} has {entry.bytes} bytes, its arrays alone would have {least}")
        rows = [line["row"] for line in document["skipped"]]
        if not all(type(row) is int and isinstance(reason, str) for row, reason in manifest.skipped.items()):
            raise ValueError("its list of skipped rows is not one of numbers and reasons")
        if rows != sorted(set(rows)) or not all(0 <= row < layout.n_images for row in rows):
            raise ValueError("its list of skipped rows is not in order")
        if type(counts["captions"]) is not int or counts["captions"] != manifest.n_captions:
            raise ValueError("its count of captions is not the sum over its shards")
        return manifest


def _entry(kind: type[Entry], record: Mapping[str, Any]) -> Entry:
    """A file's line in the manifest, every field of the type that it should have.

    Raises:
        TypeError, ValueError: It is none.
    """
    entry = kind(**record)
    for name, value in vars(entry).items():
        wanted = str if name in {"file", "sha256", "part"} else int
        if type(value) is not wanted or (isinstance(value, int) and not 0 <= value < _LARGEST):
            raise ValueError(f"{name} of a file is {value!r:.60}")
    return entry


def manifest_bytes(manifest: StoreManifest) -> bytes:
    """The bytes that ``manifest.json`` is written as."""
    return _seal(manifest.to_dict())


def key_bytes(key: StoreKey, layout: Layout) -> bytes:
    """What is written to ``key.json``, so that an unfinished folder is recognised."""
    return _seal(_head(key) | {"counts": _counts(layout)})


def read_manifest(folder: Path) -> StoreManifest:
    """Read and check the ``manifest.json`` of a store.

    Raises:
        FileNotFoundError: There is none.
        StoreMismatch: It is of another format version.
        StoreDamaged: It is not readable.
    """
    return _read(folder / MANIFEST, StoreManifest.from_dict)


def read_key(folder: Path) -> tuple[StoreKey, Layout]:
    """Read ``key.json``, and raise what :func:`read_manifest` raises."""

    def parse(document: dict[str, Any]) -> tuple[StoreKey, Layout]:
        key = _key(document)
        return key, _layout(key, document["counts"])

    return _read(folder / KEY, parse)


def _read(path: Path, parse: Callable[[dict[str, Any]], Parsed]) -> Parsed:
    document = _unseal(path)
    try:
        return parse(document)
    except (StoreError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from error


def is_ours(path: Path) -> bool:
    """Whether a JSON file was written by this project, sound or not."""
    try:
        return f'"format": "{FORMAT}"' in path.read_text(encoding="utf-8", errors="replace")[:200]
    except OSError:
        return False


def _head(key: StoreKey) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "digest": key.digest,
        "text_digest": key.text_digest,
        "key": key.to_dict(),
    }


def _key(document: Mapping[str, Any]) -> StoreKey:
    key = StoreKey.from_dict(document["key"])
    if (document["digest"], document["text_digest"]) != (key.digest, key.text_digest):
        raise ValueError("its digest is not its key's")
    return key


# What the document calls the sizes of a layout, in its order.
_COUNTS = {
    "images": "n_images",
    "width": "width",
    "captions_per_image_max": "n_captions_max",
    "shard_rows": "shard_rows",
    "batch_tokens": "batch_tokens",
}


def _counts(layout: Layout) -> dict[str, int]:
    return {name: getattr(layout, field) for name, field in _COUNTS.items()}


def _layout(key: StoreKey, counts: Mapping[str, Any]) -> Layout:
    return Layout(dtype=key.dtype, **{field: counts[name] for name, field in _COUNTS.items()})


def _seal(document: dict[str, Any]) -> bytes:
    return (json.dumps(document | {"checksum": digest_of(document)}, indent=2, ensure_ascii=False) + "\n").encode()


def _unseal(path: Path) -> dict[str, Any]:
    try:
        document = parse_json(path.read_bytes())
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"it does not say it is a {FORMAT}")
        version = document.get("format_version")
        if type(version) is int and version != FORMAT_VERSION:
            newer = "update mmcli"
            older = "extract into another folder, or replace it with `mmcli extract --force`"
            raise StoreMismatch(
                "a store of another format version",
                where=path.parent,
                got=version,
                wanted=FORMAT_VERSION,
                do=newer if version > FORMAT_VERSION else older,
            )
        if document.pop("checksum", None) != digest_of(document):  # ValueError: an infinite number, half a surrogate
            raise ValueError("its checksum is wrong")
    except (FileNotFoundError, StoreMismatch):
        raise
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    return document


def _damaged(path: Path, why: object) -> StoreDamaged:
    return StoreDamaged("cannot read", where=path, got=why, do=RESUME)


assert PARTS == ("image", "text"), "the order of parts is part of the format"
