"""The index file: samples that vote, in one safetensors file with a checksum (docs/tagging.md has the format).

It is written under a temporary name, read back, synced and renamed, by one writer at a time; so a kill leaves the old
file or the new one. No pickle anywhere.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ... import __version__
from ...cache.files import sync_folder
from ...cache.key import canonical_json
from ...cache.locks import LockHeld, take_lock
from ...cache.strict_json import parse_json
from ...errors import InputError, cannot_read
from ...heads.tensor_files import Arrays, load_arrays, read_about
from ..core.files import check_input, make_folder, remove_leftovers_of, unwritable, write_whole
from ..core.results import Codes
from ..core.run import now
from ..evaluation.search import rows_of

SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The head and the encoder that made the codes of an index; a query has to be made by the same.

    Attributes:
        head: Digest of the head (:func:`~mmcli.pipeline.tagging.encode.head_digest`).
        store: Digest of the key of the store that the head was trained from; it covers checkpoint and processing.
        model: Name of the SigLIP2 checkpoint.
        patches: Its patch budget.
        encoder: Digest of checkpoint, processing and lengths; empty where the store that knows it was gone.
    """

    head: str
    store: str
    model: str
    patches: int
    encoder: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class TagIndex:
    """N samples that vote.

    Attributes:
        image_id: ``(N,)`` int64, every value once.
        soft: Soft codes h ``(N, F)`` float32, or z for a head without hash layer.
        packed: Hard codes ``(N, B / 8)`` uint8; ``None`` without hash layer.
        labels: ``(N, C)`` uint8, 0 or 1.
        category_names: C names, in label order.
        paths: N paths relative to a data folder; empty where they are not known.
        captions: The caption of each code; empty where it is not known.
        origin: The head and the encoder that made the codes.
    """

    image_id: npt.NDArray[np.int64]
    soft: npt.NDArray[np.float32]
    packed: npt.NDArray[np.uint8] | None
    labels: npt.NDArray[np.uint8]
    category_names: tuple[str, ...]
    paths: pa.StringArray
    captions: pa.StringArray
    origin: Origin

    def __len__(self) -> int:
        return len(self.image_id)

    @property
    def bits(self) -> int:
        """B; 0 without hash layer."""
        return 0 if self.packed is None else 8 * self.packed.shape[1]

    @classmethod
    def from_codes(
        cls,
        codes: Codes,
        names: Sequence[str],
        origin: Origin,
        *,
        paths: pa.StringArray | None = None,
        captions: pa.StringArray | None = None,
    ) -> "TagIndex":
        """The codes of a split as an index; paths or captions that are not given are not known."""
        nothing = pa.array([""] * len(codes), pa.string())
        arrays = {name: getattr(codes, name) for name in ("image_id", "soft", "packed", "labels")}
        texts = {"paths": nothing if paths is None else paths, "captions": nothing if captions is None else captions}
        return cls(**arrays, **texts, category_names=tuple(names), origin=origin)

    def rows_of(self, image_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Row of each of ``(n,)`` image ids, -1 where it is not here."""
        return rows_of(self.image_id, image_ids)

    def added(self, other: "TagIndex", *, replacing: bool = False) -> "TagIndex":
        """These samples, then the other's; category names are united, new ones come last.

        Args:
            other: Codes of the same head.
            replacing: Whether samples that are here already give way to the other's.

        Raises:
            InputError: An image id is in both, and ``replacing`` is false; or the codes are of another head.
        """
        check_origin(self.origin, other.origin, where="the samples to add")
        if not replacing:
            self.check_new(other.image_id)
        # Empty for a moment where every sample is replaced, so not through `without`.
        parts = (self._rows(np.flatnonzero(~np.isin(self.image_id, other.image_id))), other)
        names = tuple(dict.fromkeys([*self.category_names, *other.category_names]))
        labels = np.zeros((sum(map(len, parts)), len(names)), np.uint8)
        labels[: len(parts[0]), : self.labels.shape[1]] = parts[0].labels
        labels[len(parts[0]) :, [names.index(name) for name in other.category_names]] = other.labels
        packed = [part.packed for part in parts if part.packed is not None]
        return replace(
            self,
            image_id=np.concatenate([part.image_id for part in parts]),
            soft=np.concatenate([part.soft for part in parts]),
            packed=np.concatenate(packed) if packed else None,
            labels=labels,
            category_names=names,
            paths=pa.concat_arrays([part.paths for part in parts]),
            captions=pa.concat_arrays([part.captions for part in parts]),
        )

    def check_new(self, image_ids: npt.NDArray[np.int64]) -> None:
        """Refuse samples that are here already.

        Raises:
            InputError: One of the ids ``(n,)`` is here.
        """
        present = image_ids[self.rows_of(image_ids) >= 0]
        if len(present):
            raise InputError(
                "already in the index",
                got=_some_ids(present),
                wanted="image ids that are not there",
                do="give the samples other ids, or --force to replace the old ones",
            )

    def without(self, image_ids: npt.NDArray[np.int64]) -> "TagIndex":
        """All samples but some; categories that no sample has any more keep their place.

        Raises:
            InputError: One of the ids ``(n,)`` is not here, or nothing would be left.
        """
        absent = image_ids[self.rows_of(image_ids) < 0]
        if len(absent):
            wanted, do = "image ids that are there", "leave them out of --ids"
            raise InputError("not in the index", got=_some_ids(absent), wanted=wanted, do=do)
        kept = np.flatnonzero(~np.isin(self.image_id, image_ids))
        if not len(kept):
            got, wanted = f"all {len(self):,} to be removed", "at least one that stays"
            raise InputError("an index needs a sample", got=got, wanted=wanted, do="delete the file instead")
        return self._rows(kept)

    def _rows(self, rows: npt.NDArray[np.int64]) -> "TagIndex":
        return replace(
            self,
            image_id=self.image_id[rows],
            soft=self.soft[rows],
            labels=self.labels[rows],
            packed=None if self.packed is None else self.packed[rows],
            paths=self.paths.take(pa.array(rows)),
            captions=self.captions.take(pa.array(rows)),
        )


def check_origin(index: Origin, query: Origin, *, where: object) -> None:
    """Refuse codes that another head, or the same head on another encoder, has made.

    Raises:
        InputError: They differ.
    """
    if index.head != query.head:
        raise InputError(
            "codes of another head",
            where=where,
            got=f"head {query.head[:12]}",
            wanted=f"head {index.head[:12]}, which made the index",
            do="name the --run that the index was built from, or build it again with `mmcli index build`",
        )
    if index.encoder and query.encoder and index.encoder != query.encoder:
        raise InputError(
            "embeddings of another encoder",
            where=where,
            got=f"{query.model}, encoder {query.encoder[:12]}",
            wanted=f"{index.model}, encoder {index.encoder[:12]}",
            do="name the --model that the index was built with",
        )


def _some_ids(ids: npt.NDArray[np.int64]) -> str:
    shown = ", ".join(map(str, ids[:SHOWN].tolist())) + (", ..." if len(ids) > SHOWN else "")
    return f"{len(ids):,} image id{'s' if len(ids) > 1 else ''}: {shown}"


FORMAT, FORMAT_VERSION = "mmcli-index", 1
REBUILD = "build it again with `mmcli index build`"


def write_index(path: Path, index: TagIndex) -> str:
    """Write an index, whole or not at all; the caller holds :func:`writing`.

    Returns:
        The checksum that the file carries.

    Raises:
        InputError: It cannot be written.
    """
    arrays = _arrays(index)
    about = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "mmcli": __version__,
        "created": now(),
        "category_names": list(index.category_names),
        "origin": asdict(index.origin),
    }
    checksum = digest_arrays(about, arrays)
    data = save(arrays, metadata={"mmcli_index": canonical_json({**about, "sha256": checksum})})

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)
        if temporary.read_bytes() != data:
            raise OSError(f"{path} gave back something else than was written")

    write_whole(path, write)
    sync_folder(path.parent)
    return checksum


def read_index(path: Path) -> tuple[TagIndex, dict[str, Any]]:
    """Read an index file and check everything in it.

    Returns:
        The index, and its header: format, version, mmcli, created, category_names, origin, sha256.

    Raises:
        InputError: No such file, no index, damaged, or of a newer format.
    """
    wanted = "a file of `mmcli index build`"
    check_input(path, "index", wanted=wanted, do=REBUILD)
    try:
        about = _header(path, read_about(path))
        arrays, _ = load_arrays(path)
    except OSError as error:
        raise cannot_read("cannot read the index", path, error, wanted=wanted, do=REBUILD) from None
    except InputError:
        raise
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    if digest_arrays({key: about[key] for key in about if key != "sha256"}, arrays) != about.get("sha256"):
        raise _damaged(path, "a checksum that does not fit the content")
    try:
        return _index(arrays, about), about
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, MemoryError, pa.ArrowException) as error:
        raise _damaged(path, f"{type(error).__name__} {error}") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Hold the right to write an index file; what a killed writer left half-written is removed.

    Raises:
        InputError: Another process holds it, or the folder cannot be written.
    """
    make_folder(path.parent)
    try:
        lock = take_lock(path.with_name(f".{path.name}.lock"))
    except LockHeld as error:
        raise InputError("another process writes this index", where=path, do=f"{error.do}; then try again") from None
    except OSError as error:
        raise unwritable(path, error) from None
    try:
        remove_leftovers_of(path)
        yield
    finally:
        lock.release()


def is_index(path: Path) -> bool:
    """Whether a file says that it is an index, of whatever version; it may be damaged."""
    try:
        with safe_open(path, framework="np") as file:
            return bool(_parsed_header(file.metadata()))
    except (OSError, SafetensorError, LookupError, ValueError):
        return False


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The header of the file; other files and newer formats are refused before anything else is looked at."""
    about = _parsed_header(metadata)
    version = about.get("version")
    if type(version) is not int or version < 1:
        got, wanted = "a safetensors file of another kind", "a file of `mmcli index build`"
        raise InputError("not an index", where=path, got=got, wanted=wanted, do=REBUILD)
    if version > FORMAT_VERSION:
        got, wanted = f"version {version}", f"at most version {FORMAT_VERSION}"
        do = "use the newer mmcli that wrote it"
        raise InputError("an index of a newer format", where=path, got=got, wanted=wanted, do=do)
    return about


def _parsed_header(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """The header of an index in the metadata of a safetensors file; empty in other files."""
    try:
        about = parse_json((metadata or {})["mmcli_index"])
    except (KeyError, ValueError):
        return {}
    return about if isinstance(about, dict) and about.get("format") == FORMAT else {}


def digest_arrays(header: Mapping[str, Any], arrays: Arrays) -> str:
    """SHA-256, in hex, of a header, then of every array by name: dtype, shape and bytes."""
    digest = hashlib.sha256(canonical_json(dict(header)).encode())
    for name in sorted(arrays):
        values = np.ascontiguousarray(arrays[name])
        digest.update(f"\0{name}\0{values.dtype.str}\0{list(values.shape)}\0".encode())
        digest.update(values.data.cast("B") if values.size else b"")
    return digest.hexdigest()


def _arrays(index: TagIndex) -> Arrays:
    rows, labels = np.nonzero(index.labels)
    ends = np.searchsorted(rows, np.arange(len(index) + 1)).astype(np.int64)
    arrays: Arrays = {
        "image_id": index.image_id,
        "soft": index.soft,
        "label_ends": ends,
        "label": labels.astype(np.int32),
    }
    if index.packed is not None:
        arrays["packed"] = index.packed
    for name, texts in (("path", index.paths), ("caption", index.captions)):
        encoded = [text.encode() for text in texts.to_pylist()]
        arrays[name] = np.frombuffer(b"".join(encoded), np.uint8)
        arrays[f"{name}_ends"] = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return {name: np.ascontiguousarray(values) for name, values in arrays.items()}


def _index(arrays: Arrays, about: Mapping[str, Any]) -> TagIndex:
    """The index in the arrays.

    Raises:
        ValueError, LookupError, TypeError, pa.ArrowException: An array does not fit.
    """
    names, ids, soft, packed = tuple(about["category_names"]), arrays["image_id"], arrays["soft"], arrays.get("packed")
    n, label = len(ids), arrays["label"]
    ends = _ends(arrays["label_ends"], n, len(label))
    checks = {
        "image ids that are not there once each": n and len(np.unique(ids)) == n and ids.dtype == np.int64,
        "soft codes that do not fit": soft.dtype == np.float32 and soft.ndim == 2 and len(soft) == n,
        "soft codes that are not finite": np.isfinite(soft).all(),
        "packed codes that do not fit": packed is None
        or (packed.dtype == np.uint8 and packed.ndim == 2 and len(packed) == n),
        "category names that are no different names": names
        and len(set(names)) == len(names)
        and all(isinstance(name, str) for name in names),
        "labels beyond the category names": not len(label) or (label.min() >= 0 and label.max() < len(names)),
    }
    for what, fits in checks.items():
        if not fits:
            raise ValueError(what)
    labels = np.zeros((n, len(names)), np.uint8)
    labels[np.repeat(np.arange(n), np.diff(ends)), label] = 1
    return TagIndex(
        image_id=ids,
        soft=soft,
        packed=packed,
        labels=labels,
        category_names=names,
        paths=_texts(arrays["path"], arrays["path_ends"], n),
        captions=_texts(arrays["caption"], arrays["caption_ends"], n),
        origin=Origin(**about["origin"]),
    )


def _ends(ends: npt.NDArray[Any], n: int, total: int) -> npt.NDArray[np.int64]:
    if ends.shape != (n + 1,) or ends[0] != 0 or ends[-1] != total or (np.diff(ends) < 0).any():
        raise ValueError("lists whose ends do not fit")
    return ends.astype(np.int64)


def _texts(letters: npt.NDArray[np.uint8], ends: npt.NDArray[Any], n: int) -> pa.StringArray:
    offsets = pa.py_buffer(_ends(ends, n, len(letters)).astype(np.int64))
    texts = pa.LargeStringArray.from_buffers(n, offsets, pa.py_buffer(letters.astype(np.uint8).tobytes()))
    texts.validate(full=True)
    return texts.cast(pa.string())


def _damaged(path: Path, got: str) -> InputError:
    return InputError("a damaged index", where=path, got=" ".join(got.split())[:200], wanted="a whole file", do=REBUILD)
