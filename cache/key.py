"""The key of a store: everything that changes a number in it."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

from .errors import StoreError
from .layout import FORMAT_VERSION, StoredDtype
from .strict_json import parse_json

ComputeDtype = Literal["float32", "bfloat16", "float16"]

_TEXT_FIELDS = ("model", "revision", "text_length", "dtype", "manifest_sha256", "compute_dtype", "format_version")
_SHORT = 12
_LONGEST_VALUE = 60


def canonical_json(value: object) -> str:
    """JSON with one spelling for one value: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: A float is not finite.
        TypeError: Something is not JSON.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: object) -> str:
    """SHA-256, in hex, of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class StoreKey:
    """What the numbers in a store depend on.

    Two stores with one key hold the same numbers, up to the rounding of sums in another order: on other hardware, in
    other sizes of batches.

    Attributes:
        model: Checkpoint, hub id or the name of a local folder.
        revision: Hub commit, or ``sha256:...`` of local weights.
        processor: Settings of the image processor as JSON; kept in canonical spelling.
        patches: ``max_num_patches`` of the image tower.
        text_length: Tokens per caption, after padding.
        dtype: How embeddings are stored.
        manifest_sha256: Hash of the manifest's content, 64 hex digits.
        compute_dtype: The arithmetic that computed them.
        format_version: Version of the store's format.

    Raises:
        StoreError: A field has a wrong type or value.
    """

    model: str
    revision: str
    processor: str
    patches: int
    text_length: int
    dtype: StoredDtype
    manifest_sha256: str
    compute_dtype: ComputeDtype
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name in ("model", "revision", "processor"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise _bad(name, value, "a name")
        for name in ("patches", "text_length", "format_version"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise _bad(name, value, "a whole number above 0")
        for name, choices in (("dtype", get_args(StoredDtype)), ("compute_dtype", get_args(ComputeDtype))):
            if getattr(self, name) not in choices:
                raise _bad(name, getattr(self, name), " or ".join(choices))
        if not (isinstance(self.manifest_sha256, str) and re.fullmatch("[0-9a-f]{64}", self.manifest_sha256)):
            raise _bad("manifest_sha256", self.manifest_sha256, "64 hex digits")
        try:
            # Two spellings of the same settings must not make two stores.
            object.__setattr__(self, "processor", canonical_json(parse_json(self.processor)))
        except ValueError as error:
            raise _bad("processor", self.processor, "JSON") from error

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the whole key."""
        return digest_of(self.to_dict())

    @property
    def commit(self) -> str | None:
        """The commit of a hub checkpoint; ``None`` where the revision is the hash of local files."""
        return None if self.revision.startswith("sha256:") else self.revision

    @property
    def text_digest(self) -> str:
        """SHA-256, in hex, of what the caption embeddings depend on: neither patches nor image processor."""
        whole = self.to_dict()
        return digest_of({name: whole[name] for name in _TEXT_FIELDS})

    @property
    def folder_name(self) -> str:
        """A readable name for the store's folder, such as ``siglip2-base-patch16-naflex-p256-float16-3fa9c1d2e4b5``."""
        last = self.model.rstrip("/").rsplit("/", 1)[-1].lower()
        slug = re.sub("[^a-z0-9._]+", "-", last).strip("-.")[:80] or "model"
        return f"{slug}-p{self.patches}-{self.dtype}-{self.digest[:_SHORT]}"

    def diff(self, other: "StoreKey") -> list[str]:
        """What differs, one readable line a field: ``patches: 256 against 512`` (this one first)."""
        lines = []
        for name, mine in self.to_dict().items():
            theirs = getattr(other, name)
            if mine == theirs:
                continue
            lines += _diff_settings(mine, theirs) if name == "processor" else [_line(name, mine, theirs)]
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The key that :meth:`to_dict` wrote.

        Raises:
            StoreError: A field is missing, unknown, or has a wrong value.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            got = sorted(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
            raise StoreError("a store key with other fields", got=got, wanted=sorted(names))
        return cls(**values)


def _bad(name: str, got: object, wanted: str) -> StoreError:
    return StoreError("bad store key", where=name, got=repr(got), wanted=wanted)


def _line(name: str, mine: object, theirs: object) -> str:
    short = [
        text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..." for text in map(str, (mine, theirs))
    ]
    return f"{name}: {short[0]} against {short[1]}"


def _diff_settings(mine: str, theirs: str) -> list[str]:
    """Processor settings are long: name the ones that differ."""
    settings = [json.loads(mine), json.loads(theirs)]
    if not all(isinstance(values, dict) for values in settings):
        return [_line("processor", mine, theirs)]
    # Compared as JSON: to Python 1, 1.0 and true are equal, to a key they are not.
    a, b = ({name: canonical_json(value) for name, value in values.items()} for values in settings)
    names = [name for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
    return [_line(f"processor {name}", a.get(name, "not set"), b.get(name, "not set")) for name in names]
