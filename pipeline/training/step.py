"""One optimiser step of a head: gather, forward, loss, backward, clip, update, with nothing fetched from the device.

Everything that changes from step to step lies on the device: the epoch's order, the position in it, the learning
rates. So the same lines run eagerly on a CPU and are captured once into a CUDA graph on a GPU, where launching them
one by one would take longer than computing them.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ...errors import InputError
from ...heads.label_losses import class_balanced_weights
from ...heads.losses import total_loss
from ...heads.mixing import mix_batch, shares
from ...heads.model import BaseHead
from ..core.config import Config, SchedulerConfig
from ..core.device import autocast, keep_freed_memory
from .data import Split

# Steps of each size of batch that a GPU does one by one before one is captured: kernels are loaded and chosen by shape,
# and buffers made, which no capture may do.
WARM_UP = 3


class WeightAverage(AveragedModel):
    """Exponential moving average of parameters and statistics (Polyak and Juditsky 1992, in its usual form).

    It begins with the weights after the first step; then ``a <- d a + (1 - d) w`` with ``d = min(decay, (1 + t) /
    (10 + t))`` after t steps, so that the first weights are soon forgotten.

    Args:
        head: The head in training.
        decay: In [0, 1).
    """

    def __init__(self, head: BaseHead, decay: float) -> None:
        self._decay = decay
        super().__init__(head, multi_avg_fn=self._average, use_buffers=True)

    def _average(self, averages: Any, weights: Any, _: Any) -> None:  # noqa: ANN401
        t = int(self.n_averaged)  # kept on the CPU
        update = get_ema_multi_avg_fn(min(self._decay, (1 + t) / (10 + t)))  # type: ignore[no-untyped-call]
        update(averages, weights, t)


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


class Step:
    """The steps of an epoch, one after another.

    Args:
        head: The head, on the device of the split; trained in place.
        train: The train split.
        config: Loss, optimiser, scheduler, training and hardware sections are used.
        steps: Optimiser steps in an epoch.

    Attributes:
        device: The device of head and split.
        head: The head in training.
        names: Names of all trained parameters, in the order of the optimiser.
        optimizer: AdamW (Loshchilov and Hutter 2019); every group has a ``name`` and its highest rate, ``peak``.
        scaler: Scales the loss, where the forward pass computes in float16.
        averages: The running average of the weights, where one is asked for.
        sums: Sum of every loss term and norm over the steps of the epoch so far.
    """

    def __init__(self, head: BaseHead, train: Split, config: Config, *, steps: int) -> None:
        self.head, self._train, self._config = head, train, config
        self.device, self._steps = train.device, steps
        if self.device.type == "cpu":
            keep_freed_memory()
        self._epochs = config.scheduler.total_epochs or config.training.num_epochs
        self.names, self.optimizer = self._make_optimizer()
        self._precision = self.autocast_of(self.device, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self._precision.dtype == torch.float16)
        decay = config.training.ema_decay
        self.averages = None if decay is None else WeightAverage(head, decay)
        balanced = config.loss.class_weights == "balanced"
        counts = train.own_labels.sum(0, dtype=torch.float32) if balanced else None
        self._pos_weight = None if counts is None else class_balanced_weights(counts, len(train))
        self._order = torch.zeros(len(train), dtype=torch.int64, device=self.device)
        self._caption = torch.zeros_like(self._order)
        self._position = torch.zeros((), dtype=torch.int64, device=self.device)
        self._n_steps = 0
        self.sums: dict[str, Tensor] = {}
        self._graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}
        self._warm: Counter[tuple[int, ...]] = Counter()

    def _make_optimizer(self) -> tuple[list[str], torch.optim.AdamW]:
        section, parts = self._config.optimizer, self.head.parameter_groups()
        rates = {"fusion": section.lr_fusion, "hash": section.lr_hash, "classifier": section.lr_classifier}
        groups: list[dict[str, Any]] = [
            {"name": part, "params": parts[part], "peak": rate} for part, rate in rates.items() if parts[part]
        ]
        groups += [{**group, "peak": group["lr"]} for group in self._more_groups()]
        for group in groups:
            group["lr"] = torch.tensor(group["peak"], device=self.device)  # a graph reads it anew in every replay
        optimizer = torch.optim.AdamW(
            groups,
            betas=section.betas,
            weight_decay=section.weight_decay,
            fused=True,
            capturable=self.device.type == "cuda",
        )
        named = [*self.head.named_parameters(), *self.others.items()]
        names = {id(parameter): name for name, parameter in named}
        return [names[id(parameter)] for group in groups for parameter in group["params"]], optimizer

    @classmethod
    def autocast_of(cls, device: torch.device, config: Config) -> autocast:
        """The context in which the forward pass computes on a device, as configured."""
        return autocast(device, config.training.mixed_precision, on_cpu=True)

    @property
    def precision(self) -> str:
        """The name of the precision that the forward pass computes in."""
        return self._precision.name

    @property
    def others(self) -> Mapping[str, Tensor]:
        """Parameters that are trained beside the head's, by name: none here."""
        return {}

    def whole(self, name: str, part: Tensor) -> Tensor:  # noqa: ARG002
        """The whole of a tensor shaped like one of the others, from the part that this process has."""
        return part

    def part(self, name: str, whole: Tensor) -> Tensor:  # noqa: ARG002
        """The part that this process has of a tensor shaped like one of the others."""
        return whole

    def _over_all(self, group: str, square: Tensor) -> Tensor:  # noqa: ARG002
        """A squared norm of a group of parameters, summed over the parts that processes have of them."""
        return square

    def _more_groups(self) -> Sequence[dict[str, Any]]:
        """Optimiser groups of the others: ``name``, ``params``, ``lr`` and ``weight_decay`` each."""
        return ()

    @property
    def averaged(self) -> BaseHead:
        """The head to evaluate: the running average where there is one."""
        if self.averages is None:
            return self.head
        head = self.averages.module
        assert isinstance(head, BaseHead)
        return head

    @property
    def learning_rate(self) -> float:
        """The rate of the first group in the last step."""
        return self._rate(self._n_steps - 1, self.optimizer.param_groups[0])

    def begin(self, epoch: int, order: Tensor, caption: Tensor, *, done: int = 0, images: int = 0) -> None:
        """Begin an epoch.

        Args:
            epoch: From 1 on.
            order: Places in the split in the order of training ``(n,)``.
            caption: The caption that goes with each ``(n,)``.
            done: Steps of this epoch that were done before; their sums were restored from a state.
            images: Images that these steps saw.
        """
        self._n_steps = (epoch - 1) * self._steps + done
        self._order.copy_(order)
        self._caption.copy_(caption)
        self._position.fill_(images)
        for value in self.sums.values() if not done else ():
            value.zero_()

    def run(self, sizes: tuple[int, ...]) -> None:
        """Do one step over batches of these sizes, whose gradients add up."""
        self._set_rates()
        if self._uses_graphs():
            # A graph is captured on the current device, which need not be the one that trains.
            with torch.cuda.device(self.device):
                self._run_graph(sizes)
        else:
            self._body(sizes)
        if self.averages is not None:
            self.averages.update_parameters(self.head)
        self._n_steps += 1

    def _set_rates(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"].fill_(self._rate(self._n_steps, group))

    def _rate(self, step: int, group: Mapping[str, Any]) -> float:
        schedule = self._config.scheduler
        return learning_rate(
            step, steps_per_epoch=self._steps, epochs=self._epochs, peak=group["peak"], schedule=schedule
        )

    def _uses_graphs(self) -> bool:
        """Whether steps are captured; a loss scaler looks at every step's gradient, which no graph can."""
        return self.device.type == "cuda" and not self.scaler.is_enabled()

    def _run_graph(self, sizes: tuple[int, ...]) -> None:
        if sizes in self._graphs:
            self._graphs[sizes].replay()
        elif self._warm[sizes] < WARM_UP:
            self._warm[sizes] += 1
            side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                self._body(sizes)
            torch.cuda.current_stream(self.device).wait_stream(side)
        else:
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self._graphs.values())).pool() if self._graphs else None
            # Other threads may go on with what no capture may do: one pins the memory of images that are read ahead.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._body(sizes)
            self._graphs[sizes] = graph
            graph.replay()

    def means(self, n_batches: int) -> dict[str, float]:
        """Mean of each term over the epoch's batches, and of the gradient's norms over its steps."""
        values = torch.stack(list(self.sums.values())).tolist()
        return {
            name: value / (self._steps if name.startswith("grad_norm") else n_batches)
            for name, value in zip(self.sums, values, strict=True)
        }

    def _body(self, sizes: tuple[int, ...]) -> None:
        for size in sizes:
            places = self._position + torch.arange(size, device=self.device)
            self._backward(self._order[places], self._caption[places], len(sizes))
            self._position += size
        self.scaler.unscale_(self.optimizer)
        self._add(self._clip())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def _backward(self, places: Tensor, caption: Tensor, parts: int) -> None:
        """Add the gradient of one batch, of so many of a step."""
        self._backward_of(self._train.batch(places, caption), places, parts)

    def _backward_of(self, batch: tuple[Tensor, Tensor, Tensor], places: Tensor, parts: int) -> None:
        if self._config.training.mixup:
            batch = mix_batch(batch, shares(places, len(self._train)))
        v_img, v_txt, y = batch
        with self._precision:
            output = self.head(v_img, v_txt)
        terms = total_loss(self._config.loss, output, y, self._pos_weight)
        self.scaler.scale(terms.loss / parts).backward()  # type: ignore[no-untyped-call]
        self._add({name: value for name, value in terms._asdict().items() if value is not None})

    def _add(self, values: Mapping[str, Tensor]) -> None:
        """Add values to their sums."""
        for name, value in values.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(value.detach())
            self.sums[name] += value.detach()

    def _clip(self) -> dict[str, Tensor]:
        """Shorten the gradient to the norm asked for; the norms before that, of the whole and of the fusion."""
        squares = []
        for group in self.optimizer.param_groups:
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            squares.append(self._over_all(group["name"], get_total_norm(gradients).square()))
        norm = torch.stack(squares).sum().sqrt()
        if (limit := self._config.training.gradient_clip_norm) is not None:
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            clip_grads_with_norm_(parameters, limit, norm)
        return {"grad_norm": norm, "grad_norm_fusion": squares[0].sqrt()}


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
