"""Dropout whose draws depend on a key and nothing else: the same on every device, alone or among replicas."""

import torch
from torch import Tensor, nn

_GOLDEN = 0x9E3779B9
_LEVELS = 1 << 16


def _signed(value: int) -> int:
    """The 32-bit pattern of a number, as int32 holds it."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


_FACTORS = _signed(0x7FEB352D), _signed(0x846CA68B)


def mix(x: Tensor) -> Tensor:
    """A hash of int32, in place: every bit of a value moves about half of the bits of its hash.

    Two rounds of shift, xor and multiply with the constants of Wellons' search for low bias (lowbias32, 2018).
    """
    for shift, factor in zip((16, 15), _FACTORS, strict=True):
        _fold(x, shift).mul_(factor)
    return _fold(x, 16)


def _fold(x: Tensor, shift: int) -> Tensor:
    """``x ^= x >> shift``, zeros shifted in."""
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1))


class Dropout(nn.Module):
    """Inverted dropout (Srivastava et al. 2014): a value is zero with probability ``p``, else divided by ``1 - p``.

    The mask depends on the position and on ``key``, which moves on with every forward pass in training. So a
    training draws the same masks again whatever else draws numbers, whatever the device, and when replicas of the head
    run in one pass; and nothing has to be fetched from the device. ``p`` is rounded to 1 / 65,536.

    Every row and every pair of columns has a hash; the two together, mixed once more, give 16 bits to each of the two
    values. Hashing every position from the start takes longer, and torch's own draws longer still (docs/lab-notes.md).

    Args:
        p: Probability of zero, in [0, 1).
    """

    key: Tensor

    def __init__(self, p: float) -> None:
        super().__init__()
        self._dropped = min(round(p * _LEVELS), _LEVELS - 1)
        self.register_buffer("key", torch.zeros((), dtype=torch.int32), persistent=False)

    @property
    def p(self) -> float:
        """The probability, as rounded."""
        return self._dropped / _LEVELS

    def reseed(self, seed: int) -> None:
        """Begin a sequence of masks; equal seeds give equal sequences."""
        self.key.fill_(_signed(seed))
        mix(self.key)

    def forward(self, x: Tensor) -> Tensor:
        """Drop values of ``x (..., F)``; in ``eval()`` mode ``x`` itself."""
        if not self.training or self._dropped == 0 or x.numel() == 0:
            return x
        self.key.add_(_signed(_GOLDEN))
        F = x.shape[-1]
        rows, pairs = x.numel() // F, (F + 1) // 2
        hashed = mix(torch.arange(rows + pairs, dtype=torch.int32, device=x.device) + self.key)
        both = (hashed[:rows, None] ^ hashed[rows:]).mul_(_FACTORS[0])
        _fold(both, 16).mul_(_FACTORS[1])
        drawn = both.view(torch.int16)[:, :F].reshape(x.shape)
        # 0 up to the limit and 1 from there on, without a comparison: a CPU takes ten times as long over truth values.
        kept = drawn.float().sub_(self._dropped - _LEVELS // 2 - 1).clamp(0, 1)
        return x * kept.mul_(_LEVELS / (_LEVELS - self._dropped)).to(x.dtype)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"p={self.p:g}"


def skip_dropout(module: nn.Module, passes: int) -> None:
    """Move the masks of every dropout layer of a module on, as so many forward passes in training do."""
    for layer in module.modules():
        if isinstance(layer, Dropout):
            layer.key.add_(_signed(_GOLDEN * passes))


def reseed_dropout(module: nn.Module, seed: int) -> None:
    """Begin the masks of every dropout layer of a module; each takes a sequence of its own."""
    layers = [layer for layer in module.modules() if isinstance(layer, Dropout)]
    for at, layer in enumerate(layers, start=1):
        layer.reseed(seed * 0x01000193 + at * _GOLDEN)
