"""``mmcli finetune --plan``: what a finetuning needs of memory, measured on one image, before anything starts.

A graph keeps tensors for its backward pass; they are counted as they are kept, for one item and for two, and the
difference is what an item costs. Nothing is estimated from formulas, so it holds for every checkpoint and precision.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from torch import Tensor

from ...errors import InputError
from ..core.config import Config
from ..core.console import FittingTable
from ..core.device import autocast, pick_device
from ..core.progress import Progress
from ..data.manifest import read_manifest
from ..extraction.encoder import Encoder
from ..extraction.images import Grid
from ..training.setup import draw_head
from .towers import Towers

FLOAT_BYTES = 4
GIB = 2**30
# What is left for the head's own activations, the caches of allocators, and images that are read ahead.
SPARE = 0.9


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one way of training needs.

    Attributes:
        checkpointing: Whether activations are computed again.
        image_bytes: Kept for an image of the largest grid; 0 where no image tower is trained.
        caption_bytes: Kept for a caption, likewise.
        largest_batch: Images that fit at once with one caption each.
    """

    checkpointing: bool
    image_bytes: int
    caption_bytes: int
    largest_batch: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a finetuning needs.

    Attributes:
        what: What is trained, a line a part.
        n_parameters: Of towers and head.
        n_trained: Trained of them.
        fixed_bytes: Weights, the copy that looks at val, gradients and moments.
        free_bytes: Free on the device before any of it.
        device: Where.
        batch: Images at once, as configured.
        needs: With and without gradient checkpointing; none where nothing is trained.
        chosen: Whether it is configured with it.
        n_images: Images of the manifest.
    """

    what: tuple[str, ...]
    n_parameters: int
    n_trained: int
    fixed_bytes: int
    free_bytes: int
    device: str
    batch: int
    parts: int
    needs: tuple[Need, ...]
    chosen: bool
    n_images: int

    @property
    def fits(self) -> bool:
        """Whether what is configured will fit."""
        needs = [need for need in self.needs if need.checkpointing == self.chosen]
        return self.fixed_bytes < self.free_bytes and all(self.batch <= need.largest_batch for need in needs)

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        left = ("what", "needs", "chosen")
        plain = {name: value for name, value in vars(self).items() if name not in left}
        return plain | {"fits": self.fits, "needs": [vars(need) for need in self.needs]}

    def summary(self) -> list[RenderableType]:
        """What a person reads."""
        lines = [
            *self.what,
            f"with the head {self.n_parameters:,} parameters, {self.n_trained:,} trained",
            f"weights, gradients, moments and a copy to look at val: {self.fixed_bytes / GIB:.2f} GiB of"
            f" {self.free_bytes / GIB:.2f} GiB free on {self.device}",
        ]
        if not self.needs:
            return [*lines, "no tower is trained: every image and caption goes through the towers once"]
        table = FittingTable(title="activations")
        for name in ("gradient checkpointing", "an image", "a caption", "largest batch at once"):
            table.add_column(name, justify="right")
        for need in self.needs:
            sizes = (f"{one / 2**20:.1f} MiB" for one in (need.image_bytes, need.caption_bytes))
            table.add_row("on" if need.checkpointing else "off", *sizes, f"{need.largest_batch:,}")
        times = f" ({self.parts} times for one batch)" if self.parts > 1 else ""
        end = "it fits" if self.fits else "it does NOT fit: lower --batch-size and raise --accumulation by as much"
        return [*lines, table, f"{self.batch} images at once{times}: {end}"]


def plan_memory(config: Config, *, data: Path, progress: Progress | None = None) -> MemoryPlan:
    """Measure what a finetuning would need; nothing is trained or written.

    Args:
        config: Of :func:`~mmcli.pipeline.finetuning.settings.settle_finetune`.
        data: The data set's folder.
        progress: Who to tell.

    Raises:
        InputError: A bad manifest or checkpoint, or more blocks than a tower has.
    """
    listing = read_manifest(data / "manifest.parquet")
    device, model = pick_device(config.hardware.device), config.model
    free = free_bytes(device)
    (progress or Progress()).say(f"measuring {model.siglip2_variant} on {device}")
    classifier = config.classifier.model_copy(update={"num_classes": len(listing.category_names)})
    parts = Encoder.parts(
        model.siglip2_variant,
        revision=model.revision,
        patches=model.max_num_patches,
        text_length=model.text_max_length,
        device=device,
    )
    towers = Towers(parts, config.finetune)
    width = Encoder(parts).width
    head = draw_head(config.model_copy(update={"classifier": classifier}), width=width, device=device)
    n_head = sum(one.numel() for one in head.parameters())
    n_towers = sum(one.numel() for one in parts.model.parameters())
    n_trained = n_head + sum(one.numel() for one in towers.trained.values())
    copy = n_towers * getattr(torch, parts.identity.compute_dtype).itemsize
    fixed = FLOAT_BYTES * (n_towers + n_head + 3 * n_trained) + copy
    needs = [_need(config, parts, flag, int(SPARE * (free - fixed))) for flag in (False, True)] if towers.sides else []
    return MemoryPlan(
        what=tuple(towers.summary()),
        n_parameters=n_towers + n_head,
        n_trained=n_trained,
        fixed_bytes=fixed,
        free_bytes=free,
        device=str(device),
        batch=config.training.batch_size,
        parts=config.training.accumulation_steps,
        needs=tuple(needs),
        chosen=config.finetune.gradient_checkpointing,
        n_images=len(listing),
    )


def _need(config: Config, parts: Any, checkpointing: bool, room: int) -> Need:  # noqa: ANN401
    section = config.finetune.model_copy(update={"gradient_checkpointing": checkpointing})
    sides, spec, device = Towers(parts, section).sides, parts.spec, parts.device
    grid = spec.fixed or Grid(1, spec.budget)
    precision = autocast(device, config.training.mixed_precision)

    def image(n: int) -> Tensor:
        patches = torch.zeros((n, grid.tokens, spec.width), dtype=torch.uint8, device=device)
        made: Tensor = sides["image"](patches, grid)
        return made

    def caption(n: int) -> Tensor:
        made: Tensor = sides["text"](torch.zeros((n, parts.identity.text_length), dtype=torch.int64, device=device))
        return made

    costs = {"image": 0, "text": 0}
    for name, run in (("image", image), ("text", caption)):
        if name in sides:
            with precision:
                costs[name] = kept_bytes(run, 2) - kept_bytes(run, 1)
    largest = max(0, room // max(1, sum(costs.values())))
    return Need(
        checkpointing=checkpointing, image_bytes=costs["image"], caption_bytes=costs["text"], largest_batch=largest
    )


def kept_bytes(run: Callable[[int], Tensor], n: int) -> int:
    """Bytes that the graph of a forward pass keeps for the backward pass, every piece of memory once."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = run(n)
    del made
    return sum(seen.values())


def free_bytes(device: torch.device) -> int:
    """Memory of a device that is free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def short_of_memory(config: Config, where: object) -> InputError:
    """The error for it, with the three things that would help most."""
    training = config.training
    parts = 2 * training.accumulation_steps
    size = max(1, training.batch_size * training.accumulation_steps // parts)
    checkpointing = "" if config.finetune.gradient_checkpointing else "--gradient-checkpointing, "
    less = "--unfreeze last-1 or --towers image" if config.finetune.gradient_checkpointing else "fewer --patches"
    return InputError(
        "out of memory",
        where=where,
        got=f"batches of {training.batch_size} in {training.accumulation_steps} parts"
        if training.accumulation_steps > 1
        else f"batches of {training.batch_size}",
        wanted="more memory",
        do=f"{checkpointing}--batch-size {size} --accumulation {parts} (the same batch, half at once), or {less};"
        " what was kept stays, and --resume goes on with the first two",
    )
