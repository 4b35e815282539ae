"""``mmcli finetune --plan``: what a finetuning needs of memory, measured on one image, before anything starts.

A graph keeps tensors for its backward pass; they are counted as they are kept, for one item and for two, and the
difference is what an item costs. Nothing is estimated from formulas, so it holds for every checkpoint and precision.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from torch import Tensor

from ...errors import InputError
from ..core.config import Config
from ..core.console import FittingTable
from ..core.cores import free_memory
from ..core.device import autocast, pick_device
from ..core.progress import Progress
from ..data.manifest import read_manifest
from ..extraction.encoder import Encoder, EncoderParts
from ..extraction.images import Grid
from ..training.setup import draw_head
from .setup import MANIFEST, with_classes
from .towers import Towers

FLOAT_BYTES = 4
GIB = 2**30
# What is left for the head's own activations, the caches of allocators, and images that are read ahead.
SPARE = 0.9


@dataclass(frozen=True, kw_only=True)
class Need:
    """What the activations of one way of training need.

    Attributes:
        checkpointing: Whether activations are computed again.
        image_bytes: Bytes kept for an image of the largest grid; 0 where no image tower is trained.
        caption_bytes: Bytes kept for a caption; 0 where no text tower is trained.
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
        n_parameters: Parameters of towers and head.
        n_trained: Trained parameters of them.
        fixed_bytes: Weights, the copy that is evaluated on val, gradients and moments.
        free_bytes: Bytes free on the device before any of it.
        device: Where it is to be trained.
        batch: Images at once, as configured.
        parts: How many times as many are one batch.
        needs: What activations need without and with gradient checkpointing; none where no tower is trained.
        chosen: Whether gradient checkpointing is configured.
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
        """The plan as one JSON object, with whether it fits."""
        plain = {name: value for name, value in vars(self).items() if name not in {"what", "needs", "chosen"}}
        return plain | {"fits": self.fits, "needs": [vars(need) for need in self.needs]}

    def summary(self) -> list[RenderableType]:
        """Lines and a table for the terminal."""
        lines = [
            *self.what,
            f"with the head {self.n_parameters:,} parameters, {self.n_trained:,} trained",
            f"weights, gradients, moments and a copy to evaluate on val: {self.fixed_bytes / GIB:.2f} GiB of"
            f" {self.free_bytes / GIB:.2f} GiB free on {self.device}",
        ]
        if not self.needs:
            return [*lines, "no tower is trained: every image and caption goes through the towers once"]
        table = FittingTable(title="activations")
        for name in ("gradient checkpointing", "an image", "a caption", "largest batch at once"):
            table.add_column(name, justify="right")
        for need in self.needs:
            sizes = (f"{size / 2**20:.1f} MiB" for size in (need.image_bytes, need.caption_bytes))
            table.add_row("on" if need.checkpointing else "off", *sizes, f"{need.largest_batch:,}")
        times = f" ({self.parts} times for one batch)" if self.parts > 1 else ""
        end = "it fits" if self.fits else "it does NOT fit: lower --batch-size and raise --accumulation by as much"
        return [*lines, table, f"{self.batch} images at once{times}: {end}"]


def plan_memory(config: Config, *, data: Path, progress: Progress | None = None) -> MemoryPlan:
    """Measure what a finetuning would need; nothing is trained or written.

    Args:
        config: A configuration of :func:`~mmcli.pipeline.finetuning.settings.resolve_finetune`.
        data: The data set's folder.
        progress: Says what is measured; nothing by default.

    Raises:
        InputError: A bad manifest or checkpoint, or more blocks than a tower has.
    """
    listing = read_manifest(data / MANIFEST)
    device, model = pick_device(config.hardware.device), config.model
    free = free_bytes(device)
    (progress or Progress.quiet()).say(f"measuring {model.siglip2_variant} on {device}")
    parts = Encoder.parts(
        model.siglip2_variant,
        revision=model.revision,
        patches=model.max_num_patches,
        text_length=model.text_max_length,
        device=device,
    )
    towers = Towers(parts, config.finetune)
    head = draw_head(with_classes(config, listing), width=Encoder(parts).width, device=device)
    n_head = sum(parameter.numel() for parameter in head.parameters())
    n_towers = sum(parameter.numel() for parameter in parts.model.parameters())
    n_trained = n_head + sum(parameter.numel() for parameter in towers.trained.values())
    copy = n_towers * getattr(torch, parts.identity.compute_dtype).itemsize
    fixed = FLOAT_BYTES * (n_towers + n_head + 3 * n_trained) + copy
    room = int(SPARE * (free - fixed))
    return MemoryPlan(
        what=tuple(towers.summary()),
        n_parameters=n_towers + n_head,
        n_trained=n_trained,
        fixed_bytes=fixed,
        free_bytes=free,
        device=str(device),
        batch=config.training.batch_size,
        parts=config.training.accumulation_steps,
        needs=tuple(_need(config, parts, flag, room) for flag in (False, True)) if towers.sides else (),
        chosen=config.finetune.gradient_checkpointing,
        n_images=len(listing),
    )


def _need(config: Config, parts: EncoderParts, checkpointing: bool, room: int) -> Need:
    section = config.finetune.model_copy(update={"gradient_checkpointing": checkpointing})
    sides, spec = Towers(parts, section).sides, parts.spec
    grid = spec.fixed or Grid(1, spec.budget)
    zeros = partial(torch.zeros, device=parts.device)
    items: dict[str, Callable[[int], tuple[Any, ...]]] = {
        "image": lambda n: (zeros((n, grid.tokens, spec.width), dtype=torch.uint8), grid),
        "text": lambda n: (zeros((n, parts.identity.text_length), dtype=torch.int64),),
    }
    costs = {"image": 0, "text": 0}
    for side, tower in sides.items():
        run = partial(_run_items, tower, items[side])
        with autocast(parts.device, config.training.mixed_precision):
            costs[side] = kept_bytes(run, 2) - kept_bytes(run, 1)
    largest = max(0, room // max(1, sum(costs.values())))
    return Need(
        checkpointing=checkpointing, image_bytes=costs["image"], caption_bytes=costs["text"], largest_batch=largest
    )


def _run_items(tower: Callable[..., Tensor], make: Callable[[int], tuple[Any, ...]], n: int) -> Tensor:
    return tower(*make(n))


def kept_bytes(run: Callable[[int], Tensor], n: int) -> int:
    """Bytes that the graph of a forward pass of n items keeps for the backward pass, every piece of memory once."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run(n)
    del output
    return sum(seen.values())


def free_bytes(device: torch.device) -> int:
    """Memory of a device that is free; of a CPU, what a container may still take."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_memory()


def short_of_memory(config: Config, where: object) -> InputError:
    """The error of a training that runs out of memory, with the three things that would help most."""
    training = config.training
    parts = 2 * training.accumulation_steps
    size = max(1, training.batch_size * training.accumulation_steps // parts)
    checkpointing = "" if config.finetune.gradient_checkpointing else "--gradient-checkpointing, "
    less = "--unfreeze last-1 or --towers image" if config.finetune.gradient_checkpointing else "fewer --patches"
    in_parts = f" in {training.accumulation_steps} parts" if training.accumulation_steps > 1 else ""
    return InputError(
        "out of memory",
        where=where,
        got=f"batches of {training.batch_size}{in_parts}",
        wanted="more memory",
        do=f"{checkpointing}--batch-size {size} --accumulation {parts} (the same batch, half at once), or {less};"
        " what was kept stays, and --resume can be given the first two",
    )
