"""Arrays of embeddings that another tool wrote, read and checked: ``.npy``, or parquet matched by image id.

A ``.npy`` file is mapped into memory; of parquet the vectors are read whole, since they have to be put in order.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ...cache.parquet import open_parquet, read_parquet, unreadable
from ...errors import InputError, first_line
from ..data.manifest import Manifest

ALLOWED = "float16 or float32"
_CHUNK = 4096
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """R rows of floats.

    Attributes:
        where: The file or folder.
        parts: Files and their arrays ``(r, D)`` or ``(r, C, D)``, in order, all of one dtype in any byte order.
        in_file_order: Whether the rows are those of the files, so that an error can name one.
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
            look: Called with every run of rows on the way: its first row, and the values ``(r, ...)``.
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
        InputError: There are no such files, or their names do not say in which order they come.
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
            raise InputError(
                "cannot read embeddings",
                where=file,
                got=first_line(error)[:200],
                wanted=f"a whole .npy file of {ALLOWED}",
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
    """The files by the last number in their names: part 10 comes after part 9, with or without leading zeros."""
    numbers: dict[int, Path] = {}
    for file in files:
        digits = re.findall(r"[0-9]+", file.stem)
        if not digits or int(digits[-1]) in numbers:
            got = f"{file.name} without a number" if not digits else f"{file.name} and {numbers[int(digits[-1])].name}"
            raise InputError(
                "parts in no clear order",
                where=f"{option} {file.parent}",
                got=got,
                wanted="one number in each name, such as img_emb_00000.npy",
            )
        numbers[int(digits[-1])] = file
    return [numbers[number] for number in sorted(numbers)]


@dataclass(frozen=True, kw_only=True)
class VectorTable:
    """Parquet files with a column ``image_id`` and one of vectors, or of lists of vectors.

    Attributes:
        where: The file or folder that the user named.
        column: The column of vectors.
        in_lists: Whether a row is a list of vectors.
        ids: The image id of each vector, in file order ``(R,)``.
        values: The vectors ``(R, D)``, float16 or float32.
    """

    where: Path
    column: str
    in_lists: bool
    ids: npt.NDArray[np.int64]
    values: npt.NDArray[Any]

    @classmethod
    def read(cls, path: Path, files: Sequence[Path], name: str) -> "VectorTable":
        """Read and check the vectors.

        Args:
            path: The file or folder that the user named.
            files: The files, in order.
            name: The column to prefer, where there are several of vectors.

        Raises:
            InputError: A file is not readable, has not the columns or has nulls, or vectors differ in width.
        """
        try:
            with open_parquet(files[0]) as opened:
                schema = opened.schema_arrow
        except (ValueError, OSError) as error:
            raise _unreadable(files[0], error) from None
        column = _pick_column(schema, name, files[0])
        kind, depth = _kind(schema.field(column).type)
        parts = [_read_part(file, column, kind, depth) for file in files]
        ids, values = (np.concatenate([part[k] for part in parts if len(part[0])] or [parts[0][k]]) for k in (0, 1))
        return cls(where=path, column=column, in_lists=depth == 2, ids=ids, values=values)

    def match(self, listing: Manifest, wanted: Counts, *, or_one: bool) -> tuple[Vectors, Counts]:
        """The vectors in the manifest's order: the images in order, the captions of an image as they come.

        Args:
            listing: The manifest, N images.
            wanted: Vectors that each image should have ``(N,)``.
            or_one: Whether one vector for every image will do as well.

        Returns:
            The vectors, and how many each image has ``(N,)``.

        Raises:
            InputError: An id that the manifest does not have, an image without vectors, or with another number of them.
        """
        order = np.argsort(listing.image_ids)
        places = np.searchsorted(listing.image_ids, self.ids, sorter=order)
        rows = order[np.minimum(places, len(order) - 1)]
        if (unknown := listing.image_ids[rows] != self.ids).any():
            raise InputError(
                "an image id that the manifest does not have",
                where=self.where,
                got=f"{self.ids[unknown.argmax()]}{_more(int(unknown.sum()) - 1)}",
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
                where=f"{self.where}, image id {listing.image_ids[row]}{more}",
                got=got[row],
                wanted=f"{wanted[row]}{also}",
                do="the manifest and the embeddings must have the same images",
            )
        ordered = self.values[np.argsort(rows, kind="stable")]
        return Vectors(where=self.where, parts=((self.where, ordered),), in_file_order=False), got


def _read_part(
    file: Path, column: str, kind: pa.DataType, depth: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """Image ids ``(r,)`` and vectors ``(r, D)`` of one file."""
    try:
        table = read_parquet(file, ["image_id", column])
    except (ValueError, OSError) as error:
        raise _unreadable(file, error) from None
    owners, vectors = (table.column(name).combine_chunks() for name in ("image_id", column))
    for name, fits, got, wanted in (
        ("image_id", pa.types.is_integer(owners.type), owners.type, "whole numbers"),
        (column, _kind(vectors.type) == (kind, depth), vectors.type, f"{kind} as in the first file"),
    ):
        if not fits:
            raise InputError("a column of another type", where=f"{file}, column {name}", got=got, wanted=wanted)
    _no_nulls(file, "image_id", owners)
    ids = np.asarray(owners.cast(pa.int64(), safe=False), np.int64)
    _no_nulls(file, column, vectors)
    if depth == 2:
        ids = np.repeat(ids, np.asarray(pc.list_value_length(vectors), np.int64))
        vectors = vectors.flatten()
        _no_nulls(file, column, vectors)
    lengths = np.asarray(pc.list_value_length(vectors), np.int64)
    odd = np.flatnonzero((lengths != lengths[:1]) | (lengths == 0))
    if len(odd):
        raise InputError(
            "vectors of different widths",
            where=f"{file}, column {column}, image id {ids[odd[0]]}",
            got=lengths[odd[0]],
            wanted=lengths[0] or "at least 1",
        )
    flat = vectors.flatten()
    _no_nulls(file, column, flat)
    return ids, np.asarray(flat).reshape(len(lengths), -1 if len(lengths) else 0)


def _more(count: int) -> str:
    return f" and {count} more" if count else ""


def _unreadable(file: Path, error: Exception) -> InputError:
    got = getattr(error, "strerror", None) or unreadable(error)
    return InputError("cannot read embeddings", where=file, got=got, wanted="a whole parquet file")


def _pick_column(schema: pa.Schema, name: str, file: Path) -> str:
    columns = [field.name for field in schema if _kind(field.type)[1]]
    if "image_id" not in schema.names or not (name in columns or len(columns) == 1):
        raise InputError(
            "no clear column of vectors",
            where=file,
            got=f"columns {', '.join(schema.names)}",
            wanted=f"image_id, and one column of lists of {ALLOWED}, or one called {name}",
        )
    return name if name in columns else columns[0]


def _kind(kind: pa.DataType) -> tuple[pa.DataType, int]:
    """The type of the values, and how many lists are around them; 0 for what holds no vectors."""
    depth = 0
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    floats = pa.types.is_float16(kind) or pa.types.is_float32(kind)
    return kind, depth if floats and depth in {1, 2} else 0


def _no_nulls(file: Path, column: str, values: pa.Array) -> None:
    if values.null_count:
        raise InputError(
            "a null among the embeddings", where=f"{file}, column {column}", got=f"{values.null_count} nulls"
        )
