"""The blocks of the fusion against NumPy, their scales, and when statistics are missing."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

from mmcli import InputError
from mmcli.heads.config import FusionConfig
from mmcli.heads.decompose import decompose, log_norms
from mmcli.heads.fusion import MIN_STD, Fusion, fusion_width

D, N = 256, 400


def make_pair(n: int = N, width: int = D, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(n, 1, generator=generator) + 5
    v_img = torch.randn(n, width, generator=generator) * scale
    return v_img, torch.randn(n, width, generator=generator) * 0.3 * (scale + 1)


def make_fusion(**options: Any) -> Fusion:
    torch.manual_seed(0)
    return Fusion(FusionConfig(**{"mlp_dims": (16, 8), **options}), D).eval()


def blocks_of(fusion: Fusion, v_img: torch.Tensor, v_txt: torch.Tensor) -> torch.Tensor:
    seen = []
    hook = fusion.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    fusion(v_img, v_txt)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("block_norm", ["none", "rms"])
@pytest.mark.parametrize("inputs", ["both", "image", "text"])
@pytest.mark.parametrize("type_", ["concat", "hadamard", "hadamard_magnitude"])
def test_blocks_equal_the_formula(type_: str, inputs: str, block_norm: str) -> None:
    fusion, (v_img, v_txt) = make_fusion(type=type_, inputs=inputs, block_norm=block_norm), make_pair()
    fusion.fit_log_norms(log_norms(v_img, v_txt))
    wanted = []
    n_img, n_txt = (np.linalg.norm(v.numpy(), axis=1, keepdims=True) for v in (v_img, v_txt))
    d_img, d_txt = v_img.numpy() / n_img, v_txt.numpy() / n_txt
    m_img, m_txt = np.log(n_img), np.log(n_txt)
    rms = block_norm == "rms"
    if inputs in ("both", "image"):
        wanted.append(d_img * (np.sqrt(D) if rms else 1))
    if inputs in ("both", "text"):
        wanted.append(d_txt * (np.sqrt(D) if rms else 1))
    if inputs == "both" and type_ != "concat":
        wanted.append(d_img * d_txt * (D if rms else 1))
    if type_ == "hadamard_magnitude":
        for name, m in (("image", m_img), ("text", m_txt)):
            if inputs in ("both", name):
                wanted.append((m - m.mean()) / m.std() if rms else m)
    got = blocks_of(fusion, v_img, v_txt)
    np.testing.assert_allclose(got.numpy(), np.concatenate(wanted, axis=1), rtol=1e-3, atol=2e-4)
    assert got.shape[1] == fusion_width(fusion.config, D)


def test_width_is_what_the_specification_says() -> None:
    widths = {t: fusion_width(FusionConfig(type=t), 768) for t in ("concat", "hadamard", "hadamard_magnitude")}
    assert widths == {"concat": 2 * 768, "hadamard": 3 * 768, "hadamard_magnitude": 3 * 768 + 2}
    assert fusion_width(FusionConfig(inputs="image"), 768) == 769
    assert fusion_width(FusionConfig(inputs="text", type="hadamard"), 768) == 768


def block_scales(block_norm: str) -> list[float]:
    fusion, pair = make_fusion(block_norm=block_norm), make_pair(2000)
    fusion.fit_log_norms(log_norms(*pair))
    blocks = torch.split(blocks_of(fusion, *pair), [D, D, D, 1, 1], dim=1)
    return [float(block.square().mean().sqrt()) for block in blocks]


def test_rms_brings_every_block_to_one_scale() -> None:
    assert block_scales("rms") == pytest.approx([1.0] * 5, abs=0.05)


def test_the_plans_blocks_are_not_of_one_scale() -> None:
    """The product is sqrt(D) times smaller than the directions, and m is off-centre."""
    d_img, d_txt, product, m_img, _ = block_scales("none")
    assert d_img / product == pytest.approx(D**0.5, rel=0.05)
    assert d_txt == pytest.approx(D**-0.5, rel=0.01)
    assert m_img > 3


def test_statistics_that_were_never_set_are_an_error() -> None:
    fusion = make_fusion()
    with pytest.raises(InputError, match=r"never fitted.*call fit_log_norms"):
        fusion(*make_pair(4))
    fusion.fit_log_norms(torch.tensor([[1.0, 2.0], [0.5, 0.25]]))
    assert torch.isfinite(fusion(*make_pair(4)).z).all()
    for options in ({"block_norm": "none"}, {"type": "hadamard"}):
        assert torch.isfinite(make_fusion(**options)(*make_pair(4)).z).all()


def test_statistics_travel_with_the_state_and_the_copy() -> None:
    fusion, pair = make_fusion(), make_pair()
    unfitted = fusion.state_dict()
    assert fusion.m_mean.isnan().all()
    unfitted = {name: value.clone() for name, value in unfitted.items()}
    fusion.fit_log_norms(log_norms(*pair))
    other = make_fusion()
    other.load_state_dict(fusion.state_dict())
    assert torch.equal(other(*pair).z, fusion(*pair).z)
    assert torch.equal(copy.deepcopy(fusion)(*pair).z, fusion(*pair).z)
    other.load_state_dict(unfitted)
    with pytest.raises(InputError, match="never fitted"):
        other(*pair)


def test_fit_takes_float16_and_uses_every_row() -> None:
    v_img, v_txt = make_pair(20_000, D)
    fusion = make_fusion()
    fusion.fit_log_norms(log_norms(v_img.half(), v_txt.half()))
    m = decompose(v_img.half()).m.double()
    assert float(fusion.m_mean[0]) == pytest.approx(float(m.mean()), abs=1e-5)
    assert float(fusion.m_std[0]) == pytest.approx(float(m.std(correction=0)), rel=1e-4)


def test_spec10_2_a_constant_magnitude_is_not_blown_up_to_noise() -> None:
    """Normalised embeddings have only rounding left in m; standardised, it must not become a block of noise."""
    v_img, v_txt = (v / v.norm(dim=-1, keepdim=True) for v in make_pair())
    fusion = make_fusion()
    fusion.fit_log_norms(log_norms(v_img, v_txt))
    assert (fusion.m_std >= MIN_STD).all()
    assert blocks_of(fusion, v_img, v_txt)[:, -2:].abs().max() < 0.05


@pytest.mark.parametrize("inputs", ["image", "text"])
def test_one_modality_reads_that_modality_alone(inputs: str) -> None:
    fusion, (v_img, v_txt) = make_fusion(inputs=inputs, adapter="linear"), make_pair()
    fusion.fit_log_norms(log_norms(v_img, v_txt))
    noise = torch.randn(N, D)
    z = fusion(v_img, v_txt).z
    same = fusion(v_img, noise).z if inputs == "image" else fusion(noise, v_txt).z
    changed = fusion(noise, v_txt).z if inputs == "image" else fusion(v_img, noise).z
    assert torch.equal(z, same)
    assert not torch.equal(z, changed)


def test_adapter_starts_as_identity_and_is_trainable() -> None:
    torch.manual_seed(0)
    plain = make_fusion(adapter="none", block_norm="none")
    adapted = make_fusion(adapter="linear", block_norm="none")
    adapted.mlp.load_state_dict(plain.mlp.state_dict())
    pair = make_pair(16)
    for a, b in zip(plain(*pair), adapted(*pair), strict=True):
        assert torch.equal(a, b)
    adapted(*pair).z.sum().backward()
    for adapter in (adapted.adapter_img, adapted.adapter_txt):
        assert adapter.linear.weight.grad.abs().sum() > 0


def test_mlp_is_linear_activation_dropout_for_each_width() -> None:
    fusion = make_fusion(mlp_dims=(32, 16, 8), dropout=0.25, activation="gelu")
    kinds = [type(layer).__name__ for layer in fusion.mlp]
    assert kinds == ["Linear", "GELU", "Dropout"] * 3
    assert {repr(layer) for layer in fusion.mlp if isinstance(layer, torch.nn.Dropout)} == {
        "Dropout(p=0.25, inplace=False)"
    }
    assert make_fusion(type="hadamard", mlp_dims=(32, 16, 8))(*make_pair(3)).z.shape == (3, 8)


def test_another_width_is_named() -> None:
    with pytest.raises(InputError, match=r"\(4, 100\).*wanted \(N, 256\)"):
        make_fusion()(torch.zeros(4, 100), torch.zeros(4, 100))
    with pytest.raises(InputError, match="do not fit"):
        make_fusion()(torch.zeros(4, D), torch.zeros(4, 5, D))
