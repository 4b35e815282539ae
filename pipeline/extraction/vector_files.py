"""Embeddings that another tool wrote as ``.npy``: one file, or a folder of numbered parts, never read whole.

Symbols: ``R`` rows, ``D`` width, ``C`` captions of an image.
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

from ... import InputError

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
            "no embeddings", where=f"{option} {path}", got=" and ".join(kinds) or "a folder without such files",
            wanted="a .npy file, a .parquet file, or a folder of files of one of these kinds",
        )  # fmt: skip
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
                "parts of different widths or types", where=file, got=_form(array),
                wanted=f"{_form(first)}, as {files[0].name}",
            )  # fmt: skip
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
                "parts in no clear order", where=f"{option} {file.parent}", got=got,
                wanted="one number in each name, such as img_emb_00000.npy",
            )  # fmt: skip
        numbers[int(found[-1])] = file
    return [numbers[number] for number in sorted(numbers)]
