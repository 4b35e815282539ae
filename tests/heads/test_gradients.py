"""Values and gradients of the losses against the formulas in float64."""

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kit.plain_losses import plain_asymmetric, plain_focal, plain_hash_losses, plain_loss
from mmcli.heads.config import HashRegConfig, LossConfig
from mmcli.heads.label_losses import asymmetric_loss, bce_loss, focal_loss
from mmcli.heads.losses import balance_loss, decorrelation_loss, quantisation_loss, total_loss
from mmcli.heads.model import HeadOutput

seeds = st.integers(0, 2**31 - 1)
WEIGHTS = torch.tensor([0.5, 1.0, 3.0, 7.0])


def draw(seed: int, mixed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, share = 3 * torch.randn(7, 4, generator=generator), torch.rand(7, 4, generator=generator)
    return x, share if mixed else share.round(), torch.tanh(0.3 + torch.randn(9, 6, generator=generator))


def gradient(loss: Any, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


def same(got: Any, wanted: Any, x: Tensor) -> None:
    torch.testing.assert_close(got(x).double(), wanted(x), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(gradient(got, x), gradient(wanted, x), rtol=1e-4, atol=1e-7)


@given(seeds, st.booleans(), st.booleans())
def test_bce(seed: int, mixed: bool, weighted: bool) -> None:
    x, y, _ = draw(seed, mixed)
    w = WEIGHTS if weighted else None
    plain = functools.partial(F.binary_cross_entropy_with_logits, target=y.double(), pos_weight=w)
    same(lambda x: bce_loss(x, y, w), lambda x: plain(x.double()), x)


def test_easy_labels_keep_the_digits_of_small_gradients() -> None:
    """Most labels are easy negatives; an optimiser that divides by the size of gradients sees those of rare classes."""
    x, y = torch.tensor([[-8.0, -12.0, -20.0, -40.0, 8.0, 12.0, 20.0, 40.0]]), torch.tensor([[0.0] * 4 + [1.0] * 4])
    wanted = torch.sigmoid(-x.double().abs()) / 8
    torch.testing.assert_close(gradient(lambda x: bce_loss(x, y), x).abs().double(), wanted, rtol=1e-5, atol=0)


@given(seeds, st.booleans(), st.booleans(), st.floats(0, 1), st.sampled_from([0.0, 0.5, 2.0, 5.0]))
def test_focal(seed: int, mixed: bool, weighted: bool, alpha: float, gamma: float) -> None:
    x, y, _ = draw(seed, mixed)
    w = WEIGHTS if weighted else torch.ones(4)
    options = {"alpha": alpha, "gamma": gamma}
    plain = functools.partial(plain_focal, y=y, w=w, **options)
    same(lambda x: focal_loss(x, y, pos_weight=w, **options), lambda x: plain(x.double()), x)


@given(
    seeds,
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 1.0, 2.5]),
    st.sampled_from([0.0, 0.5, 1.0, 4.0]),
    st.sampled_from([0.0, 0.05, 0.3]),
)
def test_asymmetric(seed: int, mixed: bool, weighted: bool, pos: float, neg: float, shift: float) -> None:
    x, y, _ = draw(seed, mixed)
    w = WEIGHTS if weighted else torch.ones(4)
    options = {"gamma_pos": pos, "gamma_neg": neg, "shift": shift, "pos_weight": w}
    plain = functools.partial(plain_asymmetric, y=y, pos=pos, neg=neg, shift=shift, w=w)
    same(lambda x: asymmetric_loss(x, y, **options), lambda x: plain(x.double()), x)


@given(seeds)
def test_hash_terms(seed: int) -> None:
    h = draw(seed)[2]
    for at, loss in enumerate((quantisation_loss, balance_loss, decorrelation_loss)):
        same(loss, lambda h, at=at: plain_hash_losses(h.double())[at], h)


CONFIGS = {
    "plan": LossConfig(),
    "all": LossConfig(
        bce_weight=0.7,
        cosine_weight=0.3,
        hash_weight=0.5,
        fused_weight=0.4,
        nested_weight=0.9,
        asymmetric_loss=True,
        hash_reg=HashRegConfig(lambda_quant=0.2, lambda_balance=0.6, lambda_decorr=3.0),
    ),
    "no hash terms": LossConfig(hash_reg=HashRegConfig(lambda_quant=0.0, lambda_balance=0.0, lambda_decorr=0.0)),
    "balance alone": LossConfig(hash_reg=HashRegConfig(lambda_quant=0.0, lambda_balance=2.0, lambda_decorr=0.0)),
    "no hash, no cosine": LossConfig(hash_weight=0.0, cosine_weight=0.0),
}


def draw_leaves(seed: int) -> list[Tensor]:
    """Code, directions, logits of three classifiers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7, 8), (7, 5), (7, 5), (7, 4), (7, 4), (7, 4)]
    return [torch.tanh(torch.randn(shape, generator=generator)) for shape in shapes]


def as_output(leaves: list[Tensor], guided: bool) -> HeadOutput:
    h, d_img, d_txt, own, fused, prefix = leaves
    guides = {"fused_logits": fused, "prefix_logits": (prefix, own + prefix)} if guided else {}
    return HeadOutput(h, h, own, d_img, d_txt, **guides)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_sum_reaches_all_it_depends_on(config: LossConfig, guided: bool) -> None:
    y = draw(1)[1]
    slopes = []
    for loss in (lambda output: total_loss(config, output, y).loss, lambda output: plain_loss(config, output, y)):
        leaves = [leaf.requires_grad_() for leaf in draw_leaves(2)]
        loss(as_output(leaves, guided)).backward()
        slopes.append([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves])
    for got, wanted in zip(*slopes, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("guide", ["fused", "nested"])
def test_a_classifier_of_weight_zero_may_overflow(guide: str) -> None:
    h, _, _, own, _, _ = (leaf.requires_grad_() for leaf in draw_leaves(5))
    beyond = torch.full_like(own, torch.inf).requires_grad_()
    guides = {"fused_logits": beyond} if guide == "fused" else {"prefix_logits": (beyond,)}
    terms = total_loss(LossConfig(**{f"{guide}_weight": 0.0}), HeadOutput(h, h, own, None, None, **guides), draw(1)[1])
    terms.loss.backward()
    assert terms.loss.isfinite()
    assert own.grad.isfinite().all()
    assert beyond.grad is None or not beyond.grad.any()
