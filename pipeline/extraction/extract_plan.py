"""What an extraction is told, and what it tells."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import RenderableType

from ... import InputError
from ...cache import Stripe
from .images import Resizer
from .shards import Clock
from .unreadable import OnError

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
            "no such stripe", where="--shard", got=text, wanted="i/n with i from 1 to n",
            do="as in --shard 1/8 to --shard 8/8",
        )  # fmt: skip
    return Stripe(int(number) - 1, int(of))
