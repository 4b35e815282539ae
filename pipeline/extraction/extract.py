"""Stage 1: a frozen SigLIP2 runs once over a manifest, and its raw embeddings go into a store.

One process fills a whole store or one stripe of its shards; several of them, on one machine or many, fill one store
together, and whoever ends last finishes it. :func:`extract` is one process, :func:`extract_here` the processes of this
machine, and :mod:`~mmcli.pipeline.extraction.ray_engine` those of a Ray cluster; all of them encode shards by
:class:`~mmcli.pipeline.extraction.shards.ShardJobs`.
"""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from rich.console import RenderableType

from ... import __version__
from ...cache import StoreKey, StoreWriter, Stripe, is_remote
from ...cache.metadata import read_key
from ...errors import InputError
from ..core.config import Config
from ..core.cores import count_cores
from ..core.defaults import STORES
from ..core.device import pick_device, reader_count
from ..core.interrupts import interruptible
from ..core.processes import end_children, end_with_parent, without_main_module
from ..core.progress import ConsoleProgress, Progress
from ..data.manifest import Manifest, read_manifest
from .encoder import Encoder, EncoderFacts
from .images import Resizer
from .model_source import pin_revision
from .shards import CAPTIONS, CLOCK_PARTS, Clock, OnError, ShardJobs, Unreadable, count_captions
from .siglip import model_path

__all__ = ["ExtractPlan", "ExtractResult", "extract", "extract_here", "parse_stripe"]

# Smaller shards lose less when an extraction is killed; larger ones fill the batches of rare grids, which a GPU wants.
SHARD_ROWS = {"cpu": 1024, "mps": 1024, "cuda": 4096}
SHOWN_REASONS = 10


@dataclass(frozen=True, kw_only=True)
class ExtractPlan:
    """The options of an extraction, beside the configuration.

    Attributes:
        data: The folder that the manifest's paths are relative to.
        manifest: The manifest; ``data/manifest.parquet`` when not given.
        out: The store's folder, or a URL's place; below ``cache`` under the key's name when not given.
        cache: The folder of all stores.
        dtype: How embeddings are stored. Norms are always float32, taken before the cast.
        on_error: Whether an image that cannot be read stops everything, or is left out and recorded.
        resizer: What resizes images; see :class:`~mmcli.pipeline.extraction.images.PatchSpec`.
        batch_tokens: Most tokens of a forward pass of a new store; what suits the device when not given.
        shard_rows: Images per shard of a new store; what suits the device when not given.
        stripe: Which shards to fill; all when not given.
        force: Throw an existing store in ``out`` away first.
    """

    data: Path
    manifest: Path | None = None
    out: Path | None = None
    cache: Path = STORES
    dtype: Literal["float16", "float32"] = "float16"
    on_error: OnError = "stop"
    resizer: Resizer = "pillow"
    batch_tokens: int | None = None
    shard_rows: int | None = None
    stripe: Stripe | None = None
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class ExtractResult:
    """The outcome of an extraction.

    Attributes:
        store: The store.
        finished: Whether it has all its shards; False after a stripe while others are at work.
        was_finished: Whether it had them before.
        digest: Digest of its key.
        n_images: Images in the store.
        n_captions: Captions in the store.
        n_encoded: Images encoded by this call; the others were in the store already.
        width: Embedding width D.
        damaged: Damaged shards, which were encoded again, each ``name: reason``.
        skipped: Rows that this call could not read, and why.
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
        """The result as one flat JSON object."""
        plain = {name: value for name, value in vars(self).items() if name != "clock"}
        lists = {"store": str(self.store), "damaged": list(self.damaged), "skipped": list(self.skipped.values())}
        return {**plain, **lists, **{name: getattr(self.clock, name) for name in (*CLOCK_PARTS, "bottleneck")}}

    def summary(self) -> list[RenderableType]:
        """Lines for a person at the end of the command."""
        lines = [f"{self.n_images:,} images and {self.n_captions:,} captions, {self.width} wide"]
        if self.n_encoded:
            waited = ", ".join(f"{part.removesuffix('_s')} {getattr(self.clock, part):.1f} s" for part in CLOCK_PARTS)
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
        InputError: The text does not name a stripe.
    """
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise InputError(
            "no such stripe",
            where="--shard",
            got=text,
            wanted="i/n with i from 1 to n",
            do="as in --shard 1/8 to --shard 8/8",
        )
    return Stripe(int(number) - 1, int(count))


@dataclass(frozen=True, kw_only=True)
class Job:
    """An extraction whose encoder is known: all that opening its store takes.

    Attributes:
        config: The configuration.
        plan: The options, with the store's folder.
        listing: The manifest.
        facts: The encoder, without its weights.
        key: The store's key.
    """

    config: Config
    plan: ExtractPlan
    listing: Manifest
    facts: EncoderFacts
    key: StoreKey

    @classmethod
    def create(cls, config: Config, plan: ExtractPlan, listing: Manifest, facts: EncoderFacts) -> "Job":
        """The job of a plan, its store named by its key where the plan names none."""
        key = StoreKey(**vars(facts.identity), dtype=plan.dtype, manifest_sha256=listing.sha256)
        plan = replace(plan, out=plan.out or plan.cache / key.folder_name)
        return cls(config=config, plan=plan, listing=listing, facts=facts, key=key)

    def open(self, stripe: Stripe | None = None) -> StoreWriter:
        """The writer of the store, to be entered; ``stripe`` is filled instead of the plan's where it is given."""
        plan, facts = self.plan, self.facts
        assert plan.out is not None
        extra = {
            "mmcli": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": str(facts.device),
            "logit_scale": facts.logit_scale,
            "logit_bias": facts.logit_bias,
            "data": self.listing.name,
            "model_path": model_path(self.config.model.siglip2_variant),
        }
        return StoreWriter(
            plan.out,
            self.key,
            self.listing.table,
            width=facts.width,
            n_captions_max=CAPTIONS,
            shard_rows=plan.shard_rows or SHARD_ROWS[facts.device.type],
            batch_tokens=plan.batch_tokens or facts.batch_tokens,
            extra=extra,
            overwrite=plan.force,
            stripe=stripe or plan.stripe,
        )

    def unreadable(self) -> Unreadable:
        """The record of images that cannot be read, empty."""
        return Unreadable(self.plan.data, self.listing.paths, self.plan.on_error, self.facts.spec)

    def begin(self, writer: StoreWriter, unreadable: Unreadable, progress: Progress) -> ExtractResult:
        """Look at what the open store has and take what can be reused; the result so far.

        Raises:
            InputError: An image that was skipped still cannot be read, and ``on_error`` is ``stop``.
        """
        for folder, commit in other_commits(self.key, self.plan.cache):
            progress.say(f"  note: {folder} holds the same of commit {commit}; give --revision {commit} to resume it")
        was_finished, damaged = writer.finished, tuple(f"{shard.name}: {shard.reason}" for shard in writer.damaged)
        for line in damaged:
            progress.say(f"  damaged, will be redone: {line}")
        reused = reuse_text(writer, writer.folder.parent)
        unreadable.retry(writer)
        missing = writer.missing("image")
        if missing or writer.missing("text"):
            identity = self.facts.identity
            what = f"{sum(shard.n_rows for shard in missing):,} images" if missing else "captions"
            how = f"{identity.compute_dtype}, {identity.patches} patches"
            progress.say(f"encoding {what} with {identity.model} on {self.facts.device} ({how}) into {writer.folder}")
        return ExtractResult(
            store=writer.folder,
            finished=writer.finished,
            was_finished=was_finished,
            digest=self.key.digest,
            n_images=len(self.listing),
            n_captions=int(count_captions(self.listing.captions).sum()),
            n_encoded=0,
            width=self.facts.width,
            damaged=damaged,
            skipped={},
            reused_text_shards=reused,
            seconds=0.0,
            clock=Clock(),
        )


def load_listing(plan: ExtractPlan) -> Manifest:
    """The manifest of a plan."""
    return read_manifest(plan.manifest or plan.data / "manifest.parquet")


def load_encoder(config: Config, plan: ExtractPlan, device: torch.device) -> Encoder:
    """The encoder that a configuration and a plan ask for.

    Raises:
        InputError: See :meth:`Encoder.load`.
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


def extract(config: Config, plan: ExtractPlan, progress: Progress | None = None) -> ExtractResult:
    """Encode every image and caption of a manifest into a store; resumes where an earlier call was stopped.

    Args:
        config: Model, hardware and data sections are used.
        plan: What to encode, from where to where.
        progress: Progress bars; silent when not given.

    Raises:
        InputError: A bad manifest, image, checkpoint, or a store of another key in ``out``.
    """
    started = time.perf_counter()
    progress = progress or Progress()
    listing = load_listing(plan)
    encoder = load_encoder(config, plan, pick_device(config.hardware.device))
    job = Job.create(config, plan, listing, encoder.facts)
    with job.open() as writer, interruptible(without=["--force"]):
        unreadable = job.unreadable()
        result = job.begin(writer, unreadable, progress)
        jobs = ShardJobs(
            encoder,
            listing,
            writer,
            unreadable,
            workers=reader_count(config.data.num_workers, encoder.device),
            prefetch_factor=config.data.prefetch_factor,
            progress=progress,
        )
        n_encoded = jobs.encode_images(writer.missing("image"))
        jobs.encode_captions(writer.missing("text"))
        writer.finish(unreadable.why)
        return replace(
            result,
            finished=writer.finished,
            n_encoded=n_encoded,
            skipped=unreadable.reasons,
            seconds=time.perf_counter() - started,
            clock=jobs.clock,
        )


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
    """Run an extraction on every GPU of this machine, or in several processes.

    Args:
        config: The model, hardware and data sections are used; with the device ``auto`` or ``cuda`` all GPUs are used.
        plan: The options of the extraction.
        processes: Processes; one a GPU when not given, and one without a GPU.
        progress: Progress bars; silent when not given.

    Raises:
        InputError: See ``extract``, from whichever process meets it first.
    """
    devices = _devices(config, processes)
    if len(devices) == 1:
        return extract(config, plan, progress)
    config = config.model_copy(update={"model": pin_revision(config.model)})
    progress = progress or Progress()
    if plan.force:
        encoder = load_encoder(config, plan, pick_device(config.hardware.device))
        with Job.create(config, plan, load_listing(plan), encoder.facts).open():
            plan = replace(plan, force=False)
        del encoder
        torch.cuda.empty_cache()  # the first process wants the encoder's room
    progress.say(f"{len(devices)} processes, one stripe each: {', '.join(devices)}")
    quiet = not isinstance(progress, ConsoleProgress)
    whole = plan.stripe or Stripe(0, 1)
    stripes = [Stripe(whole.number + part * whole.n, whole.n * len(devices)) for part in range(len(devices))]
    with interruptible(without=["--force"]):
        return _joined(_run(config, [replace(plan, stripe=stripe) for stripe in stripes], devices, quiet=quiet))


def _run(config: Config, parts: list[ExtractPlan], devices: list[str], *, quiet: bool) -> list[ExtractResult]:
    """One process a part; the first error ends the others, and what they finished is kept."""
    context = multiprocessing.get_context("spawn")
    before = multiprocessing.active_children()
    with ProcessPoolExecutor(len(devices), mp_context=context, initializer=end_with_parent) as pool:
        with without_main_module():
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
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    names = gpus if device == torch.device("cuda") and gpus else [str(device)]
    return [names[process % len(names)] for process in range(processes or len(names))]


def _stripe(config: Config, plan: ExtractPlan, device: str, n: int, quiet: bool) -> ExtractResult:
    """Fill one stripe, in a process of its own."""
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
        clock.add(result.clock)
    return replace(
        results[0],
        finished=any(result.finished for result in results),
        clock=clock,
        was_finished=all(result.was_finished for result in results),
        n_encoded=sum(result.n_encoded for result in results),
        damaged=tuple(line for result in results for line in result.damaged),
        skipped={row: reason for result in results for row, reason in result.skipped.items()},
        reused_text_shards=sum(result.reused_text_shards for result in results),
        seconds=max(result.seconds for result in results),
    )
