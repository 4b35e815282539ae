"""The embeddings of a manifest in memory, computed from the images themselves by towers that may change meanwhile.

They stand in for a store. Splits share the arrays, so what is embedded anew is seen by all of them.

Symbols: N images of the manifest, n of some rows, D embedding width.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from ...errors import InputError
from ..core.config import Config
from ..core.device import reader_count
from ..core.progress import Progress
from ..data.manifest import Manifest
from ..data.protocols import chosen
from ..extraction.encoder import Encoder, EncoderParts
from ..extraction.images import Box
from ..extraction.reader import ImageReader, Piece
from ..extraction.shards import CAPTIONS, count_captions
from ..training.data import Split
from .distributed import ProcessGroup

Rows = npt.NDArray[np.int64]
# Images are read and embedded in chunks of so many, as a shard of a store on a CPU has.
CHUNK_ROWS = 1024


class LiveStore:
    """Embeddings of all images and captions of a manifest, float32.

    Args:
        listing: The manifest.
        data: The folder that its paths are relative to.
        parts: The checkpoint; its weights may be trained.
        config: The configuration; its data, finetune and hardware sections are used.
        captions: How many captions of an image are kept: all, or the first alone.
        group: The processes; each embeds a share.
        progress: Progress bars; pass ``Progress.quiet()`` to silence them.

    Attributes:
        splits: The splits of the protocol, in arrays that they share.
        whole: All images of the manifest, in the same arrays.
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
        group: ProcessGroup,
        progress: Progress,
    ) -> None:
        self.listing, self.group, self._data, self._parts = listing, group, data, parts
        self._config, self._progress = config, progress
        self.encoder = Encoder(parts, pin_memory=config.data.pin_memory)
        n, width = len(listing), self.encoder.width
        self._counts = count_captions(listing.captions)
        self.whole = Split.place(
            np.zeros((n, width), np.float32),
            np.zeros((n, captions, width), np.float32),
            self._counts,
            listing.labels_matrix(),
            group.device,
            norms=(np.zeros(n, np.float32), np.zeros((n, captions), np.float32)),
        )
        self.splits = {name: self.whole.part(rows) for name, rows in chosen(config.data, listing).items()}

    @property
    def image_ids(self) -> dict[str, npt.NDArray[Any]]:
        """Image ids of every split, ``(n,)`` int64."""
        return {name: self.listing.image_ids[split.rows.cpu().numpy()] for name, split in self.splits.items()}

    @property
    def used(self) -> Rows:
        """Rows of any split, ascending."""
        return np.unique(np.concatenate([split.rows.cpu().numpy() for split in self.splits.values()]))

    def renew(self) -> None:
        """Take the towers as they are now."""
        tokens = self.encoder.batch_tokens
        self.encoder = Encoder(self._parts, pin_memory=self._config.data.pin_memory)
        self.encoder.batch_tokens = tokens

    def __enter__(self) -> Self:
        data = self._config.data
        workers = reader_count(data.num_workers, self.group.device)
        if data.num_workers is None:
            workers = -(-workers // self.group.size)
        tokens = max(self.encoder.batch_tokens, self._config.finetune.batch_tokens or 0)
        self._reader = ImageReader(
            self._data, self.encoder.spec, tokens=tokens, workers=workers, prefetch_factor=data.prefetch_factor
        )
        self._reader.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:  # noqa: ANN401
        self._reader.__exit__(*error)

    def read(
        self, lists: Sequence[Rows], boxes: Sequence[Sequence[Box]] | None = None, *, tokens: int | None = None
    ) -> Iterator[Piece]:
        """Pieces of images by rows of the manifest, as :meth:`ImageReader.read` gives them; one reading at a time."""
        paths = self.listing.paths
        return self._reader.read([[paths[row] for row in rows] for rows in lists], boxes, tokens=tokens)

    def check_headers(self, rows: Rows) -> None:
        """Read the header of every image of some rows, to meet a file that is no image before anything is trained.

        Args:
            rows: Rows of the manifest; each process takes a share.

        Raises:
            InputError: An image cannot be read; it is named.
        """
        mine = [self.listing.paths[row] for row in rows[self.group.share(len(rows))]]
        bad: list[str] = []
        with self._progress.task("headers", len(mine)) as task:
            for headers in self._reader.headers(mine):
                bad.extend(header for header in headers if isinstance(header, str))
                task.advance(len(headers))
        refuse_unreadable(dict(enumerate(bad)))

    def embed(self, side: str, rows: Rows, *, quiet: bool = False) -> None:
        """Embed the images of some rows, or their captions, as many of an image as are kept.

        Args:
            side: The tower, ``image`` or ``text``.
            rows: Rows of the manifest, ascending.
            quiet: Show no progress bar.

        Raises:
            InputError: An image cannot be read; it is named.
        """
        progress = Progress.quiet() if quiet else self._progress
        values = self.whole.v_img if side == "image" else self.whole.v_txt
        norms = self.whole.norm_img if side == "image" else self.whole.norm_txt
        if self.group.size > 1:  # a sum over the processes is then the union of their shares
            values[torch.from_numpy(rows).to(values.device)] = 0.0
        (self._embed_images if side == "image" else self._embed_captions)(rows, progress)
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk = torch.from_numpy(rows[start : start + CHUNK_ROWS]).to(values.device)
            part = values[chunk]
            if self.group.size > 1:
                self.group.all_reduce([part])
                values[chunk] = part
            norms[chunk] = part.norm(dim=-1)

    def _embed_images(self, rows: Rows, progress: Progress) -> None:
        chunks = [rows[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS)]
        mine = [part for chunk in chunks if len(part := chunk[self.group.share(len(chunk))])]
        with progress.task("images", sum(map(len, mine))) as task:
            for piece in self.read(mine, tokens=self.encoder.batch_tokens):
                refuse_unreadable(piece.bad)
                if piece.batch is not None:
                    images = torch.from_numpy(mine[piece.number][list(piece.batch.rows)]).to(self.group.device)
                    self.whole.v_img[images] = self.encoder.image_features(piece.pixels, piece.batch.grid)
                    task.advance(len(images))

    def _embed_captions(self, rows: Rows, progress: Progress) -> None:
        kept = self.whole.v_txt.shape[1]
        mine = rows[self.group.share(len(rows))]
        counts = np.minimum(self._counts, kept)
        with progress.task("captions", int(counts[mine].sum())) as task:
            for start in range(0, len(mine), CHUNK_ROWS):
                chunk = mine[start : start + CHUNK_ROWS]
                texts = [text for row in chunk for text in self.listing.captions[row][:kept]]
                features = torch.from_numpy(self.encoder.encode_texts(texts, advance=task.advance))
                images = np.repeat(chunk, counts[chunk])
                places = np.concatenate([np.arange(count) for count in counts[chunk]])
                self.whole.v_txt[torch.from_numpy(images), torch.from_numpy(places)] = features.to(self.group.device)


def refuse_unreadable(bad: Mapping[int, str]) -> None:
    """Stop at images that cannot be read.

    Args:
        bad: Why, by any number of theirs.

    Raises:
        InputError: There is one.
    """
    if bad:
        # Nothing about the manifest: without the image it is another one, and a run cannot be resumed with that.
        more = f" ({len(bad) - 1:,} more like it)" if len(bad) > 1 else ""
        raise InputError(f"{next(iter(bad.values()))}{more}")
