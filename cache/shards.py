"""One shard as bytes: arrays to an HDF5 file and back, with every claim of the file checked.

A shard is small (tens of megabytes) and is made and read in memory: a full disk is then an ordinary error of an
ordinary write, and what was hashed is what is parsed. Datasets are contiguous, not compressed, and carry no times.
"""

import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from .layout import FORMAT, FORMAT_VERSION, Layout, Shard
from .places import is_remote

Arrays = dict[str, NDArray[Any]]

# This range of file versions has checksums on the file's own structures, and every HDF5 since 1.10 reads it.
_LIBVER = ("v110", "v110")
# What h5py raises on a file whose structures make no sense.
_UNREADABLE = (OSError, LookupError, RuntimeError, ValueError, TypeError, AttributeError, ArithmeticError, MemoryError)

_LONGEST_ATTRIBUTE = 256

# By size in bytes: the same bits as whole numbers without and with a sign, and those of infinity.
_FLOAT_BITS: dict[int, tuple[Any, Any, Any]] = {
    2: (np.uint16, np.int16, np.uint16(0x7C00)),
    4: (np.uint32, np.int32, np.uint32(0x7F800000)),
}


class ShardBroken(Exception):  # noqa: N818 - a verdict about a file, turned into a StoreError by whoever knows the folder
    """These bytes are not the shard they should be; the message says why."""


class OtherKey(ShardBroken):
    """A shard of another key or format version."""


def content_sha256(name: str, values: NDArray[Any]) -> str:
    r"""SHA-256, in hex, of a dataset's content.

    Args:
        name: The dataset's name.
        values: Any dtype and shape.

    Returns:
        The hash of the ASCII line ``name dtype shape\n`` (such as ``v_img <f2 (1024, 768)``; a shape of one axis is
        ``(1024,)``) and then of the values' bytes: little-endian, row-major.
    """
    plain = np.ascontiguousarray(values)
    plain = plain.astype(plain.dtype.newbyteorder("<"), copy=False)
    digest = hashlib.sha256(f"{name} {plain.dtype.str} {plain.shape}\n".encode())
    digest.update(plain.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def encode_shard(shard: Shard, layout: Layout, key_digest: str, arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The HDF5 file of a shard of the key with this digest; its datasets have the dtypes and shapes of ``layout``."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=_LIBVER) as file:
        for name, value in _attributes(shard, key_digest).items():
            file.attrs[name] = value
        for name, (dtype, shape) in layout.datasets(shard.part, shard.n_rows).items():
            values = arrays[name]
            assert (values.dtype.newbyteorder("="), values.shape) == (dtype.newbyteorder("="), shape), name
            dataset = file.create_dataset(name, data=values, dtype=dtype, track_times=False)
            dataset.attrs["sha256"] = np.bytes_(content_sha256(name, values))
    return buffer.getvalue()


def decode_shard(data: bytes, shard: Shard, layout: Layout, key_digest: str) -> Arrays:
    """Read what :func:`view_shard` reads, and compare the checksums that the file carries.

    Raises:
        OtherKey: It is a shard of another key or format version.
        ShardBroken: It is anything else than that shard.
    """
    arrays = view_shard(data, shard, layout, key_digest)
    with _opened(data) as file:
        for name, values in arrays.items():
            if _attribute(file[name], "sha256") != np.bytes_(content_sha256(name, values)):
                raise ShardBroken(f"the content of {name} is not what its checksum says")
    return arrays


def view_shard(data: bytes, shard: Shard, layout: Layout, key_digest: str) -> Arrays:
    """Every dataset of a shard, as read-only views of ``data``; checksums are the caller's to check.

    Raises:
        OtherKey, ShardBroken: The file is not the one that :func:`encode_shard` makes of this shard.
    """
    with _opened(data) as file:
        _check_attributes(file, shard, key_digest)
        datasets = layout.datasets(shard.part, shard.n_rows)
        return {name: _values(data, _dataset(file, name, dtype, shape)) for name, (dtype, shape) in datasets.items()}


def is_our_shard(path: Path) -> bool:
    """Whether a file is a shard of some store of this project, as far as its header can be read."""
    try:
        with h5py.File(io.BytesIO(path.read_bytes()) if is_remote(path) else path, "r") as file:
            return bool(_attribute(file, "format") == np.bytes_(FORMAT))
    except _UNREADABLE:
        return False


def same_content(first: Arrays, second: Arrays) -> bool:
    """Whether two shards hold the same bytes under the same names (a NaN equals itself, -0 is not 0)."""
    return first.keys() == second.keys() and all(
        (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()
        for a, b in ((first[name], second[name]) for name in first)
    )


def first_bad_row(values: NDArray[Any]) -> int | None:
    """The first row with a NaN or an infinity.

    Args:
        values: ``(n, ...)`` float16 or float32.

    Returns:
        The row, or None when all is finite.
    """
    # All ones in the exponent is a NaN or an infinity; as whole numbers these are the greatest of their sign. Two
    # looks for the greatest are several times quicker than isfinite on float16, which goes through float32.
    unsigned, signed, infinity = _FLOAT_BITS[values.itemsize]
    sign = unsigned(1 << (8 * values.itemsize - 1))
    whole = values.view(unsigned)
    if whole.size == 0 or (whole.max() < (sign | infinity) and whole.view(signed).max() < signed(infinity)):
        return None
    return int(np.argmax(((whole & ~sign) >= infinity).reshape(len(values), -1).any(axis=1)))


def _attributes(shard: Shard, key_digest: str) -> dict[str, Any]:
    # Fixed-length strings lie in the checksummed header; variable ones would lie in a heap that has no checksum.
    return {
        "format": np.bytes_(FORMAT),
        "format_version": np.int64(FORMAT_VERSION),
        "part": np.bytes_(shard.part),
        "key_digest": np.bytes_(key_digest),
        "shard": np.int64(shard.number),
        "first_row": np.int64(shard.start),
        "rows": np.int64(shard.n_rows),
    }


@contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            yield file
    except _UNREADABLE as error:
        why = str(error).strip("'\"").splitlines() or [type(error).__name__]
        raise ShardBroken(f"not readable as HDF5: {why[0]}") from error


def _check_attributes(file: Any, shard: Shard, key_digest: str) -> None:  # noqa: ANN401 - h5py has no types
    for name, wanted in _attributes(shard, key_digest).items():
        got = _attribute(file, name)
        if got is None or got != wanted:
            # Whose it is comes before which rows it holds: a foreign shard is never to be taken for a damaged one.
            kind = OtherKey if name in {"format_version", "key_digest"} and got is not None else ShardBroken
            raise kind(f"its attribute {name} is {got!r}, not {wanted!r}")


def _attribute(where: Any, name: str) -> Any:  # noqa: ANN401 - h5py has no types
    """An attribute that is one number or one short text of fixed length; None where there is none.

    What it says of its size is looked at before it is read: HDF5 would allocate whatever it claims.
    """
    if name not in where.attrs:
        return None
    held = where.attrs.get_id(name)
    if held.shape != () or held.dtype.kind not in "iuS" or held.dtype.itemsize > _LONGEST_ATTRIBUTE:
        return None
    return where.attrs[name]


def _dataset(file: Any, name: str, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Any:  # noqa: ANN401
    """A dataset that is plain numbers in this very file: no object dtypes, links, external or virtual storage."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink) or not isinstance(file[name], h5py.Dataset):
        raise ShardBroken(f"{name} is absent or is no dataset of this file")
    dataset = file[name]
    if dataset.external is not None or dataset.is_virtual:
        raise ShardBroken(f"{name} lies outside the file")
    if dataset.dtype != dtype or dataset.shape != shape:
        raise ShardBroken(f"{name} is {dataset.dtype} {dataset.shape}, not {dtype} {shape}")
    return dataset


def _values(data: bytes, dataset: Any) -> NDArray[Any]:  # noqa: ANN401
    """The content as a view of the file's bytes: HDF5 says where it is; its own copy is several times slower."""
    start, size = dataset.id.get_offset(), dataset.size * dataset.dtype.itemsize
    if dataset.chunks is not None or start is None or start + size > len(data):
        raise ShardBroken(f"{dataset.name} is not one contiguous run of the file")
    return np.frombuffer(data, dataset.dtype, count=dataset.size, offset=start).reshape(dataset.shape)
