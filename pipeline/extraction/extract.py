"""Stage 1: a frozen SigLIP2 runs once over a manifest, and its raw embeddings go into a store.

One process fills a whole store or one stripe of its shards; several of them, on one machine or many, fill one store
together, and whoever ends last finishes it.
"""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import transformers
from rich.console import RenderableType

from ... import __version__
from ...cache import StoreKey, StoreWriter, Stripe, is_remote
from ...cache.metadata import read_key
from ...errors import InputError
from ..core.config import Config
from ..core.cores import count_cores
from ..core.device import pick_device, reader_count
from ..core.interrupts import interruptible
from ..core.progress import ConsoleProgress, Progress
from ..data.manifest import Manifest, read_manifest
from .encoder import Encoder
from .images import Resizer
from .model_source import pin_revision
from .reader import end_children, end_with_parent
from .shards import CAPTIONS, Clock, OnError, ShardJobs, Unreadable, count_captions
from .siglip import Identity, model_path

DEFAULT_CACHE = Path("data/cache")
SHOWN_REASONS = 10


@dataclass(frozen=True, kw_only=True)
class ExtractPlan:
    """Everything that an extraction is told, beside the configuration.

    Attributes:
        data: The folder that the manifest's paths are relative to.
        manifest: The manifest; ``data/manifest.parquet`` when not given.
        out: The store's folder, or a URL's place; below ``cache`` under the key's name when not given.
        cache: The folder of all stores.
        dtype: How embeddings are stored. Norms are always float32, taken before the cast.
        on_error: Whether an image that cannot be read stops everything, or is left out and recorded.
        resizer: What resizes images; see :class:`~mmcli.pipeline.extraction.images.PatchSpec`.
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


def parse_stripe(text: str) -> Stripe:
    """Read ``i/n``, as in ``--shard 3/8``: the third of eight stripes.

    Raises:
        InputError: It is not that.
    """
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise InputError(
            "no such stripe",
            where="--shard",
            got=text,
            wanted="i/n with i from 1 to n",
            do="as in --shard 1/8 to --shard 8/8",
        )
    return Stripe(int(number) - 1, int(of))


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
            encoder,
            listing,
            writer,
            unreadable,
            workers=reader_count(config.data.num_workers, encoder.device),
            ahead=config.data.prefetch_factor,
            progress=progress,
        )
        unreadable.retry(writer)
        missing = writer.missing("image")
        if missing or writer.missing("text"):
            progress.say(headline(encoder, writer, sum(shard.n_rows for shard in missing)))
        n_encoded = jobs.encode_images(missing)
        jobs.encode_captions(writer.missing("text"))
        writer.finish(unreadable.why)
        return ExtractResult(
            store=writer.folder,
            finished=writer.finished,
            was_finished=was_finished,
            digest=key.digest,
            n_images=len(listing),
            n_captions=int(count_captions(listing.captions).sum()),
            n_encoded=n_encoded,
            width=encoder.width,
            reused_text_shards=reused,
            damaged=tuple(f"{shard.name}: {shard.reason}" for shard in writer.damaged),
            skipped=unreadable.reasons,
            seconds=time.perf_counter() - started,
            clock=jobs.clock,
        )


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
        config.model.siglip2_variant,
        revision=config.model.revision,
        patches=config.model.max_num_patches,
        text_length=config.model.text_max_length,
        resizer=plan.resizer,
        device=device,
        pin_memory=config.data.pin_memory,
    )


def with_key(plan: ExtractPlan, listing: Manifest, encoder: Described) -> tuple[StoreKey, ExtractPlan]:
    """The store's key, and the plan with the store's folder."""
    key = StoreKey(**vars(encoder.identity), dtype=plan.dtype, manifest_sha256=listing.sha256)
    return key, replace(plan, out=plan.out or plan.cache / key.folder_name)


def open_store(config: Config, plan: ExtractPlan, listing: Manifest, encoder: Described, key: StoreKey) -> StoreWriter:
    """The writer of a plan's store, to be entered; ``plan.out`` has to be given."""
    assert plan.out is not None
    kind = encoder.device.type
    extra = {
        "mmcli": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": str(encoder.device),
        "logit_scale": encoder.logit_scale,
        "logit_bias": encoder.logit_bias,
        "data": listing.name,
        "model_path": model_path(config.model.siglip2_variant),
    }
    return StoreWriter(
        plan.out,
        key,
        listing.table,
        width=encoder.width,
        n_captions_max=CAPTIONS,
        shard_rows=plan.shard_rows or SHARD_ROWS[kind],
        batch_tokens=plan.batch_tokens or encoder.batch_tokens,
        extra=extra,
        overwrite=plan.force,
        stripe=plan.stripe,
    )


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


def extract_here(
    config: Config, plan: ExtractPlan, *, processes: int | None = None, progress: Progress | None = None
) -> ExtractResult:
    """Run an extraction on every GPU of this machine, or in so many processes.

    Args:
        config: As for :func:`extract`; with the device ``auto`` or ``cuda`` all GPUs are used.
        plan: Likewise.
        processes: Processes; one a GPU when not given, and one without a GPU.
        progress: Who to tell.

    Raises:
        InputError: As for ``extract``, from whichever process meets it first.
    """
    devices = _devices(config, processes)
    if len(devices) == 1:
        return extract(config, plan, progress)
    config = config.model_copy(update={"model": pin_revision(config.model)})
    progress = progress or Progress()
    if plan.force:
        plan = clear(config, plan)
        torch.cuda.empty_cache()  # it has loaded an encoder, whose room the first process wants
    progress.say(f"{len(devices)} processes, one stripe each: {', '.join(devices)}")
    quiet = not isinstance(progress, ConsoleProgress)
    parts = [_part(plan, at, len(devices)) for at in range(len(devices))]
    with interruptible(without=["--force"]):
        return _joined(_run(config, parts, devices, quiet=quiet))


def _run(config: Config, parts: list[ExtractPlan], devices: list[str], *, quiet: bool) -> list[ExtractResult]:
    """One process a part; the first error ends the others, and what they finished is kept."""
    context = multiprocessing.get_context("spawn")
    before = multiprocessing.active_children()
    with ProcessPoolExecutor(len(devices), mp_context=context, initializer=end_with_parent) as pool:
        futures = [
            pool.submit(_stripe, config, part, device, len(devices), quiet)
            for part, device in zip(parts, devices, strict=True)
        ]
        try:
            return [future.result() for future in as_completed(futures)]
        except BrokenProcessPool:
            raise InputError(
                "a process was killed",
                got="most likely too little memory",
                wanted=f"room for {len(devices)} of them",
                do="give fewer --processes; what was finished is kept",
            ) from None
        except BaseException:
            end_children(before)
            raise


def _devices(config: Config, processes: int | None) -> list[str]:
    """The device of each process."""
    device = pick_device(config.hardware.device)
    every = [f"cuda:{at}" for at in range(torch.cuda.device_count())]
    names = every if device == torch.device("cuda") and every else [str(device)]
    return [names[at % len(names)] for at in range(processes or len(names))]


def _part(plan: ExtractPlan, at: int, n: int) -> ExtractPlan:
    """The plan of one process: a stripe of the stripe that the plan is for."""
    whole = plan.stripe or Stripe(0, 1)
    return replace(plan, stripe=Stripe(whole.number + at * whole.n, whole.n * n))


def _stripe(config: Config, plan: ExtractPlan, device: str, n: int, quiet: bool) -> ExtractResult:
    """What runs in each process."""
    if device == "cpu":
        torch.set_num_threads(max(1, count_cores() // n))
    wanted = config.data.num_workers
    readers = max(1, reader_count(None, torch.device(device)) // n) if wanted is None else None
    data = config.data if readers is None else config.data.model_copy(update={"num_workers": readers})
    hardware = config.hardware.model_copy(update={"device": device})
    config = config.model_copy(update={"hardware": hardware, "data": data})
    assert plan.stripe is not None
    return extract(config, plan, Progress() if quiet else _Labelled(f"{plan.stripe.number + 1}/{plan.stripe.n}"))


class _Labelled(ConsoleProgress):
    """Lines that say which stripe they are of; bars of several processes would draw over each other."""

    def __init__(self, label: str) -> None:
        super().__init__(bars=False)
        self._label = label

    def say(self, line: str) -> None:
        super().say(f"[{self._label}] {line.strip()}")


def _joined(results: list[ExtractResult]) -> ExtractResult:
    clock = Clock()
    for result in results:
        for name in ("read_s", "compute_s", "write_s"):
            setattr(clock, name, getattr(clock, name) + getattr(result.clock, name))
    return replace(
        results[0],
        finished=any(one.finished for one in results),
        clock=clock,
        was_finished=all(one.was_finished for one in results),
        n_encoded=sum(one.n_encoded for one in results),
        damaged=tuple(line for one in results for line in one.damaged),
        skipped={row: why for one in results for row, why in one.skipped.items()},
        reused_text_shards=sum(one.reused_text_shards for one in results),
        seconds=max(one.seconds for one in results),
    )
