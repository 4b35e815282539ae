"""Direction and log-norm against NumPy, and what scaling must not change."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmcli.heads.decompose import EPS, decompose

vectors = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=st.floats(-100, 100, width=32)
).filter(lambda v: (np.linalg.norm(v, axis=-1) > 0.1).all())


@given(vectors)
def test_equals_the_formula_and_has_unit_norm(v: np.ndarray) -> None:
    d, m = decompose(torch.from_numpy(v))
    for row, direction, log_norm in zip(v.astype(np.float64), d.numpy(), m.numpy(), strict=True):
        n = math.sqrt(sum(x * x for x in row))
        np.testing.assert_allclose(direction, row / (n + EPS), rtol=1e-4, atol=1e-6)
        assert log_norm == pytest.approx(math.log(n + EPS), abs=1e-5)
        assert np.linalg.norm(direction) == pytest.approx(1.0, abs=2e-5)


@given(vectors, st.floats(0.5, 50))
def test_scaling_changes_the_magnitude_alone(v: np.ndarray, scale: float) -> None:
    d, m = decompose(torch.from_numpy(v))
    d2, m2 = decompose(torch.from_numpy(v * np.float32(scale)))
    torch.testing.assert_close(d, d2, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(m2 - m, torch.full_like(m, math.log(scale)), rtol=0, atol=5e-5)


def test_zero_is_finite_and_shapes_go_through() -> None:
    d, m = decompose(torch.zeros(2, 5, 3))
    assert d.shape == (2, 5, 3)
    assert m.shape == (2, 5)
    assert (d == 0).all()
    torch.testing.assert_close(m, torch.full((2, 5), math.log(1e-6)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_decomposed_in_float32(dtype: torch.dtype) -> None:
    v = torch.full((1, 768), 30.0, dtype=dtype)  # its sum of squares overflows float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        d, m = decompose(v)
    assert d.dtype == m.dtype == torch.float32
    assert float(m) == pytest.approx(math.log(30 * math.sqrt(768)), abs=1e-6)


def test_gradient_of_the_zero_vector_is_finite() -> None:
    v = torch.zeros(1, 4, requires_grad=True)
    d, _ = decompose(v)
    d.sum().backward()
    assert torch.isfinite(v.grad).all()


def test_spec10_2_a_normalised_embedding_has_no_magnitude_left() -> None:
    v = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)) * torch.rand(200, 1).add(1)
    _, raw = decompose(v)
    _, normalised = decompose(v / v.norm(dim=-1, keepdim=True))
    assert raw.std() > 0.1
    assert normalised.std() < 1e-6
