"""Everything that a manifest made by hand can get wrong, each as one line that names the row.

The checks take any arrow table and give back the canonical one: five columns, fixed types, labels sorted. Large
strings, dictionary-coded strings and wider or narrower integers are taken too, as pandas and polars write them.
"""

from collections.abc import Callable, Collection
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ...cache.strict_json import parse_json
from ...errors import InputError, first_line
from ..core.files import SAFE_PATH, UNSAFE_PATH

SPLITS = ("train", "val", "test")
SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("labels", pa.list_(pa.int32()), nullable=False),
    ]
)
NAMES_KEY, VERSION_KEY, DATA_KEY = b"category_names", b"mmcli_manifest_version", b"name"
VERSION = 1


def check_table(
    table: pa.Table, where: object, names: Collection[str] = SCHEMA.names
) -> tuple[pa.Table, tuple[str, ...]]:
    """Check a manifest's table and bring it to its canonical form.

    Args:
        table: Columns ``image_id, path, split, captions, labels`` in any order, others are left out; the schema's
            metadata holds the category names.
        where: The file, for the error.
        names: The columns that are checked, ``image_id`` among them.

    Returns:
        The canonical table of these columns, in the schema's order and with its metadata, and the C category names.

    Raises:
        InputError: The first thing that is wrong, with its row counted from 0.
    """
    categories = _category_names(table.schema.metadata or {}, where)
    schema = pa.schema([field for field in SCHEMA if field.name in names])
    for field in schema:
        if table.column_names.count(field.name) != 1:
            got = ", ".join(table.column_names) or "none"
            raise InputError(
                f"a manifest needs one column {field.name}",
                where=where,
                got=f"columns {got}",
                wanted=_columns(),
                do="run `mmcli prepare`, or mend the manifest",
            )
    if table.num_rows == 0:
        raise InputError("an empty manifest", where=where, got="no rows", wanted="one row an image")
    return _Checker(table, where, schema).canonical(len(categories)), categories


def _category_names(metadata: dict[bytes, bytes], where: object) -> tuple[str, ...]:
    version = metadata.get(VERSION_KEY, str(VERSION).encode())
    if version != str(VERSION).encode():
        raise InputError(
            "a manifest of another format",
            where=where,
            got=f"version {version.decode(errors='replace')}",
            wanted=f"version {VERSION}",
            do="run `mmcli prepare` of this mmcli again",
        )
    try:
        names = parse_json(metadata.get(NAMES_KEY, b"null"))
    except ValueError:
        names = "text that is not JSON"
    ok = isinstance(names, list) and names and all(isinstance(name, str) and name.strip() for name in names)
    if not ok or len(set(names)) != len(names):
        raise InputError(
            "no category names",
            where=where,
            got="nothing" if names is None else repr(names)[:80],
            wanted=f"a JSON list of different names, in label order, under {NAMES_KEY.decode()} in the schema metadata",
        )
    return tuple(names)


def _columns() -> str:
    return ", ".join(f"{field.name} {field.type}" for field in SCHEMA)


class _Checker:
    """The checks of one table; every one raises for the first bad row."""

    def __init__(self, table: pa.Table, where: object, schema: pa.Schema) -> None:
        self._where, self._schema = where, schema
        self._ids: npt.NDArray[np.int64] | None = None
        self._columns = {field.name: table.column(field.name).combine_chunks() for field in schema}
        for name, column in self._columns.items():
            self._typed(name, column.type)
            self._none(name, column.is_null(), "nothing (null)")

    def canonical(self, n_classes: int) -> pa.Table:
        """The checked table in the schema's types."""
        ids = self._ids = self._image_ids()
        checks: dict[str, Callable[[], pa.Array]] = {
            "image_id": lambda: pa.array(ids),
            "path": self._paths,
            "split": self._splits,
            "captions": self._captions,
            "labels": lambda: self._labels(n_classes),
        }
        return pa.table([checks[name]() for name in self._schema.names], schema=self._schema)

    def _paths(self) -> pa.Array:
        paths = self._cast("path")
        self._none("path", pc.match_substring_regex(paths, UNSAFE_PATH), paths, SAFE_PATH)
        return paths

    def _splits(self) -> pa.Array:
        splits = self._cast("split")
        self._none("split", pc.invert(pc.is_in(splits, pa.array(SPLITS))), splits, "train, val or test")
        return splits

    def _image_ids(self) -> npt.NDArray[np.int64]:
        ids: npt.NDArray[np.int64] = self._cast("image_id").to_numpy()
        order = np.argsort(ids, kind="stable")
        again = order[1:][np.diff(ids[order]) == 0]
        if len(again):
            row = int(again.min())
            first = int(np.flatnonzero(ids == ids[row])[0])
            self._refuse("image_id", row, f"{ids[row]}, which is also in row {first}", "every image id once")
        return ids

    def _captions(self) -> pa.Array:
        captions = self._columns["captions"]
        texts, rows = captions.flatten(), pc.list_parent_indices(captions)
        self._none("captions", texts.is_null(), "a null among the captions", rows=rows)
        blank = pc.match_substring_regex(texts.cast(pa.large_string()), r"^\s*$")
        self._none("captions", blank, "an empty caption", "text", rows=rows)
        return self._cast("captions")

    def _labels(self, n_classes: int) -> pa.Array:
        labels = self._columns["labels"]
        values, rows = labels.flatten(), pc.list_parent_indices(labels)
        self._none("labels", values.is_null(), "a null among the labels", rows=rows)
        try:
            label = values.cast(pa.int64()).to_numpy()
        except pa.ArrowException as error:
            raise self._unreadable("labels", error) from None
        beyond = pa.array((label < 0) | (label >= n_classes))
        self._none("labels", beyond, values, f"0 to {n_classes - 1}", rows=rows)
        return label_lists(rows.to_numpy().astype(np.int64), label, len(labels), n_classes)

    def _typed(self, name: str, kind: pa.DataType) -> None:
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        value = kind.value_type if is_list else kind
        fits = _is_text if name in {"path", "split", "captions"} else pa.types.is_integer
        # A column of lists that are all empty has no type of its own.
        untyped = is_list and name == "labels" and pa.types.is_null(value)
        if is_list != (name in {"captions", "labels"}) or not (fits(value) or untyped):
            raise InputError(
                "a manifest's column has the wrong type",
                where=f"{self._where}, column {name}",
                got=kind,
                wanted=SCHEMA.field(name).type,
            )

    def _cast(self, name: str) -> pa.Array:
        try:
            return self._columns[name].cast(SCHEMA.field(name).type)
        except pa.ArrowException as error:
            raise self._unreadable(name, error) from None

    def _unreadable(self, name: str, error: pa.ArrowException) -> InputError:
        return InputError(
            "a manifest's column cannot be read",
            where=f"{self._where}, column {name}",
            got=first_line(error),
            wanted=SCHEMA.field(name).type,
        )

    def _none(self, name: str, bad: pa.Array, got: object, wanted: object = None, *, rows: pa.Array = None) -> None:
        if pc.any(bad).as_py():
            first = pc.index(bad, True).as_py()
            shown = repr(got[first].as_py()) if isinstance(got, pa.Array) else got
            self._refuse(name, first if rows is None else rows[first].as_py(), shown, wanted or SCHEMA.field(name).type)

    def _refuse(self, name: str, row: int, got: object, wanted: object) -> NoReturn:
        image = "" if self._ids is None else f" (image {self._ids[row]})"
        raise InputError(f"bad {name} in a manifest", where=f"{self._where}, row {row}{image}", got=got, wanted=wanted)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def label_lists(
    rows: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], n_rows: int, n_classes: int
) -> pa.ListArray:
    """Lists of labels from (row, label) pairs in any order: sorted, each label once.

    Args:
        rows: ``(P,)`` int64 in 0..N-1.
        labels: ``(P,)`` int64 in 0..C-1.
        n_rows: N.
        n_classes: C.

    Returns:
        N lists of int32.
    """
    pairs = rows * n_classes + labels
    if not (np.diff(pairs) > 0).all():  # they mostly are in order, and sorting is what takes time here
        pairs = np.unique(pairs)
    offsets = np.searchsorted(pairs, np.arange(n_rows + 1, dtype=np.int64) * n_classes)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array((pairs % n_classes).astype(np.int32)))
