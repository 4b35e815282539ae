"""Masks that a key decides: as random as they should be, the same again, and of each layer and step its own."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmcli.heads.dropout import Dropout, mix, reseed_dropout


def slow_mix(x: int) -> int:
    """The hash in Python's whole numbers."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
    return x ^ (x >> 16)


def slow_mask(seed: int, passes: int, rows: int, columns: int, p: float) -> list[list[bool]]:
    """Which of some values are kept in the last of some passes."""
    key = slow_mix(seed & 0xFFFFFFFF)
    key = (key + passes * 0x9E3779B9) & 0xFFFFFFFF
    hashes = [slow_mix((at + key) & 0xFFFFFFFF) for at in range(rows + (columns + 1) // 2)]

    def is_kept(row: int, column: int) -> bool:
        both = (hashes[row] ^ hashes[rows + column // 2]) * 0x7FEB352D & 0xFFFFFFFF
        both = (both ^ (both >> 16)) * 0x846CA68B & 0xFFFFFFFF
        drawn = (both >> (16 * (column % 2))) & 0xFFFF
        return (drawn - 0x10000 if drawn >= 0x8000 else drawn) >= round(p * 65536) - 32768

    return [[is_kept(row, column) for column in range(columns)] for row in range(rows)]


def zeros(layer: Dropout, *shape: int) -> torch.Tensor:
    return (layer(torch.ones(shape)) == 0).double()


@given(st.integers(-(1 << 31), (1 << 31) - 1))
def test_the_hash_is_that_of_whole_numbers(x: int) -> None:
    got = int(mix(torch.tensor([x], dtype=torch.int32))[0])
    assert got & 0xFFFFFFFF == slow_mix(x & 0xFFFFFFFF)


@given(
    st.integers(0, 1 << 40), st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.sampled_from([0.1, 0.5, 0.9])
)
def test_the_mask_is_that_of_a_slow_loop(seed: int, passes: int, rows: int, columns: int, p: float) -> None:
    layer = Dropout(p)
    layer.reseed(seed)
    for _ in range(passes):
        dropped = zeros(layer, rows, columns)
    assert (dropped == 0).tolist() == slow_mask(seed, passes, rows, columns, p)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_look_random(p: float) -> None:
    """Shares and correlations of half a million draws, each within five standard deviations of what chance gives."""
    layer = Dropout(p)
    layer.reseed(1)
    one, two = (zeros(layer, 500, 1001) - p for _ in range(2))
    n, flat, spread = one.numel(), one.flatten(), p * (1 - p)
    assert abs(float(flat.mean())) < 5 * (spread / n) ** 0.5 + 1e-5
    pairs = {
        "neighbours": (flat[1:], flat[:-1]),
        "rows": (one[1:], one[:-1]),
        "halves": (flat[: n // 2], flat[n // 2 :]),
        "words": (one[:, :-1:2], one[:, 1::2]),
        "passes": (one, two),
        "rectangles": (one[1:, 2:] * one[:-1, :-2] / spread**0.5, one[1:, :-2] * one[:-1, 2:] / spread**0.5),
    }
    for name, (a, b) in pairs.items():
        size = min(a.numel(), b.numel())
        correlation = float((a.flatten()[:size] * b.flatten()[:size]).mean()) / spread
        assert abs(correlation) < 5 * size**-0.5, name


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_no_two_rows_and_no_two_columns_have_masks_alike(p: float) -> None:
    """Where hashes of rows were multiplied with those of columns, some rows agreed in three of four values."""
    layer = Dropout(p)
    layer.reseed(2)
    for _ in range(20):
        mask = (zeros(layer, 64, 2306) - p) / (p * (1 - p)) ** 0.5
        rows, columns = mask @ mask.T / 2306**0.5, mask.T @ mask / 64**0.5
        assert (rows - rows.diag().diag()).abs().max() < 6
        assert (columns - columns.diag().diag()).abs().max() < 14  # sums of 64 are not yet normal


def test_kept_values_and_gradients_are_scaled() -> None:
    layer = Dropout(0.25)
    x = torch.randn(64, 33, requires_grad=True)
    out = layer(x)
    kept = out != 0
    torch.testing.assert_close(out[kept], (x / 0.75)[kept], rtol=1e-4, atol=1e-6)
    out.sum().backward()
    torch.testing.assert_close(x.grad, kept / 0.75, rtol=1e-4, atol=1e-6)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_nothing_is_dropped_in_evaluation_or_at_zero() -> None:
    x = torch.randn(5, 7)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x


def test_layers_and_seeds_differ_and_a_seed_comes_again() -> None:
    module = nn.Sequential(Dropout(0.5), nn.Linear(1, 1), Dropout(0.5))
    masks = {}
    for seed in (0, 1, 0):
        reseed_dropout(module, seed)
        masks.setdefault(seed, []).append([zeros(layer, 4096) for layer in (module[0], module[2])])
    assert all(map(torch.equal, *masks[0]))
    drawn = [masks[0][0][0], masks[0][0][1], masks[1][0][0], masks[1][0][1]]
    shares = np.corrcoef(torch.stack(drawn).numpy())
    assert np.abs(shares - np.eye(4)).max() < 0.1
    assert not module.state_dict().keys() & {"0.key", "2.key"}
