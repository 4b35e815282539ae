"""``index.parquet``: one row per image, in the order of the embeddings."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..errors import first_line
from .errors import StoreError
from .layout import Layout
from .parquet import open_parquet, read_parquet

ID = "image_id"
PLACE = ("shard", "row")


def check_index(table: pa.Table) -> NDArray[np.int64]:
    """The image ids ``(N,)`` of the caller's table, in order.

    Raises:
        StoreError: It is not one row per image, with a column ``image_id`` int64 without nulls, every value once.
    """
    if not isinstance(table, pa.Table):
        raise StoreError("bad index", got=type(table).__name__, wanted="a pyarrow table")
    names = table.column_names
    if names.count(ID) != 1 or table.schema.field(ID).type != pa.int64():
        raise StoreError("bad index", got=f"columns {names}", wanted=f"one column {ID} of int64")
    if taken := [name for name in PLACE if name in names]:
        raise StoreError("bad index", got=f"columns {taken}", wanted="a table without them, the store adds them")
    if not table.num_rows:
        raise StoreError("nothing to store", got="an index without rows")
    if table.column(ID).null_count:
        raise StoreError("bad index", got=f"{table.column(ID).null_count} null image ids", wanted="none")
    ids = image_ids(table)
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) != len(ids):
        raise StoreError("bad index", got=f"image id {unique[counts > 1][0]} more than once", wanted="every image once")
    return ids


def image_ids(table: pa.Table) -> NDArray[np.int64]:
    """The image ids of an index, ``(N,)`` int64, read-only."""
    ids: NDArray[np.int64] = table.column(ID).to_numpy()
    ids.setflags(write=False)
    return ids


def place_rows(table: pa.Table, layout: Layout) -> pa.Table:
    """The table with columns ``shard`` and ``row`` int32: in which shard, and where in it, a row's embeddings are."""
    rows = np.arange(layout.n_images, dtype=np.int64)
    for name, values in zip(PLACE, divmod(rows, layout.shard_rows), strict=True):
        table = table.append_column(pa.field(name, pa.int32(), nullable=False), pa.array(values, pa.int32()))
    return table


def index_bytes(table: pa.Table) -> bytes:
    """The parquet file of an index; the schema's metadata is kept."""
    sink = pa.BufferOutputStream()
    # Parquet's own names for the items of lists would change the table's types.
    pq.write_table(table, sink, compression="zstd", use_compliant_nested_type=False)
    return bytes(sink.getvalue())


def parse_index(data: bytes, layout: Layout, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a parquet file and check that it fits the store.

    Args:
        data: The whole file.
        layout: The store's shape.
        columns: What to read beside ``image_id``, ``shard`` and ``row``; everything where not given.

    Raises:
        ValueError: It is not readable, or is not an index of that layout.
    """
    try:
        with open_parquet(data) as file:
            if file.metadata.num_rows != layout.n_images:
                raise ValueError(f"it has {file.metadata.num_rows} rows, not {layout.n_images}")
            present = set(file.schema_arrow.names)
        wanted = None if columns is None else [n for n in dict.fromkeys((ID, *columns, *PLACE)) if n in present]
        table = read_parquet(data, wanted)
        ids = check_index(table.drop_columns(list(PLACE)))
    except (StoreError, KeyError) as error:
        raise ValueError(first_line(error)) from error
    if len(ids) != layout.n_images:
        raise ValueError(f"it has {len(ids)} rows, not {layout.n_images}")
    placed = place_rows(table.select([ID]), layout)
    if not all(pc.all(pc.equal(table.column(name), placed.column(name))).as_py() for name in PLACE):
        raise ValueError("its columns shard and row do not fit the shards")
    return table
