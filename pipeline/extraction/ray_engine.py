"""Extraction on a Ray cluster: tasks read shards, actors encode and write them, Ray places, schedules and retries.

The unit is a shard, as in the local engine, and the code that encodes it is the same, so a shard comes out bit for bit
as there at the same number of threads a process. Images, checkpoint and store have to be under the same paths on every
machine. Ray is an extra; it is imported inside functions only.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from ...cache import StoreWriter, Stripe
from ...errors import InputError
from ..core.config import Config
from ..core.interrupts import interruptible
from ..core.progress import Progress
from ..data.manifest import Manifest, read_manifest
from .encoder import Encoder
from .extract import ExtractPlan, ExtractResult, headline, load_encoder, open_store, reuse_text, with_key
from .images import PatchSpec
from .ray_cluster import Shares, cluster, ignored_address, quiet_data, share_out
from .ray_reading import PATHS, SHARD, pieces_of, read_row
from .shards import Clock, ShardJobs, Unreadable, WriteBehind, count_captions
from .siglip import Identity, model_path


@dataclass(frozen=True, kw_only=True)
class Description:
    """What the driver knows of the encoder, which it does not load: the driver's machine may have no GPU.

    Attributes:
        identity: Names for the key of a store.
        device: Where it computes.
        spec: What is done to an image before the tower sees it.
        width: Embedding width D.
        batch_tokens: Most tokens of a forward pass.
        logit_scale: SigLIP's learned scale, already exponentiated.
        logit_bias: SigLIP's learned bias.
    """

    identity: Identity
    device: torch.device
    spec: PatchSpec
    width: int
    batch_tokens: int
    logit_scale: float
    logit_bias: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every actor is told.

    Attributes:
        config: The configuration.
        plan: Where the images and the store are, by paths that are the same on every machine.
        listing: The manifest.
        device: ``cuda``, which is the GPU that Ray gave the actor, or ``cpu``.
        threads: Threads of torch; the last bits of an embedding on a CPU may depend on them.
        stripes: Stripes that actors cut the store into: so many that each has one shard at most.
    """

    config: Config
    plan: ExtractPlan
    listing: Manifest
    device: str
    threads: int
    stripes: int = 0


@dataclass(kw_only=True)
class Done:
    """What became of one shard.

    Attributes:
        shard: Its number.
        refusal: What the user has to mend, where something was wrong.
        reasons: Rows of the store that could not be read, and why.
        seconds: What the actor waited for, by part of the clock.
        warnings: What was logged for the user.
    """

    shard: int
    refusal: str | None = None
    reasons: dict[int, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def to_row(self) -> pa.Table:
        """One row, ``done`` string (JSON)."""
        return pa.table({"done": [json.dumps(asdict(self))]})

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Done":
        """What :meth:`to_row` made."""
        found = cls(**json.loads(row["done"]))
        found.reasons = {int(at): reason for at, reason in found.reasons.items()}
        return found


def describe(work: Work) -> Description | str:
    """Load the encoder once, for the store's key; what the user has to mend comes back as text."""
    try:
        found = load_encoder(work.config, work.plan, torch.device(work.device))
    except InputError as error:
        return str(error)
    return Description(**{name: getattr(found, name) for name in Description.__dataclass_fields__})


class EncodeShards:
    """Encodes one shard a call and writes its files; an actor that was killed between the two finds them written.

    Args:
        reference: Ray's reference to the :class:`Work`.
    """

    def __init__(self, reference: Any) -> None:  # noqa: ANN401
        import ray

        self._work: Work = ray.get(reference)
        # Ray gives a process as many threads as it reserves cores, which is a matter of placement.
        torch.set_num_threads(self._work.threads)
        self._encoder: Encoder = load_encoder(self._work.config, self._work.plan, torch.device(self._work.device))
        self._clock, self._warnings = Clock(), _Warnings()
        logging.getLogger(__name__.partition(".")[0]).addHandler(self._warnings)

    def __call__(self, row: pa.Table) -> pa.Table:
        """Fill the shard of one row of :mod:`~mmcli.pipeline.extraction.ray_reading`; a row of :class:`Done`."""
        done = Done(shard=row.column(SHARD)[0].as_py())
        self._clock.lap("read_s")
        try:
            done.reasons = self._fill(done.shard, row)
        except InputError as error:
            done.refusal = str(error)
        clock, self._clock = self._clock, Clock()
        done.seconds = {name: getattr(clock, name) for name in ("read_s", "compute_s", "write_s")}
        done.warnings = self._warnings.take()
        return done.to_row()

    def _fill(self, number: int, row: pa.Table) -> dict[int, str]:
        work, encoder = self._work, self._encoder
        key, plan = with_key(work.plan, work.listing, encoder)
        # A stripe of one shard: it is this actor's alone, and the driver finishes the store.
        plan = replace(plan, stripe=Stripe(number, work.stripes))
        unreadable = Unreadable(plan.data, work.listing.paths, plan.on_error, encoder.spec)
        with open_store(work.config, plan, work.listing, encoder, key) as writer, WriteBehind() as behind:
            jobs = ShardJobs(encoder, work.listing, writer, unreadable, progress=Progress(), clock=self._clock)
            with Progress().task("", 0) as task:
                for shard in writer.missing("image"):
                    jobs.encode_pieces(pieces_of(row, encoder.spec), shard, behind, task)
            behind.wait()
            jobs.encode_captions(writer.missing("text"))
        return unreadable.reasons


class _Warnings(logging.Handler):
    """Keeps warnings until they are taken."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())

    def take(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines


# Shards that an actor has: one that it encodes, and one whose pixels travel to it meanwhile.
IN_FLIGHT = 2


def extract_on_ray(
    config: Config,
    plan: ExtractPlan,
    *,
    processes: int | None = None,
    address: str | None = None,
    progress: Progress | None = None,
) -> ExtractResult:
    """Encode every image and caption of a manifest into a store, on a cluster; resumes where a call was stopped.

    Args:
        config: As for :func:`~mmcli.pipeline.extraction.extract.extract`; ``data.num_workers`` bounds the tasks
            that read.
        plan: Likewise.
        processes: Actors that encode; one a GPU when not given, and one a machine on a cluster without.
        address: The cluster; see :func:`~mmcli.pipeline.extraction.ray_cluster.cluster`.
        progress: Who to tell.

    Raises:
        InputError: As for ``extract``, or there is no Ray, no such cluster or no such device in it.
    """
    started = time.perf_counter()
    config, plan = _from_anywhere(config, plan)
    listing = read_manifest(plan.manifest or plan.data / "manifest.parquet")
    progress = progress or Progress()
    if (note := ignored_address(address)) is not None:
        progress.say(note)
    with cluster(address) as ray:
        shares = share_out(ray, config, processes)
        work = Work(config=config, plan=plan, listing=listing, device=shares.device, threads=shares.threads)
        result = _Extraction(ray, work, shares, progress).run()
    return replace(result, seconds=time.perf_counter() - started)


class _Extraction:
    """One extraction: what the driver does before, beside and after the actors."""

    def __init__(self, ray: Any, work: Work, shares: Shares, progress: Progress) -> None:  # noqa: ANN401
        self._ray, self._shares, self._progress = ray, shares, progress
        task = ray.remote(describe).options(**shares.actor, max_retries=0)
        found: Description | str = ray.get(task.remote(work))
        if isinstance(found, str):
            raise InputError(found)
        self._encoder = found
        self._key, plan = with_key(work.plan, work.listing, found)
        # Actors start one by one, and a branch may move meanwhile: all load the commit of the key.
        model = work.config.model.model_copy(update={"revision": self._key.commit})
        config = work.config.model_copy(update={"model": model})
        self._work, self._clock = replace(work, config=config, plan=plan), Clock()
        self._unreadable = Unreadable(plan.data, work.listing.paths, plan.on_error, found.spec)

    def run(self) -> ExtractResult:
        plan = self._work.plan
        if plan.force:
            with self._open(plan.stripe):
                self._work = replace(self._work, plan=replace(plan, force=False))
        # A stripe, of one where there are no others: actors write beside it, and another extraction keeps out.
        with self._open(plan.stripe or Stripe(0, 1)) as writer, interruptible(without=["--force"]):
            result = self._begin(writer)
            image, text = writer.missing("image"), writer.missing("text")
            numbers = sorted({shard.number for shard in (*image, *text)})
            if numbers:
                n_images = sum(shard.n_rows for shard in image)
                self._progress.say(headline(self._encoder, writer, n_images))
                self._encode(numbers, {shard.number for shard in image}, writer)
        with self._open(plan.stripe) as writer:
            writer.finish(self._unreadable.why)
            skipped = sum(len(writer.skipped.get(shard, ())) for shard in image)
            return replace(
                result,
                finished=writer.finished,
                n_encoded=sum(shard.n_rows for shard in image) - skipped,
                skipped=self._unreadable.reasons,
                clock=self._clock,
            )

    def _open(self, stripe: Stripe | None) -> StoreWriter:
        work = self._work
        return open_store(work.config, replace(work.plan, stripe=stripe), work.listing, self._encoder, self._key)

    def _begin(self, writer: StoreWriter) -> ExtractResult:
        """Look at what is there; the result so far."""
        damaged = tuple(f"{one.name}: {one.reason}" for one in writer.damaged)
        for line in damaged:
            self._progress.say(f"  damaged, will be redone: {line}")
        was_finished, captions = writer.finished, count_captions(self._work.listing.captions)
        reused = reuse_text(writer, writer.folder.parent)
        self._unreadable.retry(writer)
        return ExtractResult(
            store=writer.folder,
            finished=False,
            was_finished=was_finished,
            digest=self._key.digest,
            n_images=len(self._work.listing),
            n_captions=int(captions.sum()),
            n_encoded=0,
            width=self._encoder.width,
            damaged=damaged,
            skipped={},
            reused_text_shards=reused,
            seconds=0.0,
            clock=self._clock,
        )

    def _encode(self, numbers: list[int], with_images: set[int], writer: StoreWriter) -> None:
        shares, every = self._shares, writer.layout.shards("image")
        self._progress.say(f"  Ray: actors {shares.actors}, on {shares.device}, threads each {shares.threads}")
        # More stripes than there are shards, and not as many as another extraction may have been told to make.
        stripe = self._work.plan.stripe
        self._work = replace(self._work, stripes=max(len(every), stripe.n if stripe else 1) + 1)
        paths = self._work.listing.paths
        items = [
            {SHARD: at, PATHS: list(paths[every[at].start : every[at].stop] if at in with_images else ())}
            for at in numbers
        ]
        with self._progress.task("images and captions", sum(every[at].n_rows for at in numbers)) as task:
            for done in self._stream(items, writer.layout.batch_tokens):
                for line in done.warnings:
                    self._progress.say(f"  {line}")
                if done.refusal is not None:
                    raise InputError(done.refusal)
                self._unreadable.record(done.reasons)
                for name, seconds in done.seconds.items():
                    setattr(self._clock, name, getattr(self._clock, name) + seconds)
                task.advance(every[done.shard].n_rows)

    def _stream(self, items: list[dict[str, Any]], tokens: int) -> Iterator[Done]:
        """Shards as they are done, in any order."""
        data, shares, work = self._ray.data, self._shares, self._work
        quiet_data(self._ray)
        one_row = {"batch_size": 1, "batch_format": "pyarrow"}
        read = {"data": work.plan.data, "spec": self._encoder.spec, "tokens": tokens}
        actors = data.ActorPoolStrategy(size=min(shares.actors, len(items)), max_tasks_in_flight_per_actor=IN_FLIGHT)
        rows = (
            data.from_items(items, override_num_blocks=len(items))
            .map_batches(
                read_row,
                fn_kwargs=read,
                compute=data.TaskPoolStrategy(size=work.config.data.num_workers or None),
                **one_row,
                **shares.reader,
            )
            .map_batches(
                EncodeShards, fn_constructor_args=(self._ray.put(work),), compute=actors, **one_row, **shares.actor
            )
        )
        for row in rows.iter_rows():
            yield Done.from_row(row)


def _from_anywhere(config: Config, plan: ExtractPlan) -> tuple[Config, ExtractPlan]:
    """The same with absolute paths: actors work in other folders."""
    model = config.model.model_copy(update={"siglip2_variant": model_path(config.model.siglip2_variant)})

    def absolute(path: Path | None) -> Path | None:
        return None if path is None else path.absolute()

    return config.model_copy(update={"model": model}), replace(
        plan,
        data=plan.data.absolute(),
        cache=plan.cache.absolute(),
        out=absolute(plan.out),
        manifest=absolute(plan.manifest),
    )
