"""Codes: never 0, packed and unpacked, and distances that count differing bits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmcli import InputError
from mmcli.heads.config import HashConfig
from mmcli.heads.hashing import HashLayer, binarise, pack_codes

soft_codes = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 8).map(lambda n: 8 * n)),
    elements=st.one_of(st.floats(-1, 1, width=32), st.sampled_from([0.0, -0.0])),
)


@given(soft_codes)
def test_codes_are_plus_or_minus_one(h: np.ndarray) -> None:
    b = binarise(h)
    wanted = [[1 if x >= 0 else -1 for x in row] for row in h.tolist()]
    assert b.tolist() == wanted
    assert binarise(torch.from_numpy(h)).tolist() == wanted
    assert b.dtype == np.int8
    assert binarise(torch.from_numpy(h)).dtype == torch.int8


def test_spec10_6_the_sign_of_zero_is_plus_one() -> None:
    zeros = np.array([[0.0, -0.0]], np.float32)
    assert torch.sign(torch.zeros(1)).item() == 0  # what must not be used
    assert binarise(zeros).tolist() == [[1, 1]]
    assert binarise(torch.from_numpy(zeros)).tolist() == [[1, 1]]
    layer = HashLayer(HashConfig(bits=8, activation="ste", batch_norm=False), 4)
    assert layer.read(torch.zeros(2, 8)).tolist() == [[1.0] * 8] * 2


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_nan_has_no_side(kind) -> None:
    with pytest.raises(InputError, match="NaN in 1 of 8"):
        binarise(kind(np.array([[np.nan, *[1.0] * 7]], np.float32)))


@given(soft_codes)
def test_packing_reads_back(h: np.ndarray) -> None:
    b = binarise(h)
    packed = pack_codes(b)
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(np.unpackbits(packed, axis=1) == 1, h >= 0)


@pytest.mark.parametrize("bits", [8, 32, 64, 128])
def test_spec10_3_packed_codes_take_an_eighth_of_a_byte_a_bit(bits: int) -> None:
    b = binarise(np.random.default_rng(0).normal(size=(5, bits)))
    assert pack_codes(b).shape == (5, bits // 8)
    assert pack_codes(b).nbytes == 5 * bits // 8


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        pack_codes(np.ones((2, 12), np.int8))
    with pytest.raises(ValueError, match="binarise"):
        pack_codes(np.zeros((2, 8), np.int8))


def test_soft_codes_are_tanh_of_a_linear_map() -> None:
    layer, z = HashLayer(HashConfig(bits=16, activation="tanh", batch_norm=False), 4), torch.randn(5, 4)
    wanted = np.tanh(z.numpy() @ layer.linear.weight.detach().numpy().T + layer.linear.bias.detach().numpy())
    np.testing.assert_allclose(layer(z).detach().numpy(), wanted, rtol=1e-5, atol=1e-6)
    assert layer.read(layer(z)) is not None
    assert torch.equal(layer.read(layer(z)), layer(z))


@pytest.mark.parametrize("training", [True, False])
def test_ste_reads_hard_codes_with_the_gradient_of_the_soft_ones(training: bool) -> None:
    layer = HashLayer(HashConfig(bits=8, activation="ste", batch_norm=False), 4).train(training)
    z, weight = torch.randn(6, 4), torch.randn(6, 8)
    gradients = []
    for read in (layer.read, lambda h: h):
        layer.zero_grad()
        (read(layer(z)) * weight).sum().backward()
        gradients.append(layer.linear.weight.grad.clone())
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1])
    hard = layer.read(layer(z))
    assert set(hard.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(hard, binarise(layer(z)).float())


def test_codes_stay_float32_under_autocast() -> None:
    layer = HashLayer(HashConfig(bits=8), 4).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(6, 4)).dtype == torch.float32
