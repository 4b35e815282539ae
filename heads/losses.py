"""The terms of the loss, each alone, and their sum (SPEC section 6).

Symbols: N images of a batch, C classes, B bits, y labels, d direction, h soft code, alpha weight of the cosine term,
gamma weight of the hash terms. :func:`total_loss` computes every term in float32, also under autocast.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .config import LossConfig
from .label_losses import asymmetric_slope, bce_slope, focal_slope
from .model import HeadOutput
from .slopes import Sloped, known


def cosine_loss(d_img: Tensor, d_txt: Tensor) -> Tensor:
    """``L_cos = mean_n(1 - d_img . d_txt)`` in [0, 2], of directions ``(N, D)``.

    With frozen towers and no adapter the directions depend on no parameter, and its gradient is zero whatever alpha is.
    """
    return (1 - (d_img.float() * d_txt.float()).sum(-1)).mean()


def quantisation_loss(h: Tensor) -> Tensor:
    """``L_quant = mean((|h| - 1)^2)`` of soft codes ``(N, B)``: 0 when every code is hard."""
    h = h.float()
    return known(_quantisation(h), h)


def balance_loss(h: Tensor) -> Tensor:
    """``L_balance = mean_i((mean_n h_ni)^2)`` of soft codes ``(N, B)``: 0 when every bit is on half of the time."""
    h = h.float()
    return known(_balance(h, h.detach().mean(0)), h)


def decorrelation_loss(h: Tensor) -> Tensor:
    """``L_decorr = sum_{i != j} Cov_ij^2 / B^2`` of soft codes ``(N, B)``, with the covariance of the batch.

    ``Cov = (h - mean)^T (h - mean) / N``. The sum is elementwise; ``trace(Cov^2)`` is the whole squared Frobenius
    norm, and what is left of it without the trace is zero. A batch of one has no covariance and gives 0.

    Its gradient is ``4 (h - mean) Off / (N B^2)`` with Off, the covariance without its diagonal; the mean's part in it
    vanishes, because the columns of ``h - mean`` sum to zero.
    """
    h = h.float()
    return known(_decorrelation(h, h.detach().mean(0)), h)


@torch.no_grad()
def _quantisation(h: Tensor) -> Sloped:
    off = h.abs() - 1
    return Sloped(off.square().mean(), off * h.sign() * (2 / h.numel()))


@torch.no_grad()
def _balance(h: Tensor, mean: Tensor) -> Sloped:
    return Sloped(mean.square().mean(), (mean * (2 / h.numel())).expand_as(h))


@torch.no_grad()
def _decorrelation(h: Tensor, mean: Tensor) -> Sloped:
    N, B = h.shape
    centred = h - mean
    off = (centred.T @ centred) * (1 / N)
    off.diagonal().zero_()
    return Sloped(off.square().sum() * (1 / B**2), (centred @ off) * (4 / (N * B**2)))


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


class LossWeights(NamedTuple):
    """What the terms weigh: numbers, or scalars on the device where replicas differ in them.

    Attributes:
        bce: Of the classifier.
        cosine: Alpha.
        hash: Gamma.
        fused: Of the training classifier that reads z.
        nested: Of those that read prefixes, together.
        quant: Within the hash terms, and so are the next two.
        balance: Likewise.
        decorr: Likewise.
    """

    bce: float | Tensor
    cosine: float | Tensor
    hash: float | Tensor
    fused: float | Tensor
    nested: float | Tensor
    quant: float | Tensor
    balance: float | Tensor
    decorr: float | Tensor

    @classmethod
    def of(cls, config: LossConfig) -> "LossWeights":
        """Those of a configuration."""
        reg = config.hash_reg
        return cls(
            config.bce_weight,
            config.cosine_weight,
            config.hash_weight,
            config.fused_weight,
            config.nested_weight,
            reg.lambda_quant,
            reg.lambda_balance,
            reg.lambda_decorr,
        )


def _counts(weight: float | Tensor) -> bool:
    """Whether a term takes part in the sum: a NaN in one of weight 0 is none in the sum."""
    return isinstance(weight, Tensor) or weight > 0


def total_loss(
    config: LossConfig,
    output: HeadOutput,
    y: Tensor,
    pos_weight: Tensor | None = None,
    weights: LossWeights | None = None,
) -> LossTerms:
    """``L = L_bce + alpha L_cos + gamma L_hash`` and its terms.

    A term of weight 0 is still computed, for the record, but takes no part in the sum; neither does the cosine term of
    a head that reads one modality, whose adapter it would train with the other.

    Args:
        config: The loss section.
        output: Of the head.
        y: Labels ``(N, C)`` of 0 and 1.
        pos_weight: Weights of positives ``(C,)``, as of :func:`class_balanced_weights`.
        weights: What the terms weigh; as configured when not given.
    """
    weights = weights or LossWeights.of(config)
    with torch.autocast(output.logits.device.type, enabled=False):
        labels = _label_terms(config, output, y, pos_weight, weights)
        hashed = None if output.h is None or not output.hash_reg else _hash_terms(weights, output.h.float())
        value, slopes = labels.total, labels.slopes
        if hashed is not None and _counts(weights.hash):
            value, slopes = value + hashed.total, (*slopes, *hashed.slopes)
        first, *others = slopes
        total = known(Sloped(value, first[0]), first[1], *others)
        cosine = None
        if output.d_img is not None and output.d_txt is not None:
            cosine = cosine_loss(output.d_img, output.d_txt)
            if output.both and _counts(weights.cosine):
                total = total + weights.cosine * cosine
        terms = labels.terms | ({} if hashed is None else hashed.terms)
        rest = (terms.get(name) for name in ("quant", "balance", "decorr", "hash", "fused", "nested"))
        return LossTerms(total, terms["bce"], cosine, *rest)


class _Terms(NamedTuple):
    """Some terms of the loss.

    Attributes:
        terms: By name, those that apply.
        total: Their part of the sum.
        slopes: Its gradient at each tensor, and that tensor.
    """

    terms: dict[str, Tensor]
    total: Tensor
    slopes: tuple[tuple[Tensor, Tensor], ...]


def _label_terms(
    config: LossConfig, output: HeadOutput, y: Tensor, pos_weight: Tensor | None, weights: LossWeights
) -> _Terms:
    own = 1 if output.fused_logits is None else 2
    some = (output.logits, output.fused_logits, *output.prefix_logits)
    # All classifiers in one go: these are many small operations.
    logits = torch.stack([one for one in some if one is not None]).float()
    losses, slopes = _classification(config, logits.detach(), y, pos_weight)
    n_prefixes = len(logits) - own
    each = [weights.bce, weights.fused][:own] + [weights.nested / max(1, n_prefixes)] * n_prefixes
    terms = {"bce": losses[0]}
    if own == 2:
        terms["fused"] = losses[1]
    if output.prefix_logits:
        terms["nested"] = losses[own:].mean()
    total, slope = _weighed(Sloped(losses, slopes), each)
    return _Terms(terms, total, ((slope, logits),))


def _weighed(classified: Sloped, weights: list[float | Tensor]) -> Sloped:
    """The sum of the losses ``(R,)`` of R classifiers, each times its weight, and its gradient ``(R, N, C)``."""
    each = _on_device(weights, classified.value)
    values, slopes = classified.value * each, classified.slope * each[:, None, None]
    if not all(map(_counts, weights)):
        none = each == 0
        values, slopes = values.masked_fill(none, 0), slopes.masked_fill(none[:, None, None], 0)
    return Sloped(values.sum(), slopes)


def _hash_terms(weights: LossWeights, h: Tensor) -> _Terms:
    codes = h.detach()
    mean = codes.mean(0)
    parts = {"quant": _quantisation(codes), "balance": _balance(codes, mean), "decorr": _decorrelation(codes, mean)}
    hashed, slope = torch.zeros_like(mean[0]), torch.zeros_like(mean).expand_as(codes)
    for weight, part in zip((weights.quant, weights.balance, weights.decorr), parts.values(), strict=True):
        if _counts(weight):
            hashed, slope = hashed + weight * part.value, slope + (weights.hash * weight) * part.slope
    terms = {name: part.value for name, part in parts.items()} | {"hash": hashed}
    return _Terms(terms, weights.hash * hashed, ((slope, h),))


def _on_device(values: list[float | Tensor], like: Tensor) -> Tensor:
    numbers = tuple(value for value in values if not isinstance(value, Tensor))
    if numbers:
        assert len(numbers) == len(values), "weights are numbers or scalars on the device, not both"
        return _constants(numbers, like.device)
    return torch.stack([value for value in values if isinstance(value, Tensor)])


@functools.lru_cache(maxsize=64)
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers on a device, put there once: a step that is captured into a graph must not copy from the host."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)


def _classification(config: LossConfig, logits: Tensor, y: Tensor, pos_weight: Tensor | None) -> Sloped:
    """The losses ``(R,)`` of R classifiers ``(R, N, C)``, of the configured kind, with their gradients."""
    if config.focal_loss:
        return focal_slope(logits, y, alpha=config.focal_alpha, gamma=config.focal_gamma, pos_weight=pos_weight)
    if config.asymmetric_loss:
        focusing = {"gamma_pos": config.asymmetric_gamma_pos, "gamma_neg": config.asymmetric_gamma_neg}
        return asymmetric_slope(logits, y, **focusing, shift=config.asymmetric_shift, pos_weight=pos_weight)
    return bce_slope(logits, y, pos_weight)
