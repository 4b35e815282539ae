"""Mixtures against a loop."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmcli.heads.mixing import mix_batch, shares


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_mixtures_equal_the_loop(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch = tuple(torch.rand(n, width, generator=generator) for width in (4, 4, 3))
    share = torch.rand(n, generator=generator)
    for got, one in zip(mix_batch(batch, share), batch, strict=True):
        for row in range(n):
            wanted = share[row] * one[row] + (1 - share[row]) * one[row - 1]
            torch.testing.assert_close(got[row], wanted)
        assert got.min() >= one.min() - 1e-6
        assert got.max() <= one.max() + 1e-6


def test_shares_are_uniform_and_not_those_of_the_mixed_images() -> None:
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))
    share = shares(order, 10_000)
    assert sorted(share.tolist()) == pytest.approx([k / 10_000 for k in range(10_000)])
    for other in (order, order.roll(1)):
        assert abs(float(torch.corrcoef(torch.stack([share, other.float()]))[0, 1])) < 0.05
