"""The files of an export: numbered parts that are whole or absent, in a folder that held nothing else.

Names, not contents: what is in a part is the business of ``export.py``.
"""

import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .errors import StoreError
from .files import write_whole
from .layout import LOCK, final_name
from .locks import SOFT, LockHeld, locked
from .ownership import contents, remove_files
from .strict_json import parse_json

# A name that pyarrow, Spark and the like leave out when they read a folder of parquet files.
MARK = "_export.json"
# What an export begins with, and removes when it is whole: as long as it is there, what lies beside it is unfinished.
BEGUN = "_export_unfinished.json"
_UNFINISHED = {"mmcli": "an export that is not finished"}
_PART_NAME = re.compile(
    r"(img_emb/img_emb|text_emb/text_emb)_[0-9]{5,9}\.npy|(metadata/metadata_|part-)[0-9]{5,9}\.parquet"
)


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

    def npy(self, v_img: NDArray[Any], v_txt: NDArray[Any], metadata: pa.Table) -> None:
        """Write the next part of ``(n, D)`` image vectors, ``(n, D)`` caption vectors and n rows about them."""
        if len(v_img):
            files = {
                "img_emb/img_emb_{}.npy": _npy_bytes(v_img),
                "text_emb/text_emb_{}.npy": _npy_bytes(v_txt),
                "metadata/metadata_{}.parquet": _parquet_bytes(metadata),
            }
            self._add(files, len(v_img))

    def parquet(self, table: pa.Table) -> None:
        """Write the next part as one parquet file."""
        if table.num_rows:
            self._add({"part-{}.parquet": _parquet_bytes(table)}, table.num_rows)

    def _add(self, files: dict[str, bytes], n_rows: int) -> None:
        for pattern, data in files.items():
            name = pattern.format(f"{self._part:0{self._digits}d}")
            put(self._out / name, data)
            self.files.append(name)
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
            "cannot write",
            where=path,
            got=got,
            wanted="free disk space and permission to write",
            do="free some room, or name another --out; then export again with --force",
        ) from error


@contextmanager
def taken_folder(out: Path, *, force: bool) -> Iterator[None]:
    """Make a folder, or empty it of an earlier export and of nothing else; no other export writes into it meanwhile.

    Raises:
        StoreError: It holds something and ``force`` is not given, or something that is not of an export of ours, or
            another process exports into it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / LOCK, keep=False):
            _empty(out, force=force)
            _begin(out)
            yield
            (out / BEGUN).unlink(missing_ok=True)
    except LockHeld as error:
        raise StoreError("another process exports into this folder", where=out, do=error.do) from None
    except OSError as error:
        raise StoreError("cannot use the folder", where=out, got=error.strerror or error) from error


def _empty(out: Path, *, force: bool) -> None:
    is_ours, passing = _rule(out), {LOCK, LOCK + SOFT}
    inside = contents(out, is_ours)
    foreign = [name for name in inside.foreign if name not in passing]
    if (foreign or any(_final(name) == name for name in inside.ours)) and not force:
        raise StoreError(
            "the folder is in use",
            where=out,
            got=(*inside.ours, *foreign)[0],
            wanted="a new or empty folder",
            do="name another --out, or replace an earlier export with --force",
        )
    if foreign:
        raise StoreError(
            "will not replace a folder that is no export",
            where=out,
            got=foreign[0],
            wanted="files of an earlier export alone",
            do="name another --out",
        )
    if (out / MARK).is_file():  # half removed, it must not look whole, and must still be known for an export
        _begin(out)
        (out / MARK).unlink()
    remove_files(out, [name for name in inside.ours if name != BEGUN])


def _begin(out: Path) -> None:
    put(out / BEGUN, json.dumps(_UNFINISHED).encode())


def _rule(out: Path) -> Callable[[str], bool]:
    """Which files of a folder an export wrote: a finished one lists them, those of another have exact names."""
    if _read(out / BEGUN) == _UNFINISHED:
        return _could_be
    record, listed = _read(out / MARK), frozenset[str]()
    is_mark = isinstance(record, dict) and {"store_digest", "files", "n_rows"} <= record.keys()
    if is_mark and isinstance(record["files"], list):
        listed = frozenset({MARK, *map(str, record["files"])})
    return lambda name: name in listed or (_final(name) != name and _could_be(name))


def _could_be(name: str) -> bool:
    """Whether an export writes a file of this name, or of this temporary one."""
    return _final(name) in {MARK, BEGUN} or _PART_NAME.fullmatch(_final(name)) is not None


def _read(path: Path) -> Any:  # noqa: ANN401 - JSON
    try:
        return parse_json(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError):
        return None


def _final(name: str) -> str:
    """The name that a file has, or will have when it is whole."""
    path = Path(name)
    return path.with_name(final_name(path.name) or path.name).as_posix()
