"""The one way of a shard into a store: read, encode and write, which overlap and are each timed."""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from ...cache import Shard, StoreWriter
from ...errors import InputError
from ..core.device import to_device
from ..core.progress import Progress, Task
from ..data.manifest import Manifest
from .encoder import Encoder
from .images import PatchSpec
from .reader import ImageReader, Piece, Reasons, plan_pieces, read_headers, read_piece

OnError = Literal["stop", "skip"]


class Unreadable:
    """The images of a store that cannot be read, as far as this process knows them.

    Args:
        data: The folder that paths are relative to.
        paths: The path of every row of the store.
        on_error: Whether an image that cannot be read stops everything, or is left out and recorded.
        spec: What is done to an image before the tower sees it.

    Attributes:
        data: The folder that paths are relative to.
        reasons: Why each unreadable row cannot be read.
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
        """Look at images that an earlier run skipped; a shard with one that can be read now is encoded again.

        Raises:
            InputError: See :meth:`record`.
        """
        mended = []
        for shard, rows in writer.skipped.items():
            reasons = {row: reason for row in rows if (reason := self._try(row)) is not None}
            self.record(reasons)
            if len(reasons) < len(rows):
                mended.append(shard)
        # Only now: a refusal must not leave a store unfinished that was finished.
        for shard in mended:
            writer.redo(shard)

    def why(self, row: int) -> str:
        """Why a row of the store was skipped, by this process or by another one."""
        reason = self.reasons.get(row) or self._try(row)
        return reason or "it could not be read, and can be now: run `mmcli extract` again"

    def _try(self, row: int) -> str | None:
        """Read one image; the reason if it cannot be read."""
        paths = [self._paths[row]]
        (header,) = read_headers(paths, data=self.data, spec=self._spec)
        (work,) = plan_pieces(0, paths, [header], self._spec.most_tokens)
        return read_piece(work, data=self.data, spec=self._spec).bad.get(0)


CAPTIONS = 5
ClockPart = Literal["read_s", "compute_s", "write_s"]
CLOCK_PARTS: tuple[ClockPart, ...] = get_args(ClockPart)


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
        """Begin to count seconds at this moment."""
        self._last = time.perf_counter()

    def lap(self, part: ClockPart) -> None:
        """Book the time since the last lap under ``part``."""
        now = time.perf_counter()
        setattr(self, part, getattr(self, part) + now - self._last)
        self._last = now

    def add(self, other: "Clock") -> None:
        """Add the seconds that another clock counted."""
        for part in CLOCK_PARTS:
            setattr(self, part, getattr(self, part) + getattr(other, part))

    @property
    def bottleneck(self) -> str | None:
        """The part that was waited for longest; None where nothing was done."""
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
        prefetch_factor: Batches that each of them reads ahead.
        progress: Progress bars; pass ``Progress()`` to silence them.
        clock: The clock that the time is booked on; a new one when not given.

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
        prefetch_factor: int = 2,
        progress: Progress,
        clock: Clock | None = None,
    ) -> None:
        self._encoder, self._listing, self._writer, self._unreadable = encoder, listing, writer, unreadable
        self._workers, self._prefetch_factor, self._progress = workers, prefetch_factor, progress
        self._tokens = encoder.batch_tokens = writer.layout.batch_tokens
        self.clock = clock or Clock()

    def encode_images(self, shards: Sequence[Shard]) -> int:
        """Encode and write the image part of some shards; the number of images that were encoded."""
        if not shards:
            return 0
        lists = [self._listing.paths[shard.start : shard.stop] for shard in shards]
        reader = ImageReader(
            self._unreadable.data,
            self._encoder.spec,
            tokens=self._tokens,
            workers=self._workers,
            prefetch_factor=self._prefetch_factor,
        )
        with self._progress.task("images", sum(map(len, lists))) as task, WriteBehind() as behind, reader:
            self.clock.start()
            encoded = sum(
                self.encode_pieces(pieces, shards[number], behind, task)
                for number, pieces in itertools.groupby(reader.read(lists), key=attrgetter("number"))
            )
            behind.finish()
            self.clock.lap("write_s")
        return encoded

    def encode_pieces(self, pieces: Iterable[Piece], shard: Shard, behind: "WriteBehind", task: Task) -> int:
        """Encode the pieces of one shard, and have its image part written.

        Args:
            pieces: All pieces of the shard, as they are read.
            shard: An image shard that is missing.
            behind: The thread that writes it; the caller waits for the last shard.
            task: The progress bar that counts images.

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
                encoded = self._encoder.image_features(piece.pixels, piece.batch.grid)
                # With a list of rows as its index a GPU would have to be waited for.
                rows = to_device(torch.tensor(piece.batch.rows), features.device, pin=self._encoder.pin_memory)
                features.index_copy_(0, rows, encoded)
                task.advance(len(piece.batch.rows))
            self.clock.lap("compute_s")
        v_img = features.cpu().numpy()
        v_img[sorted(bad)] = 0
        self.clock.lap("compute_s")
        behind.begin(self._writer.write_image, shard, v_img=v_img, skipped=bad)
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
                if texts:
                    encoded = self._encoder.encode_texts(texts, advance=task.advance)
                    v_txt[np.arange(CAPTIONS) < real[:, None]] = encoded
                self.clock.lap("compute_s")
                behind.begin(self._writer.write_text, shard, v_txt=v_txt, n_captions=real)
                self.clock.lap("write_s")
            behind.finish()
            self.clock.lap("write_s")


class WriteBehind(ThreadPoolExecutor):
    """One thread that writes while the model goes on; at most one piece of work is under way."""

    def __init__(self) -> None:
        super().__init__(1)
        self._pending: Future[None] | None = None

    def begin(self, work: Callable[..., None], /, *args: object, **kwargs: object) -> None:
        """Start a piece of work when the one before it is done; an error of that one is raised here."""
        self.finish()
        self._pending = self.submit(work, *args, **kwargs)

    def finish(self) -> None:
        """Wait for the work under way, and raise its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def count_captions(captions: Sequence[Sequence[str]]) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The number of captions of each image that are kept, ``(N,)`` uint8."""
    return np.array([min(len(texts), CAPTIONS) for texts in captions], np.uint8)
