"""The embeddings of a manifest in memory, made from the images themselves by towers that may change meanwhile.

What a store would give: splits share the arrays, so what is embedded anew is seen by all of them.

Symbols: N images of the manifest, n of some rows, D embedding width.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from ...errors import InputError
from ..core.config import Config
from ..core.device import reader_count
from ..core.progress import Progress, Task
from ..data.manifest import Manifest
from ..data.protocols import read_lists, select
from ..extraction.encoder import Encoder, EncoderParts
from ..extraction.images import Box
from ..extraction.reader import ImageReader, Piece
from ..extraction.shards import CAPTIONS, count_captions
from ..training.data import Split
from .distributed import Team

Rows = npt.NDArray[np.int64]
# A plan of batches covers so many images, as a shard of a store on a CPU does.
CHUNK_ROWS = 1024


class LiveStore:
    """Embeddings of all images and captions of a manifest, float32.

    Args:
        listing: The manifest.
        data: The folder that its paths are relative to.
        parts: The checkpoint; its weights may be trained.
        config: Data and hardware sections are used.
        captions: How many of an image are kept: all, or the first alone.
        team: Who embeds; each process a share.
        progress: Who to tell.

    Attributes:
        splits: Those of the protocol, in arrays that they share.
        encoder: The towers as they were when :meth:`renew` was called last.
    """

    def __init__(
        self,
        listing: Manifest,
        data: Path,
        parts: EncoderParts,
        config: Config,
        *,
        captions: int = CAPTIONS,
        team: Team,
        progress: Progress,
    ) -> None:
        self.listing, self.data, self.parts = listing, data, parts
        self._config, self.team, self._progress = config, team, progress
        self.encoder = Encoder(parts, pin_memory=config.data.pin_memory)
        n, width = len(listing), self.encoder.width
        self._counts = count_captions(listing.captions)
        self.whole = Split.place(
            np.zeros((n, width), np.float32),
            np.zeros((n, captions, width), np.float32),
            self._counts,
            listing.labels_matrix(),
            team.device,
            norms=(np.zeros(n, np.float32), np.zeros((n, captions), np.float32)),
        )
        lists = None if config.data.protocol_lists is None else read_lists(Path(config.data.protocol_lists))
        chosen = select(config.data.split_type, listing, lists)
        self.splits = {split: self.whole.part(rows) for split, rows in chosen.items()}

    @property
    def image_ids(self) -> dict[str, npt.NDArray[Any]]:
        """Of every split, ``(n,)`` int64."""
        return {name: self.listing.image_ids[split.rows.cpu().numpy()] for name, split in self.splits.items()}

    @property
    def used(self) -> Rows:
        """Rows of any split, ascending."""
        return np.unique(np.concatenate([split.rows.cpu().numpy() for split in self.splits.values()]))

    def renew(self) -> None:
        """Take the towers as they are now."""
        tokens = self.encoder.batch_tokens
        self.encoder = Encoder(self.parts, pin_memory=self._config.data.pin_memory)
        self.encoder.batch_tokens = tokens

    def __enter__(self) -> Self:
        wanted = self._config.data.num_workers
        workers = reader_count(wanted, self.team.device)
        workers = workers if wanted is not None else -(-workers // self.team.size)
        ahead = self._config.data.prefetch_factor
        tokens = max(self.encoder.batch_tokens, self._config.finetune.batch_tokens or 0)
        self._reader = ImageReader(self.data, self.encoder.spec, tokens=tokens, workers=workers, prefetch_factor=ahead)
        self._reader.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.__exit__(kind, error, trace)

    def read(
        self, lists: Sequence[Rows], boxes: Sequence[Sequence[Box]] | None = None, *, tokens: int | None = None
    ) -> Iterator[Piece]:
        """Pieces of images by rows of the manifest, as :meth:`ImageReader.read` gives them; one reading at a time."""
        paths = self.listing.paths
        return self._reader.read([[paths[row] for row in rows] for rows in lists], boxes, tokens=tokens)

    def check_headers(self, rows: Rows) -> None:
        """Read the headers of the images of some rows, each process of a share: what is no image is met at once.

        Args:
            rows: Of the manifest.

        Raises:
            InputError: One cannot be read; it is named.
        """
        mine = [self.listing.paths[row] for row in rows[self._share()]]
        with self._task("headers", len(mine)) as task:
            bad: list[str] = []
            for found in self._reader.headers(mine):
                bad.extend(one for one in found if isinstance(one, str))
                task.advance(len(found))
        refuse_unreadable(dict(enumerate(bad)))

    def embed_images(self, rows: Rows, title: str | None = "images") -> None:
        """Embed the images of some rows.

        Args:
            rows: Of the manifest, ascending.
            title: What it is called to whoever waits; None for quiet.

        Raises:
            InputError: One cannot be read; it is named.
        """
        mine = [rows[at : at + CHUNK_ROWS][self._share()] for at in range(0, len(rows), CHUNK_ROWS)]
        mine = [part for part in mine if len(part)]
        self._clear(self.whole.v_img, rows)
        with self._task(title, sum(map(len, mine))) as task:
            for piece in self.read(mine, tokens=self.encoder.batch_tokens):
                refuse_unreadable(piece.bad)
                if piece.batch is not None:
                    at = torch.from_numpy(mine[piece.number][list(piece.batch.rows)]).to(self.team.device)
                    self.whole.v_img[at] = self.encoder.image_features(piece.pixels, piece.batch.grid)
                    task.advance(len(at))
        self._gather(self.whole.v_img, rows)
        self._measure(self.whole.v_img, self.whole.norm_img, rows)

    def embed_captions(self, rows: Rows, title: str | None = "captions") -> None:
        """Embed the captions of some rows, as many of an image as are kept; arguments as of :meth:`embed_images`."""
        kept = self.whole.v_txt.shape[1]
        self._clear(self.whole.v_txt, rows)
        mine = rows[self._share()]
        counts = np.minimum(self._counts, kept)[mine]
        with self._task(title, int(counts.sum())) as task:
            for start in range(0, len(mine), CHUNK_ROWS):
                part = slice(start, start + CHUNK_ROWS)
                texts = [text for row in mine[part] for text in self.listing.captions[row][:kept]]
                made = torch.from_numpy(self.encoder.encode_texts(texts, advance=task.advance)).to(self.team.device)
                at = np.repeat(mine[part], counts[part])
                caption = np.concatenate([np.arange(count) for count in counts[part]])
                self.whole.v_txt[torch.from_numpy(at), torch.from_numpy(caption)] = made
        self._gather(self.whole.v_txt, rows)
        self._measure(self.whole.v_txt, self.whole.norm_txt, rows)

    def _task(self, title: str | None, total: int) -> AbstractContextManager[Task]:
        return self._progress.task(title, total) if title is not None else Progress().task("", total)

    def _share(self) -> slice:
        return slice(self.team.rank, None, self.team.size)

    def _clear(self, whole: torch.Tensor, rows: Rows) -> None:
        if self.team.size > 1:
            whole[torch.from_numpy(rows).to(whole.device)] = 0.0

    def _gather(self, whole: torch.Tensor, rows: Rows) -> None:
        """Everybody's share to everybody: the others' are zeros in each."""
        for start in range(0, len(rows) if self.team.size > 1 else 0, CHUNK_ROWS):
            at = torch.from_numpy(rows[start : start + CHUNK_ROWS]).to(whole.device)
            part = whole[at]
            self.team.sum_([part])
            whole[at] = part

    @staticmethod
    def _measure(whole: torch.Tensor, norms: torch.Tensor, rows: Rows) -> None:
        for start in range(0, len(rows), CHUNK_ROWS):
            at = torch.from_numpy(rows[start : start + CHUNK_ROWS]).to(whole.device)
            norms[at] = whole[at].norm(dim=-1)


def refuse_unreadable(bad: dict[int, str]) -> None:
    """Stop at images that cannot be read.

    Raises:
        InputError: There is one.
    """
    if bad:
        # Nothing about the manifest: without the image it is another one, and a run does not go on with that.
        more = f" ({len(bad) - 1:,} more like it)" if len(bad) > 1 else ""
        raise InputError(f"{next(iter(bad.values()))}{more}")
