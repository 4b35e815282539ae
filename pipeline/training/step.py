"""One optimiser step of a head: gather, forward, loss, backward, clip, update, with nothing fetched from the device.

Everything that a step depends on lies on the device: the epoch's order, the place in it, the learning rates of its
steps. So the same lines run eagerly on a CPU and are captured once into a CUDA graph on a GPU, where launching them one
by one would take longer than computing them.
"""

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.adamw import adamw

from ...errors import InputError
from ...heads.label_losses import class_balanced_weights
from ...heads.mixing import mix_batch, shares
from ...heads.model import BaseHead
from ..core.config import Config, OptimizerConfig, SchedulerConfig
from ..core.device import autocast, keep_freed_memory
from .data import Split
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

    def __init__(self, parts: Mapping[str, list[Tensor]], config: OptimizerConfig, more: Sequence[Group] = ()) -> None:
        rates = {"fusion": config.lr_fusion, "hash": config.lr_hash, "classifier": config.lr_classifier}
        self._betas = config.betas
        own = [
            Group(name=name, parameters=parameters, rate=rates[name], decay=config.weight_decay)
            for name, parameters in parts.items()
        ]
        groups = [group for group in (*own, *more) if group.parameters]
        self.param_groups: list[dict[str, Any]] = [
            {
                "name": group.name,
                "params": group.parameters,
                "decay": group.decay,
                "lr": torch.tensor(group.rate, device=group.parameters[0].device),
            }
            for group in groups
        ]
        self.peaks = [group.rate for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = {
            parameter: {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            for group in groups
            for parameter in group.parameters
        }

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [one for one in group["params"] if one.grad is not None]
            states = [self.state[one] for one in parameters]
            adamw(
                parameters,
                [one.grad for one in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                lr=group["lr"],
                beta1=self._betas[0],
                beta2=self._betas[1],
                weight_decay=group["decay"],
                eps=EPS,
                amsgrad=False,
                maximize=False,
            )

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.state:
            parameter.grad = None


# Steps of each size of batch that a GPU does one by one before one is captured: kernels are loaded and chosen by shape,
# and buffers made, which no capture may do.
WARM_UP = 3
NORM_EPS = 1e-6  # as in torch's own clipping


class Step:
    """The steps of an epoch, one after another.

    Args:
        members: The heads.
        train: The train split.
        config: Loss, optimiser, scheduler, training and hardware sections are used.
        steps: Optimiser steps in an epoch.
    """

    def __init__(self, members: Replicas, train: Split, config: Config, *, steps: int) -> None:
        self.members, self._train, self._config = members, train, config
        self._device, self._steps = train.device, steps
        if self._device.type == "cpu":
            keep_freed_memory()
        self._epochs = config.scheduler.total_epochs or config.training.num_epochs
        self.optimizer = AdamW(members.groups(), config.optimizer, self._more_groups())
        self._precision = self.autocast_of(self._device, config)
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=self._precision.dtype == torch.float16)
        decay = config.training.ema_decay
        self.averages = None if decay is None else Averages(members, decay)
        balanced = config.loss.class_weights == "balanced"
        counts = train.own_labels.sum(0, dtype=torch.float32) if balanced else None
        self._pos_weight = None if counts is None else class_balanced_weights(counts, len(train))
        shape = (len(members),) if members.stacked else ()
        self._order = torch.zeros((*shape, len(train)), dtype=torch.int64, device=self._device)
        self._caption = torch.zeros_like(self._order)
        self._rates = torch.zeros((steps, len(self.optimizer.peaks)), device=self._device)
        self.last_rates: list[float] = []
        self._at = torch.zeros((), dtype=torch.int64, device=self._device)
        self._step = torch.zeros((), dtype=torch.int64, device=self._device)
        self.sums: dict[str, Tensor] = {}
        self._totals: dict[tuple[str, ...], Tensor] = {}
        self._graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}
        self._warm: Counter[tuple[int, ...]] = Counter()

    @classmethod
    def autocast_of(cls, device: torch.device, config: Config) -> autocast:
        """What the forward pass computes in on a device, as configured."""
        return autocast(device, config.training.mixed_precision, on_cpu=True)

    @property
    def precision(self) -> str:
        """The name of the precision that the forward pass computes in."""
        return self._precision.name

    @property
    def others(self) -> Mapping[str, Tensor]:
        """What is trained beside the heads, by name: nothing here."""
        return {}

    def whole(self, name: str, part: Tensor) -> Tensor:  # noqa: ARG002
        """All of what is shaped like one of the others, from what this process has of it."""
        return part

    def part(self, name: str, whole: Tensor) -> Tensor:  # noqa: ARG002
        """What this process has of it."""
        return whole

    def _over_all(self, group: str, square: Tensor) -> Tensor:  # noqa: ARG002
        """A squared norm of a group of parameters, of all that processes have of them."""
        return square

    def _more_groups(self) -> Sequence[Group]:
        """How the optimiser steps on it."""
        return ()

    def averaged(self, place: int) -> BaseHead:
        """The head to evaluate: the running average where there is one."""
        return (self.members if self.averages is None else self.averages).heads[place]

    def begin(self, epoch: int, order: Tensor, caption: Tensor, *, done: int = 0, images: int = 0) -> None:
        """Set out on an epoch.

        Args:
            epoch: From 1 on.
            order: Places in the split in the order of training, ``(n,)``, or ``(R, n)`` where stacked.
            caption: Which caption goes with each, likewise.
            done: Steps of this epoch that were done before; their sums are as :func:`restore_state` put them.
            images: Images that these steps saw.
        """
        first = (epoch - 1) * self._steps
        rates = [
            [
                learning_rate(
                    first + step,
                    steps_per_epoch=self._steps,
                    epochs=self._epochs,
                    peak=peak,
                    schedule=self._config.scheduler,
                )
                for peak in self.optimizer.peaks
            ]
            for step in range(self._steps)
        ]
        self._rates.copy_(torch.tensor(rates))
        self.last_rates = rates[-1]
        self._order.copy_(order)
        self._caption.copy_(caption)
        self._at.fill_(images)
        self._step.fill_(done)
        for value in self.sums.values() if not done else ():
            value.zero_()

    def run(self, sizes: tuple[int, ...]) -> None:
        """One step over batches of these sizes, whose gradients add up."""
        if self._device.type != "cuda" or self.scaler.is_enabled():
            self._body(sizes)
        else:
            # A graph is captured on the current device, which need not be the one that trains.
            with torch.cuda.device(self._device):
                self._run_on_gpu(sizes)

    def _run_on_gpu(self, sizes: tuple[int, ...]) -> None:
        if sizes in self._graphs:
            self._graphs[sizes].replay()
        elif self._warm[sizes] < WARM_UP:
            self._warm[sizes] += 1
            side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(side):
                self._body(sizes)
            torch.cuda.current_stream(self._device).wait_stream(side)
        else:
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self._graphs.values())).pool() if self._graphs else None
            # Other threads may go on with what no capture may do: one pins the memory of images that are read ahead.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._body(sizes)
            self._graphs[sizes] = graph
            graph.replay()

    def means(self, n_batches: int) -> dict[str, Tensor]:
        """Mean of each term over the epoch's batches, and of the gradient's norms over its steps."""
        norms = {name: value / self._steps for name, value in self.sums.items() if name.startswith("grad_norm")}
        return {name: value / n_batches for name, value in self.sums.items()} | norms

    def _body(self, sizes: tuple[int, ...]) -> None:
        for size in sizes:
            places = self._at + torch.arange(size, device=self._device)
            self._backward(self._order[..., places], self._caption[..., places], len(sizes))
            self._at += size
        self._update()

    def _backward(self, at: Tensor, caption: Tensor, parts: int) -> None:
        """Add the gradient of one batch, of so many of a step."""
        self._backward_of(self._train.batch(at, caption), at, parts)

    def _backward_of(self, batch: tuple[Tensor, Tensor, Tensor], at: Tensor, parts: int) -> None:
        if self._config.training.mixup:
            batch = mix_batch(batch, shares(at, len(self._train)))
        terms = self.members.losses(self._config.loss, batch, self._pos_weight, self._precision)
        self.scaler.scale(terms["loss"].sum() / parts).backward()  # type: ignore[no-untyped-call]
        self._count(terms)

    def _update(self) -> None:
        self._set_rates()
        self.scaler.unscale_(self.optimizer)  # type: ignore[arg-type]
        self._count(self._clip())
        self.scaler.step(self.optimizer)  # type: ignore[arg-type]
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.averages is not None:
            self.averages.update()
        self._step += 1

    def _count(self, terms: Mapping[str, Tensor]) -> None:
        """Add values to their sums, which lie side by side: two kernels for all of them."""
        names, values = tuple(terms), torch.stack([value.detach() for value in terms.values()])
        if names not in self._totals:
            self._totals[names] = torch.zeros_like(values)
            for name, total in zip(names, self._totals[names], strict=True):
                if name in self.sums:  # of an epoch that goes on
                    total.copy_(self.sums[name])
                self.sums[name] = total
        self._totals[names] += values

    def _set_rates(self) -> None:
        # Indexing with a scalar tensor would fetch it from the device.
        rates = self._rates.index_select(0, self._step.view(1))[0]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"].copy_(rate)

    def _clip(self) -> dict[str, Tensor]:
        """Shorten the gradient of every head to the norm asked for; the norms before that, of all and of the fusion."""
        stacked = self.members.stacked
        squares = []
        for group in self.optimizer.param_groups:
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            if stacked:
                norms = [torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients]
                square = torch.stack(norms).square().sum(0)
            elif self._device.type == "cpu":  # BLAS takes half the time of a norm
                flats = [gradient.flatten() for gradient in gradients]
                square = torch.stack([torch.dot(flat, flat) for flat in flats]).sum(0)
            else:
                square = get_total_norm(gradients).square()
            squares.append(self._over_all(group["name"], square))
        norm = torch.stack(squares).sum(0).sqrt()
        limit = self._config.training.gradient_clip_norm
        if limit is not None and self._may_exceed(norm, limit):
            self._shorten(norm, limit)
        return {"grad_norm": norm, "grad_norm_fusion": squares[0].sqrt()}

    def _may_exceed(self, norm: Tensor, limit: float) -> bool:
        """Whether there may be something to shorten: asking a CPU costs nothing, asking a GPU would stall it."""
        return self._device.type != "cpu" or self.members.stacked or float(norm) + NORM_EPS > limit

    def _shorten(self, norm: Tensor, limit: float) -> None:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if not self.members.stacked:
            clip_grads_with_norm_(parameters, limit, norm)
            return
        factor = (limit / (norm + NORM_EPS)).clamp(max=1.0)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor.view(-1, *(1,) * (parameter.dim() - 1)))


def count_batches(head: nn.Module, n: int, batch_size: int) -> int:
    """Batches of an epoch over n images, as even as can be.

    With batch normalisation none has fewer than two images, because one has no statistics; a batch may then be larger
    than ``batch_size`` by one, or by two where that is 1.

    Raises:
        InputError: n is less than one batch needs.
    """
    least = 2 if any(isinstance(module, nn.BatchNorm1d) for module in head.modules()) else 1
    if n < least:
        raise InputError(
            "too few train images", got=n, wanted=f"at least {least} for a batch", do="add images to the manifest"
        )
    return max(1, min(math.ceil(n / batch_size), n // least))
