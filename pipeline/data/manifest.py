"""The manifest: one row per image, and the one thing that everything after ``prepare`` reads.

Columns ``image_id int64, path string, split string, captions list<string>, labels list<int32>``; the schema's metadata
holds the category names as a JSON list whose index is the label. Any multi-label image-text set enters by bringing one.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...cache.parquet import read_parquet
from ...errors import InputError, cannot_read, first_line
from ..core.files import check_input, is_inside, resolve_image, write_whole
from .manifest_checks import DATA_KEY, NAMES_KEY, SCHEMA, SPLITS, VERSION, VERSION_KEY, check_table

Array = TypeVar("Array", bound=npt.NDArray[Any])

CORE = ("image_id", "split", "labels")

__all__ = ["CORE", "SPLITS", "Manifest", "is_inside", "read_manifest", "resolve_image", "write_manifest"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """A checked manifest of N images and C categories.

    Made by :func:`read_manifest`, :meth:`from_table` or :meth:`from_columns`, which check everything, or by
    :meth:`from_parts`; the constructor checks nothing.

    Attributes:
        core: The canonical columns without ``path`` and ``captions``, or with them; N rows.
        category_names: C names; the index is the label.
        whole: Gives all canonical columns.
    """

    core: pa.Table
    category_names: tuple[str, ...]
    whole: Callable[[], pa.Table]

    @classmethod
    def from_table(cls, table: pa.Table, *, where: object = "manifest") -> Self:
        """Check any arrow table with a manifest's columns and metadata; other columns are left out.

        Args:
            table: The table.
            where: The file it comes from, for the error.

        Raises:
            InputError: Something is wrong with it; the row is named.
        """
        checked, names = _checked(table, where, SCHEMA.names)
        return cls(core=checked, category_names=names, whole=lambda: checked)

    @classmethod
    def from_parts(cls, core: pa.Table, whole: Callable[[], pa.Table], *, where: object = "manifest") -> Self:
        """A manifest whose paths and captions are read and checked when they are first used.

        Args:
            core: A table as for :meth:`from_table`, of which ``image_id``, ``split`` and ``labels`` are checked now.
            whole: Gives the same rows with all columns.
            where: The file it comes from, for the error.

        Raises:
            InputError: Something is wrong with the core; with the rest, when it is first used.
        """
        checked, names = _checked(core, where, CORE)
        return cls(core=checked, category_names=names, whole=lambda: _checked(whole(), where, SCHEMA.names)[0])

    @classmethod
    def from_columns(
        cls,
        *,
        image_ids: Sequence[int] | npt.NDArray[np.int64],
        paths: Sequence[str],
        splits: Sequence[str],
        captions: Sequence[Sequence[str]],
        labels: Sequence[Sequence[int]] | pa.Array,
        category_names: Sequence[str],
        name: str = "unnamed",
        where: object = "manifest",
    ) -> Self:
        """Make a manifest from its columns, of N entries each.

        Raises:
            InputError: Something is wrong with them; the row is named.
        """
        given = zip(SCHEMA.names, (image_ids, paths, splits, captions, labels), strict=True)
        columns = [_column(column, values, where) for column, values in given]
        if len({len(column) for column in columns}) != 1:
            raise InputError("columns of different lengths", where=where, got=", ".join(str(len(c)) for c in columns))
        metadata = {NAMES_KEY: json.dumps(list(category_names)), DATA_KEY: name}
        return cls.from_table(pa.table(columns, schema=SCHEMA.with_metadata(metadata)), where=where)

    def __len__(self) -> int:
        return int(self.core.num_rows)

    @cached_property
    def table(self) -> pa.Table:
        """All canonical columns, N rows."""
        return self.whole()

    @cached_property
    def sha256(self) -> str:
        """Hash of the content (columns and category names), the same whatever wrote the file."""
        return _sha256(self.table, self.category_names)

    @property
    def name(self) -> str:
        """The name of the data set that the manifest lists."""
        return bytes(self.core.schema.metadata[DATA_KEY]).decode()

    @cached_property
    def image_ids(self) -> npt.NDArray[np.int64]:
        """``(N,)`` int64, every value once, read-only."""
        return _frozen(self.core.column("image_id").to_numpy())

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """N paths relative to the data folder, with forward slashes."""
        return tuple(self.table.column("path").to_pylist())

    @cached_property
    def splits(self) -> npt.NDArray[np.str_]:
        """``(N,)`` of train, val or test, read-only."""
        coded = self.core.column("split").combine_chunks().dictionary_encode()
        names = np.array(coded.dictionary.to_pylist(), np.str_)
        return _frozen(names[coded.indices.to_numpy()])

    @cached_property
    def captions(self) -> tuple[tuple[str, ...], ...]:
        """The captions of N images; none for an image without."""
        return tuple(tuple(texts) for texts in self.table.column("captions").to_pylist())

    @cached_property
    def first_captions(self) -> tuple[str, ...]:
        """The first caption of N images; an empty text for an image without."""
        return tuple(texts[0] if texts else "" for texts in self.captions)

    def labels_matrix(self) -> npt.NDArray[np.uint8]:
        """Multi-hot labels ``(N, C)`` uint8; images without a label are rows of zeros."""
        labels = self.core.column("labels").combine_chunks()
        matrix = np.zeros((len(self), len(self.category_names)), np.uint8)
        matrix[pc.list_parent_indices(labels).to_numpy(), labels.flatten().to_numpy()] = 1
        return matrix

    def rows(self, split: str) -> npt.NDArray[np.int64]:
        """Rows of a split ``(n,)`` int64, ascending.

        Raises:
            InputError: There is no such split, or no image in it.
        """
        if split not in SPLITS:
            raise InputError("no such split", got=split, wanted=", ".join(SPLITS))
        rows = np.flatnonzero(self.splits == split).astype(np.int64)
        if not len(rows):
            raise InputError(
                f"no {split} image in the manifest", where=self.name, wanted=f"at least one row with split {split}"
            )
        return rows


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Args:
        path: The parquet file.

    Raises:
        InputError: It is missing, not a parquet file, or something in it is wrong; the row is named.
    """
    check_input(
        path,
        "manifest",
        wanted="a parquet file",
        do="run `mmcli prepare` first, or name the manifest or the folder that it is in",
    )
    try:
        table = read_parquet(path)
    except (ValueError, OSError) as error:
        raise cannot_read(
            "cannot read the manifest", path, error, wanted="a whole parquet file", do="run `mmcli prepare` again"
        ) from None
    return Manifest.from_table(table, where=path)


def says_it_is_of(path: Path, name: str) -> bool:
    """Whether a file says that it is a manifest of a data set; a file that is cut short is taken for one."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError):
        with path.open("rb") as stream:
            return stream.read(4) in {b"PAR1", b""}
    return NAMES_KEY in metadata and metadata.get(DATA_KEY) == name.encode()


def write_manifest(path: Path, listing: Manifest) -> None:
    """Write a manifest, whole or not at all: under a temporary name, synced, renamed.

    Raises:
        InputError: The file cannot be written.
    """
    write_whole(path, lambda part: pq.write_table(listing.table, part, compression="zstd", write_page_checksum=True))


def _column(name: str, values: object, where: object) -> pa.Array:
    kind = SCHEMA.field(name).type
    try:
        return values if isinstance(values, pa.Array) else pa.array(values, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"bad {name} in a manifest", where=where, got=first_line(error), wanted=kind) from None


def _frozen(array: Array) -> Array:
    array.setflags(write=False)
    return array


def _sha256(table: pa.Table, names: tuple[str, ...]) -> str:
    """Hash of a canonical table: every column as lengths and values, little-endian, free of arrow's layout."""
    digest = hashlib.sha256(json.dumps({"mmcli_manifest": VERSION, "category_names": names}).encode())
    digest.update(table.column("image_id").to_numpy().astype("<i8").tobytes())
    for name in ("path", "split", "captions", "labels"):
        values = table.column(name).combine_chunks()
        if pa.types.is_list(values.type):
            digest.update(pc.list_value_length(values).to_numpy().astype("<i8").tobytes())
            values = values.flatten()
        if pa.types.is_string(values.type):
            digest.update(pc.binary_length(values).to_numpy().astype("<i8").tobytes())
            digest.update(_letters(values))
        else:
            digest.update(values.to_numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _letters(texts: pa.StringArray) -> memoryview:
    """All texts on end, as UTF-8; there is no null among them."""
    _, offsets, data = texts.buffers()
    if data is None or not len(texts):
        return memoryview(b"")
    first, last = np.frombuffer(offsets, np.int32, len(texts) + 1, 4 * texts.offset)[[0, -1]]
    return memoryview(data)[first:last]


def _checked(table: pa.Table, where: object, columns: Sequence[str]) -> tuple[pa.Table, tuple[str, ...]]:
    checked, names = check_table(table, where, columns)
    name = (table.schema.metadata or {}).get(DATA_KEY, b"unnamed").decode(errors="replace")
    metadata = {VERSION_KEY: str(VERSION), DATA_KEY: name, NAMES_KEY: json.dumps(names, ensure_ascii=False)}
    return checked.replace_schema_metadata(metadata), names
