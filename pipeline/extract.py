"""Stage 1: a frozen SigLIP2 runs once over a manifest, and its raw embeddings go into a store.

One process fills a whole store or one stripe of its shards; several of them, on one machine or many, fill one store
together, and whoever ends last finishes it.
"""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from rich.console import RenderableType

from .. import InputError, __version__
from ..cache import StoreKey, StoreWriter, Stripe
from .config import Config
from .device import pick_device
from .encoder import Encoder
from .manifest import Manifest, read_manifest
from .patches import Resizer
from .progress import Progress
from .shard_jobs import CAPTIONS, Clock, OnError, ShardJobs, count_captions

DEFAULT_CACHE = Path("data/cache")
# Smaller shards lose less when an extraction is killed; larger ones fill the batches of rare grids, which a GPU wants.
SHARD_ROWS = {"cpu": 1024, "mps": 1024, "cuda": 4096}
SHOWN_REASONS = 10


@dataclass(frozen=True, kw_only=True)
class ExtractPlan:
    """Everything that an extraction is told, beside the configuration.

    Attributes:
        data: The folder that the manifest's paths are relative to.
        manifest: The manifest; ``data/manifest.parquet`` when not given.
        out: The store's folder; below ``cache`` under the key's name when not given.
        cache: The folder of all stores.
        dtype: How embeddings are stored. Norms are always float32, taken before the cast.
        on_error: Whether an image that cannot be read stops everything, or is left out and recorded.
        resizer: What resizes images; see :class:`~mmcli.pipeline.patches.PatchSpec`.
        batch_tokens: Most tokens of a forward pass of a new store; what suits the device when not given.
        shard_rows: Images per shard of a new store; likewise.
        stripe: Which shards to fill; all when not given.
        force: Throw an existing store in ``out`` away first.
    """

    data: Path
    manifest: Path | None = None
    out: Path | None = None
    cache: Path = DEFAULT_CACHE
    dtype: Literal["float16", "float32"] = "float16"
    on_error: OnError = "stop"
    resizer: Resizer = "pillow"
    batch_tokens: int | None = None
    shard_rows: int | None = None
    stripe: Stripe | None = None
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class ExtractResult:
    """What an extraction did.

    Attributes:
        store: The store.
        finished: Whether it has all its shards; False after a stripe while others are at work.
        was_finished: Whether it had them before.
        digest: Digest of its key.
        n_images: Images in the store.
        n_captions: Captions in the store.
        n_encoded: Images encoded by this call; the others were already there.
        width: Embedding width D.
        damaged: Shards that were found damaged and were redone, each ``name: reason``.
        skipped: Rows that this call found unreadable, and why.
        reused_text_shards: Caption shards taken from a store with another patch budget.
        seconds: Wall time.
        clock: Seconds by part.
    """

    store: Path
    finished: bool
    was_finished: bool
    digest: str
    n_images: int
    n_captions: int
    n_encoded: int
    width: int
    damaged: tuple[str, ...]
    skipped: dict[int, str]
    reused_text_shards: int
    seconds: float
    clock: Clock

    def to_json(self) -> dict[str, Any]:
        """One flat JSON object."""
        plain = {name: value for name, value in vars(self).items() if name != "clock"}
        lists = {"store": str(self.store), "damaged": list(self.damaged), "skipped": list(self.skipped.values())}
        seconds = {name: getattr(self.clock, name) for name in ("read_s", "compute_s", "write_s", "bottleneck")}
        return {**plain, **lists, **seconds}

    def summary(self) -> list[RenderableType]:
        """What a person reads at the end."""
        lines = [f"{self.n_images:,} images and {self.n_captions:,} captions, {self.width} wide"]
        if self.n_encoded:
            waited = ", ".join(
                f"{name} {getattr(self.clock, f'{name}_s'):.1f} s" for name in ("read", "compute", "write")
            )
            lines += [
                f"{self.n_encoded:,} images encoded, {self.seconds:.1f} s in all; waited for: {waited}",
                f"the bottleneck was {self.clock.bottleneck}",
            ]
        if self.skipped:
            shown = list(self.skipped.values())[:SHOWN_REASONS]
            more = f"  and {len(self.skipped) - len(shown):,} more, in the store's manifest.json"
            lines += [f"{len(self.skipped):,} images could not be read; training leaves them out, a later run retries:"]
            lines += [f"  {reason}" for reason in shown] + ([more] if len(shown) < len(self.skipped) else [])
        if not self.finished:
            return [*lines, f"wrote this stripe of {self.store}; the last stripe to end finishes the store"]
        return [*lines, f"nothing was missing in {self.store}" if self.was_finished else f"wrote {self.store}"]


def extract(config: Config, plan: ExtractPlan, progress: Progress | None = None) -> ExtractResult:
    """Encode every image and caption of a manifest into a store; resumes where an earlier call was stopped.

    Args:
        config: Model, hardware and data sections are used.
        plan: What to do, from where to where.
        progress: Who to tell.

    Raises:
        InputError: A bad manifest, image, checkpoint, or a store of another key in ``out``.
    """
    started = time.perf_counter()
    progress = progress or Progress()
    listing, encoder, key, plan = _load(config, plan)
    with _writer(config, plan, listing, encoder, key) as writer:
        was_finished = writer.finished
        for shard in writer.damaged:
            progress.say(f"  damaged, will be redone: {shard.name}: {shard.reason}")
        reused = _reuse_text(writer, writer.folder.parent)
        jobs = ShardJobs(
            encoder, listing, writer, data=plan.data, on_error=plan.on_error,
            workers=reader_count(config, encoder.device), ahead=config.data.prefetch_factor, progress=progress,
        )  # fmt: skip
        jobs.retry_skipped()
        missing = writer.missing("image")
        if missing or writer.missing("text"):
            progress.say(_headline(encoder, writer, sum(shard.n_rows for shard in missing)))
        n_encoded = jobs.encode_images(missing)
        jobs.encode_captions(writer.missing("text"))
        writer.finish(jobs.why_skipped)
        return ExtractResult(
            store=writer.folder, finished=writer.finished, was_finished=was_finished, digest=key.digest,
            n_images=len(listing), n_captions=int(count_captions(listing.captions).sum()),
            n_encoded=n_encoded, width=encoder.width, reused_text_shards=reused,
            damaged=tuple(f"{shard.name}: {shard.reason}" for shard in writer.damaged), skipped=jobs.reasons,
            seconds=time.perf_counter() - started, clock=jobs.clock,
        )  # fmt: skip


def clear(config: Config, plan: ExtractPlan) -> ExtractPlan:
    """Throw the store that a plan is for away; the plan of what is left to do."""
    listing, encoder, key, plan = _load(config, plan)
    with _writer(config, plan, listing, encoder, key):
        return replace(plan, force=False)


def parse_stripe(text: str) -> Stripe:
    """Read ``i/n``, as in ``--shard 3/8``: the third of eight stripes.

    Raises:
        InputError: It is not that.
    """
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise InputError(
            "no such stripe", where="--shard", got=text, wanted="i/n with i from 1 to n",
            do="as in --shard 1/8 to --shard 8/8",
        )  # fmt: skip
    return Stripe(int(number) - 1, int(of))


def reader_count(config: Config, device: torch.device) -> int:
    """Processes that read images: on a CPU few, because the model computes on the same cores."""
    if config.data.num_workers is not None:
        return config.data.num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // 8) if device.type == "cpu" else cores


def _load(config: Config, plan: ExtractPlan) -> tuple[Manifest, Encoder, StoreKey, ExtractPlan]:
    listing = read_manifest(plan.manifest or plan.data / "manifest.parquet")
    encoder = Encoder.load(
        config.model.siglip2_variant, revision=config.model.revision, patches=config.model.max_num_patches,
        text_length=config.model.text_max_length, resizer=plan.resizer, device=pick_device(config.hardware.device),
    )  # fmt: skip
    key = StoreKey(**vars(encoder.identity), dtype=plan.dtype, manifest_sha256=listing.sha256)
    return listing, encoder, key, replace(plan, out=plan.out or plan.cache / key.folder_name)


def _writer(config: Config, plan: ExtractPlan, listing: Manifest, encoder: Encoder, key: StoreKey) -> StoreWriter:
    assert plan.out is not None
    kind = encoder.device.type
    extra = {
        "mmcli": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "device": str(encoder.device), "logit_scale": encoder.logit_scale, "logit_bias": encoder.logit_bias,
        "data": listing.name, "model_path": _model_path(config.model.siglip2_variant),
    }  # fmt: skip
    return StoreWriter(
        plan.out, key, listing.table, width=encoder.width, n_captions_max=CAPTIONS,
        shard_rows=plan.shard_rows or SHARD_ROWS[kind], batch_tokens=plan.batch_tokens or encoder.batch_tokens,
        extra=extra, overwrite=plan.force, stripe=plan.stripe,
    )  # fmt: skip


def _headline(encoder: Encoder, writer: StoreWriter, n_images: int) -> str:
    identity = encoder.identity
    what = f"{n_images:,} images" if n_images else "captions"
    how = f"{identity.compute_dtype}, {identity.patches} patches"
    return f"encoding {what} with {identity.model} on {encoder.device} ({how}) into {writer.folder}"


def _model_path(name: str) -> str:
    """What finds the checkpoint again: a hub id as it is, a folder from wherever the next command runs."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _reuse_text(writer: StoreWriter, siblings: Path) -> int:
    """Caption embeddings do not depend on the patch budget: take them from a sibling store that has them."""
    if not writer.missing("text"):
        return 0
    folders = [folder for folder in sorted(siblings.iterdir()) if folder.is_dir() and folder != writer.folder]
    return sum(writer.reuse_text(folder) for folder in folders)
