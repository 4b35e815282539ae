"""The files of an export: numbered parts that are whole or absent, in a folder that held nothing else.

Names, not contents: what is in a part is the business of ``export.py``.
"""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .errors import StoreError
from .files import write_whole

# A name that pyarrow, Spark and the like leave out when they read a folder of parquet files.
MARK = "_export.json"
FOLDERS = ("img_emb", "text_emb", "metadata")
_OWN_NAME = re.compile(
    r"_export\.json|(img_emb/img_emb|text_emb/text_emb)_[0-9]{5,9}\.npy|(metadata/metadata_|part-)[0-9]{5,9}\.parquet"
)
_TEMPORARY_NAME = re.compile(r"\.(?P<name>[a-z_0-9-]+\.(npy|parquet|json))\..*tmp")


class Parts:
    """Numbered parts, each with at least one row: readers that pass over an empty part lose the alignment.

    Args:
        out: The folder.
        most: How many parts there may be; other tools sort names as text, so all numbers have one length.

    Attributes:
        files: Files written, relative to the folder, in order.
        n_rows: Rows written.
        n_bytes: Size of the files.
    """

    def __init__(self, out: Path, most: int) -> None:
        self._out, self._part, self._digits = out, 0, max(5, len(str(most)))
        self.files: list[str] = []
        self.n_rows = self.n_bytes = 0

    @property
    def _number(self) -> str:
        return f"{self._part:0{self._digits}d}"

    def npy(self, v_img: NDArray[Any], v_txt: NDArray[Any], metadata: pa.Table) -> None:
        """Write the next part of ``(n, D)`` image vectors, ``(n, D)`` caption vectors and n rows about them."""
        if len(v_img):
            contents = (_npy_bytes(v_img), _npy_bytes(v_txt), _parquet_bytes(metadata))
            names = (f"{name}/{name}_{self._number}" for name in FOLDERS)
            self._add(dict(zip(names, contents, strict=True)), (".npy", ".npy", ".parquet"), len(v_img))

    def parquet(self, table: pa.Table) -> None:
        """Write the next part as one parquet file."""
        if table.num_rows:
            self._add({f"part-{self._number}": _parquet_bytes(table)}, (".parquet",), table.num_rows)

    def _add(self, contents: dict[str, bytes], suffixes: tuple[str, ...], n_rows: int) -> None:
        for (name, data), suffix in zip(contents.items(), suffixes, strict=True):
            put(self._out / f"{name}{suffix}", data)
            self.files.append(f"{name}{suffix}")
            self.n_bytes += len(data)
        self._part, self.n_rows = self._part + 1, self.n_rows + n_rows


def _npy_bytes(values: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(values), allow_pickle=False)
    return buffer.getvalue()


def _parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    # Floats do not repeat: a dictionary of them would only be in the way.
    floats = [name for name in table.column_names if name.startswith(("v_", "norm_"))]
    words = [name for name in table.column_names if name not in floats]
    pq.write_table(table, sink, compression="zstd", use_dictionary=words, write_page_checksum=True)
    return bytes(sink.getvalue())


def put(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        StoreError: The disk does not take it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except (OSError, StoreError) as error:
        got = error.got if isinstance(error, StoreError) else error.strerror or error
        raise StoreError(
            "cannot write", where=path, got=got, wanted="room, and leave to write",
            do="free some room, or name another --out; then export again with --force",
        ) from error  # fmt: skip


def take_folder(out: Path, *, force: bool) -> None:
    """Make the folder, or empty it of an earlier export and of nothing else.

    Raises:
        StoreError: It holds something and ``force`` is not given, or something that is no export.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = [path for path in sorted(out.rglob("*")) if not (path.is_dir() and path.name in FOLDERS)]
        if found and not force:
            raise StoreError(
                "the folder is in use", where=out, got=f"{found[0].relative_to(out)}", wanted="a new or empty folder",
                do="name another --out, or replace an earlier export with --force",
            )  # fmt: skip
        if foreign := [path for path in found if not _is_ours(path.relative_to(out))]:
            raise StoreError(
                "will not replace a folder that is no export", where=out, got=f"{foreign[0].relative_to(out)}",
                wanted="files of an earlier export alone", do="name another --out",
            )  # fmt: skip
        # The mark first: an export that is half removed must not look whole.
        for path in sorted(found, key=lambda path: path.name != MARK):
            path.unlink()
        for name in FOLDERS:
            if (out / name).is_dir():
                (out / name).rmdir()
    except OSError as error:
        raise StoreError("cannot use the folder", where=out, got=error.strerror or error) from error


def _is_ours(relative: Path) -> bool:
    temporary = _TEMPORARY_NAME.fullmatch(relative.name)
    whole = relative.with_name(temporary["name"]) if temporary else relative
    return _OWN_NAME.fullmatch(whole.as_posix()) is not None
