"""Mixtures of two images of a batch.

Symbols: N images of a batch, D embedding width, C classes, s share of the first image.
"""

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor, Tensor]


def mix_batch(batch: Batch, share: Tensor) -> Batch:
    """Every image mixed with the one before it, the first with the last (mixup: Zhang et al. 2018, eq. 1).

    ``v_n <- s_n v_n + (1 - s_n) v_(n-1)``, image, caption and labels alike. The paper draws s from Beta(a, a), one for
    a batch; here every image has its own, and a uniform share is a = 1. Batches are shuffled, so the one before is
    any other.

    Args:
        batch: Image and caption embeddings ``(N, D)`` and labels ``(N, C)``.
        share: s ``(N,)`` in [0, 1].

    Returns:
        The same shapes; labels in [0, 1].
    """
    v_img, v_txt, y = (torch.lerp(part.roll(1, -2), part, share[..., None]) for part in batch)
    return v_img, v_txt, y


def shares(order: Tensor, n: int) -> Tensor:
    """Pseudo-random shares in [0, 1), taken from the shuffled order, so that a repeated training has the same.

    The share of an image is the place in the split, over n, of the image two before it in the batch. A shuffled order
    holds every place once, so shares are uniform.

    Args:
        order: Places of a batch's images in the split ``(N,)``, shuffled.
        n: Images of the split.
    """
    return order.roll(2, -1) / n
