"""Libraries in C and Rust write past Python's streams: a warning of theirs would be a second line beside our own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import RLock

STREAMS = (1, 2)  # stdout and stderr
# Two threads that swap the streams in turn would leave them swapped.
_lock = RLock()


@contextmanager
def without_native_output() -> Iterator[None]:
    """Drop what libraries write past Python: a panic in Rust prints its traceback, an unknown key a line on stdout."""
    kept: dict[int, int] = {}
    with _lock, Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        for stream in STREAMS:
            with suppress(OSError):  # a stream that is closed takes nothing anyway
                kept[stream] = os.dup(stream)
                os.dup2(nowhere.fileno(), stream)
        try:
            yield
        finally:
            for stream, copy in kept.items():
                os.dup2(copy, stream)
                os.close(copy)
