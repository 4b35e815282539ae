"""Each term against plain Python loops, at its extremes, and the sum of them."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmcli.heads.config import HashRegConfig, LossConfig
from mmcli.heads.label_losses import asymmetric_loss, bce_loss, class_balanced_weights, focal_loss
from mmcli.heads.losses import (
    HASH_TERMS,
    LossTerms,
    balance_loss,
    cosine_loss,
    decorrelation_loss,
    quantisation_loss,
    total_loss,
)
from mmcli.heads.model import HeadOutput

seeds = st.integers(0, 2**32 - 1)


def make_batch(seed: int, n: int = 7, c: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.normal(size=(n, c)) * 3), torch.tensor(rng.integers(0, 2, (n, c)))


def make_codes(seed: int, n: int = 9, bits: int = 6) -> torch.Tensor:
    return torch.tensor(np.tanh(np.random.default_rng(seed).normal(size=(n, bits)) + 0.3))


def make_output(seed: int = 0, **replace: Any) -> HeadOutput:
    generator = torch.Generator().manual_seed(seed)
    d_img, d_txt = (torch.nn.functional.normalize(torch.randn(7, 5, generator=generator)) for _ in range(2))
    output = HeadOutput(
        torch.randn(7, 3, generator=generator), make_codes(seed, 7, 8), make_batch(seed)[0], d_img, d_txt
    )
    return output._replace(**replace)


@given(seeds, st.booleans())
def test_bce_equals_the_loop(seed: int, weighted: bool) -> None:
    x, y = make_batch(seed)
    w = [0.5, 1.0, 3.0, 7.0] if weighted else [1.0] * 4
    total = 0.0
    for row, labels in zip(x.tolist(), y.tolist(), strict=True):
        for logit, label, weight in zip(row, labels, w, strict=True):
            p = 1 / (1 + math.exp(-logit))
            total += -weight * math.log(p) if label else -math.log(1 - p)
    assert float(bce_loss(x, y, torch.tensor(w) if weighted else None)) == pytest.approx(total / x.numel(), rel=1e-4)


@given(seeds, st.sampled_from([0.0, 0.5, 2.0, 5.0]), st.floats(0, 1), st.booleans())
def test_focal_equals_the_loop(seed: int, gamma: float, alpha: float, weighted: bool) -> None:
    x, y = make_batch(seed)
    w = [0.5, 1.0, 3.0, 7.0] if weighted else [1.0] * 4
    total = 0.0
    for row, labels in zip(x.tolist(), y.tolist(), strict=True):
        for logit, label, weight in zip(row, labels, w, strict=True):
            p = 1 / (1 + math.exp(-logit))
            p_t, a_t = (p, alpha * weight) if label else (1 - p, 1 - alpha)
            total += -a_t * (1 - p_t) ** gamma * math.log(p_t)
    got = focal_loss(x, y, alpha=alpha, gamma=gamma, pos_weight=torch.tensor(w) if weighted else None)
    assert float(got) == pytest.approx(total / x.numel(), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_extreme_logits_have_finite_losses_and_gradients(gamma: float) -> None:
    y = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    for loss in (lambda x: bce_loss(x, y), lambda x: focal_loss(x, y, gamma=gamma)):
        x = torch.tensor([[1e4, -1e4, -1e4, 1e4]], requires_grad=True)
        value = loss(x)
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(x.grad).all()
        assert value > 100  # the two confident mistakes count


def test_balanced_weights_rise_for_rare_classes_up_to_the_cap() -> None:
    counts = torch.tensor([61377, 11753, 1000, 203, 0, 113287])
    weights = class_balanced_weights(counts, 113287)
    for weight, n in zip(weights.tolist()[:4], [61377, 11753, 1000, 203], strict=True):
        assert weight == pytest.approx(min(10.0, math.sqrt((113287 - n) / n)), rel=1e-5)
    assert weights[0] < 1 < weights[1] < weights[2] < 10.01
    assert weights[4] == 10
    assert weights[5] == pytest.approx(0.1)
    assert torch.isfinite(weights).all()
    assert class_balanced_weights(counts, 113287, cap=2.0).max() == 2


@given(seeds)
def test_cosine_equals_the_loop(seed: int) -> None:
    output = make_output(seed)
    dots = [
        sum(a * b for a, b in zip(i, t, strict=True))
        for i, t in zip(output.d_img.tolist(), output.d_txt.tolist(), strict=True)
    ]
    assert float(cosine_loss(output.d_img, output.d_txt)) == pytest.approx(
        sum(1 - dot for dot in dots) / len(dots), abs=1e-5
    )
    assert float(cosine_loss(output.d_img, output.d_img)) == pytest.approx(0, abs=1e-6)
    assert float(cosine_loss(output.d_img, -output.d_img)) == pytest.approx(2, abs=1e-6)


@given(seeds, st.integers(1, 9), st.integers(1, 8))
def test_hash_terms_equal_the_loops(seed: int, n: int, bits: int) -> None:
    h = make_codes(seed, n, bits)
    rows = h.tolist()
    quant = sum((abs(x) - 1) ** 2 for row in rows for x in row) / (n * bits)
    means = [sum(row[i] for row in rows) / n for i in range(bits)]
    balance = sum(mean**2 for mean in means) / bits
    decorr = 0.0
    for i in range(bits):
        for j in range(bits):
            if i != j:
                covariance = sum((row[i] - means[i]) * (row[j] - means[j]) for row in rows) / n
                decorr += covariance**2 / bits**2
    assert float(quantisation_loss(h)) == pytest.approx(quant, rel=1e-4, abs=1e-8)
    assert float(balance_loss(h)) == pytest.approx(balance, rel=1e-4, abs=1e-8)
    assert float(decorrelation_loss(h)) == pytest.approx(decorr, rel=1e-4, abs=1e-8)


def test_hash_terms_are_zero_where_they_should_be() -> None:
    hard = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert float(quantisation_loss(hard)) == float(balance_loss(hard)) == float(decorrelation_loss(hard)) == 0
    assert float(decorrelation_loss(hard[:1])) == 0  # a batch of one has no covariance
    assert float(quantisation_loss(torch.zeros(3, 8))) == 1
    assert float(balance_loss(torch.ones(3, 8))) == 1


def test_spec10_5_decorrelation_is_off_diagonal_and_not_a_trace() -> None:
    """trace(Cov^2) is the whole squared Frobenius norm: it punishes variance, and minus itself leaves zero."""
    independent = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    identical = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    for h, wanted in ((independent, 0.0), (identical, 2 / 4)):
        covariance = torch.cov(h.T, correction=0)
        trace = torch.trace(covariance @ covariance)
        assert float(trace) == pytest.approx(float(covariance.square().sum()))
        assert float(decorrelation_loss(h)) == pytest.approx(wanted)
        assert float(decorrelation_loss(h)) != pytest.approx(float(trace) / 4)


def test_total_is_the_weighted_sum() -> None:
    config = LossConfig(
        bce_weight=0.7,
        cosine_weight=1.3,
        hash_weight=0.2,
        hash_reg=HashRegConfig(lambda_balance=0.5, lambda_decorr=0.25),
    )
    output, y = make_output(), make_batch(0)[1]
    terms = total_loss(config, output, y)
    quant, balance, decorr = quantisation_loss(output.h), balance_loss(output.h), decorrelation_loss(output.h)
    hashed = quant + 0.5 * balance + 0.25 * decorr
    assert float(terms.hash) == pytest.approx(float(hashed))
    wanted = 0.7 * bce_loss(output.logits, y) + 1.3 * cosine_loss(output.d_img, output.d_txt) + 0.2 * hashed
    assert float(terms.loss) == pytest.approx(float(wanted))
    assert [float(terms.bce), float(terms.cosine)] == pytest.approx(
        [float(bce_loss(output.logits, y)), float(cosine_loss(output.d_img, output.d_txt))]
    )


def test_variants_reach_the_sum() -> None:
    output, y, w = make_output(), make_batch(0)[1], torch.tensor([1.0, 2.0, 3.0, 4.0])
    focal = total_loss(LossConfig(focal_loss=True, focal_alpha=0.4, focal_gamma=1.5), output, y, w).bce
    assert float(focal) == pytest.approx(float(focal_loss(output.logits, y, alpha=0.4, gamma=1.5, pos_weight=w)))
    assert float(total_loss(LossConfig(), output, y, w).bce) == pytest.approx(float(bce_loss(output.logits, y, w)))


@pytest.mark.parametrize("replace", [{"h": None}, {"hash_reg": False}])
def test_without_hash_terms(replace: dict[str, Any]) -> None:
    terms = total_loss(LossConfig(hash_weight=5.0), make_output(**replace), make_batch(0)[1])
    assert (terms.hash, terms.quant, terms.balance, terms.decorr) == (None, None, None, None)
    assert float(terms.loss) == pytest.approx(float(terms.bce + terms.cosine))


def test_terms_of_weight_zero_are_logged_but_give_no_gradient() -> None:
    h = make_codes(0, 7, 8).requires_grad_()
    x = make_batch(0)[0].requires_grad_()
    terms = total_loss(LossConfig(hash_weight=0.0, cosine_weight=0.0), make_output(h=h, logits=x), make_batch(0)[1])
    terms.loss.backward()
    assert h.grad is None
    assert x.grad is not None
    assert terms.hash > 0
    assert torch.equal(terms.loss, terms.bce)


def test_one_modality_learns_nothing_from_the_cosine_term() -> None:
    """Its adapter would be trained with the other modality; the value is logged all the same."""
    plain = make_output()
    output = plain._replace(d_img=plain.d_img.clone().requires_grad_(), logits=plain.logits.clone().requires_grad_())
    for both in (True, False):
        terms = total_loss(LossConfig(hash_weight=0.0), output._replace(both=both), make_batch(0)[1])
        terms.loss.backward()
        total, bce, cosine = (term.item() for term in (terms.loss, terms.bce, terms.cosine))
        assert cosine == pytest.approx(cosine_loss(plain.d_img, plain.d_txt).item())
        assert (output.d_img.grad is not None) == both
        assert total == pytest.approx(bce + both * cosine)
        output.d_img.grad = None


def test_the_baseline_has_the_first_term_alone() -> None:
    terms = total_loss(LossConfig(), make_output(h=None, d_img=None, d_txt=None), make_batch(0)[1])
    assert terms.cosine is None
    assert float(terms.loss) == float(terms.bce)


def test_terms_are_float32_under_autocast() -> None:
    plain, y = make_output(), make_batch(0)[1]
    plain = plain._replace(fused_logits=plain.logits, prefix_logits=(plain.logits,))
    half = plain._replace(logits=plain.logits.bfloat16().float(), h=plain.h.float())
    wanted = total_loss(LossConfig(), half, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = total_loss(LossConfig(), half._replace(logits=half.logits.bfloat16()), y)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b)


def asymmetric_loop(x: np.ndarray, y: np.ndarray, gamma_pos: float, gamma_neg: float, shift: float, w: list) -> float:
    total = 0.0
    for row, labels in zip(x.tolist(), y.tolist(), strict=True):
        for logit, label, weight in zip(row, labels, w, strict=True):
            p = 1 / (1 + math.exp(-logit))
            shifted = max(p - shift, 0.0)
            if label:
                total += -weight * (1 - p) ** gamma_pos * math.log(p)
            else:
                total += -(shifted**gamma_neg) * math.log(1 - shifted)
    return total / x.size


@given(
    seeds,
    st.sampled_from([0.0, 1.0, 2.5]),
    st.sampled_from([0.5, 1.0, 4.0]),
    st.sampled_from([0.0, 0.05, 0.3]),
    st.booleans(),
)
def test_asymmetric_equals_the_loop(seed: int, pos: float, neg: float, shift: float, weighted: bool) -> None:
    x, y = make_batch(seed)
    w = [0.5, 1.0, 3.0, 7.0] if weighted else [1.0] * 4
    wanted = asymmetric_loop(x.numpy(), y.numpy(), pos, neg, shift, w)
    weights = torch.tensor(w) if weighted else None
    got = asymmetric_loss(x, y, gamma_pos=pos, gamma_neg=neg, shift=shift, pos_weight=weights)
    assert float(got) == pytest.approx(wanted, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize(("pos", "neg", "shift"), [(0.0, 4.0, 0.05), (1.0, 2.0, 0.0), (2.0, 0.5, 0.2)])
def test_the_slope_of_asymmetric_is_that_of_the_loop(pos: float, neg: float, shift: float) -> None:
    x, y = make_batch(3)
    leaf = x.clone().requires_grad_()
    asymmetric_loss(leaf, y, gamma_pos=pos, gamma_neg=neg, shift=shift).backward()
    step = 1e-6
    for place in np.ndindex(*x.shape):
        values = []
        for sign in (1, -1):
            moved = x.numpy().copy()
            moved[place] += sign * step
            values.append(asymmetric_loop(moved, y.numpy(), pos, neg, shift, [1.0] * 4))
        assert float(leaf.grad[place]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-3, abs=1e-6)


@given(seeds, st.sampled_from([0.0, 2.0]))
def test_asymmetric_without_shift_is_focal_without_alpha(seed: int, gamma: float) -> None:
    x, y = make_batch(seed)
    plain = asymmetric_loss(x, y, gamma_pos=gamma, gamma_neg=gamma, shift=0.0)
    assert float(plain) == pytest.approx(2 * float(focal_loss(x, y, alpha=0.5, gamma=gamma)), rel=1e-5)


@pytest.mark.parametrize("neg", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("shift", [0.0, 0.05])
def test_asymmetric_is_finite_and_easy_negatives_count_nothing(neg: float, shift: float) -> None:
    y = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    x = torch.tensor([[1e4, -1e4, -1e4, 1e4]], requires_grad=True)
    value = asymmetric_loss(x, y, gamma_neg=neg, shift=shift)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(x.grad).all()
    easy = asymmetric_loss(torch.full((1, 4), -3.0), torch.zeros(1, 4), gamma_neg=neg, shift=0.05)
    assert easy == 0


def test_training_classifiers_reach_the_sum() -> None:
    y = make_batch(0)[1]
    fused, short, whole = (make_batch(seed)[0] for seed in (1, 2, 3))
    output = make_output(fused_logits=fused, prefix_logits=(short, whole))
    config = LossConfig(fused_weight=0.5, nested_weight=0.25, hash_weight=0.0, cosine_weight=0.0)
    terms = total_loss(config, output, y)
    nested = (bce_loss(short, y) + bce_loss(whole, y)) / 2
    assert float(terms.fused) == pytest.approx(float(bce_loss(fused, y)))
    assert float(terms.nested) == pytest.approx(float(nested))
    assert float(terms.loss) == pytest.approx(float(terms.bce + 0.5 * terms.fused + 0.25 * nested))
    lone = total_loss(config, make_output(), y)
    assert lone.fused is None
    assert lone.nested is None


def test_every_classifier_has_the_loss_that_is_named() -> None:
    y, fused = make_batch(0)[1], make_batch(1)[0]
    config = LossConfig(asymmetric_loss=True, asymmetric_gamma_pos=1.0, asymmetric_gamma_neg=2.0, asymmetric_shift=0.1)
    terms = total_loss(config, make_output(fused_logits=fused, prefix_logits=(fused,)), y)
    options = {"gamma_pos": 1.0, "gamma_neg": 2.0, "shift": 0.1}
    assert float(terms.bce) == pytest.approx(float(asymmetric_loss(make_batch(0)[0], y, **options)))
    assert float(terms.fused) == float(terms.nested) == pytest.approx(float(asymmetric_loss(fused, y, **options)))
    both = total_loss(LossConfig(focal_loss=True, asymmetric_loss=True), make_output(), y)
    assert float(both.bce) == pytest.approx(float(focal_loss(make_batch(0)[0], y)))


def test_the_weight_of_quantisation_is_its_own() -> None:
    terms = total_loss(LossConfig(hash_reg=HashRegConfig(lambda_quant=0.0)), make_output(), make_batch(0)[1])
    assert terms.quant > 0
    assert float(terms.hash) == pytest.approx(float(0.1 * terms.balance + 0.01 * terms.decorr))


@pytest.mark.parametrize("loss", [bce_loss, focal_loss, asymmetric_loss])
def test_a_mixed_label_has_the_loss_of_both_in_its_shares(loss) -> None:
    x, y = make_batch(5)
    mixed = 0.3 * float(loss(x, y)) + 0.7 * float(loss(x, 1 - y))
    assert float(loss(x, 0.3 * y + 0.7 * (1 - y))) == pytest.approx(mixed, rel=1e-5)


def test_every_hash_term_has_a_weight_and_a_field() -> None:
    assert {f"lambda_{name}" for name in HASH_TERMS} == HashRegConfig.model_fields.keys()
    assert HASH_TERMS.keys() <= set(LossTerms._fields)
