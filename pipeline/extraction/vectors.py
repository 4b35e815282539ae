"""Embeddings that another tool wrote as parquet, matched to a manifest by image id.

The rows may come in any order, so they are put in the manifest's order in a scratch file on the disk of the store,
which has no name and is gone when the process ends.
"""

import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ...cache.parquet import open_parquet, unreadable
from ...errors import InputError
from ..core.files import make_folder, unwritable
from ..data.manifest import Manifest

ALLOWED = "float16 or float32"
_CHUNK = 4096


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """R rows of floats, memory-mapped.

    Attributes:
        where: The file or folder.
        parts: Files and their arrays ``(r, D)`` or ``(r, C, D)``, in order, all of one dtype in any byte order.
        in_file_order: Whether row numbers mean something to whoever looks into the files.
    """

    where: Path
    parts: Sequence[tuple[Path, npt.NDArray[Any]]]
    in_file_order: bool = True

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        return np.cumsum([0, *(len(array) for _, array in self.parts)])

    @property
    def dtype(self) -> np.dtype[Any]:
        """float16 or float32, in the byte order of this machine."""
        return _native(self.parts[0][1])

    @property
    def shape(self) -> tuple[int, ...]:
        """``(R, D)`` or ``(R, C, D)``."""
        return (int(self._starts[-1]), *self.parts[0][1].shape[1:])

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows ``start`` to ``stop``, copied into memory, in the byte order of this machine."""
        pieces = [
            array[max(0, start - first) : max(0, stop - first)]
            for first, (_, array) in zip(self._starts, self.parts, strict=False)
        ]
        return np.concatenate(pieces, dtype=self.dtype)

    def place(self, row: int) -> str:
        """The file of a row, and which row of the file it is."""
        if not self.in_file_order:
            return str(self.where)
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return f"{self.parts[part][0]}, row {row - self._starts[part]}"

    def sha256(self, look: Callable[[int, npt.NDArray[Any]], object]) -> str:
        """Hash of dtype, shape and values, whatever files they are in.

        Args:
            look: Shown every run of rows on the way: its first row, and the values ``(r, ...)``.
        """
        little = self.dtype.newbyteorder("<")
        digest = hashlib.sha256(f"{little.str} {self.shape}\n".encode())
        for start in range(0, self.shape[0], _CHUNK):
            values = self.read(start, min(start + _CHUNK, self.shape[0]))
            look(start, values)
            digest.update(np.ascontiguousarray(values, little).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()


def find_files(path: Path, option: str) -> tuple[str, list[Path]]:
    """The files that an option names: one, or those of a folder in the order of the number in their names.

    Returns:
        ``.npy`` or ``.parquet``, and the files.

    Raises:
        InputError: There is nothing, or something else, or an order that nobody can tell.
    """
    if not path.exists():
        raise InputError("no embeddings", where=f"{option} {path}", got="no such file or folder")
    files = [path]
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith((".", "_"))]
        files = [file for file in files if file.suffix in {".npy", ".parquet"}]
    kinds = sorted({file.suffix for file in files})
    if len(kinds) != 1 or kinds[0] not in {".npy", ".parquet"}:
        raise InputError(
            "no embeddings",
            where=f"{option} {path}",
            got=" and ".join(kinds) or "a folder without such files",
            wanted="a .npy file, a .parquet file, or a folder of files of one of these kinds",
        )
    if len(files) > 1:
        files = _by_number(files, option)
    return kinds[0], files


def open_npy(path: Path, files: Sequence[Path], ndims: tuple[int, ...]) -> Vectors:
    """Map ``.npy`` files into memory; a pickle in one is never read.

    Args:
        path: What the user named.
        files: The parts, in order.
        ndims: How many axes the arrays may have.

    Raises:
        InputError: One is not readable, or is not of the dtype and shape of the others.
    """
    parts: list[tuple[Path, npt.NDArray[Any]]] = []
    for file in files:
        try:
            array: npt.NDArray[Any] = np.lib.format.open_memmap(file, mode="r")
        except Exception as error:  # noqa: BLE001 - numpy raises whatever it raises on a header that makes no sense
            got = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise InputError(
                "cannot read embeddings", where=file, got=got[:200], wanted=f"a whole .npy file of {ALLOWED}"
            ) from None
        if array.dtype.kind != "f" or array.dtype.itemsize not in {2, 4}:
            raise InputError(
                "embeddings of another type", where=file, got=array.dtype, wanted=ALLOWED, do="convert them with astype"
            )
        if array.ndim not in ndims or 0 in array.shape:
            wanted = " or ".join({2: "(rows, width)", 3: "(images, captions, width)"}[n] for n in ndims)
            raise InputError("embeddings of another shape", where=file, got=array.shape, wanted=wanted)
        parts.append((file, array))
        first = parts[0][1]
        if (_native(array), array.shape[1:]) != (_native(first), first.shape[1:]):
            raise InputError(
                "parts of different widths or types",
                where=file,
                got=_form(array),
                wanted=f"{_form(first)}, as {files[0].name}",
            )
    return Vectors(where=path, parts=tuple(parts))


def _native(array: npt.NDArray[Any]) -> np.dtype[Any]:
    return array.dtype.newbyteorder("=")


def _form(array: npt.NDArray[Any]) -> str:
    return f"{array.dtype} rows of shape {array.shape[1:]}"


def _by_number(files: Sequence[Path], option: str) -> list[Path]:
    """By the last number in the name: part 10 comes after part 9, with or without leading zeros."""
    numbers: dict[int, Path] = {}
    for file in files:
        found = re.findall(r"[0-9]+", file.stem)
        if not found or int(found[-1]) in numbers:
            got = f"{file.name} without a number" if not found else f"{file.name} and {numbers[int(found[-1])].name}"
            raise InputError(
                "parts in no clear order",
                where=f"{option} {file.parent}",
                got=got,
                wanted="one number in each name, such as img_emb_00000.npy",
            )
        numbers[int(found[-1])] = file
    return [numbers[number] for number in sorted(numbers)]


_BATCH = 1024
_BLOCK = 1 << 20
# What the system says where a file system does not take room beforehand.
NO_ALLOCATION = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS, errno.ENODEV, errno.EPERM}
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class VectorTable:
    """Parquet files with a column ``image_id`` and one of vectors, or of lists of vectors.

    Attributes:
        where: What the user named.
        files: The files, in order.
        column: The column of vectors.
        depth: 1 for vectors, 2 for lists of vectors.
        dtype: float16 or float32.
        ids: The image id of each vector, in file order ``(R,)``.
    """

    where: Path
    files: Sequence[Path]
    column: str
    depth: int
    dtype: np.dtype[Any]
    ids: npt.NDArray[np.int64]

    @classmethod
    def open(cls, path: Path, files: Sequence[Path], name: str) -> "VectorTable":
        """Read types and image ids.

        Args:
            path: What the user named.
            files: The files, in order.
            name: The column to prefer, where there are several of vectors.

        Raises:
            InputError: A file is not readable, or has not the columns.
        """
        schema = _schema(files[0])
        column = _pick_column(schema, name, files[0])
        kind, depth = _kind(schema.field(column).type)
        table = cls(
            where=path,
            files=files,
            column=column,
            depth=depth,
            dtype=np.dtype(kind.to_pandas_dtype()),
            ids=np.empty(0, np.int64),
        )
        ids = []
        for file, batch in table.batches(["image_id", column] if depth == 2 else ["image_id"]):
            own = np.asarray(batch.column(0).cast(pa.int64(), safe=False), np.int64)
            if depth == 2:
                _no_nulls(file, column, batch.column(1))
                own = np.repeat(own, np.asarray(pc.list_value_length(batch.column(1)), np.int64))
            ids.append(own)
        return cls(**vars(table) | {"ids": np.concatenate([np.empty(0, np.int64), *ids])})

    def batches(self, columns: list[str]) -> Iterator[tuple[Path, pa.RecordBatch]]:
        """A few rows at a time, of some columns, each with its file."""
        for file in self.files:
            schema = _schema(file)
            for name in columns:
                kind = schema.field(name).type if name in schema.names else None
                right = pa.types.is_integer(kind) if name == "image_id" and kind else _is(kind, self.depth, self.dtype)
                if not right:
                    raise InputError(
                        "a column of another type",
                        where=f"{file}, column {name}",
                        got=kind or "no such column",
                        wanted="whole numbers" if name == "image_id" else f"{self.dtype} as in {self.files[0].name}",
                    )
            for batch in _batches(file, columns):
                if "image_id" in columns:
                    _no_nulls(file, "image_id", batch.column("image_id"))
                yield file, batch

    def in_order(self, targets: npt.NDArray[np.int64], scratch: Path) -> Vectors:
        """The vectors as memory-mapped rows in another order.

        Args:
            targets: The row of each vector ``(R,)``, every one of 0..R-1 once.
            scratch: Folder of the scratch file; made when absent.

        Raises:
            InputError: Vectors of different widths, nulls, or no room for the scratch file.
        """
        rows: npt.NDArray[Any] | None = None
        at = 0
        for file, batch in self.batches([self.column]):
            values = self._vectors(file, batch.column(0), at)
            if not len(values):
                continue
            if rows is None:
                rows = _scratch(scratch, self.dtype, (len(targets), values.shape[1]))
            if values.shape[1] != rows.shape[1]:
                raise self._width(file, at, values.shape[1], rows.shape[1])
            rows[targets[at : at + len(values)]] = values
            at += len(values)
        assert rows is not None, "a table without rows has no right ids"
        return Vectors(where=self.where, parts=((self.where, rows),), in_file_order=False)

    def _vectors(self, file: Path, column: pa.Array, at: int) -> npt.NDArray[Any]:
        _no_nulls(file, self.column, column)
        if self.depth == 2:
            column = column.flatten()
            _no_nulls(file, self.column, column)
        lengths = np.asarray(pc.list_value_length(column), np.int64)
        if len(lengths) and (lengths != lengths[0]).any():
            odd = int(np.argmax(lengths != lengths[0]))
            raise self._width(file, at + odd, int(lengths[odd]), int(lengths[0]))
        if len(lengths) and not lengths[0]:
            raise self._width(file, at, 0, "at least 1")
        flat = column.flatten()
        _no_nulls(file, self.column, flat)
        return np.asarray(flat).reshape(len(lengths), -1 if len(lengths) else 0)

    def _width(self, file: Path, at: int, got: int, wanted: object) -> InputError:
        where = f"{file}, column {self.column}, image id {self.ids[at]}"
        return InputError("vectors of different widths", where=where, got=got, wanted=wanted)


def match(
    table: VectorTable, listing: Manifest, wanted: Counts, *, or_one: bool
) -> tuple[npt.NDArray[np.int64], Counts]:
    """Which row each vector has in the manifest's order: the images in order, the captions of an image as they come.

    Args:
        table: The table.
        listing: The manifest, N images.
        wanted: Vectors that each image should have ``(N,)``.
        or_one: Whether one vector for every image will do as well.

    Returns:
        ``(R,)`` rows, and the vectors of each image ``(N,)``.

    Raises:
        InputError: An id that the manifest does not have, an image without vectors, or with another number of them.
    """
    order = np.argsort(listing.image_ids)
    at = np.searchsorted(listing.image_ids, table.ids, sorter=order)
    rows = order[np.minimum(at, len(order) - 1)]
    if (unknown := listing.image_ids[rows] != table.ids).any():
        raise InputError(
            "an image id that the manifest does not have",
            where=table.where,
            got=f"{table.ids[unknown.argmax()]}{_more(int(unknown.sum()) - 1)}",
            do="leave these rows out",
        )
    got = np.bincount(rows, minlength=len(listing)).astype(np.int64)
    if or_one and (got == 1).all():
        wanted = got
    if (wrong := got != wanted).any():
        row = int(wrong.argmax())
        more, also = _more(int(wrong.sum()) - 1), ", or 1 for every image" if or_one else ""
        raise InputError(
            "another number of vectors for an image",
            where=f"{table.where}, image id {listing.image_ids[row]}{more}",
            got=got[row],
            wanted=f"{wanted[row]}{also}",
            do="the manifest and the embeddings must have the same images",
        )
    targets = np.empty(len(rows), np.int64)
    targets[np.argsort(rows, kind="stable")] = np.arange(len(rows))
    return targets, got


def _more(count: int) -> str:
    return f" and {count} more" if count else ""


def _scratch(folder: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    make_folder(folder)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # Room is taken now: a disk that is full when a mapped page is written ends the process.
            _take_room(file, int(np.prod(shape)) * dtype.itemsize)
            return np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        raise unwritable(folder, error) from None


def _take_room(file: IO[bytes], size: int) -> None:
    """Make a new file so large that all of it has its place on the disk."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:  # macOS has no such function, and not every file system does it
        if isinstance(error, OSError) and error.errno not in NO_ALLOCATION:
            raise
        for start in range(0, size, _BLOCK):
            file.write(bytes(min(_BLOCK, size - start)))
        file.flush()


def _batches(file: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """A few rows of some columns at a time, every value of them valid."""
    try:
        with open_parquet(file) as opened:
            batches = opened.iter_batches(_BATCH, columns=columns, use_threads=False)
            while (batch := next(batches, None)) is not None:
                ordered = batch.select(columns)
                ordered.validate(full=True)
                yield ordered
    except GeneratorExit:
        raise
    except Exception as error:  # noqa: BLE001 - arrow raises errors of many kinds where the bytes make no sense
        raise _unreadable(file, error) from None


def _schema(file: Path) -> pa.Schema:
    try:
        with open_parquet(file) as opened:
            return opened.schema_arrow
    except (ValueError, OSError) as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> InputError:
    got = getattr(error, "strerror", None) or unreadable(error)
    return InputError("cannot read embeddings", where=file, got=got, wanted="a whole parquet file")


def _pick_column(schema: pa.Schema, name: str, file: Path) -> str:
    found = [field.name for field in schema if _kind(field.type)[1]]
    if "image_id" not in schema.names or not (name in found or len(found) == 1):
        raise InputError(
            "no clear column of vectors",
            where=file,
            got=f"columns {', '.join(schema.names)}",
            wanted=f"image_id, and one column of lists of {ALLOWED}, or one called {name}",
        )
    return name if name in found else found[0]


def _kind(kind: pa.DataType) -> tuple[pa.DataType, int]:
    """The type of the values, and how many lists are around them; 0 for what holds no vectors."""
    depth = 0
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    floats = pa.types.is_float16(kind) or pa.types.is_float32(kind)
    return kind, depth if floats and depth in {1, 2} else 0


def _is(kind: pa.DataType | None, depth: int, dtype: np.dtype[Any]) -> bool:
    if kind is None:
        return False
    value, found = _kind(kind)
    return found == depth and np.dtype(value.to_pandas_dtype()) == dtype


def _no_nulls(file: Path, column: str, values: pa.Array) -> None:
    if values.null_count:
        raise InputError(
            "a null among the embeddings", where=f"{file}, column {column}", got=f"{values.null_count} nulls"
        )
