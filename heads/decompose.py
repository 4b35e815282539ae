"""A raw embedding split into where it points and how long it is.

Symbols: v raw embedding, n its Euclidean norm, d direction, m log-norm, D embedding width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-6


class Decomposed(NamedTuple):
    """Direction and log-norm of embeddings.

    Attributes:
        d: Directions ``(..., D)`` float32, of unit length up to ``eps``.
        m: Log-norms ``(...)`` float32, natural logarithm.
    """

    d: Tensor
    m: Tensor


def decompose(v: Tensor, eps: float = EPS) -> Decomposed:
    """Split embeddings into direction and log-norm over the last dimension.

    ``n = ||v||_2``, ``d = v / (n + eps)``, ``m = log(n + eps)``. Scaling ``v`` by ``s > 0`` leaves ``d`` and adds
    ``log s`` to ``m`` (both up to ``eps / n``); a zero vector has ``d = 0`` and ``m = log(eps)``.

    Args:
        v: Raw embeddings ``(..., D)`` of any floating dtype. They must not be normalised: ``m`` would be constant.
        eps: Keeps the zero vector finite.

    Returns:
        Direction ``(..., D)`` and log-norm ``(...)``, float32 also inside autocast: float16 squares overflow from
        256 on, and bfloat16 would leave the log-norm three digits.
    """
    with torch.autocast(v.device.type, enabled=False):
        v = v.float()
        n = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        return Decomposed(d=v / (n + eps), m=torch.log(n + eps).squeeze(-1))


def log_norms(v_img: Tensor, v_txt: Tensor) -> Tensor:
    """Log-norms ``(N, 2)`` of raw image and caption embeddings ``(N, D)``, by which a head standardises them."""
    return torch.stack([decompose(v_img).m, decompose(v_txt).m], dim=-1)
