"""What of the towers of a checkpoint is trained, by name, and how the optimiser steps on it.

Symbols: L blocks of a tower.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ... import InputError
from ..core.config import FinetuneConfig, OptimizerConfig
from ..extraction.encoder import EncoderParts
from ..training.optimisation import Group
from .sides import ImageSide, TextSide

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
        sides: What is trained, by ``image`` and ``text``.
        trained: Trained parameters by their names in the model of ``transformers``.

    Raises:
        InputError: More blocks than a tower has.
    """

    def __init__(self, parts: EncoderParts, config: FinetuneConfig) -> None:
        self.parts, self._config = parts, config
        dtype = getattr(torch, parts.identity.compute_dtype)
        self.depth = {name: len(self._tower(name).encoder.layers) for name in TOWERS}
        chosen = () if config.unfreeze == "none" else ("image", "text") if config.towers == "both" else (config.towers,)
        first = {name: self._first_block(name) for name in chosen}
        for name, parameter in parts.model.named_parameters():
            parameter.requires_grad_(any(_is_trained(name, tower, first[tower]) for tower in chosen))
        self.find_trained()
        options: dict[str, Any] = {"checkpointing": config.gradient_checkpointing}
        self.sides: dict[str, nn.Module] = {}
        if "image" in chosen:
            vision = self._tower("image")
            self.sides["image"] = ImageSide(vision, parts.scale, dtype, first["image"], **options)
        if "text" in chosen:
            self.sides["text"] = TextSide(self._tower("text"), dtype, first["text"], **options)

    def find_trained(self) -> None:
        """Look for what is trained again: where blocks are sharded, their parameters are others."""
        named = self.parts.model.named_parameters()
        self.trained: dict[str, nn.Parameter] = {name: one for name, one in named if one.requires_grad}

    def groups(self, optimizer: OptimizerConfig, local: Mapping[str, Tensor] | None = None) -> list[Group]:
        """Trained parameters by learning rate and weight decay.

        Where ``local`` has a part of a parameter, that part is stepped on, in a group of ``PARTS``.

        ``lr_towers * layer_decay^k`` for what lies k blocks below the top (Clark et al. 2020, section 2; Bao et al.
        2022); norms and biases do not decay.
        """
        found: dict[tuple[str, int, bool, str], list[Tensor]] = {}
        for name, parameter in self.trained.items():
            tower = next(tower for tower, prefix in TOWERS.items() if name.startswith(prefix))
            own = parameter if local is None else local[name]
            kind = "" if own is parameter else PARTS
            found.setdefault((tower, self._below_top(name, tower), parameter.ndim > 1, kind), []).append(own)
        return [
            Group(
                name=f"{tower} -{below}{kind}", parameters=parameters,
                rate=optimizer.lr_towers * self._config.layer_decay**below,
                decay=optimizer.weight_decay if decays else 0.0,
            )
            for (tower, below, decays, kind), parameters in found.items()
        ]  # fmt: skip

    def summary(self) -> list[str]:
        """What is trained, a line a part."""
        counts: dict[str, int] = {}
        for name, parameter in self.trained.items():
            found = re.match(r"\w+\.(encoder\.layers\.\d+|\w+)", name)
            part = found.group() if found else name
            counts[part] = counts.get(part, 0) + parameter.numel()
        total = sum(parameter.numel() for parameter in self.parts.model.parameters())
        lines = [f"  {part}: {count:,} parameters" for part, count in counts.items()]
        return [f"training {sum(counts.values()):,} of {total:,} parameters of the towers", *lines]

    def _tower(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self.parts.model, TOWERS[name])

    def _first_block(self, tower: str) -> int | None:
        if self._config.unfreeze == "all":
            return None
        n, depth = int(self._config.unfreeze.removeprefix("last-")), self.depth[tower]
        if n > depth:
            raise InputError(
                f"the {tower} tower has not so many blocks", where="--unfreeze", got=f"last-{n}",
                wanted=f"at most last-{depth}, or all", do="lower it, or give --unfreeze all",
            )  # fmt: skip
        return depth - n

    def _below_top(self, name: str, tower: str) -> int:
        """How many blocks lie above a parameter's, 0 for what follows the last block."""
        block = re.match(r"\w+\.encoder\.layers\.(\d+)\.", name)
        if block:
            return self.depth[tower] - int(block.group(1))
        return self.depth[tower] + 1 if name.startswith(f"{TOWERS[tower]}.embeddings.") else 0


def _is_trained(name: str, tower: str, first: int | None) -> bool:
    prefix = TOWERS[tower]
    if not name.startswith(f"{prefix}."):
        return False
    block = re.match(rf"{prefix}\.encoder\.layers\.(\d+)\.", name)
    if first is None or block is None:
        return first is None or name.startswith(tuple(f"{prefix}.{part}." for part in _TOP[tower]))
    return int(block.group(1)) >= first
