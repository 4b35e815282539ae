"""Extraction on a Ray cluster: tasks read shards, actors encode and write them, Ray places, schedules and retries.

The unit is a shard, as in the local engine, and the code that encodes it is the same, so a shard comes out bit for bit
the same at the same number of threads a process. Images, checkpoint and store have to be under the same paths on every
machine. Ray is an extra; it is imported inside functions only.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...cache import Shard, StoreWriter, Stripe
from ...errors import InputError
from ..core.config import Config
from ..core.interrupts import interruptible
from ..core.progress import Progress
from .encoder import EncoderFacts
from .extract import ExtractPlan, ExtractResult, Job, load_encoder, load_listing
from .images import PatchSpec
from .ray_cluster import Shares, cluster, ignored_address, share_out
from .reader import Piece, Reasons, plan_pieces, read_headers, read_piece
from .shards import Clock, ShardJobs, Unreadable, WriteBehind
from .siglip import model_path

# Shards that an actor has: one that it encodes, and one whose pixels travel to it meanwhile.
IN_FLIGHT = 2


@dataclass(kw_only=True)
class Outcome:
    """The outcome of encoding one shard.

    Attributes:
        shard: Its number.
        refusal: What the user has to mend, where something was wrong.
        reasons: Rows of the store that could not be read, and why.
        clock: What the actor waited for.
        warnings: What was logged for the user.
    """

    shard: int
    refusal: InputError | None = None
    reasons: Reasons = field(default_factory=dict)
    clock: Clock
    warnings: list[str] = field(default_factory=list)


def describe(config: Config, plan: ExtractPlan, device: str) -> EncoderFacts | InputError:
    """Load the encoder once, for the store's key: the driver's machine may have no GPU."""
    try:
        return load_encoder(config, plan, torch.device(device)).facts
    except InputError as error:
        return error


def read_shard(number: int, paths: Sequence[str], data: Path, spec: PatchSpec, tokens: int) -> list[Piece] | InputError:
    """Read the images of one shard; what the user has to mend is returned, since an error of a task has a traceback.

    Args:
        number: The shard's number.
        paths: Its images, from a manifest; none where its image part is in the store already.
        data: The folder that paths are relative to.
        spec: The processor's settings.
        tokens: Most patches of a batch.
    """
    try:
        headers = read_headers(paths, data=data, spec=spec)
        return [read_piece(work, data=data, spec=spec) for work in plan_pieces(number, paths, headers, tokens)]
    except InputError as error:
        return error


class EncodeShards:
    """An actor that encodes one shard a call and writes its files; where one was killed, the next finds them written.

    Args:
        job: The extraction, by paths that are the same on every machine.
        shares: The device, and the threads of torch: the last bits of an embedding on a CPU may depend on them.
        stripes: Stripes that actors cut the store into: so many that each has one shard at most.
    """

    def __init__(self, job: Job, shares: Shares, stripes: int) -> None:
        self._job, self._stripes = job, stripes
        # Ray gives a process as many threads as it reserves cores, which is a matter of placement.
        torch.set_num_threads(shares.threads)
        self._encoder = load_encoder(job.config, job.plan, torch.device(shares.device))
        self._clock, self._warnings = Clock(), _Warnings()
        logging.getLogger(__name__.partition(".")[0]).addHandler(self._warnings)

    def encode(self, number: int, pieces: list[Piece] | InputError) -> Outcome:
        """Fill a shard from the pieces of :func:`read_shard`."""
        outcome = Outcome(shard=number, clock=self._clock)
        self._clock.lap("read_s")
        try:
            if isinstance(pieces, InputError):
                raise pieces
            outcome.reasons = self._fill(number, pieces)
        except InputError as error:
            outcome.refusal = error
        self._clock = Clock()
        outcome.warnings = self._warnings.take()
        return outcome

    def _fill(self, number: int, pieces: list[Piece]) -> Reasons:
        job, unreadable = self._job, self._job.unreadable()
        # A stripe of one shard: it is this actor's alone, and the driver finishes the store.
        with job.open(Stripe(number, self._stripes)) as writer, WriteBehind() as behind:
            jobs = ShardJobs(self._encoder, job.listing, writer, unreadable, progress=Progress(), clock=self._clock)
            with Progress().task("", 0) as task:
                for shard in writer.missing("image"):
                    # The object store's memory is read-only.
                    copies = (piece._replace(pixels=piece.pixels.copy()) for piece in pieces)
                    jobs.encode_pieces(copies, shard, behind, task)
            behind.finish()
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
        config: The model, hardware and data sections are used; ``data.num_workers`` bounds the tasks
            that read.
        plan: The options of the extraction.
        processes: Actors that encode; one a GPU when not given, and one a machine on a cluster without.
        address: The cluster; see :func:`~mmcli.pipeline.extraction.ray_cluster.cluster`.
        progress: Progress bars; silent when not given.

    Raises:
        InputError: See ``extract``, or there is no Ray, no such cluster or no such device in it.
    """
    started = time.perf_counter()
    config, plan = _with_absolute_paths(config, plan)
    listing, progress = load_listing(plan), progress or Progress()
    if (note := ignored_address(address)) is not None:
        progress.say(note)
    with cluster(address) as ray:
        shares = share_out(ray, config, processes)
        task = ray.remote(describe).options(**shares.actor, max_retries=0)
        facts: EncoderFacts | InputError = ray.get(task.remote(config, plan, shares.device))
        if isinstance(facts, InputError):
            raise facts
        job = Job.create(config, plan, listing, facts)
        # Actors start one by one, and a branch may move meanwhile: all load the commit of the key.
        model = config.model.model_copy(update={"revision": job.key.commit})
        job = replace(job, config=config.model_copy(update={"model": model}))
        result = _fill_store(ray, job, shares, progress)
    return replace(result, seconds=time.perf_counter() - started)


def _fill_store(ray: Any, job: Job, shares: Shares, progress: Progress) -> ExtractResult:  # noqa: ANN401
    if job.plan.force:
        with job.open():
            job = replace(job, plan=replace(job.plan, force=False))
    unreadable, clock = job.unreadable(), Clock()
    # A stripe, of one where there are no others: actors write beside it, and another extraction keeps out.
    with job.open(job.plan.stripe or Stripe(0, 1)) as writer, interruptible(without=["--force"]):
        result = job.begin(writer, unreadable, progress)
        missing = writer.missing("image")
        if missing or writer.missing("text"):
            progress.say(f"  Ray: actors {shares.actors}, on {shares.device}, threads each {shares.threads}")
            clock = _encode(ray, job, shares, writer, unreadable, progress)
    with job.open() as writer:
        writer.finish(unreadable.why)
        n_skipped = sum(len(writer.skipped.get(shard, ())) for shard in missing)
        return replace(
            result,
            finished=writer.finished,
            n_encoded=sum(shard.n_rows for shard in missing) - n_skipped,
            skipped=unreadable.reasons,
            clock=clock,
        )


def _encode(
    ray: Any,  # noqa: ANN401
    job: Job,
    shares: Shares,
    writer: StoreWriter,
    unreadable: Unreadable,
    progress: Progress,
) -> Clock:
    """Have all missing shards encoded; what the actors waited for."""
    clock = Clock()
    shards, images = writer.layout.shards("image"), {shard.number for shard in writer.missing("image")}
    missing = [shards[number] for number in sorted(images | {shard.number for shard in writer.missing("text")})]
    # More stripes than there are shards, and not as many as another extraction may have been asked to make.
    stripes = max(len(shards), job.plan.stripe.n if job.plan.stripe else 1) + 1
    with progress.task("images and captions", sum(shard.n_rows for shard in missing)) as task:
        for outcome in _stream(ray, job, shares, writer.layout.batch_tokens, missing, images, stripes):
            for line in outcome.warnings:
                progress.say(f"  {line}")
            if outcome.refusal is not None:
                raise outcome.refusal
            unreadable.record(outcome.reasons)
            clock.add(outcome.clock)
            task.advance(shards[outcome.shard].n_rows)
    return clock


def _stream(
    ray: Any,  # noqa: ANN401
    job: Job,
    shares: Shares,
    tokens: int,
    shards: Sequence[Shard],
    images: set[int],
    stripes: int,
) -> Iterator[Outcome]:
    """The outcome of each shard, in the order in which they end; a few are read ahead of the actors."""
    paths, spec, data = job.listing.paths, job.facts.spec, job.plan.data
    read = ray.remote(read_shard).options(**shares.reader)
    actor = ray.remote(EncodeShards).options(**shares.actor, max_restarts=-1, max_task_retries=-1)
    reference = ray.put(job)
    actors = [actor.remote(reference, shares, stripes) for _ in range(min(shares.actors, len(shards)))]
    resources = ray.cluster_resources()
    readers = job.config.data.num_workers or int(resources["CPU"] / shares.reader["num_cpus"])
    # All that is read ahead lies in the memory of Ray's object store.
    room = resources["object_store_memory"] // max(shard.n_rows * spec.most_tokens * spec.width for shard in shards)
    most = max(len(actors), min(readers + IN_FLIGHT * len(actors), int(room)))
    waiting, reading, under_way = list(reversed(shards)), set[Any](), dict[Any, int]()
    while waiting or under_way:
        while waiting and len(reading) < readers and len(under_way) < most:
            shard = waiting.pop()
            chosen = paths[shard.start : shard.stop] if shard.number in images else ()
            pieces = read.remote(shard.number, chosen, data, spec, tokens)
            reading.add(pieces)
            index = min(range(len(actors)), key=[*under_way.values()].count)
            under_way[actors[index].encode.remote(shard.number, pieces)] = index
        (ended, *_), _ = ray.wait([*under_way, *reading], fetch_local=False)
        if ended in reading:
            reading.remove(ended)
        else:
            del under_way[ended]
            yield ray.get(ended)


def _with_absolute_paths(config: Config, plan: ExtractPlan) -> tuple[Config, ExtractPlan]:
    """The same configuration and plan with absolute paths: actors work in other folders."""
    model = config.model.model_copy(update={"siglip2_variant": model_path(config.model.siglip2_variant)})
    return config.model_copy(update={"model": model}), replace(
        plan,
        data=plan.data.absolute(),
        cache=plan.cache.absolute(),
        out=None if plan.out is None else plan.out.absolute(),
        manifest=None if plan.manifest is None else plan.manifest.absolute(),
    )
