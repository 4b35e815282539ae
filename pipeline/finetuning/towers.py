"""What of the towers of a checkpoint is trained, by name, and how the optimiser steps on it.

Symbols: L blocks of a tower.
"""

import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from ...errors import InputError
from ..core.config import FinetuneConfig, OptimizerConfig
from ..extraction.encoder import EncoderParts
from ..extraction.images import Grid
from ..extraction.towers import ImageTower, PixelScale, TextTower, resize_positions

# Of tokens ``(S, D)``: how many images or texts of how many tokens each follow each other.
Shapes = Sequence[tuple[int, int]]


class _Block(nn.Module):
    """One block of ``transformers``, without a mask."""

    def __init__(self, layer: Any, *, checkpointing: bool) -> None:  # noqa: ANN401
        super().__init__()
        self.layer, self._checkpointing = layer, checkpointing

    def forward(self, x: Tensor, shapes: Shapes, last: bool = False) -> Tensor:
        """Tokens ``(S, D)`` to the same, or to the last one of every text, ``(n, D)``."""
        if self._checkpointing and torch.is_grad_enabled():
            kept: Tensor = checkpoint(self._attend, x, shapes, last, use_reentrant=False)
            return kept
        return self._attend(x, shapes, last)

    def _attend(self, x: Tensor, shapes: Shapes, last: bool) -> Tensor:
        attention = self.layer.self_attn
        normed = self.layer.layer_norm1(x)
        asking = [(n, 1) for n, _ in shapes] if last else shapes
        x, asked = (_ends(x, shapes), _ends(normed, shapes)) if last else (x, normed)
        q, k, v = (
            _by_head(project(part), own, attention.num_heads)
            for project, part, own in (
                (attention.q_proj, asked, asking),
                (attention.k_proj, normed, shapes),
                (attention.v_proj, normed, shapes),
            )
        )
        made = [F.scaled_dot_product_attention(*qkv) for qkv in zip(q, k, v, strict=True)]
        x = x + attention.out_proj(_joined([one.transpose(1, 2).flatten(2).flatten(0, 1) for one in made]))
        out: Tensor = x + self.layer.mlp(self.layer.layer_norm2(x))
        return out


def _by_head(tokens: Tensor, shapes: Shapes, heads: int) -> list[Tensor]:
    """Tokens ``(S, D)`` as ``(n, H, T, D / H)`` of each shape."""
    return [part.view(*part.shape[:2], heads, -1).transpose(1, 2) for part in _by_shape(tokens, shapes)]


def _by_shape(tokens: Tensor, shapes: Shapes) -> list[Tensor]:
    """Tokens ``(S, D)`` as ``(n, T, D)`` of each shape."""
    parts = torch.split(tokens, [n * T for n, T in shapes])
    return [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]


def _ends(tokens: Tensor, shapes: Shapes) -> Tensor:
    """The last token of every image or text, ``(n of all shapes, D)``."""
    return _joined([part[:, -1] for part in _by_shape(tokens, shapes)])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class _Pool(nn.Module):
    """The last norm and the pooling head of an image tower; see :class:`mmcli.pipeline.extraction.towers._Pool`."""

    def __init__(self, vision: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.norm, self.head = vision.post_layernorm, vision.head

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        """Tokens ``(S, D)`` to raw embeddings ``(n of all shapes, D)`` float32."""
        x, attention = self.norm(x), self.head.attention
        D, H = attention.embed_dim, attention.num_heads
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        with torch.autocast(x.device.type, enabled=False):  # scores are rounded to nothing before the softmax
            q = F.linear(self.head.probe, weight[:D], bias[:D]).view(H, 1, D // H)
            query = (q @ weight[D : 2 * D].view(H, D // H, D) * (D // H) ** -0.5)[:, 0]
            scores = _by_shape(x.float() @ query.T, shapes)  # (n, P, H)
        means = [
            score.softmax(1).transpose(1, 2) @ part  # (n, H, D)
            for score, part in zip(scores, _by_shape(x, shapes), strict=True)
        ]
        value = weight[2 * D :].view(H, D // H, D)
        values = torch.einsum("nhd,hed->nhe", _joined(means), value).flatten(1) + bias[2 * D :]
        pooled = attention.out_proj(values).float()
        out: Tensor = pooled + self.head.mlp(self.head.layernorm(pooled)).float()
        return out


class ImageSide(nn.Module):
    """An image tower whose upper part is trained.

    Args:
        vision: The vision model of ``transformers``.
        scale: How pixels are normalised.
        dtype: What the frozen part computes in.
        first: The first trained block; None where the embeddings are trained too.
        checkpointing: Whether activations within a block are computed again in the backward pass.
    """

    def __init__(
        self,
        vision: Any,  # noqa: ANN401
        scale: PixelScale,
        dtype: torch.dtype,
        first: int | None,
        *,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        layers = vision.encoder.layers
        self._first = first
        self._below = ImageTower(cut_off(vision, layers[: first or 0]), scale, dtype)
        self.embeddings = vision.embeddings if first is None else None
        self.blocks = nn.ModuleList(_Block(layer, checkpointing=checkpointing) for layer in layers[first or 0 :])
        self.pool = _Pool(vision)

    def forward(self, pieces: Sequence[tuple[Tensor, Grid]]) -> Tensor:
        """Raw embeddings float32, in the order of the pieces: patches ``(n, P, 3 p^2)`` uint8 of one grid each."""
        shapes = [(patches.shape[0], patches.shape[1]) for patches, _ in pieces]
        with torch.no_grad():
            below = self._below
            parts = [
                below.scaled(patches) if self.embeddings is not None else below.hidden(patches, grid)
                for patches, grid in pieces
            ]
            x = _joined([part.flatten(0, 1) for part in parts])
        if self.embeddings is not None:
            x = self._embed(x, [grid for _, grid in pieces], shapes)
        for block in self.blocks:
            x = block(x, shapes)
        out: Tensor = self.pool(x, shapes)
        return out

    def _embed(self, x: Tensor, grids: Sequence[Grid], shapes: Shapes) -> Tensor:
        assert self.embeddings is not None
        patch = self.embeddings.patch_embedding
        weight = patch.weight.permute(0, 2, 3, 1).flatten(1) if patch.weight.ndim == 4 else patch.weight
        resized = {grid: resize_positions(self.embeddings.position_embedding.weight, grid) for grid in set(grids)}
        positions = [resized[grid].repeat(n, 1) for grid, (n, _) in zip(grids, shapes, strict=True)]
        return F.linear(x, weight, patch.bias).float() + _joined(positions)


class TextSide(nn.Module):
    """A text tower whose upper part is trained; arguments as of :class:`ImageSide`."""

    def __init__(self, text: Any, dtype: torch.dtype, first: int | None, *, checkpointing: bool) -> None:  # noqa: ANN401
        super().__init__()
        layers = text.encoder.layers
        self._first = first
        self._below = TextTower(cut_off(text, layers[: first or 0]), dtype)
        self.embeddings = text.embeddings if first is None else None
        self.blocks = nn.ModuleList(_Block(layer, checkpointing=checkpointing) for layer in layers[first or 0 :])
        self.norm, self.head = text.final_layer_norm, text.head

    def forward(self, ids: Tensor) -> Tensor:
        """Raw embeddings ``(n, D)`` float32 of token ids ``(n, T)`` int64, padded to one length."""
        if self.embeddings is None:
            with torch.no_grad():
                x = self._below.hidden(ids, self._first or 0)
        else:
            x = self.embeddings.token_embedding(ids) + self.embeddings.position_embedding.weight[: ids.shape[1]]
        shapes = [(ids.shape[0], ids.shape[1])]
        x = x.flatten(0, 1)
        for block in self.blocks[:-1]:
            x = block(x, shapes)
        x = self.blocks[-1](x, shapes, True)
        out: Tensor = self.head(self.norm(x)).float()
        return out


def cut_off(tower: Any, layers: Sequence[Any]) -> SimpleNamespace:  # noqa: ANN401
    """A tower without the blocks above some."""
    own = ("embeddings", "post_layernorm", "final_layer_norm", "head")
    parts = {name: getattr(tower, name) for name in own if hasattr(tower, name)}
    return SimpleNamespace(**parts, encoder=SimpleNamespace(layers=list(layers)))


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

    def groups(self, optimizer: OptimizerConfig, local: Mapping[str, Tensor] | None = None) -> list[dict[str, Any]]:
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
            {
                "name": f"{tower} -{below}{kind}",
                "params": parameters,
                "lr": optimizer.lr_towers * self._config.layer_decay**below,
                "weight_decay": optimizer.weight_decay if decays else 0.0,
            }
            for (tower, below, decays, kind), parameters in found.items()
        ]

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
                f"the {tower} tower has not so many blocks",
                where="--unfreeze",
                got=f"last-{n}",
                wanted=f"at most last-{depth}, or all",
                do="lower it, or give --unfreeze all",
            )
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
