"""The two towers of a SigLIP checkpoint, frozen or with upper parts that are trained: no padding, no mask.

The weights are the checkpoint's; the arithmetic is that of ``transformers``' modules (Tschannen et al. 2025; Zhai et
al. 2023), rearranged where that changes no more than rounding:

- images of any patch grids lie one behind the other, and meet by image in attention and pooling alone (NaViT: Dehghani
  et al. 2023), so nothing is padded or masked and attention may use the fast kernels;
- uint8 pixels are scaled and normalised on the device;
- only the last position of a text is pooled, so the last block attends, and runs its MLP, for that position alone;
- the pooling head's query is the same for every image, so keys and values need not be made of every patch: attention
  weighs the patches themselves, and the values are made of H weighted means.

Of what is frozen, besides:

- queries, keys and values are one matrix product, and position embeddings are resized once per grid and kept;
- the padding of a text is the same in every text before the first block has attended: its queries, keys and values are
  computed once;
- on a CPU with AVX-512, in float32, the matrix products are oneDNN's;
- weights are cast to the compute dtype once, and not in every forward pass as under autocast.

The residual stream and the normalisations stay float32 whatever the compute dtype.

Symbols: n images or texts, P patches, T tokens, S tokens of all images or texts of a pass, D width, H heads, p side of
a patch in pixels.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from .images import Grid

# Resized position embeddings are kept for this many grids; COCO has about 35 at 1,024 patches.
GRIDS_KEPT = 64

# A module or configuration of ``transformers``, whose models have no types here.
Module = Any
# Of tokens ``(S, D)``: how many images or texts of how many tokens each follow each other.
Shapes = Sequence[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class PixelScale:
    """From uint8 to what the tower was trained on: ``(x * factor - mean) / std``, per channel."""

    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TrainedPart:
    """What of a tower is trained: its upper blocks and what follows them, or everything.

    Attributes:
        first_block: Index of the first trained block; the number of blocks for what follows them alone.
        embeddings: Whether the embeddings below the blocks are trained too; ``first_block`` is 0 then.
        checkpointing: Whether activations inside a block are computed again in the backward pass.
    """

    first_block: int
    embeddings: bool = False
    checkpointing: bool = False


class _FrozenLinear:
    """Linear layers of one input as one product in the compute dtype, their outputs side by side.

    On a CPU with AVX-512 the float32 product is oneDNN's, which took half as long as PyTorch's default there.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._onednn = weight.device.type == "cpu" and dtype == torch.float32 and _has_fast_onednn()
        weight = weight.detach().to(dtype).contiguous()
        bias = None if bias is None else bias.detach().to(dtype).contiguous()
        if self._onednn:
            weight, bias = weight.to_mkldnn(), None if bias is None else bias.to_mkldnn()
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self._dtype)
        if self._onednn:
            return F.linear(x.contiguous().to_mkldnn(), self._weight, self._bias).to_dense()
        return F.linear(x, self._weight, self._bias)


def _has_fast_onednn() -> bool:
    """Whether oneDNN's products are worth their copies: with AVX2 they were not faster."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _linear(layer: Module, dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """A layer as it is where its weights are trained (no ``dtype``), else its frozen product."""
    return layer if dtype is None else _FrozenLinear(layer.weight, layer.bias, dtype)


class _Projections(nn.Module):
    """Linear layers of one input, side by side: frozen ones are one product."""

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype | None) -> None:
        super().__init__()
        self._n = len(layers)
        self._trained = nn.ModuleList(layers if dtype is None else ())
        self._frozen: _FrozenLinear | None = None
        if dtype is not None:
            weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
            self._frozen = _FrozenLinear(weight, bias, dtype)

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        """The output of every layer."""
        if self._frozen is None:
            return [layer(x) for layer in self._trained]
        return self._frozen(x).chunk(self._n, dim=-1)


class _FrozenMlp:
    """The MLP of a block with frozen weights."""

    def __init__(self, mlp: Module, dtype: torch.dtype) -> None:
        self._fc1, self._fc2 = _linear(mlp.fc1, dtype), _linear(mlp.fc2, dtype)
        self._activation = ACT2FN[mlp.config.hidden_act]

    def __call__(self, x: Tensor) -> Tensor:
        return self._fc2(self._activation(self._fc1(x)))


def _mlp(mlp: Module, dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    return mlp if dtype is None else _FrozenMlp(mlp, dtype)


class _Block(nn.Module):
    """One encoder layer of ``transformers``, without a mask.

    Args:
        layer: The layer.
        dtype: What its frozen weights are computed in; None where they are trained.
        checkpointing: Compute activations again in the backward pass, to save memory.
        pools_last: Whether only the last token of every text is wanted.
    """

    def __init__(self, layer: Module, dtype: torch.dtype | None, *, checkpointing: bool, pools_last: bool) -> None:
        super().__init__()
        attention = layer.self_attn
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        groups = [(q,), (k, v)] if pools_last else [(q, k, v)]
        self._projections = nn.ModuleList(_Projections(group, dtype) for group in groups)
        self._out, self._mlp = _linear(attention.out_proj, dtype), _mlp(layer.mlp, dtype)
        self._norm1, self._norm2 = layer.layer_norm1, layer.layer_norm2
        self._heads, self._checkpointing, self.pools_last = attention.num_heads, checkpointing, pools_last

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        """Tokens ``(S, D)`` to the same, or to the last one of every text, ``(n, D)``."""
        if self._checkpointing and torch.is_grad_enabled():
            kept: Tensor = checkpoint(self._run, x, shapes, use_reentrant=False)
            return kept
        return self._run(x, shapes)

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values, ``(..., D)`` each, of tokens ``(..., D)``."""
        qkv: Sequence[Tensor] = self._projections[0](self._norm1(x))
        return qkv

    def attend(self, x: Tensor, qkv: Sequence[Tensor], asking: Shapes, shapes: Shapes) -> Tensor:
        """The block's output where queries, keys and values are known; queries and ``x`` have shapes of their own."""
        q, k, v = (
            [part.view(*part.shape[:2], self._heads, -1).transpose(1, 2) for part in _by_shape(tokens, each)]
            for tokens, each in zip(qkv, (asking, shapes, shapes), strict=True)
        )
        mixed = [F.scaled_dot_product_attention(*heads) for heads in zip(q, k, v, strict=True)]
        x = x + self._out(_joined([part.transpose(1, 2).flatten(2).flatten(0, 1) for part in mixed]))
        return x + self._mlp(self._norm2(x))

    def _run(self, x: Tensor, shapes: Shapes) -> Tensor:
        if not self.pools_last:
            return self.attend(x, self.project(x), shapes, shapes)
        normed = self._norm1(x)
        qkv = [*self._projections[0](_ends(normed, shapes)), *self._projections[1](normed)]
        return self.attend(_ends(x, shapes), qkv, [(n, 1) for n, _ in shapes], shapes)


def _by_shape(tokens: Tensor, shapes: Shapes) -> list[Tensor]:
    """Tokens ``(S, D)`` as ``(n, T, D)`` of each shape."""
    parts = torch.split(tokens, [n * T for n, T in shapes])
    return [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]


def _ends(tokens: Tensor, shapes: Shapes) -> Tensor:
    """The last token of every image or text, ``(n of all shapes, D)``."""
    return _joined([part[:, -1] for part in _by_shape(tokens, shapes)])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class _ImagePool(nn.Module):
    """The last norm of an image tower and SigLIP's pooling head: one learned query attends to all patches, then an MLP.

    With ``k_p = W_k x_p + b_k`` and one query for all images, the score of a patch is ``(W_k^T q) . x_p`` plus what is
    the same for every patch, which softmax does not see; and
    ``sum_p a_p (W_v x_p + b_v) = W_v (sum_p a_p x_p) + b_v``.
    """

    def __init__(self, vision: Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        head = vision.head
        self._head, self._last_norm, self._norm = head, vision.post_layernorm, head.layernorm
        self._out, self._mlp = _linear(head.attention.out_proj, dtype), _mlp(head.mlp, dtype)
        self._constants: tuple[Tensor, Tensor, Tensor] | None = None
        if dtype is not None:
            with torch.no_grad():
                query, value, bias = self._fold()
                self._constants = query, value.to(dtype).contiguous(), bias

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        """Tokens ``(S, D)`` to raw embeddings ``(n of all shapes, D)`` float32."""
        x = self._last_norm(x)
        query, value, bias = self._constants or self._fold()
        # In float32, as what they are made of: rounded to bfloat16, scores of 100 would be 0.5 off before the softmax.
        with torch.autocast(x.device.type, enabled=False):
            scores = _by_shape(x.float() @ query.T, shapes)  # (n, P, H)
        x = x.to(value.dtype)
        means = [
            score.softmax(1).transpose(1, 2).to(x.dtype) @ part  # (n, H, D)
            for score, part in zip(scores, _by_shape(x, shapes), strict=True)
        ]
        values = torch.einsum("nhd,hde->nhe", _joined(means), value).flatten(1).float() + bias
        pooled = self._out(values).float()
        return pooled + self._mlp(self._norm(pooled))  # float32, whatever is added to it

    def _fold(self) -> tuple[Tensor, Tensor, Tensor]:
        """The query on patches ``(H, D)``, the values' weight ``(H, D, D / H)`` and their bias ``(D,)``."""
        attention = self._head.attention
        D, H = attention.embed_dim, attention.num_heads
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        with torch.autocast(weight.device.type, enabled=False):
            q = F.linear(self._head.probe, weight[:D], bias[:D]).view(H, 1, D // H)
            query = (q @ weight[D : 2 * D].view(H, D // H, D) * (D // H) ** -0.5)[:, 0]
        return query, weight[2 * D :].view(H, D // H, D).transpose(1, 2), bias[2 * D :]


class _Tower(nn.Module):
    """Embeddings, blocks and pooling of a tower; what is frozen keeps no graph.

    Args:
        tower: The model of ``transformers``, on its device.
        dtype: What frozen weights are computed in.
        trained: What is trained, in float32 or as the surrounding ``autocast`` says; nothing when not given.
        pools_last: Whether the last token is pooled.

    Attributes:
        embeddings: The tower's embeddings.
        blocks: The trained blocks.
    """

    __call__: Callable[..., Tensor]
    _pool: Callable[[Tensor, Shapes], Tensor]

    def __init__(self, tower: Module, dtype: torch.dtype, trained: TrainedPart | None, *, pools_last: bool) -> None:
        super().__init__()
        depth = len(tower.encoder.layers)
        first = depth if trained is None else trained.first_block
        blocks = [
            _Block(
                layer,
                dtype if place < first else None,
                checkpointing=trained is not None and trained.checkpointing,
                pools_last=pools_last and place == depth - 1,
            )
            for place, layer in enumerate(tower.encoder.layers)
        ]
        self._frozen, self.blocks = nn.ModuleList(blocks[:first]), nn.ModuleList(blocks[first:])
        self.embeddings: Any = tower.embeddings
        self.trains_embeddings = trained is not None and trained.embeddings
        self._dtype_below = None if self.trains_embeddings else dtype
        self._dtype_above = None if trained is not None else dtype

    def _encode(self, inputs: Any, shapes: Shapes) -> Tensor:  # noqa: ANN401
        without_graph = contextlib.nullcontext if self.trains_embeddings else torch.no_grad
        with contextlib.nullcontext() if self._dtype_above is None else torch.inference_mode():
            with without_graph():
                x = self._below(inputs, shapes)
            for block in self.blocks:
                x = block(x, shapes)
            return self._pool(x, shapes)

    def _below(self, inputs: Any, shapes: Shapes) -> Tensor:  # noqa: ANN401
        """What enters the first trained block, or the pooling, ``(S, D)`` float32."""
        raise NotImplementedError


class ImageTower(_Tower):
    """Raw image embeddings from uint8 patches.

    Args:
        vision: The vision model of ``transformers``, with a pooling head, on its device.
        scale: How pixels are normalised.
        dtype: What frozen weights are computed in.
        trained: What is trained; nothing when not given.
    """

    def __init__(
        self, vision: Module, scale: PixelScale, dtype: torch.dtype, trained: TrainedPart | None = None
    ) -> None:
        super().__init__(vision, dtype, trained, pools_last=False)
        patch, position = self.embeddings.patch_embedding, self.embeddings.position_embedding.weight.detach()
        self._patch = None
        if self._dtype_below is not None:
            self._patch = _FrozenLinear(_flat_weight(patch), patch.bias, self._dtype_below)
        self._positions = functools.lru_cache(GRIDS_KEPT)(lambda grid: resize_positions(position, grid).contiguous())
        self._pool = _ImagePool(vision, self._dtype_above)
        pixels = _flat_weight(patch).shape[1] // 3
        mean, std = (torch.tensor(values, device=position.device).repeat(pixels) for values in (scale.mean, scale.std))
        self._factor, self._offset = scale.factor / std, mean / std

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        """Raw embeddings ``(n, D)`` float32 of patches ``(n, P, 3 p^2)`` uint8, all of one grid."""
        return self.encode_pack([(patches, grid)])

    def encode_pack(self, pieces: Sequence[tuple[Tensor, Grid]]) -> Tensor:
        """Raw embeddings float32, in the order of the pieces: patches ``(n, P, 3 p^2)`` uint8 of one grid each."""
        return self._encode(pieces, [(patches.shape[0], patches.shape[1]) for patches, _ in pieces])

    def _below(self, pieces: Sequence[tuple[Tensor, Grid]], shapes: Shapes) -> Tensor:
        pixels = _joined([patches.float().flatten(0, 1) for patches, _ in pieces])
        x = self._embed(pixels.mul_(self._factor).sub_(self._offset)).float()
        positions = {grid: self._position(grid) for grid in dict.fromkeys(grid for _, grid in pieces)}
        parts = zip(_by_shape(x, shapes), pieces, strict=True)
        x = _joined([(part + positions[grid]).flatten(0, 1) for part, (_, grid) in parts])
        for block in self._frozen:
            x = block(x, shapes)
        return x

    def _embed(self, pixels: Tensor) -> Tensor:
        patch = self.embeddings.patch_embedding
        return F.linear(pixels, _flat_weight(patch), patch.bias) if self._patch is None else self._patch(pixels)

    def _position(self, grid: Grid) -> Tensor:
        """Position embeddings ``(P, D)`` at the size of a grid."""
        if self.trains_embeddings:
            return resize_positions(self.embeddings.position_embedding.weight, grid)
        return self._positions(grid)


def _flat_weight(patch_embedding: Module) -> Tensor:
    """The weight of a patch embedding ``(D, 3 p^2)``, channels last.

    A convolution whose stride is its kernel is a product with patches.
    """
    weight: Tensor = patch_embedding.weight
    return weight.permute(0, 2, 3, 1).flatten(1) if weight.ndim == 4 else weight


def resize_positions(position: Tensor, grid: Grid) -> Tensor:
    """Position embeddings of a square ``(S^2, D)`` at the size of a grid, ``(P, D)``, float32.

    As ``F.interpolate`` with ``bilinear`` and ``antialias`` gives them, by two products with its weights: on a GPU its
    own backward pass adds up in any order, and the deterministic mode refuses it.
    """
    side = round(len(position) ** 0.5)
    rows, columns = (_resize_weights(side, size, position.device) for size in (grid.rows, grid.columns))
    with torch.autocast(position.device.type, enabled=False):
        high = (rows @ position.float().view(side, -1)).view(grid.rows, side, -1)
        return (columns @ high).flatten(0, 1)


@functools.lru_cache(maxsize=256)
def _resize_weights(side: int, size: int, device: torch.device) -> Tensor:
    """Weights of resizing ``side`` places to ``size``, ``(size, side)`` float32; kept, so that a GPU has them."""
    with torch.inference_mode(False), torch.no_grad():
        each = torch.eye(side)[None, None]
        resized = F.interpolate(each, size=(size, side), mode="bilinear", align_corners=False, antialias=True)
        return resized[0, 0].to(device)


class TextTower(_Tower):
    """Raw text embeddings from token ids, without an attention mask: SigLIP pools the last position, padding or not.

    Args:
        text: The text model of ``transformers``, on its device.
        dtype: What frozen weights are computed in.
        trained: What is trained; nothing when not given.
    """

    def __init__(self, text: Module, dtype: torch.dtype, trained: TrainedPart | None = None) -> None:
        super().__init__(text, dtype, trained, pools_last=True)
        self._norm, self._head = text.final_layer_norm, _linear(text.head, self._dtype_above)

    def forward(self, ids: Tensor) -> Tensor:
        """Raw embeddings ``(n, D)`` float32 of token ids ``(n, T)`` int64, padded to one length."""
        return self._encode(ids, [(ids.shape[0], ids.shape[1])])

    def _pool(self, x: Tensor, shapes: Shapes) -> Tensor:  # noqa: ARG002
        return self._head(self._norm(x)).float()

    def _below(self, ids: Tensor, shapes: Shapes) -> Tensor:
        x = self._embed(ids)
        for place, block in enumerate(self._frozen):
            # Which tokens of a GPU are padding is known there alone, and asking it would stall it.
            if place or ids.device.type != "cpu" or block.pools_last:
                x = block(x, shapes)
            else:
                x = block.attend(x, self._project_first(x, ids), shapes, shapes)  # type: ignore[operator]
        return x

    def _embed(self, ids: Tensor) -> Tensor:
        """Embedded tokens ``(n T, D)`` float32 of ids ``(n, T)``."""
        token, position = self.embeddings.token_embedding, self.embeddings.position_embedding.weight[: ids.shape[1]]
        # Only trained embeddings may be sharded, and their module gathers them when it is called.
        tokens: Tensor = token(ids) if self.trains_embeddings else F.embedding(ids, token.weight)
        embedded: Tensor = tokens.float() + position
        return embedded.flatten(0, 1)

    def _project_first(self, x: Tensor, ids: Tensor) -> list[Tensor]:
        """Queries, keys and values of the first block, those of the padding computed once."""
        block: Any = self._frozen[0]
        padding = ids[:, -1].mode().values
        others = (ids != padding).flatten()
        qkv = []
        for padded, other in zip(
            block.project(self._embed(padding.expand(1, ids.shape[1]))), block.project(x[others]), strict=True
        ):
            part = padded.repeat(len(ids), 1)
            part[others] = other
            qkv.append(part)
        return qkv
