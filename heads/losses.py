"""The terms of the loss, each alone, and their sum (SPEC section 6).

Symbols: N images of a batch, C classes, B bits, y labels, d direction, h soft code, alpha weight of the cosine term,
gamma weight of the hash terms. :func:`total_loss` computes every term in float32, also under autocast.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .config import LossConfig
from .model import HeadOutput

WEIGHT_CAP = 10.0


def bce_loss(logits: Tensor, y: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, mean over batch and classes.

    ``L = mean_nc(-w_c y_nc log s(x_nc) - (1 - y_nc) log(1 - s(x_nc)))`` with the sigmoid s, from logits.

    Args:
        logits: x ``(N, C)``; of several classifiers ``(..., N, C)``, which gives a loss for each.
        y: ``(N, C)`` of 0 and 1.
        pos_weight: w ``(C,)``; all 1 when not given.
    """
    x = logits.float()
    return F.binary_cross_entropy_with_logits(
        x, y.float().expand_as(x), pos_weight=pos_weight, reduction="none"
    ).mean((-2, -1))  # fmt: skip


def focal_loss(
    logits: Tensor, y: Tensor, *, alpha: float = 0.25, gamma: float = 2.0, pos_weight: Tensor | None = None
) -> Tensor:
    """Focal loss, mean over batch and classes (Lin et al. 2017, eq. 5).

    ``L = mean_nc(-a_t (1 - p_t)^gamma log p_t)``, where ``p_t = s(x)`` and ``a_t = alpha`` for a positive, and
    ``1 - s(x)`` and ``1 - alpha`` for a negative.

    Args:
        logits: x ``(N, C)``; of several classifiers ``(..., N, C)``, which gives a loss for each.
        y: ``(N, C)`` of 0 and 1.
        alpha: Weight of positives.
        gamma: How much easy examples are turned down; 0 leaves weighted cross-entropy.
        pos_weight: Further weight ``(C,)`` of positives; all 1 when not given.
    """
    x, y = logits.float(), y.float()
    # log s(x) = -softplus(-x), log(1 - s(x)) = -softplus(x): no power of zero, whose gradient may be infinite.
    # Written for both sides, so that labels between 0 and 1, as of mixtures, have the loss of both in their shares.
    positive = alpha * torch.exp(-gamma * F.softplus(x)) * F.softplus(-x)
    if pos_weight is not None:
        positive = pos_weight * positive
    negative = (1 - alpha) * torch.exp(-gamma * F.softplus(-x)) * F.softplus(x)
    return (y * positive + (1 - y) * negative).mean((-2, -1))


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
        y: ``(N, C)`` of 0 and 1.
        gamma_pos: Focusing of positives.
        gamma_neg: Focusing of negatives.
        shift: Probability margin of negatives, in [0, 1).
        pos_weight: Weight of positives w ``(C,)``; all 1 when not given.
    """
    x, y = logits.float(), y.float()
    positive = F.softplus(-x)
    if gamma_pos > 0:
        positive = torch.exp(-gamma_pos * F.softplus(x)) * positive
    if pos_weight is not None:
        positive = pos_weight * positive
    if shift == 0:
        negative = torch.exp(-gamma_neg * F.softplus(-x)) * F.softplus(x)
    else:
        # 1 - p_m >= shift, so the logarithm is finite; the power is cut off from zero, where its slope is infinite
        # for an exponent below 1.
        p = (torch.sigmoid(x) - shift).clamp_min(1e-12)
        negative = torch.where(p > 1e-12, p.pow(gamma_neg) * -torch.log1p(-p), 0.0)
    return (y * positive + (1 - y) * negative).mean((-2, -1))


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


def cosine_loss(d_img: Tensor, d_txt: Tensor) -> Tensor:
    """``L_cos = mean_n(1 - d_img . d_txt)`` in [0, 2], of directions ``(N, D)``.

    With frozen towers and no adapter the directions depend on no parameter, and its gradient is zero whatever alpha is.
    """
    return (1 - (d_img.float() * d_txt.float()).sum(-1)).mean()


def quantisation_loss(h: Tensor) -> Tensor:
    """``L_quant = mean((|h| - 1)^2)`` of soft codes ``(N, B)``: 0 when every code is hard."""
    return (h.float().abs() - 1).square().mean()


def balance_loss(h: Tensor) -> Tensor:
    """``L_balance = mean_i((mean_n h_ni)^2)`` of soft codes ``(N, B)``: 0 when every bit is on half of the time."""
    return h.float().mean(0).square().mean()


def decorrelation_loss(h: Tensor) -> Tensor:
    """``L_decorr = sum_{i != j} Cov_ij^2 / B^2`` of soft codes ``(N, B)``, with the covariance of the batch.

    ``Cov = (h - mean)^T (h - mean) / N``. The sum is elementwise; ``trace(Cov^2)`` is the whole squared Frobenius
    norm, and what is left of it without the trace is zero. A batch of one has no covariance and gives 0.
    """
    h = h.float()
    centred = h - h.mean(0)
    covariance = centred.T @ centred / len(h)
    off_diagonal = covariance - torch.diag(covariance.diagonal())
    return off_diagonal.square().sum() / h.shape[1] ** 2


class LossTerms(NamedTuple):
    """The loss and its terms, scalars float32; terms that do not apply are ``None``.

    Attributes:
        total: What is minimised: ``bce_weight * bce + cosine_weight * cosine + hash_weight * hash``, and
            ``fused_weight * fused + nested_weight * nested``.
        bce: Binary cross-entropy or its focal, asymmetric or class-balanced variant.
        cosine: L_cos; ``None`` for the MLP baseline.
        quant: L_quant; ``None``, as the next three, without hash layer or without ``use_hash_reg``.
        balance: L_balance.
        decorr: L_decorr.
        hash: ``lambda_quant * quant + lambda_balance * balance + lambda_decorr * decorr``.
        fused: As bce, of the training classifier that reads z; ``None`` without one.
        nested: As bce, mean over the training classifiers that read hard prefixes; ``None`` without them.
    """

    total: Tensor
    bce: Tensor
    cosine: Tensor | None
    quant: Tensor | None
    balance: Tensor | None
    decorr: Tensor | None
    hash: Tensor | None
    fused: Tensor | None = None
    nested: Tensor | None = None


def total_loss(config: LossConfig, output: HeadOutput, y: Tensor, pos_weight: Tensor | None = None) -> LossTerms:
    """``L = L_bce + alpha L_cos + gamma L_hash`` and its terms.

    A term of weight 0 is still computed, for the record, but takes no part in the sum; neither does the cosine term of
    a head that reads one modality, whose adapter it would train with the other.

    Args:
        config: The loss section.
        output: Of the head.
        y: Labels ``(N, C)`` of 0 and 1.
        pos_weight: Weights of positives ``(C,)``, as of :func:`class_balanced_weights`.
    """
    with torch.autocast(output.logits.device.type, enabled=False):
        own = 1 if output.fused_logits is None else 2
        logits = [output.logits, output.fused_logits, *output.prefix_logits]
        # All classifiers in one go: these are many small operations.
        losses = _classification(config, torch.stack([one for one in logits if one is not None]), y, pos_weight)
        bce, *others = losses.unbind()
        fused = others[0] if own == 2 else None
        nested = losses[own:].mean() if output.prefix_logits else None
        cosine = quant = balance = decorr = hashed = None
        if output.d_img is not None and output.d_txt is not None:
            cosine = cosine_loss(output.d_img, output.d_txt)
        if output.h is not None and output.hash_reg:
            h, reg = output.h, config.hash_reg
            quant, balance, decorr = quantisation_loss(h), balance_loss(h), decorrelation_loss(h)
            weighted = ((reg.lambda_quant, quant), (reg.lambda_balance, balance), (reg.lambda_decorr, decorr))
            parts = [weight * term for weight, term in weighted if weight > 0]
            hashed = torch.stack(parts).sum(0) if parts else torch.zeros_like(quant)
        total = config.bce_weight * bce
        alpha = config.cosine_weight if output.both else 0.0
        guides = ((config.fused_weight, fused), (config.nested_weight, nested))
        for weight, term in ((alpha, cosine), (config.hash_weight, hashed), *guides):
            if term is not None and weight > 0:
                total = total + weight * term
        return LossTerms(total, bce, cosine, quant, balance, decorr, hashed, fused, nested)


def _classification(config: LossConfig, logits: Tensor, y: Tensor, pos_weight: Tensor | None) -> Tensor:
    """The losses ``(R,)`` of R classifiers ``(R, N, C)``, of the kind that the configuration names."""
    if config.focal_loss:
        return focal_loss(logits, y, alpha=config.focal_alpha, gamma=config.focal_gamma, pos_weight=pos_weight)
    if config.asymmetric_loss:
        focusing = {"gamma_pos": config.asymmetric_gamma_pos, "gamma_neg": config.asymmetric_gamma_neg}
        return asymmetric_loss(logits, y, **focusing, shift=config.asymmetric_shift, pos_weight=pos_weight)
    return bce_loss(logits, y, pos_weight)
