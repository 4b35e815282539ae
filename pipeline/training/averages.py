"""A running average of the weights of heads in training."""

import copy

import torch
from torch import Tensor

from ...heads.model import BaseHead
from .replicas import Replicas


class Averages:
    """Exponential moving average of parameters and statistics (Polyak and Juditsky 1992, in its usual form).

    ``a <- a + (1 - d) (w - a)`` after every step, with ``d = min(decay, (1 + t) / (10 + t))`` after t steps, so that
    the first weights are soon forgotten.

    Args:
        members: The heads in training.
        decay: In [0, 1).
    """

    def __init__(self, members: Replicas, decay: float) -> None:
        self._live, self._decay = members, decay
        self._copies = Replicas([copy.deepcopy(head) for head in members.heads], stacked=members.stacked)
        self._taken = torch.zeros((), device=members.parameters[0].device)

    @property
    def heads(self) -> list[BaseHead]:
        """The averaged heads."""
        return self._copies.heads

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        rate = 1 - ((1 + self._taken) / (10 + self._taken)).clamp(max=self._decay)
        # A whole tensor of rates would be as large as the weights; a number would have to be fetched.
        pairs = zip(self._copies.floats(), self._live.floats(), strict=True)
        for average, weight in pairs:
            average.lerp_(weight, rate)
        self._taken += 1

    @property
    def taken(self) -> Tensor:
        """How many steps were taken in, a scalar on the device."""
        return self._taken
