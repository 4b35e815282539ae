"""What runs in the actors of a Ray cluster: one holds the encoder, and fills a shard of the store a call."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import torch

from ... import InputError
from ...cache import Stripe
from ..core.config import Config
from ..core.progress import Progress
from ..data.manifest import Manifest
from .encoder import Encoder
from .extract import load_encoder, open_store, with_key
from .extract_plan import ExtractPlan
from .images import PatchSpec
from .ray_reading import SHARD, pieces_of
from .shards import Clock, ShardJobs, WriteBehind
from .siglip import Identity
from .unreadable import Unreadable


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
