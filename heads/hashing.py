"""Soft codes, hard codes, packed codes.

Symbols: N images, B bits, z fused embedding, h soft code in [-1, 1]^B, b hard code in {-1, +1}^B.
"""

from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..errors import InputError
from .config import HashConfig


class HashLayer(nn.Module):
    """``h = tanh(beta (W z + c))``, with batch normalisation before the tanh where asked for.

    ``beta`` is 1, or rises from 1 to ``config.beta`` over the training, by which soft codes approach hard ones
    (continuation: Cao et al. 2017, HashNet, section 3.2). The current one is kept with the parameters.

    The soft code is the output in training and in evaluation alike, whatever the activation. With activation ``ste``
    the classifier reads :meth:`read`, hard codes whose gradient is that of the soft ones (straight-through estimator:
    Bengio, Leonard, Courville 2013; for hashing: Su et al. 2018), in training and in evaluation, so that it is
    trained and used on the same kind of input. Losses, cosine neighbours and :func:`binarise` take the soft code.

    Args:
        config: The hash section; ``bits`` must not be 0.
        in_features: Width of z.
    """

    beta: Tensor | None

    def __init__(self, config: HashConfig, in_features: int) -> None:
        super().__init__()
        assert config.bits > 0, "a head without bits has no hash layer"
        self.config = config
        # Batch normalisation takes a constant out again: a bias would be moved by rounding alone.
        self.linear = nn.Linear(in_features, config.bits, bias=not config.batch_norm)
        self.norm = nn.BatchNorm1d(config.bits) if config.batch_norm else nn.Identity()
        self.register_buffer("beta", torch.ones(()) if config.beta != 1.0 else None)

    def set_progress(self, progress: float) -> None:
        """Set ``beta = 1 + (config.beta - 1) progress``, in place.

        Args:
            progress: Share of the training that is done, in [0, 1].
        """
        if self.beta is not None:
            self.beta.fill_(1.0 + (self.config.beta - 1.0) * progress)

    def forward(self, z: Tensor) -> Tensor:
        """Soft codes ``(N, B)`` float32 of fused embeddings ``(N, in_features)``."""
        # Codes are cut at zero, so what comes after the matrix product stays float32 under autocast too.
        u = self.linear(z).float()
        with torch.autocast(u.device.type, enabled=False):
            u = self.norm(u)
            return torch.tanh(u if self.beta is None else self.beta * u)

    def read(self, h: Tensor) -> Tensor:
        """What the classifier reads ``(N, B)``: h, or its hard code with h's gradient (``ste``)."""
        if self.config.activation == "tanh":
            return h
        return straight_through(h)


def straight_through(h: Tensor) -> Tensor:
    """Hard codes of soft ones, with the gradient of the soft ones; any shape, in h's dtype."""
    # b + (h - h) is exactly b; h + (b - h) would not be, in floating point.
    return _sign(h) + (h - h.detach())


def _sign(h: Tensor) -> Tensor:
    """+1 where h >= 0, else -1, in h's dtype; ``torch.sign`` would give 0 at 0."""
    return torch.where(h.detach() >= 0, 1.0, -1.0).to(h.dtype)


@overload
def binarise(h: Tensor) -> Tensor: ...
@overload
def binarise(h: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.int8]: ...
def binarise(h: Tensor | npt.NDArray[np.floating[Any]]) -> Tensor | npt.NDArray[np.int8]:
    """Hard codes: +1 where ``h >= 0`` (also at -0.0), else -1; never 0.

    Args:
        h: Soft codes of any shape, a tensor or an array.

    Returns:
        int8 of the same shape, kind and device.

    Raises:
        InputError: NaN, which is on neither side of zero.
    """
    if isinstance(h, Tensor):
        _refuse_nan(int(h.isnan().sum()), h.numel())
        return _sign(h).to(torch.int8)
    _refuse_nan(int(np.isnan(h).sum()), h.size)
    return np.where(h >= 0, np.int8(1), np.int8(-1))


def _refuse_nan(n_nan: int, size: int) -> None:
    if n_nan:
        raise InputError(
            "soft codes that are no numbers",
            got=f"NaN in {n_nan} of {size} values",
            wanted="numbers",
            do="check the embeddings and the training loss for NaN",
        )


def pack_codes(b: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Pack hard codes, eight bits a byte, as FAISS binary indexes take them.

    Bit i is bit ``7 - i % 8`` of byte ``i // 8`` (``np.packbits``), 1 for +1. Distances do not depend on the order.

    Args:
        b: ``(N, B)`` of -1 and +1, B a multiple of 8.

    Returns:
        ``(N, B // 8)`` uint8.

    Raises:
        ValueError: B is not a multiple of 8, or a value is neither -1 nor +1.
    """
    if b.shape[-1] % 8:
        raise ValueError(f"codes of {b.shape[-1]} bits do not fill whole bytes: bits must be a multiple of 8")
    if not (np.abs(b) == 1).all():
        raise ValueError("codes to pack must be -1 or +1: call binarise first")
    return np.packbits(b > 0, axis=-1)
