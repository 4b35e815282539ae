"""What one process does to the shards it is given: read, compute and write overlap, and each is timed."""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch

from ...cache import Shard, StoreWriter
from ...errors import InputError
from ..core.device import to_device
from ..core.files import resolve_image
from ..core.progress import Progress, Task
from ..data.manifest import Manifest
from .encoder import Encoder
from .images import PatchSpec, UnreadableImage, image_size, read_patches
from .reader import ImageReader, Piece

OnError = Literal["stop", "skip"]
Reasons = dict[int, str]


class Unreadable:
    """What this process knows of the images that cannot be read.

    Args:
        data: The folder that paths are relative to.
        paths: The path of every row of the store.
        on_error: Whether an image that cannot be read stops everything, or is left out and recorded.
        spec: What is done to an image before the tower sees it.

    Attributes:
        data: That folder.
        reasons: Rows that were found unreadable, and why.
    """

    def __init__(self, data: Path, paths: Sequence[str], on_error: OnError, spec: PatchSpec) -> None:
        self.data, self._paths, self._on_error, self._spec = data, paths, on_error, spec
        self.reasons: Reasons = {}

    def record(self, reasons: Reasons) -> None:
        """Note rows that cannot be read.

        Raises:
            InputError: There is one, and ``on_error`` is ``stop``.
        """
        if reasons and self._on_error == "stop":
            raise InputError(f"{next(iter(reasons.values()))}, or leave such images out with --on-error skip")
        self.reasons |= reasons

    def retry(self, writer: StoreWriter) -> None:
        """Look at images that an earlier run skipped; a shard with one that can be read now is made again.

        Raises:
            InputError: As for :meth:`record`.
        """
        mended = []
        for shard, rows in writer.skipped.items():
            found = {row: self._refusal(row) for row in rows}
            still = {row: reason for row, reason in found.items() if reason is not None}
            self.record(still)
            if len(still) < len(rows):
                mended.append(shard)
        # Only now: a refusal must not leave a store unfinished that was finished.
        for shard in mended:
            writer.redo(shard)

    def why(self, row: int) -> str:
        """Why a row of the store was skipped, by this process or by another one."""
        found = self.reasons.get(row) or self._refusal(row)
        return found or "it could not be read, and can be now: run `mmcli extract` again"

    def _refusal(self, row: int) -> str | None:
        try:
            path, spec = resolve_image(self.data, self._paths[row]), self._spec
            grid = spec.grid(*image_size(path))
            read_patches(path, grid, spec, np.empty((grid.tokens, spec.width), np.uint8))
        except UnreadableImage as error:
            return str(error)
        return None


CAPTIONS = 5


@dataclass(kw_only=True)
class Clock:
    """Seconds that the work waited for images, for the model, and for the disk.

    Reading and writing run beside the model, so each second is counted once, under what it was spent waiting for: the
    largest is the bottleneck.
    """

    read_s: float = 0.0
    compute_s: float = 0.0
    write_s: float = 0.0
    _last: float = field(default_factory=time.perf_counter, repr=False)

    def start(self) -> None:
        """Count from now."""
        self._last = time.perf_counter()

    def lap(self, part: Literal["read_s", "compute_s", "write_s"]) -> None:
        """Book the time since the last lap under ``part``."""
        now = time.perf_counter()
        setattr(self, part, getattr(self, part) + now - self._last)
        self._last = now

    @property
    def bottleneck(self) -> str | None:
        """What was waited for longest; None where nothing was done."""
        parts = {"reading images": self.read_s, "the model": self.compute_s, "writing": self.write_s}
        longest = max(parts, key=lambda name: parts[name])
        return longest if parts[longest] > 0 else None


class ShardJobs:
    """Encodes the images and captions of some shards of a store.

    A batch never crosses a shard, and a plan depends on its shard alone, so a resumed store is the same.

    Args:
        encoder: The towers; its ``batch_tokens`` become the store's.
        listing: The manifest.
        writer: The open store.
        unreadable: Where the images are, and what becomes of one that cannot be read.
        workers: Processes that read images; 0 reads in this one.
        ahead: Batches that are read ahead of the model.
        progress: Who to tell.
        clock: What the time is booked on; a new one when not given.

    Attributes:
        clock: Where the time went.
    """

    def __init__(
        self,
        encoder: Encoder,
        listing: Manifest,
        writer: StoreWriter,
        unreadable: Unreadable,
        *,
        workers: int = 0,
        ahead: int = 0,
        progress: Progress,
        clock: Clock | None = None,
    ) -> None:
        self._encoder, self._listing, self._writer, self._unreadable = encoder, listing, writer, unreadable
        self._workers, self._ahead, self._progress = workers, ahead, progress
        self._tokens = encoder.batch_tokens = writer.layout.batch_tokens
        self.clock = clock or Clock()

    def encode_images(self, shards: Sequence[Shard]) -> int:
        """Encode and write the image part of some shards; the number of images that were encoded."""
        rows = [range(shard.start, shard.stop) for shard in shards]
        total = sum(map(len, rows))
        if not total:
            return 0
        paths = self._listing.paths
        lists = [paths[shard.start : shard.stop] for shard in shards]
        reader = ImageReader(
            self._unreadable.data, self._encoder.spec, tokens=self._tokens, workers=self._workers, ahead=self._ahead
        )
        with self._progress.task("images", total) as task, WriteBehind() as behind, reader:
            self.clock.start()
            encoded = sum(
                self.encode_pieces(pieces, shards[number], behind, task)
                for number, pieces in itertools.groupby(reader.read(lists), key=attrgetter("number"))
            )
            behind.wait()
            self.clock.lap("write_s")
        return encoded

    def encode_pieces(self, pieces: Iterable[Piece], shard: Shard, behind: "WriteBehind", task: Task) -> int:
        """Encode the pieces of one shard, and have its image part written.

        Args:
            pieces: All pieces of the shard, as they are read.
            shard: An image shard that is missing.
            behind: Who writes it; the caller waits for the last one.
            task: Told how many images are done.

        Returns:
            How many images were encoded.

        Raises:
            InputError: An image cannot be read and ``on_error`` is ``stop``, or as for the encoder and the writer.
        """
        features = torch.zeros((shard.n_rows, self._encoder.width), device=self._encoder.device)
        bad = set[int]()
        for piece in pieces:
            self.clock.lap("read_s")
            self._unreadable.record({shard.start + row: reason for row, reason in piece.bad.items()})
            bad |= piece.bad.keys()
            if piece.batch is not None:
                made = self._encoder.image_features(piece.pixels, piece.batch.grid)
                # With a list of rows as its index a GPU would have to be waited for.
                rows = to_device(torch.tensor(piece.batch.rows), features.device, pin=self._encoder.pin_memory)
                features.index_copy_(0, rows, made)
                task.advance(len(piece.batch.rows))
            self.clock.lap("compute_s")
        v_img = features.cpu().numpy()
        v_img[sorted(bad)] = 0
        self.clock.lap("compute_s")
        behind.submit(self._writer.write_image, shard, v_img=v_img, skipped=bad)
        self.clock.lap("write_s")
        return shard.n_rows - len(bad)

    def encode_captions(self, shards: Sequence[Shard]) -> None:
        """Encode and write the text part of some shards."""
        if not shards:
            return
        captions = self._listing.captions
        counts = count_captions(captions)
        total = int(sum(counts[shard.start : shard.stop].sum() for shard in shards))
        with self._progress.task("captions", total) as task, WriteBehind() as behind:
            self.clock.start()
            for shard in shards:
                real = counts[shard.start : shard.stop]
                texts = [text for row in captions[shard.start : shard.stop] for text in row[:CAPTIONS]]
                v_txt = np.zeros((shard.n_rows, CAPTIONS, self._encoder.width), np.float32)
                v_txt[np.arange(CAPTIONS) < real[:, None]] = self._encoder.encode_texts(texts, advance=task.advance)
                self.clock.lap("compute_s")
                behind.submit(self._writer.write_text, shard, v_txt=v_txt, n_captions=real)
                self.clock.lap("write_s")
            behind.wait()
            self.clock.lap("write_s")


class WriteBehind:
    """One thread that writes while the model goes on; at most one piece of work waits."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def submit(self, work: Callable[..., None], /, *words: object, **named: object) -> None:
        """Start a piece of work when the one before is done; an error of that one is raised here."""
        self.wait()
        self._pending = self._pool.submit(work, *words, **named)

    def wait(self) -> None:
        """Wait for the work under way, and raise its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)


def count_captions(captions: Sequence[Sequence[str]]) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """How many captions of each image are kept, ``(N,)`` uint8."""
    return np.array([min(len(texts), CAPTIONS) for texts in captions], np.uint8)
