"""Stage 1: a frozen SigLIP2 runs once over a manifest, and its raw embeddings go into a store."""

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from rich.console import RenderableType

from .. import __version__
from ..cache import Shard, StoreKey, StoreWriter
from .config import Config, DataConfig
from .device import pick_device
from .encoder import Encoder
from .images import load_image
from .manifest import Manifest, read_manifest, resolve_image
from .progress import Progress

CAPTIONS = 5
SHARD_ROWS = 1024

Images = dict[str, torch.Tensor]


@dataclass(kw_only=True)
class Clock:
    """Seconds spent waiting for images, computing and writing."""

    read_s: float = 0.0
    compute_s: float = 0.0
    write_s: float = 0.0
    _last: float = field(default_factory=time.perf_counter, repr=False)

    def lap(self, part: Literal["read_s", "compute_s", "write_s"]) -> None:
        """Book the time since the last lap under ``part``."""
        now = time.perf_counter()
        setattr(self, part, getattr(self, part) + now - self._last)
        self._last = now

    @property
    def bottleneck(self) -> str:
        """Which part took longest."""
        parts = {"reading images": self.read_s, "the model": self.compute_s, "writing": self.write_s}
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True, kw_only=True)
class ExtractResult:
    """What an extraction did.

    Attributes:
        store: The finished store.
        digest: Digest of its key.
        n_images: Images in the store.
        n_captions: Captions in the store.
        n_encoded: Images encoded by this call; the others were already there.
        width: Embedding width D.
        damaged: Shards that were found damaged and were redone, each ``name: reason``.
        reused_text_shards: Caption shards taken from a store with another patch budget.
        seconds: Wall time.
        clock: Seconds by part.
    """

    store: Path
    digest: str
    n_images: int
    n_captions: int
    n_encoded: int
    width: int
    damaged: tuple[str, ...]
    reused_text_shards: int
    seconds: float
    clock: Clock

    def to_json(self) -> dict[str, Any]:
        """One flat JSON object."""
        return {
            "store": str(self.store), "digest": self.digest, "n_images": self.n_images, "n_captions": self.n_captions,
            "n_encoded": self.n_encoded, "width": self.width, "damaged": list(self.damaged),
            "reused_text_shards": self.reused_text_shards, "seconds": self.seconds, "read_s": self.clock.read_s,
            "compute_s": self.clock.compute_s, "write_s": self.clock.write_s, "bottleneck": self.clock.bottleneck,
        }  # fmt: skip

    def summary(self) -> list[RenderableType]:
        """What a person reads at the end."""
        what = f"{self.n_images:,} images and {self.n_captions:,} captions, {self.width} wide"
        how = f"{self.n_encoded:,} images encoded in {self.seconds:.1f} s, most of it in {self.clock.bottleneck}"
        return [f"{what}; {how if self.n_encoded else 'nothing was missing'}", f"wrote {self.store}"]


def extract(
    config: Config,
    *,
    data: Path,
    manifest: Path | None = None,
    out: Path | None = None,
    cache: Path = Path("data/cache"),
    dtype: Literal["float16", "float32"] = "float16",
    batch_size: int = 32,
    shard_rows: int = SHARD_ROWS,
    force: bool = False,
    progress: Progress | None = None,
) -> ExtractResult:
    """Encode every image and caption of a manifest into a store; resumes where an earlier call was stopped.

    Args:
        config: Model, hardware and data sections are used.
        data: The folder that the manifest's paths are relative to.
        manifest: The manifest; ``data/manifest.parquet`` when not given.
        out: The store's folder; below ``cache`` under the key's name when not given.
        cache: The folder of all stores.
        dtype: How embeddings are stored. Norms are always float32, taken before the cast.
        batch_size: Images per forward pass.
        shard_rows: Images per shard.
        force: Throw an existing store in ``out`` away first.
        progress: Who to tell.

    Raises:
        InputError: A bad manifest, image, checkpoint, or a store of another key in ``out``.
    """
    started = time.perf_counter()
    progress = progress or Progress()
    listing = read_manifest(manifest or data / "manifest.parquet")
    encoder = Encoder.load(
        config.model.siglip2_variant, revision=config.model.revision, patches=config.model.max_num_patches,
        text_length=config.model.text_max_length, device=pick_device(config.hardware.device),
    )  # fmt: skip
    identity = encoder.identity
    key = StoreKey(**vars(identity), dtype=dtype, manifest_sha256=listing.sha256)
    folder = out or cache / key.folder_name
    progress.say(
        f"encoding {len(listing):,} images with {identity.model} on {encoder.device.type}"
        f" ({identity.compute_dtype}, {identity.patches} patches) into {folder}"
    )
    clock = Clock()
    extra = {
        "mmcli": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "device": str(encoder.device), "logit_scale": encoder.logit_scale, "logit_bias": encoder.logit_bias,
        "data": listing.name, "model_path": _model_path(config.model.siglip2_variant),
    }  # fmt: skip
    with StoreWriter(
        folder, key, listing.table, width=encoder.width, n_captions_max=CAPTIONS, shard_rows=shard_rows, extra=extra,
        overwrite=force,
    ) as writer:  # fmt: skip
        for shard in writer.damaged:
            progress.say(f"  damaged, will be redone: {shard.name}: {shard.reason}")
        reused = _reuse_text(writer, folder.parent)
        workers = config.data.num_workers
        with ThreadPoolExecutor(max(1, workers if workers is not None else os.cpu_count() or 1)) as pool:
            job = _Job(encoder, listing, data, batch_size, config.data, pool, clock)
            n_encoded = job.encode_images(writer, progress)
        job.encode_captions(writer, progress)
        writer.finish()
        damaged = tuple(f"{shard.name}: {shard.reason}" for shard in writer.damaged)
    return ExtractResult(
        store=folder, digest=key.digest, n_images=len(listing), n_captions=int(_counts(listing.captions).sum()),
        n_encoded=n_encoded, width=encoder.width, damaged=damaged, reused_text_shards=reused,
        seconds=time.perf_counter() - started, clock=clock,
    )  # fmt: skip


class _Job:
    """One pass over the shards that are missing. A batch never crosses a shard, so a resumed store is the same."""

    def __init__(
        self,
        encoder: Encoder,
        listing: Manifest,
        data: Path,
        batch_size: int,
        read: DataConfig,
        pool: ThreadPoolExecutor,
        clock: Clock,
    ) -> None:
        self._encoder, self._listing, self._data, self._batch = encoder, listing, data, batch_size
        self._paths = listing.paths
        self._pool, self._clock = pool, clock
        self._ahead = max(1, read.prefetch_factor)
        self._pin = read.pin_memory and encoder.device.type == "cuda"

    def encode_images(self, writer: StoreWriter, progress: Progress) -> int:
        missing = writer.missing("image")
        total = sum(shard.stop - shard.start for shard in missing)
        if not total:
            return 0
        with progress.task("images", total) as task:
            batches = self._read_ahead(missing)
            for shard in missing:
                rows = []
                for _ in range(shard.start, shard.stop, self._batch):
                    inputs = next(batches)
                    self._clock.lap("read_s")
                    rows.append(self._encoder.encode_pixels(inputs))
                    self._clock.lap("compute_s")
                    task.advance(len(rows[-1]))
                writer.write_image(shard, v_img=np.concatenate(rows))
                self._clock.lap("write_s")
        return total

    def encode_captions(self, writer: StoreWriter, progress: Progress) -> None:
        missing = writer.missing("text")
        if not missing:
            return
        captions = self._listing.captions
        counts = _counts(captions)
        with progress.task("captions", int(sum(counts[s.start : s.stop].sum() for s in missing))) as task:
            for shard in missing:
                rows = [texts[:CAPTIONS] for texts in captions[shard.start : shard.stop]]
                real = counts[shard.start : shard.stop]
                v_txt = np.zeros((len(rows), CAPTIONS, self._encoder.width), np.float32)
                encoded = self._encoder.encode_texts([text for texts in rows for text in texts])
                v_txt[np.arange(CAPTIONS) < real[:, None]] = encoded
                self._clock.lap("compute_s")
                writer.write_text(shard, v_txt=v_txt, n_captions=real)
                self._clock.lap("write_s")
                task.advance(int(real.sum()))

    def _read_ahead(self, shards: Sequence[Shard]) -> Iterator[Images]:
        """Batches in order, decoded and patched by the pool a few batches ahead of the model."""
        spans = (
            (start, min(start + self._batch, shard.stop))
            for shard in shards
            for start in range(shard.start, shard.stop, self._batch)
        )
        waiting: deque[Future[Images]] = deque()
        for start, stop in spans:
            waiting.append(self._pool.submit(self._read, start, stop))
            if len(waiting) > self._ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _read(self, start: int, stop: int) -> Images:
        images = [load_image(resolve_image(self._data, path)) for path in self._paths[start:stop]]
        inputs = self._encoder.prepare_images(images)
        return {name: value.pin_memory() for name, value in inputs.items()} if self._pin else inputs


def _counts(captions: Sequence[Sequence[str]]) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.array([min(len(texts), CAPTIONS) for texts in captions], np.uint8)


def _model_path(name: str) -> str:
    """What finds the checkpoint again: a hub id as it is, a folder from wherever the next command runs."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _reuse_text(writer: StoreWriter, siblings: Path) -> int:
    """Caption embeddings do not depend on the patch budget: take them from a sibling store that has them."""
    if not writer.missing("text"):
        return 0
    return sum(
        writer.reuse_text(folder)
        for folder in sorted(siblings.iterdir())
        if folder.is_dir() and folder != writer.folder
    )
