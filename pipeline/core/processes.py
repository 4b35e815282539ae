"""Processes that this one starts: they end with it, and can be ended by it."""

import multiprocessing
import os
import threading
from collections.abc import Collection
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess


def end_with_parent() -> None:
    """Let this process end when the one that started it does, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_children(kept: Collection[BaseProcess]) -> None:
    """End the processes that this one started, but for some.

    Args:
        kept: Processes that go on, as ``multiprocessing.active_children()`` listed them earlier.
    """
    for process in multiprocessing.active_children():
        if process not in kept:
            process.terminate()
