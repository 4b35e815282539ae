"""Losses of logits against labels: cross-entropy, focal, asymmetric; and what positives of rare classes weigh.

Each is a mean over batch and classes of ``y P(x) + (1 - y) N(x)``, so a label between 0 and 1, as of a mixture, has the
loss of both in their shares. With the derivatives of P and N at hand, its gradient is computed beside it.

Symbols: N images of a batch, C classes, x logits, y labels, s = sigmoid(x), w weights of positives.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .slopes import Sloped, known

WEIGHT_CAP = 10.0
# Probabilities below are zero: a power has no slope there, or an infinite one.
_TINY = 1e-12


def _mean(positive: Sloped, negative: Sloped, y: Tensor, pos_weight: Tensor | None) -> Sloped:
    """The loss ``(...)`` of positives and negatives ``(..., N, C)``, and its gradient."""
    if pos_weight is not None:
        positive = Sloped(pos_weight * positive.value, pos_weight * positive.slope)
    y = y.to(positive.value.dtype)
    value = torch.lerp(negative.value, positive.value, y).mean((-2, -1))
    return Sloped(value, torch.lerp(negative.slope, positive.slope, y).div_(y.shape[-1] * y.shape[-2]))


def _hit(x: Tensor, gamma: float) -> Sloped:
    """``(1 - s)^gamma -log s``: the focused loss of a positive."""
    log = F.logsigmoid(x)
    slope = (-x).sigmoid_().neg_()  # s - 1, which as a difference would lose its digits where s is near 1
    if gamma == 0:
        return Sloped(-log, slope)
    # log(1 - s) = log s - x: no power of zero, whose slope may be infinite.
    power = ((log - x) * gamma).exp_()
    return Sloped(power * -log, torch.addcmul(slope, log.exp(), log, value=gamma).mul_(power))


def _miss(x: Tensor, gamma: float) -> Sloped:
    """``s^gamma -log(1 - s)``: the focused loss of a negative."""
    value, slope = _hit(-x, gamma)
    return Sloped(value, slope.neg_())


def _shifted_miss(x: Tensor, gamma: float, shift: float) -> Sloped:
    """``p^gamma -log(1 - p)`` with ``p = max(s - shift, 0)``."""
    s = torch.sigmoid(x)
    p = s - shift
    there = (p / _TINY).clamp(0, 1)  # 0 where the negative counts nothing; comparing takes a CPU longer
    p = p.clamp_min_(_TINY)  # 1 - p >= shift, so the logarithm is finite
    power = p.pow(gamma / 2).square().mul_(there)  # squares are quick, other powers are not
    log = torch.log1p(-p)
    slope = torch.addcdiv((1 - p).reciprocal_(), log, p, value=-gamma).mul_(power).mul_(s).mul_(1 - s)
    return Sloped(log.neg_().mul_(power), slope)


def bce_loss(logits: Tensor, y: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, mean over batch and classes.

    ``L = mean_nc(-w_c y_nc log s(x_nc) - (1 - y_nc) log(1 - s(x_nc)))``.

    Args:
        logits: x ``(N, C)``; of several classifiers ``(..., N, C)``, which gives a loss for each.
        y: ``(N, C)`` in [0, 1].
        pos_weight: w ``(C,)``; all 1 when not given.
    """
    x = logits.float()
    return known(bce_slope(x, y, pos_weight), x)


@torch.no_grad()
def bce_slope(x: Tensor, y: Tensor, pos_weight: Tensor | None = None) -> Sloped:
    """As :func:`bce_loss` of float32 logits, with its gradient and without a graph."""
    return _mean(_hit(x, 0), _miss(x, 0), y, pos_weight)


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
    return known(focal_slope(x, y, alpha=alpha, gamma=gamma, pos_weight=pos_weight), x)


@torch.no_grad()
def focal_slope(x: Tensor, y: Tensor, *, alpha: float, gamma: float, pos_weight: Tensor | None = None) -> Sloped:
    """As :func:`focal_loss` of float32 logits, with its gradient and without a graph."""
    positive, negative = _hit(x, gamma), _miss(x, gamma)
    positive = Sloped(alpha * positive.value, alpha * positive.slope)
    return _mean(positive, Sloped((1 - alpha) * negative.value, (1 - alpha) * negative.slope), y, pos_weight)


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
    focusing = {"gamma_pos": gamma_pos, "gamma_neg": gamma_neg}
    return known(asymmetric_slope(x, y, **focusing, shift=shift, pos_weight=pos_weight), x)


@torch.no_grad()
def asymmetric_slope(
    x: Tensor, y: Tensor, *, gamma_pos: float, gamma_neg: float, shift: float, pos_weight: Tensor | None = None
) -> Sloped:
    """As :func:`asymmetric_loss` of float32 logits, with its gradient and without a graph."""
    negative = _miss(x, gamma_neg) if shift == 0 else _shifted_miss(x, gamma_neg, shift)
    return _mean(_hit(x, gamma_pos), negative, y, pos_weight)


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
