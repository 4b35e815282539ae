"""Between pyarrow and numpy without pyarrow's own ways, which import pandas where it is installed: 0.3 s of a start."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def numbers(values: Any) -> NDArray[Any]:  # noqa: ANN401 - pyarrow has no types
    """Whole numbers of an array or a column, ``(n,)`` of their own type; read-only, and no copy of one array.

    Args:
        values: Of an integer type, without a null.
    """
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    assert pa.types.is_integer(values.type), values.type
    assert not values.null_count, "a null among numbers"
    dtype, data = np.dtype(str(values.type)), values.buffers()[1]
    if data is None or not len(values):
        return np.empty(0, dtype)
    found = np.frombuffer(data, dtype, len(values), values.offset * dtype.itemsize)
    found.setflags(write=False)  # arrow's memory does not change
    return found


def integers(values: NDArray[np.integer[Any]]) -> pa.Array:
    """An array of whole numbers ``(n,)``, which share the memory of ``values``."""
    plain = np.ascontiguousarray(values)
    kind = pa.type_for_alias(plain.dtype.name)
    return pa.Array.from_buffers(kind, len(plain), [None, pa.py_buffer(plain)])


def booleans(values: NDArray[np.bool_]) -> pa.Array:
    """An array of truth values ``(n,)``."""
    return integers(values.view(np.uint8)).cast(pa.bool_())


def texts(values: Sequence[str]) -> pa.Array:
    """An array of a few texts."""
    coded = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, coded)], dtype=np.int32)
    return pa.Array.from_buffers(pa.string(), len(coded), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(coded))])
