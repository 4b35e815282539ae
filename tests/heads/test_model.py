"""The head as a whole: shapes, eval mode, which parameters a term of the loss reaches."""

from typing import Any

import pytest
import torch

from mmcli.heads.config import ClassifierConfig, FusionConfig, HashConfig
from mmcli.heads.decompose import log_norms
from mmcli.heads.hashing import binarise
from mmcli.heads.losses import cosine_loss
from mmcli.heads.model import Head, MlpBaseline

D, C = 24, 5


def make_pair(n: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator) * 3, torch.randn(n, D, generator=generator) * 7


def make_head(*, bits: int = 16, activation: str = "ste", use_bias: bool = True, **fusion: Any) -> Head:
    torch.manual_seed(0)
    head = Head(
        FusionConfig(mlp_dims=(32, 12), dropout=0.5, **fusion),
        HashConfig(bits=bits, activation=activation),
        ClassifierConfig(num_classes=C, use_bias=use_bias),
        width=D,
    )
    head.fit_log_norms(log_norms(*make_pair(200, seed=1)))
    return head


def test_shapes_and_what_neighbours_use() -> None:
    output = make_head()(*make_pair())
    assert output.z.shape == (32, 12)
    assert output.h.shape == output.features.shape == (32, 16)
    assert output.logits.shape == (32, C)
    assert output.features is output.h
    without = make_head(bits=0)(*make_pair())
    assert without.h is None
    assert without.features is without.z
    assert without.logits.shape == (32, C)


@pytest.mark.parametrize("bits", [0, 16])
@pytest.mark.parametrize("activation", ["tanh", "ste"])
def test_spec10_13_eval_mode_is_independent_of_the_batch(bits: int, activation: str) -> None:
    head, (v_img, v_txt) = make_head(bits=bits, activation=activation), make_pair()
    head.train()
    for seed in range(3):
        head(*make_pair(seed=seed))  # moves the running statistics away from 0 and 1
    head.eval()
    whole = head(v_img, v_txt)
    alone = [head(v_img[i : i + 1], v_txt[i : i + 1]) for i in range(len(v_img))]
    torch.testing.assert_close(whole.features, torch.cat([one.features for one in alone]), rtol=1e-4, atol=1e-6)
    order = torch.randperm(len(v_img))
    torch.testing.assert_close(head(v_img[order], v_txt[order]).logits, whole.logits[order], rtol=1e-4, atol=1e-5)
    assert torch.equal(head(v_img, v_txt).features, whole.features)
    head.train()
    assert not torch.equal(head(v_img, v_txt).features, whole.features)  # dropout and batch statistics are on


@pytest.mark.parametrize("activation", ["tanh", "ste"])
@pytest.mark.parametrize("training", [True, False])
def test_the_classifier_reads_the_same_codes_in_both_modes(activation: str, training: bool) -> None:
    head = make_head(activation=activation).train(training)
    output = head(*make_pair())
    read = output.h if activation == "tanh" else binarise(output.h).float()
    torch.testing.assert_close(output.logits, head.classifier(read))
    assert output.h.abs().max() < 1  # the soft code is the output either way


@pytest.mark.parametrize("inputs", ["both", "image", "text"])
def test_spec10_9_cosine_trains_nothing_without_an_adapter(inputs: str) -> None:
    head = make_head(inputs=inputs).train()
    output = head(*make_pair())
    assert not cosine_loss(output.d_img, output.d_txt).requires_grad
    gradients = []
    for weight in (0.0, 5.0):
        torch.manual_seed(3)
        head.zero_grad()
        output = head(*make_pair())
        (output.logits.sum() + weight * cosine_loss(output.d_img, output.d_txt)).backward()
        gradients.append([p.grad.clone() for p in head.parameters()])
    assert all(g.abs().sum() > 0 for g in gradients[0][-2:])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_cosine_term_is_live_with_an_adapter() -> None:
    head = make_head(adapter="linear").train()
    output = head(*make_pair())
    cosine_loss(output.d_img, output.d_txt).backward()
    moved = {name for name, p in head.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {"fusion.adapter_img.linear.weight", "fusion.adapter_txt.linear.weight"}


@pytest.mark.parametrize("bits", [0, 16])
def test_every_parameter_is_in_one_group(bits: int) -> None:
    for module in (
        make_head(bits=bits, adapter="linear"),
        MlpBaseline(FusionConfig(mlp_dims=(8,)), ClassifierConfig(), width=D),
    ):
        groups = module.parameter_groups()
        assert list(groups) == ["fusion", "hash", "classifier"]
        grouped = [id(p) for parameters in groups.values() for p in parameters]
        assert len(grouped) == len(set(grouped))
        assert set(grouped) == {id(p) for p in module.parameters()}


def test_classifier_bias_can_be_left_out() -> None:
    assert make_head(use_bias=False).classifier.bias is None


def test_state_reads_back() -> None:
    head, other = make_head().eval(), make_head()
    torch.nn.init.ones_(other.classifier.weight)
    other.load_state_dict(head.state_dict())
    assert torch.equal(head(*make_pair()).logits, other.eval()(*make_pair()).logits)


@pytest.mark.parametrize("inputs", ["both", "image", "text"])
def test_baseline_is_the_mlp_on_raw_embeddings(inputs: str) -> None:
    torch.manual_seed(0)
    baseline = MlpBaseline(FusionConfig(mlp_dims=(8,), inputs=inputs), ClassifierConfig(num_classes=C), width=D).eval()
    v_img, v_txt = make_pair()
    raw = {"both": torch.cat([v_img, v_txt], 1), "image": v_img, "text": v_txt}[inputs]
    first = baseline.mlp[0]
    z = torch.relu(raw @ first.weight.T + first.bias)
    output = baseline(v_img, v_txt)
    torch.testing.assert_close(output.logits, z @ baseline.classifier.weight.T + baseline.classifier.bias)
    assert output.h is None
    assert output.d_img is None
    assert output.features is output.z
