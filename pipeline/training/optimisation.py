"""The optimiser of a head, and its learning rate at every step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..core.config import OptimizerConfig, SchedulerConfig

EPS = 1e-8


def learning_rate(step: int, *, steps_per_epoch: int, epochs: int, peak: float, schedule: SchedulerConfig) -> float:
    """Linear warm-up then cosine decay, per optimiser step (Loshchilov and Hutter 2017, eq. 5, without restarts).

    Args:
        step: Optimiser steps done before this one.
        steps_per_epoch: Optimiser steps in an epoch.
        epochs: Length of the schedule.
        peak: The rate after warm-up.
        schedule: Warm-up epochs and the final rate.

    Returns:
        The rate of this step; never under ``min(min_lr, peak)`` after warm-up.
    """
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return peak * (step + 1) / warmup
    floor = min(schedule.min_lr, peak)
    done = (step - warmup) / max(1, epochs * steps_per_epoch - warmup)
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters beside the head's that share a learning rate and a weight decay.

    Attributes:
        name: For messages.
        parameters: Trained.
        rate: Their highest learning rate.
        decay: Their weight decay.
    """

    name: str
    parameters: list[Tensor]
    rate: float
    decay: float


class AdamW:
    """AdamW (Loshchilov and Hutter 2019), one fused kernel a part of the head: the function behind torch's own class.

    That class imports torch's compiler when it is made, a second of a process that lives for a few, and asks its hooks
    in every step. A loss scaler finds here what it looks for in an optimiser.

    Args:
        parts: Parameters of ``fusion``, ``hash`` and ``classifier``; a part without any is left out.
        config: The optimiser section.
        more: Groups of other parameters.

    Attributes:
        param_groups: One a part, then the others: its name, ``params``, ``decay``, and ``lr``, a scalar tensor that can
            be filled on the device.
        peaks: The highest learning rate of each group.
        state: ``step``, ``exp_avg`` and ``exp_avg_sq`` of each parameter.
    """

    def __init__(
        self, parts: Mapping[str, list[Tensor]], config: OptimizerConfig, more: Sequence[Group] = ()
    ) -> None:  # fmt: skip
        rates = {"fusion": config.lr_fusion, "hash": config.lr_hash, "classifier": config.lr_classifier}
        self._betas = config.betas
        own = [
            Group(name=name, parameters=parameters, rate=rates[name], decay=config.weight_decay)
            for name, parameters in parts.items()
        ]
        groups = [group for group in (*own, *more) if group.parameters]
        self.param_groups: list[dict[str, Any]] = [
            {
                "name": group.name, "params": group.parameters, "decay": group.decay,
                "lr": torch.tensor(group.rate, device=group.parameters[0].device),
            }
            for group in groups
        ]  # fmt: skip
        self.peaks = [group.rate for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = {
            parameter: {
                "step": torch.zeros((), device=parameter.device), "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            for group in groups
            for parameter in group.parameters
        }  # fmt: skip

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [one for one in group["params"] if one.grad is not None]
            states = [self.state[one] for one in parameters]
            adamw(
                parameters, [one.grad for one in parameters], [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states], [], [state["step"] for state in states], fused=True,
                lr=group["lr"], beta1=self._betas[0], beta2=self._betas[1], weight_decay=group["decay"], eps=EPS,
                amsgrad=False, maximize=False,
            )  # fmt: skip

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.state:
            parameter.grad = None
