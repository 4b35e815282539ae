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
- on a CPU with AVX-512, in float32, GELU is computed inside the product before it (oneDNN), its results in cache;
- frozen weights are cast to the compute dtype once, and not in every forward pass as under autocast.

The residual stream and the normalisations stay float32 whatever the compute dtype.

Symbols: n images or texts, P patches, T tokens, D width, H heads, p side of a patch in pixels.
"""

import functools
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.activations import ACT2FN

from .patches import Grid

# Resized position embeddings are kept for this many grids; COCO has about 35 at 1,024 patches.
GRIDS_KEPT = 64


@dataclass(frozen=True, kw_only=True)
class PixelScale:
    """From uint8 to what the tower was trained on: ``(x * factor - mean) / std``, per channel."""

    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


class _Linear:
    """A frozen linear layer in the compute dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.detach().to(dtype).contiguous()
        self.bias = None if bias is None else bias.detach().to(dtype)

    def __call__(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        bias = None if self.bias is None else self.bias[rows]
        return F.linear(x.to(self.weight.dtype), self.weight[rows], bias)


class _Norm:
    """A frozen layer normalisation in float32."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        assert norm.weight is not None
        self._weight, self._bias, self._eps = norm.weight.detach().float(), norm.bias.detach().float(), norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self._weight.shape, self._weight, self._bias, self._eps)


class _GeluLinear:
    """A frozen linear layer and its tanh-GELU in one call of oneDNN, float32 on a CPU.

    PyTorch's own compiler emits these calls; they are not part of its public interface, so :meth:`works` asks first.
    """

    # oneDNN lays the weights out for about so many rows; any number may come.
    ROWS = 2048

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), self.ROWS)  # noqa: SLF001
        self._bias = bias.detach()

    @staticmethod
    def works(device: torch.device, dtype: torch.dtype, activation: str) -> bool:
        """Whether this layer may take the place of two."""
        return (
            activation == "gelu_pytorch_tanh" and device.type == "cpu" and dtype == torch.float32
            and torch.backends.cpu.get_cpu_capability() == "AVX512"  # with AVX2 two calls were faster
            and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
            and all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
        )  # fmt: skip

    def __call__(self, x: Tensor) -> Tensor:
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "gelu", [], "tanh")  # noqa: SLF001
        return made


class _Mlp:
    def __init__(self, mlp: Any, dtype: torch.dtype) -> None:  # noqa: ANN401
        weight, bias, activation = mlp.fc1.weight, mlp.fc1.bias, mlp.config.hidden_act
        self._fused = _GeluLinear(weight, bias) if _GeluLinear.works(weight.device, dtype, activation) else None
        self._fc1 = _Linear(weight, bias, dtype) if self._fused is None else None
        self._activation = ACT2FN[activation]
        self._fc2 = _Linear(mlp.fc2.weight, mlp.fc2.bias, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        if self._fused is not None:
            return self._fc2(self._fused(x))
        assert self._fc1 is not None
        return self._fc2(self._activation(self._fc1(x)))


class _Layer:
    """One encoder layer; ``last`` computes the last position only."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:  # noqa: ANN401
        attention = layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        self._heads = attention.num_heads
        self._qkv = _Linear(torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts]), dtype)
        self._out = _Linear(attention.out_proj.weight, attention.out_proj.bias, dtype)
        self._norm1, self._norm2 = _Norm(layer.layer_norm1), _Norm(layer.layer_norm2)
        self._mlp = _Mlp(layer.mlp, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self.attend(x, self.project(x))

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values ``(..., 3 D)`` of ``x (..., D)``."""
        return self._qkv(self._norm1(x))

    def attend(self, x: Tensor, qkv: Tensor) -> Tensor:
        """The layer's output ``(n, T, D)``, where its queries, keys and values are known."""
        q, k, v = self._by_head(qkv, 3)
        return self._finish(x, q, k, v)

    def last(self, x: Tensor) -> Tensor:
        """The layer's output at the last position alone, ``(n, 1, D)``."""
        normed, D = self._norm1(x), x.shape[-1]
        q = self._by_head(self._qkv(normed[:, -1:], rows=slice(None, D)), 1)[0]
        k, v = self._by_head(self._qkv(normed, rows=slice(D, None)), 2)
        return self._finish(x[:, -1:], q, k, v)

    def _finish(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = x + self._out(_attend(q, k, v))
        return x + self._mlp(self._norm2(x))

    def _by_head(self, made: Tensor, parts: int) -> Tensor:
        """``(n, T, parts D)`` to ``(parts, n, H, T, D / H)``."""
        n, T, _ = made.shape
        return made.view(n, T, parts, self._heads, -1).permute(2, 0, 3, 1, 4)


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
        """What leaves the last block, ``(n, P, D)`` float32."""
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
    """What each of ``size`` places takes of ``side`` others, ``(size, side)`` float32; kept, so that a GPU has them."""
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
        self._layers = [_Layer(layer, dtype) for layer in text.encoder.layers]
        self._norm = _Norm(text.final_layer_norm)
        self._head = _Linear(text.head.weight, text.head.bias, dtype)

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        """Raw embeddings ``(n, D)`` float32 of token ids ``(n, T)`` int64, padded to one length."""
        x = self._layers[-1].last(self.hidden(ids, len(self._layers) - 1))
        return self._head(self._norm(x[:, -1])).float()

    def hidden(self, ids: Tensor, blocks: int) -> Tensor:
        """What leaves the first so many blocks, ``(n, T, D)`` float32."""
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
