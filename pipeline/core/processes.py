"""Processes that this one starts: they end with it, and can be ended by it."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any


def end_with_parent() -> None:
    """Let this process end when the one that started it does, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def without_main_module() -> Iterator[None]:
    """Start processes that do not run the user's script again.

    A process that is not forked imports the file of ``__main__`` first, so a script without ``if __name__ ==
    "__main__"`` would begin its own work once more in each of them. What they run here is never in that file.
    """
    main = sys.modules["__main__"]
    kept: dict[str, Any] = {name: vars(main).pop(name) for name in ("__file__", "__spec__") if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(kept)


def end_children(kept: Collection[BaseProcess]) -> None:
    """End the processes that this one started, but for some.

    Args:
        kept: Processes that go on, as ``multiprocessing.active_children()`` listed them earlier.
    """
    for process in multiprocessing.active_children():
        if process not in kept:
            process.terminate()
