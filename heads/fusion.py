"""Two raw embeddings fused into one: blocks of directions, product and log-norms, then an MLP.

Symbols: N images, D embedding width, v raw embedding, d direction, m log-norm, p = d_img * d_txt, z fused embedding.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from .config import FusionConfig
from .decompose import Decomposed, decompose

# A log-norm that spreads less than this is a constant (embeddings already normalised), and only its rounding varies.
MIN_STD = 1e-4


class FusionOutput(NamedTuple):
    """The fused embedding and the parts it was made of.

    Attributes:
        z: ``(N, mlp_dims[-1])``.
        d_img: Image directions ``(N, D)`` float32, after the adapter where there is one.
        d_txt: Caption directions ``(N, D)`` float32, after the adapter where there is one.
        m_img: Image log-norms ``(N,)`` float32, not standardised.
        m_txt: Caption log-norms ``(N,)`` float32, not standardised.
    """

    z: Tensor
    d_img: Tensor
    d_txt: Tensor
    m_img: Tensor
    m_txt: Tensor


def fusion_width(config: FusionConfig, D: int) -> int:
    """Elements of the fusion input: 2D, 3D or 3D + 2, and D or D + 1 with one modality."""
    magnitudes = config.type == "hadamard_magnitude"
    if config.inputs != "both":
        return D + magnitudes
    return {"concat": 2, "hadamard": 3, "hadamard_magnitude": 3}[config.type] * D + 2 * magnitudes


def make_mlp(config: FusionConfig, in_features: int) -> nn.Sequential:
    """Dropout of the inputs where asked for; then linear, activation, dropout for each of ``mlp_dims``."""
    layers: list[nn.Module] = [nn.Dropout(config.input_dropout)] if config.input_dropout else []
    for fan_in, fan_out in pairwise((in_features, *config.mlp_dims)):
        activation: nn.Module = nn.ReLU() if config.activation == "relu" else nn.GELU()
        layers += [nn.Linear(fan_in, fan_out), activation, nn.Dropout(config.dropout)]
    return nn.Sequential(*layers)


class Adapter(nn.Module):
    """Trainable residual linear map ``v + A v`` on a raw embedding; ``A`` starts at zero, so it starts as identity."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, v: Tensor) -> Tensor:
        """Adapt embeddings ``(N, D)``; float32 out."""
        adapted: Tensor = v.float() + self.linear(v.float()).float()
        return adapted


class Fusion(nn.Module):
    """Raw embeddings in, fused embedding out.

    The blocks are ``[d_img; d_txt]`` (concat), with ``p`` (hadamard, after MLB: Kim et al. 2017), with
    ``m_img; m_txt`` (hadamard_magnitude). ``inputs`` image or text leaves that modality's ``d``, and its ``m`` with
    hadamard_magnitude. ``block_norm`` rms brings every block to root-mean-square 1 per element: ``sqrt(D) d``,
    ``D p``, and ``m`` standardised with the mean and deviation of train, which are kept as buffers.

    Args:
        config: The fusion section.
        D: Embedding width.
    """

    m_mean: Tensor
    m_std: Tensor

    def __init__(self, config: FusionConfig, D: int) -> None:
        super().__init__()
        self.config, self.D = config, D
        self._uses_m = config.type == "hadamard_magnitude"
        self._fitted = False
        if self.needs_statistics:
            # NaN, so that a checkpoint of a head that was never fitted cannot pass for a fitted one.
            self.register_buffer("m_mean", torch.full((2,), torch.nan))
            self.register_buffer("m_std", torch.full((2,), torch.nan))
            self.register_load_state_dict_post_hook(_note_fitted)  # type: ignore[no-untyped-call]
        adapted = config.adapter == "linear"
        self.adapter_img = Adapter(D) if adapted and config.inputs != "text" else nn.Identity()
        self.adapter_txt = Adapter(D) if adapted and config.inputs != "image" else nn.Identity()
        self.mlp = make_mlp(config, fusion_width(config, D))

    @property
    def needs_statistics(self) -> bool:
        """Whether :meth:`fit_log_norms` must run before :meth:`forward`."""
        return self._uses_m and self.config.block_norm == "rms"

    def forward(self, v_img: Tensor, v_txt: Tensor) -> FusionOutput:
        """Fuse raw embeddings of images and captions into z.

        Args:
            v_img: Raw image embeddings ``(N, D)``.
            v_txt: Raw caption embeddings ``(N, D)``.

        Raises:
            InputError: The widths are not D, or log-norms are to be standardised and no statistics were set.
        """
        if v_img.shape != v_txt.shape or v_img.shape[-1] != self.D:
            raise InputError(
                "embeddings that do not fit the head",
                got=f"{tuple(v_img.shape)} and {tuple(v_txt.shape)}",
                wanted=f"(N, {self.D}) twice",
                do="use the store the head was trained from",
            )
        image, text = decompose(self.adapter_img(v_img)), decompose(self.adapter_txt(v_txt))
        return FusionOutput(self.mlp(self.blocks(image, text)), image.d, text.d, image.m, text.m)

    def blocks(self, image: Decomposed, text: Decomposed) -> Tensor:
        """The input of the MLP, ``(N, fusion_width)`` float32."""
        rms, D = self.config.block_norm == "rms", self.D
        used = {"both": (image, text), "image": (image,), "text": (text,)}[self.config.inputs]
        parts = [D**0.5 * side.d if rms else side.d for side in used]
        if self.config.type != "concat" and len(used) == 2:
            # An element of d is about 1 / sqrt(D), one of the product about 1 / D.
            product = image.d * text.d
            parts.append(D * product if rms else product)
        if self._uses_m:
            m = torch.stack([image.m, text.m], dim=-1)
            m = self._standardise(m) if rms else m
            columns = {"both": slice(0, 2), "image": slice(0, 1), "text": slice(1, 2)}[self.config.inputs]
            parts.append(m[:, columns])
        return torch.cat(parts, dim=-1)

    def _standardise(self, m: Tensor) -> Tensor:
        if not self._fitted:
            raise InputError(
                "log-norms without statistics",
                got="a fusion with block_norm rms that was never fitted",
                wanted="mean and deviation of train",
                do="call fit_log_norms on train, or load a checkpoint",
            )
        return (m - self.m_mean) / self.m_std

    @torch.no_grad()
    def fit_log_norms(self, m: Tensor) -> None:
        """Take mean and deviation from log-norms ``(N, 2)`` of train: an image, then one of its captions."""
        if self.needs_statistics:
            m = m.cpu().double()  # MPS has no float64
            self.m_mean.copy_(m.mean(0))
            self.m_std.copy_(m.std(0, correction=0).clamp_min(MIN_STD))
            self._fitted = True


def _note_fitted(fusion: nn.Module, _: object) -> None:
    """Mark the module as fitted if the loaded checkpoint has finite statistics."""
    assert isinstance(fusion, Fusion)
    fusion._fitted = not bool(fusion.m_std.isnan().any())  # noqa: SLF001
