"""The towers of a checkpoint in a forward pass that trains them: frozen below without a graph, live above with one.

The arithmetic is that of :mod:`~mmcli.pipeline.extraction.towers` on live weights, and so are its savings where they change no
more than rounding: no mask, the last position of a text alone in the last block, a pooling head that weighs patches
before it makes values of them. Towers have no dropout: a second pass gives the same numbers.

A batch has images of many grids. Their patches go through norms and products as one row behind the other, whatever
their image, and meet by image in attention and pooling alone (packing: Dehghani et al. 2023, NaViT, section 2.1). So
each weight has one gradient a pass, and not one for every grid, which costs as much as the weight is large.

Symbols: n images or texts of one shape, P patches, T tokens, S tokens of all shapes, D width, H heads, p side
of a patch in pixels.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

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
                (attention.q_proj, asked, asking), (attention.k_proj, normed, shapes),
                (attention.v_proj, normed, shapes),
            )
        )  # fmt: skip
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
        self, vision: Any, scale: PixelScale, dtype: torch.dtype, first: int | None, *, checkpointing: bool  # noqa: ANN401
    ) -> None:  # fmt: skip
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
