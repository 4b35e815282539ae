"""One head, or several of one shape that train in one pass: their parameters side by side, each head a view of its own.

A small head at batch 64 leaves most of a GPU idle; replicas of other seeds, or of other weights of the loss's terms,
cost little more than one.
Symbols: R replicas, N images of a batch, D embedding width, C classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ...heads.config import LossConfig
from ...heads.losses import LossTerms, LossWeights, total_loss
from ...heads.model import BaseHead


class Replicas:
    """Heads that are trained together.

    Args:
        heads: R heads of one configuration, on one device; they are trained in place.
        stacked: Run them in one pass, with parameters ``(R, ...)``; without it R must be 1.
        losses: The loss section of each, which may differ in the weights of terms; those of ``config`` when not given.

    Attributes:
        heads: Likewise; their parameters always show the state of the training.
        parameters: What the optimiser steps on, in the order of ``names``.
        names: Names of the parameters.
    """

    def __init__(self, heads: Sequence[BaseHead], *, stacked: bool, losses: Sequence[LossConfig] | None = None) -> None:
        assert stacked or len(heads) == 1
        self.heads, self.stacked = list(heads), stacked
        self._weights = None if losses is None else _weights(losses, next(heads[0].parameters()).device)
        self.names = [name for name, _ in heads[0].named_parameters()]
        if not stacked:
            self.parameters: list[Tensor] = list(heads[0].parameters())
            return
        self._template = heads[0]
        self.parameters = [_stack([dict(head.named_parameters())[name] for head in heads]) for name in self.names]
        for parameter in self.parameters:
            parameter.requires_grad_()
        names = [name for name, _ in heads[0].named_buffers()]
        self._buffers = {name: _stack([dict(head.named_buffers())[name] for head in heads]) for name in names}

    def __len__(self) -> int:
        return len(self.heads)

    def groups(self) -> dict[str, list[Tensor]]:
        """Parameters by the part of the head that they belong to, as of :meth:`BaseHead.parameter_groups`."""
        place = {id(parameter): at for at, parameter in enumerate(self.heads[0].parameters())}
        groups = self.heads[0].parameter_groups()
        return {part: [self.parameters[place[id(one)]] for one in ones] for part, ones in groups.items()}

    def floats(self) -> list[Tensor]:
        """Parameters, and buffers that are numbers with a fraction: what an average over time is taken of."""
        buffers = self._buffers if self.stacked else dict(self.heads[0].named_buffers())
        return [*self.parameters, *(value for value in buffers.values() if value.is_floating_point())]

    def train(self) -> None:
        """Put every head into training mode."""
        for head in self.heads:
            head.train()

    def losses(
        self,
        config: LossConfig,
        batch: tuple[Tensor, Tensor, Tensor],
        pos_weight: Tensor | None,
        precision: Any,  # noqa: ANN401
    ) -> dict[str, Tensor]:
        """Every loss term of a batch.

        Args:
            config: The loss section.
            batch: Image embeddings ``(N, D)``, caption embeddings and labels, with a first axis R where stacked.
            pos_weight: Weights of positives ``(C,)``.
            precision: Context manager of mixed precision.

        Returns:
            Scalars by name, or ``(R,)`` where stacked; ``loss`` is the one to minimise.
        """
        if not self.stacked:
            with precision:
                output = self.heads[0](*batch[:2])
            return _terms(total_loss(config, output, batch[2], pos_weight))

        def one(
            parameters: dict[str, Tensor],
            buffers: dict[str, Tensor],
            v_img: Tensor,
            v_txt: Tensor,
            y: Tensor,
            weights: LossWeights | None,
        ) -> dict[str, Tensor]:
            with precision:
                output = functional_call(self._template, (parameters, buffers), (v_img, v_txt))
            return _terms(total_loss(config, output, y, pos_weight, weights))

        parameters = dict(zip(self.names, self.parameters, strict=True))
        axes = (0, 0, 0, 0, 0, None if self._weights is None else 0)
        return torch.func.vmap(one, in_dims=axes)(parameters, self._buffers, *batch, self._weights)


def _terms(terms: LossTerms) -> dict[str, Tensor]:
    return {"loss" if name == "total" else name: value for name, value in terms._asdict().items() if value is not None}


def _weights(losses: Sequence[LossConfig], device: torch.device) -> LossWeights | None:
    """Weights ``(R,)`` of every term, on the device; None where all replicas have the same."""
    each = [LossWeights.of(one) for one in losses]
    if len(set(each)) == 1:
        return None
    return LossWeights(*torch.tensor(each, device=device).T)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of replicas side by side; each of them becomes a view of its part."""
    whole = torch.stack([tensor.detach() for tensor in tensors])
    for tensor, part in zip(tensors, whole, strict=True):
        tensor.data = part
    return whole
