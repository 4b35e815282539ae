"""The two towers of a SigLIP checkpoint as they are fastest to run frozen: no padding, no mask, nothing twice.

The weights are the checkpoint's; the arithmetic is that of ``transformers``' modules (Tschannen et al. 2025; Zhai et
al. 2023), rearranged where that changes no more than rounding:

- one matrix product for queries, keys and values;
- a batch of one patch grid needs no padding, so attention has no mask and may use the fast kernels, and the position
  embeddings are resized once per grid and kept;
- uint8 pixels are scaled and normalised on the device;
- only the last position of a text is pooled, so the last layer attends, and runs its MLP, for that position alone;
- the padding of a text is the same in every text before the first layer has attended: its queries, keys and values are
  computed once;
- the pooling head's query is a constant, so keys and values need not be made of every patch: attention weighs the
  patches themselves, and the values are made of H weighted means;
- on a CPU with AVX-512, in float32, the matrix products are oneDNN's;
- frozen weights are cast to the compute dtype once, and not in every forward pass as under autocast.

The residual stream and the normalisations stay float32 whatever the compute dtype.

Symbols: n images or texts, P patches, T tokens, D width, H heads, p side of a patch in pixels.
"""

import functools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.activations import ACT2FN

from .images import Grid

# Resized position embeddings are kept for this many grids; COCO has about 35 at 1,024 patches.
GRIDS_KEPT = 64


@dataclass(frozen=True, kw_only=True)
class PixelScale:
    """From uint8 to what the tower was trained on: ``(x * factor - mean) / std``, per channel."""

    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


class _Linear:
    """A frozen linear layer in the compute dtype.

    On a CPU with AVX-512 its float32 product is oneDNN's, which took half as long as PyTorch's default there.
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


def _concatenated(parts: Sequence[Any], dtype: torch.dtype) -> _Linear:
    """Several linear layers of one input as one, their outputs side by side."""
    return _Linear(torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts]), dtype)


def _has_fast_onednn() -> bool:
    """Whether oneDNN's products are worth their copies: with AVX2 they were not faster."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and torch.backends.cpu.get_cpu_capability() == "AVX512"


class _Norm:
    """A frozen layer normalisation in float32."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        assert norm.weight is not None
        self._weight, self._bias, self._eps = norm.weight.detach().float(), norm.bias.detach().float(), norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self._weight.shape, self._weight, self._bias, self._eps)


class _Mlp:
    def __init__(self, mlp: Any, dtype: torch.dtype) -> None:  # noqa: ANN401
        self._fc1 = _Linear(mlp.fc1.weight, mlp.fc1.bias, dtype)
        self._activation = ACT2FN[mlp.config.hidden_act]
        self._fc2 = _Linear(mlp.fc2.weight, mlp.fc2.bias, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self._fc2(self._activation(self._fc1(x)))


class _Layer:
    """One frozen encoder layer, attention and MLP."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:  # noqa: ANN401
        attention = layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        self._heads = attention.num_heads
        self._qkv = _concatenated(parts, dtype)
        self._out = _Linear(attention.out_proj.weight, attention.out_proj.bias, dtype)
        self._norm1, self._norm2 = _Norm(layer.layer_norm1), _Norm(layer.layer_norm2)
        self._mlp = _Mlp(layer.mlp, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self.attend(x, self.project(x))

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values ``(..., 3 D)`` of ``x (..., D)``."""
        return self._qkv(self._norm1(x))

    def attend(self, x: Tensor, qkv: Tensor) -> Tensor:
        """The layer's output ``(n, T, D)`` from its queries, keys and values."""
        q, k, v = self._by_head(qkv, 3)
        return self._finish(x, q, k, v)

    def _finish(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = x + self._out(_attend(q, k, v))
        return x + self._mlp(self._norm2(x))

    def _by_head(self, projected: Tensor, parts: int) -> Tensor:
        """``(n, T, parts D)`` to ``(parts, n, H, T, D / H)``."""
        n, T, _ = projected.shape
        return projected.view(n, T, parts, self._heads, -1).permute(2, 0, 3, 1, 4)


class _LastLayer(_Layer):
    """The last encoder layer of a tower that pools its last position."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:  # noqa: ANN401
        super().__init__(layer, dtype)
        attention = layer.self_attn
        self._q = _concatenated((attention.q_proj,), dtype)
        self._kv = _concatenated((attention.k_proj, attention.v_proj), dtype)

    def last(self, x: Tensor) -> Tensor:
        """The layer's output at the last position alone, ``(n, 1, D)``."""
        normed = self._norm1(x)
        q = self._by_head(self._q(normed[:, -1:]), 1)[0]
        k, v = self._by_head(self._kv(normed), 2)
        return self._finish(x[:, -1:], q, k, v)


class _Pool:
    """SigLIP's pooling head: one learned query attends to all patches, then an MLP.

    With ``k_p = W_k x_p + b_k`` and a constant query, the score of a patch is ``(W_k^T q) . x_p`` plus what is the
    same for every patch, which softmax does not see; and ``sum_p a_p (W_v x_p + b_v) = W_v (sum_p a_p x_p) + b_v``.
    """

    def __init__(self, head: Any, dtype: torch.dtype) -> None:  # noqa: ANN401
        attention = head.attention
        D, H = attention.embed_dim, attention.num_heads
        weight, bias = attention.in_proj_weight.detach().float(), attention.in_proj_bias.detach().float()
        q = F.linear(head.probe.detach().float(), weight[:D], bias[:D]).view(H, 1, D // H)
        self._query = (q @ weight[D : 2 * D].view(H, D // H, D) * (D // H) ** -0.5)[:, 0]
        self._value = weight[2 * D :].view(H, D // H, D).transpose(1, 2).to(dtype).contiguous()
        self._value_bias = bias[2 * D :]
        self._out = _Linear(attention.out_proj.weight, attention.out_proj.bias, dtype)
        self._norm, self._mlp = _Norm(head.layernorm), _Mlp(head.mlp, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        # In float32, as what they are made of: rounded to bfloat16, scores of 100 would be 0.5 off before the softmax.
        weights = (x @ self._query.T).softmax(1).transpose(1, 2)  # (n, H, P)
        x = x.to(self._value.dtype)
        means = weights.to(x.dtype) @ x  # (n, H, D)
        values = torch.einsum("nhd,hde->nhe", means, self._value).flatten(1).float() + self._value_bias
        pooled = self._out(values).float()
        return (pooled + self._mlp(self._norm(pooled))).float()


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without a mask: ``(n, H, T, D / H)`` each, to ``(n, T, D)``."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ImageTower:
    """Raw image embeddings from uint8 patches.

    Args:
        vision: The vision model of ``transformers``, with a pooling head, on its device.
        scale: How pixels are normalised.
        dtype: Compute dtype of the matrix products.
    """

    def __init__(self, vision: Any, scale: PixelScale, dtype: torch.dtype) -> None:  # noqa: ANN401
        embeddings = vision.embeddings
        weight = embeddings.patch_embedding.weight
        if weight.ndim == 4:
            # A convolution whose stride is its kernel is a product with patches; they have the channels last.
            weight = weight.permute(0, 2, 3, 1).flatten(1)
        device = weight.device
        self._patch = _Linear(weight, embeddings.patch_embedding.bias, dtype)
        self._position = embeddings.position_embedding.weight.detach().float()
        self._kept: OrderedDict[Grid, Tensor] = OrderedDict()
        self._layers = [_Layer(layer, dtype) for layer in vision.encoder.layers]
        self._norm, self._pool = _Norm(vision.post_layernorm), _Pool(vision.head, dtype)
        pixels = weight.shape[1] // 3
        mean, std = (torch.tensor(values, device=device).repeat(pixels) for values in (scale.mean, scale.std))
        self._factor, self._offset = scale.factor / std, mean / std

    @torch.inference_mode()
    def __call__(self, patches: Tensor, grid: Grid) -> Tensor:
        """Raw embeddings ``(n, D)`` float32 of patches ``(n, P, 3 p^2)`` uint8, all of one grid."""
        return self._pool(self._norm(self.hidden(patches, grid)))

    def hidden(self, patches: Tensor, grid: Grid) -> Tensor:
        """The output of the last block, ``(n, P, D)`` float32."""
        x = self._patch(self.scaled(patches)).float() + self._positions(grid)
        for layer in self._layers:
            x = layer(x)
        return x

    def scaled(self, patches: Tensor) -> Tensor:
        """Pixels as the tower was trained on them, float32."""
        return patches.float().mul_(self._factor).sub_(self._offset)

    def _positions(self, grid: Grid) -> Tensor:
        """Position embeddings ``(P, D)`` at the size of a grid."""
        if grid not in self._kept:
            self._kept[grid] = resize_positions(self._position, grid).contiguous()
            if len(self._kept) > GRIDS_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(grid)
        return self._kept[grid]


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


class TextTower:
    """Raw text embeddings from token ids, without an attention mask: SigLIP pools the last position, padding or not.

    Args:
        text: The text model of ``transformers``, on its device.
        dtype: Compute dtype of the matrix products.
    """

    def __init__(self, text: Any, dtype: torch.dtype) -> None:  # noqa: ANN401
        self._token = text.embeddings.token_embedding.weight.detach()
        self._position = text.embeddings.position_embedding.weight.detach().float()
        # Finetuning makes a tower of the frozen layers alone, of which there may be none.
        self._last = _LastLayer(text.encoder.layers[-1], dtype) if text.encoder.layers else None
        self._layers: list[_Layer] = [_Layer(layer, dtype) for layer in text.encoder.layers[:-1]]
        self._layers += [self._last] if self._last else []
        self._norm = _Norm(text.final_layer_norm)
        self._head = _Linear(text.head.weight, text.head.bias, dtype)

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        """Raw embeddings ``(n, D)`` float32 of token ids ``(n, T)`` int64, padded to one length."""
        assert self._last is not None
        x = self._last.last(self.hidden(ids, len(self._layers) - 1))
        return self._head(self._norm(x[:, -1])).float()

    def hidden(self, ids: Tensor, blocks: int) -> Tensor:
        """The output of the first ``blocks`` blocks, ``(n, T, D)`` float32."""
        position = self._position[: ids.shape[1]]
        x: Tensor = F.embedding(ids, self._token).float() + position
        if blocks:
            x = self._layers[0].attend(x, self._project_first(x, ids, position))
        for layer in self._layers[1:blocks]:
            x = layer(x)
        return x

    def _project_first(self, x: Tensor, ids: Tensor, position: Tensor) -> Tensor:
        """Queries, keys and values of the first layer, ``(n, T, 3 D)``, those of the padding made once."""
        layer = self._layers[0]
        if ids.device.type != "cpu":  # which tokens are padding is known on the device alone, and asking it stalls it
            return layer.project(x)
        padding = ids[:, -1].mode().values
        other = ids != padding
        qkv = layer.project(F.embedding(padding, self._token).float() + position).repeat(len(ids), 1, 1)
        qkv[other] = layer.project(x[other])
        return qkv
