"""The terms of the loss, each alone, and their sum.

Symbols: N images of a batch, C classes, B bits, y labels, d direction, h soft code, alpha weight of the cosine term,
gamma weight of the hash terms. :func:`total_loss` computes every term in float32, also under autocast.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .config import LossConfig
from .label_losses import asymmetric_loss, bce_loss, focal_loss
from .model import HeadOutput


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
    N, B = h.shape
    centred = h.float() - h.float().mean(0)
    covariance = centred.T @ centred / N
    return (covariance - covariance.diagonal().diag()).square().sum() / B**2


# The terms of ``loss.hash_reg``, each with a ``lambda_NAME`` there and a field of :class:`LossTerms`.
HASH_TERMS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "quant": quantisation_loss,
    "balance": balance_loss,
    "decorr": decorrelation_loss,
}


class LossTerms(NamedTuple):
    """The loss and its terms, scalars float32; terms that do not apply are ``None``.

    Attributes:
        loss: The sum that is minimised: ``bce_weight * bce + cosine_weight * cosine + hash_weight * hash``, and
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

    loss: Tensor
    bce: Tensor
    cosine: Tensor | None = None
    quant: Tensor | None = None
    balance: Tensor | None = None
    decorr: Tensor | None = None
    hash: Tensor | None = None
    fused: Tensor | None = None
    nested: Tensor | None = None


def total_loss(config: LossConfig, output: HeadOutput, y: Tensor, pos_weight: Tensor | None = None) -> LossTerms:
    """``L = L_bce + alpha L_cos + gamma L_hash`` and its terms.

    A term of weight 0 is still computed, for the record, but takes no part in the sum; neither does the cosine term of
    a head that reads one modality, whose adapter it would train with the other.

    Args:
        config: The loss section.
        output: The head's output for a batch.
        y: Labels ``(N, C)`` of 0 and 1.
        pos_weight: Weights of positives ``(C,)``, from :func:`class_balanced_weights`.
    """
    with torch.autocast(output.logits.device.type, enabled=False):
        bce, fused, nested = _label_losses(config, output, y, pos_weight)
        hashed = cosine = None
        terms: dict[str, Tensor] = {}
        if output.h is not None and output.hash_reg:
            terms = {name: term(output.h) for name, term in HASH_TERMS.items()}
            lambdas = {name: getattr(config.hash_reg, f"lambda_{name}") for name in terms}
            parts = (lambdas[name] * term for name, term in terms.items() if lambdas[name] > 0)
            hashed = sum(parts, torch.zeros_like(bce))
        if output.d_img is not None and output.d_txt is not None:
            cosine = cosine_loss(output.d_img, output.d_txt)
        weighted = (
            (config.fused_weight, fused),
            (config.nested_weight, nested),
            (config.hash_weight, hashed),
            (config.cosine_weight, cosine if output.both else None),
        )
        # A term of weight 0 is left out, not multiplied: 0 * NaN is NaN.
        loss = sum(
            (weight * term for weight, term in weighted if term is not None and weight > 0), config.bce_weight * bce
        )
        return LossTerms(loss=loss, bce=bce, fused=fused, nested=nested, cosine=cosine, hash=hashed, **terms)


def _label_losses(
    config: LossConfig, output: HeadOutput, y: Tensor, pos_weight: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The losses of the classifier, of the one that reads z, and the mean of those that read prefixes of the code."""
    guides = [] if output.fused_logits is None else [output.fused_logits]
    # All classifiers in one go: these are many small operations.
    logits = torch.stack([output.logits, *guides, *output.prefix_logits])
    losses = _classification_loss(config, logits, y, pos_weight)
    bce, fused, prefixes = losses[0], losses[1 : 1 + len(guides)], losses[1 + len(guides) :]
    return bce, fused[0] if len(fused) else None, prefixes.mean() if len(prefixes) else None


def _classification_loss(config: LossConfig, logits: Tensor, y: Tensor, pos_weight: Tensor | None) -> Tensor:
    """The losses ``(R,)`` of R classifiers ``(R, N, C)``, of the configured kind."""
    if config.focal_loss:
        return focal_loss(logits, y, alpha=config.focal_alpha, gamma=config.focal_gamma, pos_weight=pos_weight)
    if config.asymmetric_loss:
        focusing = {"gamma_pos": config.asymmetric_gamma_pos, "gamma_neg": config.asymmetric_gamma_neg}
        return asymmetric_loss(logits, y, **focusing, shift=config.asymmetric_shift, pos_weight=pos_weight)
    return bce_loss(logits, y, pos_weight)
