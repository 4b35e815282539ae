"""The optimiser of a head, and its learning rate at every step."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .config import OptimizerConfig, SchedulerConfig


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


def make_optimizer(
    parts: Mapping[str, list[Tensor]], config: OptimizerConfig, device: torch.device
) -> tuple[torch.optim.Optimizer, list[float]]:
    """AdamW with one group per part of the head, whose learning rates are tensors; the peak rates in the groups' order.

    Args:
        parts: Parameters of ``fusion``, ``hash`` and ``classifier``; a part without any is left out.
        config: The optimiser section.
        device: Where the parameters are.
    """
    rates = {"fusion": config.lr_fusion, "hash": config.lr_hash, "classifier": config.lr_classifier}
    used = {name: parameters for name, parameters in parts.items() if parameters}
    groups = [
        {"params": parameters, "lr": torch.tensor(rates[name], device=device)} for name, parameters in used.items()
    ]
    optimizer = torch.optim.AdamW(
        groups, betas=config.betas, weight_decay=config.weight_decay, fused=device.type in {"cpu", "cuda"},
        capturable=device.type == "cuda",
    )  # fmt: skip
    return optimizer, [rates[name] for name in used]
