"""Stage 1: a frozen SigLIP2 runs once over a manifest, and its raw embeddings go into a store.

One process fills a whole store or one stripe of its shards; several of them, on one machine or many, fill one store
together, and whoever ends last finishes it.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
import transformers

from ... import InputError, __version__
from ...cache import StoreKey, StoreWriter, is_remote
from ...cache.metadata import read_key
from ..core.config import Config
from ..core.device import pick_device, reader_count
from ..core.interrupts import interruptible
from ..core.progress import Progress
from ..data.manifest import Manifest, read_manifest
from .encoder import Encoder
from .extract_plan import ExtractPlan, ExtractResult, parse_stripe
from .shards import CAPTIONS, ShardJobs, count_captions
from .siglip import Identity, model_path
from .unreadable import Unreadable

__all__ = ["ExtractPlan", "ExtractResult", "extract", "parse_stripe"]

# Smaller shards lose less when an extraction is killed; larger ones fill the batches of rare grids, which a GPU wants.
SHARD_ROWS = {"cpu": 1024, "mps": 1024, "cuda": 4096}


class Described(Protocol):
    """What a store is told of the encoder that fills it: the encoder itself, or its description from elsewhere."""

    @property
    def identity(self) -> Identity: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def width(self) -> int: ...
    @property
    def batch_tokens(self) -> int: ...
    @property
    def logit_scale(self) -> float: ...
    @property
    def logit_bias(self) -> float: ...


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
    for folder, commit in other_commits(key, plan.cache):
        progress.say(f"  note: {folder} holds the same of commit {commit}; --revision {commit} goes on with that one")
    with open_store(config, plan, listing, encoder, key) as writer, interruptible(without=["--force"]):
        was_finished = writer.finished
        for shard in writer.damaged:
            progress.say(f"  damaged, will be redone: {shard.name}: {shard.reason}")
        reused = reuse_text(writer, writer.folder.parent)
        unreadable = Unreadable(plan.data, listing.paths, plan.on_error, encoder.spec)
        jobs = ShardJobs(
            encoder, listing, writer, unreadable, workers=reader_count(config.data.num_workers, encoder.device),
            ahead=config.data.prefetch_factor, progress=progress,
        )  # fmt: skip
        unreadable.retry(writer)
        missing = writer.missing("image")
        if missing or writer.missing("text"):
            progress.say(headline(encoder, writer, sum(shard.n_rows for shard in missing)))
        n_encoded = jobs.encode_images(missing)
        jobs.encode_captions(writer.missing("text"))
        writer.finish(unreadable.why)
        return ExtractResult(
            store=writer.folder, finished=writer.finished, was_finished=was_finished, digest=key.digest,
            n_images=len(listing), n_captions=int(count_captions(listing.captions).sum()),
            n_encoded=n_encoded, width=encoder.width, reused_text_shards=reused,
            damaged=tuple(f"{shard.name}: {shard.reason}" for shard in writer.damaged), skipped=unreadable.reasons,
            seconds=time.perf_counter() - started, clock=jobs.clock,
        )  # fmt: skip


def _load(config: Config, plan: ExtractPlan) -> tuple[Manifest, Encoder, StoreKey, ExtractPlan]:
    listing = read_manifest(plan.manifest or plan.data / "manifest.parquet")
    encoder = load_encoder(config, plan, pick_device(config.hardware.device))
    return listing, encoder, *with_key(plan, listing, encoder)


def clear(config: Config, plan: ExtractPlan) -> ExtractPlan:
    """Throw the store that a plan is for away; the plan of what is left to do."""
    listing, encoder, key, plan = _load(config, plan)
    with open_store(config, plan, listing, encoder, key):
        return replace(plan, force=False)


def load_encoder(config: Config, plan: ExtractPlan, device: torch.device) -> Encoder:
    """The encoder that a configuration and a plan ask for.

    Raises:
        InputError: As for :meth:`Encoder.load`.
    """
    return Encoder.load(
        config.model.siglip2_variant, revision=config.model.revision, patches=config.model.max_num_patches,
        text_length=config.model.text_max_length, resizer=plan.resizer, device=device,
        pin_memory=config.data.pin_memory,
    )  # fmt: skip


def with_key(plan: ExtractPlan, listing: Manifest, encoder: Described) -> tuple[StoreKey, ExtractPlan]:
    """The store's key, and the plan with the store's folder."""
    key = StoreKey(**vars(encoder.identity), dtype=plan.dtype, manifest_sha256=listing.sha256)
    return key, replace(plan, out=plan.out or plan.cache / key.folder_name)


def open_store(config: Config, plan: ExtractPlan, listing: Manifest, encoder: Described, key: StoreKey) -> StoreWriter:
    """The writer of a plan's store, to be entered; ``plan.out`` has to be given."""
    assert plan.out is not None
    kind = encoder.device.type
    extra = {
        "mmcli": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "device": str(encoder.device), "logit_scale": encoder.logit_scale, "logit_bias": encoder.logit_bias,
        "data": listing.name, "model_path": model_path(config.model.siglip2_variant),
    }  # fmt: skip
    return StoreWriter(
        plan.out, key, listing.table, width=encoder.width, n_captions_max=CAPTIONS,
        shard_rows=plan.shard_rows or SHARD_ROWS[kind], batch_tokens=plan.batch_tokens or encoder.batch_tokens,
        extra=extra, overwrite=plan.force, stripe=plan.stripe,
    )  # fmt: skip


def headline(encoder: Described, writer: StoreWriter, n_images: int) -> str:
    """What is about to be encoded, in one line."""
    identity = encoder.identity
    what = f"{n_images:,} images" if n_images else "captions"
    how = f"{identity.compute_dtype}, {identity.patches} patches"
    return f"encoding {what} with {identity.model} on {encoder.device} ({how}) into {writer.folder}"


def other_commits(key: StoreKey, cache: Path) -> list[tuple[Path, str]]:
    """Stores that differ in the commit of the hub checkpoint alone: a branch has moved since they were begun.

    Args:
        key: The key of the store that is about to be filled.
        cache: The folder of all stores.

    Returns:
        Their folders, each with its commit.
    """
    if key.commit is None or is_remote(cache) or not cache.is_dir():
        return []
    stores = []
    for folder in sorted(cache.iterdir()):
        try:
            other, _ = read_key(folder)
        except (OSError, InputError):  # no store, or one that says so itself when it is used
            continue
        if other.commit not in {None, key.commit} and replace(other, revision=key.revision) == key:
            stores.append((folder, other.revision))
    return stores


def reuse_text(writer: StoreWriter, siblings: Path) -> int:
    """Caption embeddings do not depend on the patch budget: take them from a sibling store that has them."""
    if is_remote(siblings) or not writer.missing("text"):
        return 0
    folders = [folder for folder in sorted(siblings.iterdir()) if folder.is_dir() and folder != writer.folder]
    return sum(writer.reuse_text(folder) for folder in folders)
