"""What of the towers of a checkpoint is trained, by name, and how the optimiser steps on it."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ..core.config import FinetuneConfig, OptimizerConfig
from ..extraction.encoder import EncoderParts
from ..extraction.towers import ImageTower, TextTower, TrainedPart

# What the names of groups end with whose parameters are parts of larger ones.
PARTS = ", parts"
TOWERS = {"image": "vision_model", "text": "text_model"}
# What leaves a tower belongs to it as its last block does.
_TOP = {"image": ("post_layernorm", "head"), "text": ("final_layer_norm", "head")}


class Towers:
    """Both towers of a checkpoint, and what of them is trained.

    Args:
        parts: The checkpoint; ``requires_grad`` of its parameters is set here.
        config: The finetune section.

    Attributes:
        sides: The towers of which something is trained, by ``image`` and ``text``.
        trained: Trained parameters by their names in the model of ``transformers``.

    Raises:
        InputError: More blocks than a tower has.
    """

    def __init__(self, parts: EncoderParts, config: FinetuneConfig) -> None:
        self.parts, self._config = parts, config
        self.depth = {side: len(self._tower(side).encoder.layers) for side in TOWERS}
        chosen = () if config.unfreeze == "none" else ("image", "text") if config.towers == "both" else (config.towers,)
        what = {side: self._trained_part(side) for side in chosen}
        for name, parameter in parts.model.named_parameters():
            parameter.requires_grad_(any(_is_trained(name, side, what[side]) for side in chosen))
        self.find_trained()
        dtype = getattr(torch, parts.identity.compute_dtype)
        self.sides: dict[str, ImageTower | TextTower] = {}
        if "image" in what:
            self.sides["image"] = ImageTower(self._tower("image"), parts.scale, dtype, what["image"])
        if "text" in what:
            self.sides["text"] = TextTower(self._tower("text"), dtype, what["text"])

    def find_trained(self) -> None:
        """Look for what is trained again: where blocks are sharded, their parameters are others."""
        named = self.parts.model.named_parameters()
        self.trained: dict[str, nn.Parameter] = {name: value for name, value in named if value.requires_grad}

    def groups(self, optimizer: OptimizerConfig, local: Mapping[str, Tensor] | None = None) -> list[dict[str, Any]]:
        """Trained parameters by learning rate and weight decay, as groups of an optimiser.

        The rate is ``lr_towers * layer_decay^k`` for what lies k blocks below the top (Clark et al. 2020, section 2;
        Bao et al. 2022); norms and biases do not decay.

        Args:
            optimizer: The optimiser section.
            local: By name, the parts of parameters that this process steps on where they are sharded; they are in
                groups of their own, whose names end with ``PARTS``.
        """
        members: dict[tuple[str, int, bool, str], list[Tensor]] = {}
        for name, parameter in self.trained.items():
            side = next(side for side, prefix in TOWERS.items() if name.startswith(prefix))
            stepped = parameter if local is None else local[name]
            kind = "" if stepped is parameter else PARTS
            members.setdefault((side, self._below_top(name, side), parameter.ndim > 1, kind), []).append(stepped)
        return [
            {
                "name": f"{side} -{below}{kind}",
                "params": parameters,
                "lr": optimizer.lr_towers * self._config.layer_decay**below,
                "weight_decay": optimizer.weight_decay if decays else 0.0,
            }
            for (side, below, decays, kind), parameters in members.items()
        ]

    def summary(self) -> list[str]:
        """What is trained, a line a part."""
        counts: dict[str, int] = {}
        for name, parameter in self.trained.items():
            match = re.match(r"\w+\.(encoder\.layers\.\d+|\w+)", name)
            part = match.group() if match else name
            counts[part] = counts.get(part, 0) + parameter.numel()
        total = sum(parameter.numel() for parameter in self.parts.model.parameters())
        lines = [f"  {part}: {count:,} parameters" for part, count in counts.items()]
        return [f"training {sum(counts.values()):,} of {total:,} parameters of the towers", *lines]

    def _tower(self, side: str) -> Any:  # noqa: ANN401
        return getattr(self.parts.model, TOWERS[side])

    def _trained_part(self, side: str) -> TrainedPart:
        checkpointing = self._config.gradient_checkpointing
        if self._config.unfreeze == "all":
            return TrainedPart(first_block=0, embeddings=True, checkpointing=checkpointing)
        n, depth = int(self._config.unfreeze.removeprefix("last-")), self.depth[side]
        if n > depth:
            raise InputError(
                f"the {side} tower has not so many blocks",
                where="--unfreeze",
                got=f"last-{n}",
                wanted=f"at most last-{depth}, or all",
                do="lower it, or give --unfreeze all",
            )
        return TrainedPart(first_block=depth - n, checkpointing=checkpointing)

    def _below_top(self, name: str, side: str) -> int:
        """How many blocks lie above a parameter's, 0 for what follows the last block."""
        block = _block_of(name, side)
        if block is not None:
            return self.depth[side] - block
        return self.depth[side] + 1 if name.startswith(f"{TOWERS[side]}.embeddings.") else 0


def _block_of(name: str, side: str) -> int | None:
    match = re.match(rf"{TOWERS[side]}\.encoder\.layers\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def _is_trained(name: str, side: str, what: TrainedPart) -> bool:
    if not name.startswith(f"{TOWERS[side]}."):
        return False
    block = _block_of(name, side)
    if what.embeddings or block is None:
        return what.embeddings or name.startswith(tuple(f"{TOWERS[side]}.{part}." for part in _TOP[side]))
    return block >= what.first_block
