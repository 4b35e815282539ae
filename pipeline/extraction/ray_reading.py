"""The images of one shard read and cut by one process, as one Arrow row that travels to whoever encodes them.

The row is a shard's whole plan: batches in the order in which
:class:`~mmcli.pipeline.extraction.reader.ImageReader` gives them.
No torch is imported here: the processes that read do not compute.

Columns: ``shard`` int64, ``plan`` string (JSON, see :func:`read_shard`), ``pixels`` large_binary (all batches' patches,
one after another).
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from ...errors import InputError
from .images import Grid, PatchSpec
from .reader import Batch, Piece, fill, measure, plan

SHARD, PATHS, PLAN, PIXELS, REFUSAL = "shard", "paths", "plan", "pixels", "refusal"
SCHEMA = pa.schema([(SHARD, pa.int64()), (PLAN, pa.string()), (PIXELS, pa.large_binary())])


def read_row(row: pa.Table, *, data: Path, spec: PatchSpec, tokens: int) -> pa.Table:
    """:func:`read_shard` for one row with columns ``shard`` and ``paths``; what it raises travels in the row."""
    number, paths = row.column(SHARD)[0].as_py(), row.column(PATHS)[0].as_py()
    try:
        return read_shard(number, paths, data, spec, tokens=tokens)
    except InputError as error:
        refusal = json.dumps({REFUSAL: str(error)})
        return pa.table([pa.array([number]), pa.array([refusal]), pa.array([b""], pa.large_binary())], schema=SCHEMA)


def read_shard(number: int, paths: Sequence[str], data: Path, spec: PatchSpec, *, tokens: int) -> pa.Table:
    """Read the images of one shard.

    Args:
        number: The shard's number.
        paths: Its images, from a manifest; none where its image part is there already.
        data: The folder that paths are relative to.
        spec: The processor's settings.
        tokens: Most patches of a batch.

    Returns:
        One row of :data:`SCHEMA`; the plan lists ``[grid, rows, bad]`` a batch, and what the headers say first.

    Raises:
        InputError: As for :func:`~mmcli.pipeline.extraction.reader.measure`.
    """
    measured = measure(data, paths, spec)
    unreadable = {row: one for row, one in enumerate(measured) if isinstance(one, str)}
    batches = plan([None if isinstance(one, str) else one for one in measured], tokens=tokens)
    pixels = np.empty(sum(batch.tokens for batch in batches) * spec.width, np.uint8)
    steps: list[object] = [sorted(unreadable.items())]
    start = 0
    for batch in batches:
        stop = start + batch.tokens * spec.width
        view = pixels[start:stop].reshape(len(batch.rows), batch.grid.tokens, spec.width)
        bad = fill(view, data, [paths[row] for row in batch.rows], batch.grid, spec)
        steps.append((batch.grid, batch.rows, [(batch.rows[at], reason) for at, reason in bad.items()]))
        start = stop
    ends = pa.py_buffer(np.array([0, pixels.size], np.int64))
    column = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(pixels)])
    return pa.table([pa.array([number]), pa.array([json.dumps(steps)]), column], schema=SCHEMA)


def pieces_of(row: pa.Table, spec: PatchSpec) -> Iterator[Piece]:
    """The pieces of a row that :func:`read_row` made, as ``ImageReader`` gives them.

    Args:
        row: One row.
        spec: The processor's settings.

    Yields:
        Pieces whose pixels are their own, so that they may be written to.

    Raises:
        InputError: What reading the shard raised.
    """
    number, steps = row.column(SHARD)[0].as_py(), json.loads(row.column(PLAN)[0].as_py())
    if isinstance(steps, dict):
        raise InputError(steps[REFUSAL])
    first, *steps = steps
    found = dict[int, str](first)
    if not steps:
        yield Piece(number, None, np.empty((0, 0, spec.width), np.uint8), found, last=True)
    whole = np.frombuffer(row.column(PIXELS)[0].as_buffer(), np.uint8)
    start = 0
    for at, (grid, rows, bad) in enumerate(steps):
        batch = Batch(grid=Grid(*grid), rows=tuple(rows))
        stop = start + batch.tokens * spec.width
        pixels = whole[start:stop].reshape(len(rows), batch.grid.tokens, spec.width).copy()
        yield Piece(number, batch, pixels, (found if at == 0 else {}) | dict(bad), last=at == len(steps) - 1)
        start = stop
