"""Images ahead of the model: a plan of batches, and the DataLoader whose worker processes decode them.

A list of images (a shard's, say) is planned from the images' headers alone: each batch holds images of one patch grid,
so that none is padded. The headers of a list are read while the batches of the one before it are. Only names, reasons
and handles go through pipes; pixels are written into shared memory by the process that decodes them.
"""

import multiprocessing
import shutil
import signal
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ...errors import InputError
from ..core.files import resolve_image
from ..core.processes import end_with_parent, without_main_module
from .images import Box, Grid, PatchSpec, Pixels, UnreadableImage, image_size, read_patches

HEADERS_A_TASK = 64
# Headers take about a tenth of the time of whole images. They are read a list ahead, so that none is waited for.
MOST_WORKERS_OF_HEADERS, TASKS_AHEAD = 4, 16
SHM = Path("/dev/shm")  # noqa: S108

Reasons = dict[int, str]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images of one grid.

    Attributes:
        grid: The grid of all of them.
        rows: Their rows in the list, ascending.
    """

    grid: Grid
    rows: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Patches of all images together."""
        return self.grid.tokens * len(self.rows)


def plan(grids: Sequence[Grid | None], *, tokens: int) -> list[Batch]:
    """Group the images of a list by grid and cut each group into even batches.

    Args:
        grids: The grid of every image in the list's order; None for an image that cannot be read.
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


class Piece(NamedTuple):
    """A batch and its pixels.

    Attributes:
        number: Which of the lists of paths it belongs to.
        batch: Its grid and rows; None where nothing of that list can be read.
        pixels: Patches ``(n, P, 3 p^2)`` uint8; rows that cannot be read are zero.
        bad: Rows of the list that cannot be read, with the reason; a list's first piece has those whose header says it.
        last: Whether the list ends with this piece.
    """

    number: int
    batch: Batch | None
    pixels: Pixels
    bad: Reasons
    last: bool


class Work(NamedTuple):
    """The images of one :class:`Piece`, which explains ``number``, ``batch``, ``bad`` and ``last``.

    Attributes:
        paths: Paths of the batch's images.
        boxes: The part of each image that is read, at the grid of the whole image; all of it where None.
    """

    number: int
    batch: Batch | None
    paths: list[str]
    boxes: list[Box] | None
    bad: Reasons
    last: bool


def plan_pieces(
    number: int, paths: Sequence[str], headers: Sequence[Grid | str], tokens: int, boxes: Sequence[Box] | None = None
) -> list[Work]:
    """The work of one list, from what :func:`read_headers` gives for it.

    Args:
        number: The list's number.
        paths: Paths of its images.
        headers: The grid of each image, or why it cannot be read.
        tokens: Most patches of a batch.
        boxes: The part of each image that is read; all of it when not given.
    """
    bad = {row: header for row, header in enumerate(headers) if isinstance(header, str)}
    batches = plan([None if isinstance(header, str) else header for header in headers], tokens=tokens)
    work = [
        Work(
            number,
            batch,
            [paths[row] for row in batch.rows],
            None if boxes is None else [boxes[row] for row in batch.rows],
            {},
            last=batch is batches[-1],
        )
        for batch in batches
    ] or [Work(number, None, [], None, {}, last=True)]
    return [work[0]._replace(bad=bad), *work[1:]]


def read_headers(paths: Sequence[str], *, data: Path, spec: PatchSpec) -> list[Grid | str]:
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


def read_piece(work: Work, *, data: Path, spec: PatchSpec) -> Piece:
    """Read a batch of images.

    Raises:
        InputError: See :func:`read_headers`.
    """
    if work.batch is None:
        return Piece(work.number, None, np.empty((0, 0, spec.width), np.uint8), work.bad, work.last)
    bad = dict(work.bad)
    pixels = np.zeros((len(work.paths), work.batch.grid.tokens, spec.width), np.uint8)
    for place, (row, path) in enumerate(zip(work.batch.rows, work.paths, strict=True)):
        try:
            box = None if work.boxes is None else work.boxes[place]
            read_patches(resolve_image(data, path), work.batch.grid, spec, pixels[place], box)
        except UnreadableImage as error:
            bad[row] = str(error)
            pixels[place] = 0
    return Piece(work.number, work.batch, pixels, bad, work.last)


class ImageReader:
    """Reads lists of images in order, some batches ahead; leaving it as a context manager ends its processes.

    Args:
        data: The folder that paths are relative to.
        spec: The processor's settings.
        tokens: Most patches of a batch.
        workers: Processes; 0 reads in this one.
        prefetch_factor: Batches that each process reads ahead.
    """

    def __init__(self, data: Path, spec: PatchSpec, *, tokens: int, workers: int, prefetch_factor: int = 2) -> None:
        self._data, self._spec, self._tokens = data, spec, tokens
        self._workers, self._prefetch_factor = workers, prefetch_factor
        self._reading: Generator[Piece, None, None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reading is not None:
            self._reading.close()

    def headers(self, paths: Sequence[str]) -> Iterator[list[Grid | str]]:
        """The grids of the next images, or why there is none, some images at a time.

        Raises:
            InputError: A worker process was killed, or as for :func:`read_headers`.
        """
        return self._load(read_headers, _chunks([paths]), self._workers, self._prefetch_factor)

    def read(
        self, lists: Sequence[Sequence[str]], boxes: Sequence[Sequence[Box]] | None = None, *, tokens: int | None = None
    ) -> Iterator[Piece]:
        """Pieces of every list in turn.

        Args:
            lists: Paths from a manifest; a plan covers one list.
            boxes: The part of each image that is read, at the grid of the whole image; all of it when not given.
            tokens: Most patches of a batch, where these lists are to have smaller ones.

        Raises:
            InputError: A worker process was killed, or as for :func:`read_headers`.
        """
        self._reading = self._read(lists, boxes, min(self._tokens, tokens or self._tokens))
        return self._reading

    def _read(
        self, lists: Sequence[Sequence[str]], boxes: Sequence[Sequence[Box]] | None, tokens: int
    ) -> Generator[Piece, None, None]:
        if self._workers:
            _check_shared_memory(
                (self._workers * self._prefetch_factor + 1) * max(tokens, self._spec.most_tokens) * self._spec.width
            )
        workers = min(self._workers, MOST_WORKERS_OF_HEADERS)
        with closing(self._load(read_headers, _chunks(lists), workers, TASKS_AHEAD)) as headers:

            def works() -> Iterator[Work | InputError]:
                try:
                    for number, paths in enumerate(lists):
                        grids = [grid for _ in _chunks([paths]) for grid in next(headers)]
                        yield from plan_pieces(number, paths, grids, tokens, boxes[number] if boxes else None)
                except InputError as error:  # raised behind the pieces before it: a DataLoader cannot stop half-begun
                    yield error

            for piece in self._load(read_piece, works(), self._workers, self._prefetch_factor):
                yield piece._replace(pixels=piece.pixels.numpy())

    def _load(
        self, function: Callable[..., Any], items: Iterable[Any], workers: int, ahead: int
    ) -> Generator[Any, None, None]:
        """Call a function for every item, in worker processes where there are any; its results, in order."""
        parallel: dict[str, Any] = {}
        results: Iterator[Any] | None = None
        if workers:
            methods = multiprocessing.get_all_start_methods()
            context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
            if "forkserver" in methods:  # a process that was forked from this one would keep the store's lock
                context.set_forkserver_preload([__name__])
            parallel = {"prefetch_factor": ahead, "multiprocessing_context": context, "worker_init_fn": _begin}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # more workers than cores may be asked for
                loader: DataLoader[Any] = DataLoader(
                    _Calls(partial(function, data=self._data, spec=self._spec)),
                    sampler=items,
                    batch_size=None,
                    collate_fn=_to_tensor,
                    num_workers=workers,
                    generator=torch.Generator(),  # its own: a training draws from the default one
                    **parallel,
                )
                with without_main_module():
                    results = iter(loader)
            for result in results:
                if isinstance(result, InputError):
                    raise result
                yield result
        except (MemoryError, OSError, EOFError, RuntimeError) as error:
            # Its parent may be in the middle of taking over shared memory from a process that is killed.
            is_killed = isinstance(error, EOFError | ConnectionError | FileNotFoundError) or any(
                sign in str(error) for sign in ("DataLoader worker", "ancdata")
            )
            if isinstance(error, RuntimeError) and not is_killed:
                raise
            raise InputError(
                "a process that reads images was killed" if is_killed else "the processes that read images cannot work",
                where=self._data,
                got="most likely too little memory" if is_killed else error or "too little memory",
                wanted=f"room for {workers} of them",
                do="give fewer --workers; what was finished is kept",
            ) from None
        finally:
            results = None  # its processes end here, and not when the traceback of an error is thrown away


def _chunks(lists: Iterable[Sequence[str]]) -> Iterator[Sequence[str]]:
    """Paths a few at a time, none of two lists."""
    for paths in lists:
        for start in range(0, len(paths), HEADERS_A_TASK):
            yield paths[start : start + HEADERS_A_TASK]


class _Calls(Dataset[Any]):
    """A function of the items of a sampler; what the user has to mend is returned, for the parent to raise."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __getitem__(self, item: Any) -> Any:  # noqa: ANN401
        try:
            return item if isinstance(item, InputError) else self._function(item)
        except InputError as error:
            return error


def _to_tensor(result: Any) -> Any:  # noqa: ANN401
    """Pixels as a tensor, which travels through shared memory and not through a pipe."""
    if not isinstance(result, Piece):
        return result
    return Piece(**result._asdict() | {"pixels": torch.from_numpy(result.pixels)})


def _begin(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent ends this one
    end_with_parent()


def _check_shared_memory(size: int) -> None:
    """Refuse to use more shared memory than there is, which would kill the worker that does."""
    if SHM.is_dir() and (free := shutil.disk_usage(SHM).free) < size:
        raise InputError(
            "too little shared memory",
            where=SHM,
            got=f"{free / 2**20:,.0f} MiB",
            wanted=f"{size / 2**20:,.0f} MiB",
            do="enlarge it (docker run --shm-size), or give a smaller --batch-tokens or fewer --workers",
        )
