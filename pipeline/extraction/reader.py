"""Images ahead of the model: worker processes decode into shared memory, the model takes whole batches from it.

Decoding is the bottleneck of extraction on a machine with a GPU, and Python threads share one interpreter, so processes
do it. Only names and reasons go through pipes; pixels are written once, where the model reads them. The number of
batches in memory is bounded. Workers import no torch, ignore Ctrl-C (the parent ends them), and end with the parent.
"""

import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from ...errors import InputError
from ..core.files import resolve_image
from .images import Box, Grid, PatchSpec, Pixels, UnreadableImage, image_size, read_patches


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images of one grid.

    Attributes:
        grid: Their grid.
        rows: Their rows in the shard, rising.
    """

    grid: Grid
    rows: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Patches of all images together."""
        return self.grid.tokens * len(self.rows)


def plan(grids: Sequence[Grid | None], *, tokens: int) -> list[Batch]:
    """Group the images of a shard by grid and cut each group into even batches.

    Args:
        grids: The grid of every image in the shard's order; None for an image that cannot be read.
        tokens: Most patches of a batch. An image that has more by itself is a batch of its own.

    Returns:
        Batches, the grids in order of first appearance; every readable image is in exactly one.

    Raises:
        ValueError: ``tokens`` is not positive.
    """
    if tokens < 1:
        raise ValueError(f"a batch of {tokens} tokens holds nothing")
    groups: dict[Grid, list[int]] = {}
    for row, grid in enumerate(grids):
        if grid is not None:
            groups.setdefault(grid, []).append(row)
    return [
        Batch(grid=grid, rows=tuple(rows[start:stop]))
        for grid, rows in groups.items()
        for start, stop in even_cuts(len(rows), max(1, tokens // grid.tokens))
    ]


def even_cuts(count: int, most: int) -> list[tuple[int, int]]:
    """Cut ``count`` things into as few runs of at most ``most`` as there can be; their sizes differ by at most one."""
    parts = -(-count // most)
    return list(pairwise(part * count // parts for part in range(parts + 1))) if parts else []


HEADERS_A_TASK = 64
SHM = Path("/dev/shm")  # noqa: S108

Bad = dict[int, str]


class Piece(NamedTuple):
    """A batch whose pixels are there.

    Attributes:
        number: Which of the lists of paths it belongs to.
        batch: Its grid and rows; None where nothing of that list can be read.
        pixels: Patches ``(n, P, 3 p^2)`` uint8; rows that cannot be read are zero.
        bad: Rows of the list that cannot be read, with the reason; those found by the header come with the first piece.
        last: Whether the list ends with this piece.
    """

    number: int
    batch: Batch | None
    pixels: Pixels
    bad: Bad
    last: bool


def measure(data: Path, paths: Sequence[str], spec: PatchSpec) -> list[Grid | str]:
    """The grid of each image from its header, or why it has none.

    Raises:
        InputError: The file system fails, or a path leaves the data folder: neither says anything about the image.
    """
    grids: list[Grid | str] = []
    for path in paths:
        try:
            grids.append(spec.grid(*image_size(resolve_image(data, path))))
        except UnreadableImage as error:
            grids.append(str(error))
    return grids


def fill(
    pixels: Pixels, data: Path, paths: Sequence[str], grid: Grid, spec: PatchSpec, boxes: Sequence[Box] | None = None
) -> Bad:
    """Read a batch of images into ``pixels``, ``(n, P, 3 p^2)`` uint8; those that cannot be read are zero and named.

    Of every image the part in its box is read, where boxes are given.

    Raises:
        InputError: As for :func:`measure`.
    """
    bad: Bad = {}
    for at, path in enumerate(paths):
        try:
            box = None if boxes is None else boxes[at]
            read_patches(resolve_image(data, path), grid, spec, pixels[at], box)
        except UnreadableImage as error:
            bad[at] = str(error)
            pixels[at] = 0
    return bad


class ImageReader:
    """Reads lists of images in order, a few batches ahead; a context manager that owns the processes.

    Args:
        data: The folder that paths are relative to.
        spec: The processor's settings.
        tokens: Most patches of a batch.
        workers: Processes; 0 reads in this one.
        ahead: Batches that are read ahead of the one that is used; at least one a worker.
    """

    def __init__(self, data: Path, spec: PatchSpec, *, tokens: int, workers: int, ahead: int) -> None:
        self._data, self._spec, self._tokens, self._workers = data, spec, tokens, workers
        self._slot_bytes = max(tokens, spec.most_tokens) * spec.width
        self._n_slots = 1 if workers == 0 else max(ahead, workers) + 2
        self._memory: SharedMemory | None = None
        self._pool: Executor | None = None

    def __enter__(self) -> Self:
        if self._workers == 0:
            _attach_array(np.zeros(self._slot_bytes, np.uint8), self._slot_bytes)
            self._pool = _Here()
            return self
        self._memory = _shared_memory(self._n_slots * self._slot_bytes)
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            context.set_forkserver_preload([__name__])
        self._pool = ProcessPoolExecutor(
            self._workers, mp_context=context, initializer=_start_worker, initargs=(self._memory.name, self._slot_bytes)
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._memory is not None:
            self._memory.close()
            self._memory.unlink()

    def headers(self, paths: Sequence[str]) -> Iterator[list[Grid | str]]:
        """The grids of the next images, or why there is none, some images at a time.

        Raises:
            InputError: A worker process was killed, or as for :func:`measure`.
        """
        with self._watched():
            for future in self._measure(paths):
                yield future.result()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool:
            raise InputError(
                "a process that reads images was killed",
                where=self._data,
                got="most likely too little memory",
                wanted=f"room for {self._workers} of them",
                do="give fewer --workers; what was finished is kept",
            ) from None
        except (MemoryError, OSError) as error:
            raise InputError(
                "the processes that read images cannot work",
                where=self._data,
                got=error or "too little memory",
                wanted=f"room for {self._workers} of them",
                do="give fewer --workers; what was finished is kept",
            ) from None

    def _measure(self, paths: Sequence[str]) -> "list[Future[list[Grid | str]]]":
        """Start reading headers."""
        assert self._pool is not None
        chunks = (paths[at : at + HEADERS_A_TASK] for at in range(0, len(paths), HEADERS_A_TASK))
        return [self._pool.submit(measure, self._data, list(chunk), self._spec) for chunk in chunks]

    def read(
        self, lists: Sequence[Sequence[str]], boxes: Sequence[Sequence[Box]] | None = None, *, tokens: int | None = None
    ) -> Iterator[Piece]:
        """Pieces of every list in turn.

        Args:
            lists: Paths from a manifest; a plan covers one list.
            boxes: The part of each image that is read, at the grid of the whole one; all of it when not given.
            tokens: Most patches of a batch, where these lists are to have smaller ones.

        Raises:
            InputError: A worker process was killed, or as for :func:`measure`.
        """
        free = deque(range(self._n_slots))
        waiting: deque[tuple[_Work, int | None, Future[Bad]]] = deque()
        works = self._works(lists, boxes, min(self._tokens, tokens or self._tokens))
        with self._watched():
            while True:
                for work in itertools.islice(works, len(free)):
                    waiting.append(self._start(work, free))
                if not waiting:
                    return
                work, slot, future = waiting.popleft()
                piece = self._piece(work, slot, future.result())
                if slot is not None:
                    free.append(slot)
                yield piece

    def _works(
        self, lists: Sequence[Sequence[str]], boxes: Sequence[Sequence[Box]] | None, tokens: int
    ) -> "Iterator[_Work]":
        """Batches of every list; headers are read one list ahead."""
        upcoming: deque[list[Future[list[Grid | str]]]] = deque()
        for number, paths in enumerate(lists):
            if not upcoming:
                upcoming.append(self._measure(paths))
            if number + 1 < len(lists):
                upcoming.append(self._measure(lists[number + 1]))
            measured = [one for future in upcoming.popleft() for one in future.result()]
            bad = {row: one for row, one in enumerate(measured) if isinstance(one, str)}
            batches = plan([None if isinstance(one, str) else one for one in measured], tokens=tokens)
            if not batches:
                yield _Work(number, None, (), bad, last=True)
            for at, batch in enumerate(batches):
                chosen = tuple(paths[row] for row in batch.rows)
                parts = None if boxes is None else tuple(boxes[number][row] for row in batch.rows)
                last = at == len(batches) - 1
                yield _Work(number, batch, chosen, bad if at == 0 else {}, last=last, boxes=parts)

    def _start(self, work: "_Work", free: deque[int]) -> "tuple[_Work, int | None, Future[Bad]]":
        if work.batch is None:
            nothing: Future[Bad] = Future()
            nothing.set_result({})
            return work, None, nothing
        assert self._pool is not None
        slot = free.popleft()
        asked = (slot, self._data, work.paths, work.batch.grid, self._spec, work.boxes)
        return work, slot, self._pool.submit(_fill, *asked)

    def _piece(self, work: "_Work", slot: int | None, bad: Bad) -> Piece:
        width = self._spec.width
        if work.batch is None or slot is None:
            return Piece(work.number, None, np.empty((0, 0, width), np.uint8), work.bad, work.last)
        named = {work.batch.rows[at]: reason for at, reason in bad.items()}
        whole = _slots if self._memory is None else _array(self._memory)
        # A copy: a slot is filled again at once, and shared memory cannot be closed while an array looks into it.
        pixels = _view(whole, slot * self._slot_bytes, len(work.paths), work.batch.grid, width).copy()
        return Piece(work.number, work.batch, pixels, work.bad | named, work.last)


class _Work(NamedTuple):
    number: int
    batch: Batch | None
    paths: tuple[str, ...]
    bad: Bad
    last: bool
    boxes: tuple[Box, ...] | None = None


class _Here(Executor):
    """Does the work when it is asked for, in this process."""

    def submit(self, fn: Any, /, *words: Any, **named: Any) -> Future[Any]:  # noqa: ANN401
        future: Future[Any] = Future()
        future.set_result(fn(*words, **named))
        return future


def _array(memory: SharedMemory) -> Pixels:
    assert memory.buf is not None
    return np.frombuffer(memory.buf, np.uint8)


def _view(whole: Pixels, start: int, n: int, grid: Grid, width: int) -> Pixels:
    size = n * grid.tokens * width
    return whole[start : start + size].reshape(n, grid.tokens, width)


# What follows runs in the workers. `_slots` is the shared memory as one array, `_slot_bytes` what each batch has of it.
_slots: Pixels = np.empty(0, np.uint8)
_slot_bytes = 0
_memory: SharedMemory | None = None


def _attach_array(slots: Pixels, slot_bytes: int) -> None:
    global _slots, _slot_bytes
    _slots, _slot_bytes = slots, slot_bytes


def _start_worker(name: str, slot_bytes: int) -> None:
    global _memory  # noqa: PLW0603
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["OMP_NUM_THREADS"] = "1"  # for torch, where it resizes: each worker is one core's work
    end_with_parent()
    _memory = SharedMemory(name=name)
    _attach_array(_array(_memory), slot_bytes)


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
    """End the processes that this one started since ``kept`` was what ``multiprocessing.active_children()`` gave."""
    for process in multiprocessing.active_children():
        if process not in kept:
            process.terminate()


def _shared_memory(size: int) -> SharedMemory:
    """Shared memory that is really there: using more than there is would kill the worker that does."""
    if SHM.is_dir() and (free := shutil.disk_usage(SHM).free) < size:
        raise InputError(
            "too little shared memory",
            where=SHM,
            got=f"{free / 2**20:,.0f} MiB",
            wanted=f"{size / 2**20:,.0f} MiB",
            do="enlarge it (docker run --shm-size), or give a smaller --batch-tokens or fewer --workers",
        )
    try:
        return SharedMemory(create=True, size=size)
    except OSError as error:
        raise InputError("no shared memory", where=SHM, got=error, do="give --workers 0, which needs none") from None


def _fill(slot: int, data: Path, paths: Sequence[str], grid: Grid, spec: PatchSpec, boxes: Sequence[Box] | None) -> Bad:
    return fill(_view(_slots, slot * _slot_bytes, len(paths), grid, spec.width), data, paths, grid, spec, boxes)
