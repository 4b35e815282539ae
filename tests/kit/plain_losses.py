"""The losses as their formulas stand, each classifier by itself, for autograd to find every gradient.

Symbols: N images of a batch, C classes, B bits, x logits, y labels, h soft code.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mmcli.heads.config import LossConfig
from mmcli.heads.model import HeadOutput


def plain_loss(config: LossConfig, output: HeadOutput, y: Tensor) -> Tensor:
    """The same loss as :func:`~mmcli.heads.losses.total_loss`, without weights of classes."""
    total = config.bce_weight * plain_label_loss(config, output.logits, y)
    if output.fused_logits is not None:
        total = total + config.fused_weight * plain_label_loss(config, output.fused_logits, y)
    for logits in output.prefix_logits:
        total = total + config.nested_weight / len(output.prefix_logits) * plain_label_loss(config, logits, y)
    if output.h is not None and output.hash_reg:
        reg, (quant, balance, decorr) = config.hash_reg, plain_hash_losses(output.h)
        hashed = reg.lambda_quant * quant + reg.lambda_balance * balance + reg.lambda_decorr * decorr
        total = total + config.hash_weight * hashed
    if output.d_img is not None and output.d_txt is not None and output.both:
        total = total + config.cosine_weight * (1 - (output.d_img * output.d_txt).sum(-1)).mean()
    return total


def plain_label_loss(config: LossConfig, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, focal or asymmetric loss of one classifier."""
    if config.focal_loss:
        return plain_focal(x, y, config.focal_alpha, config.focal_gamma)
    if config.asymmetric_loss:
        gammas = config.asymmetric_gamma_pos, config.asymmetric_gamma_neg
        return plain_asymmetric(x, y, *gammas, config.asymmetric_shift)
    return F.binary_cross_entropy_with_logits(x, y)


def plain_focal(x: Tensor, y: Tensor, alpha: float, gamma: float, w: float | Tensor = 1.0) -> Tensor:
    """Lin et al. 2017, eq. 5; ``w (C,)`` weighs positives."""
    p = torch.sigmoid(x)
    positive = -w * alpha * (1 - p) ** gamma * torch.log(p.clamp_min(1e-8))
    return (y * positive - (1 - y) * (1 - alpha) * p**gamma * torch.log((1 - p).clamp_min(1e-8))).mean()


def plain_asymmetric(x: Tensor, y: Tensor, pos: float, neg: float, shift: float, w: float | Tensor = 1.0) -> Tensor:
    """Ridnik et al. 2021, eq. 4, 5 and 7; ``w (C,)`` weighs positives."""
    p = torch.sigmoid(x)
    shifted = (p - shift).clamp_min(1e-12)
    positive = -w * (1 - p) ** pos * torch.log(p.clamp_min(1e-8))
    negative = torch.where(p > shift, -(shifted**neg) * torch.log((1 - shifted).clamp_min(1e-8)), 0.0)
    return (y * positive + (1 - y) * negative).mean()


def plain_hash_losses(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantisation, balance and decorrelation of soft codes ``(N, B)``."""
    centred = h - h.mean(0)
    covariance = centred.T @ centred / len(h)
    off = covariance - torch.diag(covariance.diagonal())
    return (h.abs() - 1).square().mean(), h.mean(0).square().mean(), off.square().sum() / h.shape[1] ** 2
