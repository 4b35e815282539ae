"""The index file: samples that vote, in one safetensors file with a checksum (docs/tagging.md has the format).

It is written under a temporary name, read back, synced and renamed, by one writer at a time; so a kill leaves the old
file or the new one. No pickle anywhere.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ... import InputError, __version__, cannot_read
from ...cache.files import sync_folder
from ...cache.key import canonical_json
from ...cache.locks import LockHeld, take_lock
from ...cache.strict_json import parse_json
from ...heads.tensor_files import Arrays, load_arrays, read_about
from ..core.files import check_input, make_folder, remove_leftovers_of, unwritable, write_whole
from ..core.run import now
from .tag_index import Origin, TagIndex

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
        "format": FORMAT, "version": FORMAT_VERSION, "mmcli": __version__, "created": now(),
        "category_names": list(index.category_names), "origin": asdict(index.origin),
    }  # fmt: skip
    checksum = _checksum(about, arrays)
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
        The index, and what its header says: format, version, mmcli, created, category_names, origin, sha256.

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
    if _checksum({key: value for key, value in about.items() if key != "sha256"}, arrays) != about.get("sha256"):
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
            about = parse_json((file.metadata() or {})["mmcli_index"])
    except (OSError, SafetensorError, LookupError, ValueError):
        return False
    return isinstance(about, dict) and about.get("format") == FORMAT


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the file says of itself; other files and newer formats are refused before anything else is looked at."""
    try:
        about = parse_json(metadata["mmcli_index"])
        version = about["version"]
        known = about["format"] == FORMAT and type(version) is int and version >= 1
    except (KeyError, ValueError, TypeError):
        known = False
    if not known:
        raise InputError(
            "not an index", where=path, got="a safetensors file of another kind",
            wanted="a file of `mmcli index build`", do=REBUILD,
        )  # fmt: skip
    if version > FORMAT_VERSION:
        raise InputError(
            "an index of a newer format", where=path, got=f"version {version}",
            wanted=f"at most version {FORMAT_VERSION}", do="use the newer mmcli that wrote it",
        )  # fmt: skip
    return dict(about)


def _checksum(about: Mapping[str, Any], arrays: Arrays) -> str:
    """SHA-256, in hex, of the header without it and of every array by name: dtype, shape and bytes."""
    digest = hashlib.sha256(canonical_json(dict(about)).encode())
    for name in sorted(arrays):
        values = np.ascontiguousarray(arrays[name])
        digest.update(f"\0{name}\0{values.dtype.str}\0{list(values.shape)}\0".encode())
        digest.update(values.data.cast("B") if values.size else b"")
    return digest.hexdigest()


def _arrays(index: TagIndex) -> Arrays:
    rows, labels = np.nonzero(index.labels)
    ends = np.searchsorted(rows, np.arange(len(index) + 1)).astype(np.int64)
    arrays: Arrays = {
        "image_id": index.image_id, "soft": index.soft, "label_ends": ends, "label": labels.astype(np.int32),
    }  # fmt: skip
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
        ValueError: Something does not fit; likewise KeyError, TypeError and what Arrow raises.
    """
    names, ids, soft, packed = tuple(about["category_names"]), arrays["image_id"], arrays["soft"], arrays.get("packed")
    n = len(ids)
    if not n or len(np.unique(ids)) != n or ids.dtype != np.int64:
        raise ValueError("image ids that are not there once each")
    if soft.dtype != np.float32 or soft.ndim != 2 or len(soft) != n or not np.isfinite(soft).all():
        raise ValueError("soft codes that do not fit")
    if packed is not None and (packed.dtype != np.uint8 or packed.ndim != 2 or len(packed) != n):
        raise ValueError("packed codes that do not fit")
    if not names or len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
        raise ValueError("category names that are no different names")
    ends, label = _ends(arrays["label_ends"], n, len(arrays["label"])), arrays["label"]
    if len(label) and not (label.min() >= 0 and label.max() < len(names)):
        raise ValueError("labels beyond the category names")
    labels = np.zeros((n, len(names)), np.uint8)
    labels[np.repeat(np.arange(n), np.diff(ends)), label] = 1
    paths, captions = (_texts(arrays[name], arrays[f"{name}_ends"], n) for name in ("path", "caption"))
    return TagIndex(
        image_id=ids, soft=soft, packed=packed, labels=labels, category_names=names, paths=paths, captions=captions,
        origin=Origin(**about["origin"]),
    )  # fmt: skip


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
