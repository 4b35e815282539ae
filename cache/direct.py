"""Reads a shard's datasets straight into their rows of larger arrays, and tells whether the file's bytes are known.

For files whose SHA-256 was right before (``checked.py``). SHA-256 is several times slower than reading; a *mark* is
several times quicker: the file is cut into spans (its datasets, and what lies between), a span into pages of 512
little-endian 64-bit words; each page is summed modulo 2^64, and the mark is the CRC-32 of all the sums, and of the
bytes at the end of a span that fill no page. It finds what disks and memory do to bytes, not what people do: whoever
changes a file on purpose also changes its times, and then SHA-256 decides.
"""

import os
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_WORDS = 512
_PAGE = 8 * _WORDS
# What is read and summed at a time: it stays in the cache of one core.
_BLOCK = 128 * _PAGE


class Span(NamedTuple):
    """A range of a file's bytes: a dataset, or with an empty name what lies between."""

    name: str
    start: int
    stop: int


def spans(size: int, places: Mapping[str, tuple[int, int]]) -> tuple[Span, ...]:
    """All of a file, in order.

    Args:
        size: Its bytes.
        places: Where each dataset starts, and its bytes.

    Raises:
        ValueError: Datasets overlap, or lie outside the file.
    """
    found, at = [], 0
    for name, (start, length) in sorted(places.items(), key=lambda item: item[1]):
        if start < at or length < 0 or start + length > size:
            raise ValueError(f"{name} does not lie in the file by itself")
        found += [Span("", at, start), Span(name, start, start + length)]
        at = start + length
    return tuple(span for span in (*found, Span("", at, size)) if span.start < span.stop)


def mark_of(data: bytes, cut: tuple[Span, ...]) -> int:
    """The mark of a file's content, from 0 to 2^32 - 1."""
    whole, mark = np.frombuffer(data, np.uint8), 0
    for span in cut:
        for at in range(span.start, span.stop, _BLOCK):
            mark = _go_on(mark, whole[at : min(at + _BLOCK, span.stop)])
    return mark


def read_spans(handle: int, cut: tuple[Span, ...], out: Mapping[str, NDArray[Any]]) -> int:
    """Read a file once, its datasets straight into arrays; each block is summed while it is in the processor's cache.

    Args:
        handle: The open file.
        cut: All of it.
        out: Where each dataset goes: contiguous, writable, of as many bytes as its span.

    Returns:
        The mark of what was read.

    Raises:
        OSError: It cannot be read, or ends early.
    """
    mark = 0
    for span in cut:
        length = span.stop - span.start
        into: Bytes = out[span.name].reshape(-1).view(np.uint8) if span.name else np.empty(length, np.uint8)
        assert len(into) == length, span
        for at in range(0, length, _BLOCK):
            block = into[at : at + _BLOCK]
            _fill(handle, block, span.start + at)
            mark = _go_on(mark, block)
    return mark


def _fill(handle: int, block: Bytes, at: int) -> None:
    done = 0
    while done < len(block):
        if hasattr(os, "preadv"):
            got = os.preadv(handle, [block[done:].data], at + done)
        else:  # Windows
            os.lseek(handle, at + done, os.SEEK_SET)
            data = np.frombuffer(os.read(handle, len(block) - done), np.uint8)
            got = len(data)
            block[done : done + got] = data
        if got == 0:
            raise OSError("the file ends early")
        done += got


def _go_on(mark: int, block: Bytes) -> int:
    whole = len(block) - len(block) % _PAGE
    if whole:
        sums = np.add.reduce(block[:whole].view("<u8").reshape(-1, _WORDS), axis=1, dtype=np.uint64)
        mark = zlib.crc32(sums.astype("<u8", copy=False).data, mark)
    return zlib.crc32(block[whole:].data, mark) if whole < len(block) else mark
