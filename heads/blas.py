"""BLAS on one thread, for work that has threads of its own.

A product of small matrices is asked of BLAS by every thread of a pool. Where BLAS has threads too, they wait for each
other in loops that burn a core: on two cores the bootstrap of 5,000 images took ten times the processor time.
"""

import functools
from contextlib import AbstractContextManager
from typing import Any

from threadpoolctl import ThreadpoolController


def one_blas_thread() -> AbstractContextManager[Any]:
    """A context in which products run on the thread that asks for them; results do not depend on it."""
    limits: AbstractContextManager[Any] = _controller().limit(limits=1, user_api="blas")
    return limits


@functools.cache
def _controller() -> ThreadpoolController:
    """The libraries that this process has loaded; looking for them takes milliseconds."""
    return ThreadpoolController()
