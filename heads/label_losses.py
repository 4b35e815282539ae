"""Losses of logits against labels: cross-entropy, focal, asymmetric; and the weights of positives of rare classes.

Each is a mean over batch and classes of ``y P(x) + (1 - y) N(x)``, so a label between 0 and 1, as of a mixture, has the
loss of both in their shares.

Symbols: N images of a batch, C classes, x logits, y labels, s = sigmoid(x), w weights of positives.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

WEIGHT_CAP = 10.0
# Shifted probabilities below are zero: a power has no slope there, or an infinite one.
_TINY = 1e-12


def bce_loss(logits: Tensor, y: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, mean over batch and classes.

    ``L = mean_nc(-w_c y_nc log s(x_nc) - (1 - y_nc) log(1 - s(x_nc)))``.

    Args:
        logits: x ``(N, C)``; of several classifiers ``(..., N, C)``, which gives a loss for each.
        y: ``(N, C)`` in [0, 1].
        pos_weight: w ``(C,)``; all 1 when not given.
    """
    x = logits.float()
    return _mean(_focused(x, 0.0), _focused(-x, 0.0), y, pos_weight)


def focal_loss(
    logits: Tensor, y: Tensor, *, alpha: float = 0.25, gamma: float = 2.0, pos_weight: Tensor | None = None
) -> Tensor:
    """Focal loss, mean over batch and classes (Lin et al. 2017, eq. 5).

    ``L = mean_nc(-a_t (1 - p_t)^gamma log p_t)``, where ``p_t = s(x)`` and ``a_t = alpha`` for a positive, and
    ``1 - s(x)`` and ``1 - alpha`` for a negative.

    Args:
        logits: x ``(N, C)``; of several classifiers ``(..., N, C)``, which gives a loss for each.
        y: ``(N, C)`` in [0, 1].
        alpha: Weight of positives.
        gamma: How much easy examples are turned down; 0 leaves weighted cross-entropy.
        pos_weight: Further weight ``(C,)`` of positives; all 1 when not given.
    """
    x = logits.float()
    return _mean(alpha * _focused(x, gamma), (1 - alpha) * _focused(-x, gamma), y, pos_weight)


def asymmetric_loss(
    logits: Tensor,
    y: Tensor,
    *,
    gamma_pos: float = 0.0,
    gamma_neg: float = 4.0,
    shift: float = 0.05,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Asymmetric loss, mean over batch and classes (Ridnik et al. 2021, eq. 4, 5 and 7).

    ``L = mean_nc(-w_c y (1 - p)^gamma_pos log p - (1 - y) p_m^gamma_neg log(1 - p_m))`` with ``p = s(x)`` and the
    shifted ``p_m = max(p - shift, 0)``: a negative of a probability below the shift adds nothing. The paper sums over
    classes. With a zero shift and equal focusing it is the focal loss without its alpha.

    Args:
        logits: x ``(N, C)``; of several classifiers ``(..., N, C)``, which gives a loss for each.
        y: ``(N, C)`` in [0, 1].
        gamma_pos: Focusing of positives.
        gamma_neg: Focusing of negatives.
        shift: Probability margin of negatives, in [0, 1).
        pos_weight: Weight of positives w ``(C,)``; all 1 when not given.
    """
    x = logits.float()
    negative = _focused(-x, gamma_neg) if shift == 0 else _shifted(x, gamma_neg, shift)
    return _mean(_focused(x, gamma_pos), negative, y, pos_weight)


def _focused(x: Tensor, gamma: float) -> Tensor:
    """``(1 - s)^gamma -log s``: the focused loss of a positive, and at ``-x`` that of a negative."""
    log = F.logsigmoid(x)
    # log(1 - s) = log s - x: no power of zero, whose slope may be infinite.
    return -log if gamma == 0 else -((log - x) * gamma).exp() * log


def _shifted(x: Tensor, gamma: float, shift: float) -> Tensor:
    """``p^gamma -log(1 - p)`` with ``p = max(s - shift, 0)``; as 1 - p >= shift, the logarithm is finite."""
    p = (torch.sigmoid(x) - shift).clamp_min(_TINY)
    return torch.where(p > _TINY, -p.pow(gamma) * torch.log1p(-p), 0.0)


def _mean(positive: Tensor, negative: Tensor, y: Tensor, pos_weight: Tensor | None) -> Tensor:
    """The loss ``(...)`` of the losses ``(..., N, C)`` that every label would have as a positive and as a negative."""
    if pos_weight is not None:
        positive = pos_weight * positive
    return torch.lerp(negative, positive, y.to(positive.dtype)).mean((-2, -1))


def class_balanced_weights(counts: Tensor, n: int, *, cap: float = WEIGHT_CAP) -> Tensor:
    """Weights of positives that rise as classes get rarer.

    ``w_c = min(cap, sqrt((n - n_c) / n_c))``: the square root of the odds against the class. The odds themselves
    would be 557 for COCO's toaster; capped low enough to train with, they would be the same for nearly every class.
    The root (the damping of Mahajan et al. 2018) keeps the classes apart: person 0.9, chair 2.9, and the
    cap only below 1 % of the images. A class without positives gets the cap, which then weighs nothing.

    Args:
        counts: Images with each class in train, n_c ``(C,)``.
        n: Images of train.
        cap: The largest weight.

    Returns:
        ``(C,)`` float32 on the device of ``counts``, in ``[1 / cap, cap]``: a class of every image is still learnt.
    """
    counts = counts.float()
    return torch.sqrt((n - counts) / counts.clamp_min(1e-12)).clamp(1 / cap, cap)
