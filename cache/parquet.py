"""Parquet files, read with every claim of their footer checked before anything is allocated."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import first_line

# A byte of a file holds at most so many rows: each has an image id or a path of its own.
MOST_ROWS_A_BYTE = 64


def open_parquet(source: Path | bytes) -> pq.ParquetFile:
    """A parquet file whose footer makes sense; its pages are compared with their checksums when they are read.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is no parquet file, or its footer claims more rows than its bytes can hold.
    """
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    try:
        opened = pa.BufferReader(source) if isinstance(source, bytes) else source
        file = pq.ParquetFile(opened, page_checksum_verification=True)
    except MemoryError:  # of this machine, not of the file
        raise
    except Exception as error:  # noqa: BLE001 - arrow raises errors of many kinds where the bytes make no sense
        raise unreadable(error) from None
    # Nothing else of the footer is asked for: arrow aborts the process over the parts of one that is damaged.
    if not 0 <= file.metadata.num_rows <= MOST_ROWS_A_BYTE * size:
        raise ValueError(f"{file.metadata.num_rows:,} rows in {size:,} bytes")
    return file


def read_parquet(source: Path | bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole table, or some columns of it, every value valid; the source is a file, or the whole content of one.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is not readable, a column is missing, or as for :func:`open_parquet`.
    """
    with open_parquet(source) as file:
        try:
            # One thread: arrow's threads, where a process is short, may abort it at its exit ("terminate called
            # without an active exception"). Not read_table, which takes `name=value` folders for further columns.
            table = file.read(columns=columns, use_threads=False)
            table.validate(full=True)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - as above
            raise unreadable(error) from None
        if table.num_rows != file.metadata.num_rows:
            raise ValueError(f"{table.num_rows:,} rows, not {file.metadata.num_rows:,} as it says")
    missing = set(columns or ()) - set(table.column_names)
    if missing:
        raise ValueError(f"no column {', '.join(sorted(missing))}")
    return table


def unreadable(error: Exception) -> OSError | ValueError:
    """What arrow says of a file in one line; it raises errors of many kinds where the bytes make no sense."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return ValueError(first_line(error)[:200])
