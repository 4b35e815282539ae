"""Values whose gradient is known in closed form: one node of the graph, instead of one for every operation.

A loss of a small batch is dozens of operations on few numbers, and recording them for the backward pass costs more than
they do.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sloped(NamedTuple):
    """A value and its gradient.

    Attributes:
        value: Of any shape S.
        slope: Its gradient ``S + T`` at ``x S + T``, where each value is a function of its own part of x alone.
    """

    value: Tensor
    slope: Tensor


class _Known(torch.autograd.Function):
    generate_vmap_rule = True  # replicas of a head train under vmap

    @staticmethod
    def forward(value: Tensor, *given: Tensor) -> Tensor:  # noqa: ARG004
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ANN401, ARG004
        ctx.save_for_backward(*inputs[1 : len(inputs) // 2 + 1])

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        own, slopes = given[0], ctx.saved_tensors
        made = (own.view(*own.shape, *(1,) * (slope.dim() - own.dim())) * slope for slope in slopes)
        return None, *(None for _ in slopes), *made


def known(one: Sloped, x: Tensor, *others: tuple[Tensor, Tensor]) -> Tensor:
    """A function of ``x`` whose value and gradient were computed beside each other.

    Args:
        one: Both of them, without a graph.
        x: What it is a function of, in the slope's dtype.
        others: What else it is a function of, each after its slope.

    Returns:
        The value, with that gradient; there is no second derivative.
    """
    slopes, inputs = (one.slope, *(slope for slope, _ in others)), (x, *(other for _, other in others))
    made: Tensor = _Known.apply(one.value, *slopes, *inputs)  # type: ignore[no-untyped-call]
    return made
