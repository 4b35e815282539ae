"""The training loop of heads: epochs of steps, each followed by a look at val.

Symbols: n images of train.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...heads.model import BaseHead
from ..core.config import Config
from ..core.progress import Task
from .data import Split, all_finite, diverged
from .state import TrainingState, gather_state, restore_state
from .step import Step, count_batches

Record = dict[str, float]
MakeStep = Callable[..., Step]

NOTE_EVERY_S = 1.0
# The state of a resumable training is as large as three heads: not after every epoch of a second.
KEEP_EVERY_S = 10.0
# The first codes are random projections, and good ones; training has to get past them before a val mAP that does not
# rise means anything. With few images that takes many epochs.
PATIENT_STEPS = 1000
# Draws of epoch e use the seed ``seed * EPOCH_STRIDE + e``.
EPOCH_STRIDE = 1_000_003


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a training calls on its way.

    Attributes:
        monitor: Gives ``val_mAP`` of the head in ``eval()`` mode, and whatever else is to be recorded.
        on_epoch: Called after every epoch with the head that was evaluated and the epoch's record.
        keep: Called now and then with all that is needed to resume; nothing is kept without it.
        keep_within_s: Seconds after which a state is kept in the middle of an epoch.
        keep_every_s: Seconds after which a state is kept at the end of an epoch; ``KEEP_EVERY_S`` when not given.
    """

    monitor: Callable[[BaseHead], Mapping[str, float]]
    on_epoch: Callable[[BaseHead, Record], None]
    keep: Callable[[TrainingState], None] | None = None
    keep_within_s: float = math.inf
    keep_every_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """How a training went.

    Attributes:
        history: One record an epoch.
        best_epoch: The first of the best; 0 where there is none.
        best_value: Its val mAP.
        stopped_early: Whether patience ended it.
    """

    history: tuple[Record, ...]
    best_epoch: int
    best_value: float
    stopped_early: bool

    @property
    def seconds(self) -> float:
        """Seconds of all epochs, also of those before it was resumed."""
        return sum(record["epoch_s"] for record in self.history)


def fit(
    head: BaseHead,
    train: Split,
    config: Config,
    hooks: Hooks,
    *,
    task: Task,
    resumed: TrainingState | None = None,
    make_step: MakeStep = Step,
) -> FitResult:
    """Train a head in place.

    Args:
        head: On the device of train, its statistics fitted.
        train: The train split.
        config: Loss, optimiser, scheduler, training and hardware sections are used.
        hooks: Called on the way.
        task: Counts epochs.
        resumed: The state to resume from; None begins.
        make_step: Makes the steps, from the arguments of :class:`Step`.

    Raises:
        Diverged: The loss or the head is no longer finite.
        InputError: Fewer images than a batch needs, or the state of another head.
    """
    loop = _Loop(head, train, config, hooks, make_step)
    if resumed is not None:
        loop.resume(resumed)
    first = 1 if resumed is None else resumed.epoch + 1
    task.advance(first - 1)
    kept_at = time.perf_counter()
    for epoch in range(first, config.training.num_epochs + 1):
        if loop.is_patience_over():
            break
        loop.run(epoch, task)
        task.advance(1, _note(loop.history))
        if time.perf_counter() - kept_at >= (KEEP_EVERY_S if hooks.keep_every_s is None else hooks.keep_every_s):
            loop.keep(epoch)
            kept_at = time.perf_counter()
    return summarise(loop.history, config.training.num_epochs)


class _Loop:
    """One epoch at a time; the random draws of an epoch depend on the seed and the epoch alone."""

    def __init__(self, head: BaseHead, train: Split, config: Config, hooks: Hooks, make_step: MakeStep) -> None:
        self._head, self._train, self._config, self._hooks = head, train, config.training, hooks
        self._seed = config.hardware.seed
        self._batches = count_batches(head, len(train), config.training.batch_size)
        self._steps = math.ceil(self._batches / config.training.accumulation_steps)
        self._step = make_step(head, train, config, steps=self._steps)
        self._done = 0
        self.history: list[Record] = []

    def is_patience_over(self) -> bool:
        """Whether val mAP has not risen for as many epochs as patience allows, counted from ``PATIENT_STEPS`` on."""
        best, patience = _best(self.history), self._config.early_stopping_patience
        if best is None or not patience:
            return False
        begin = math.ceil(PATIENT_STEPS / self._steps)
        return self.history[-1]["epoch"] - max(best["epoch"], begin) >= patience

    def resume(self, state: TrainingState) -> None:
        """Restore a state; the next epoch may be done in part."""
        restore_state(self._step, state)
        self.history = [dict(record) for record in state.history]
        self._done = state.batches

    def run(self, epoch: int, task: Task) -> None:
        """Train one epoch, or what is left of it, and record it.

        Raises:
            Diverged: The loss, the gradient or the head is no longer finite.
        """
        started = time.perf_counter()
        self._train_epoch(epoch, task)
        means, train_s = self._step.means(self._batches), time.perf_counter() - started
        self._check(epoch, means)
        # With a running average of the weights, it is the averaged head that is evaluated and kept.
        head = self._step.averaged
        record = {"epoch": float(epoch), **means, "lr": self._step.learning_rate, "train_s": train_s}
        record |= self._hooks.monitor(head)
        record["epoch_s"] = time.perf_counter() - started
        self.history.append(record)
        self._hooks.on_epoch(head, record)

    def _train_epoch(self, epoch: int, task: Task) -> None:
        every = self._config.accumulation_steps
        sizes = [len(part) for part in torch.tensor_split(torch.empty(len(self._train)), self._batches)]
        first, self._done = self._done, 0
        order, caption = self._draw(epoch)
        if not first:  # else the generators stand where the state was kept
            torch.manual_seed(self._seed * EPOCH_STRIDE + epoch)
        self._head.train()
        self._head.set_progress((epoch - 1) / max(1, self._config.num_epochs - 1))
        self._step.begin(epoch, order, caption, done=first // every, images=sum(sizes[:first]))
        noted = kept = time.perf_counter()
        for batch in range(first, self._batches, every):
            self._step.run(tuple(sizes[batch : batch + every]))
            now = time.perf_counter()
            if now - noted >= NOTE_EVERY_S:
                noted = now
                task.advance(0, f"epoch {epoch}: batch {batch:,} of {self._batches:,}")
            if now - kept >= self._hooks.keep_within_s:
                self.keep(epoch - 1, batches=batch + every)
                kept = time.perf_counter()

    def keep(self, epoch: int, *, batches: int = 0) -> None:
        """Offer a state to be kept, after an epoch and so many batches of the next."""
        if self._hooks.keep is not None:
            self._hooks.keep(gather_state(self._step, epoch, self.history, batches=batches))

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The order of the images in an epoch, and which caption goes with each: ``(n,)`` both."""
        generator = torch.Generator().manual_seed(self._seed * EPOCH_STRIDE + epoch)
        order = torch.randperm(len(self._train), generator=generator).to(self._train.device)
        draw = torch.rand(len(self._train), generator=generator).to(self._train.device)
        return order, (draw * self._train.captions_of).long()[order]

    def _check(self, epoch: int, means: Record) -> None:
        where = f"epoch {epoch}"
        if not math.isfinite(means["loss"]):
            raise diverged("the loss is no longer finite", where=where, got=means["loss"])
        # A loss scaler looks for the largest scale that overflows nothing: then such a norm is no sign of anything.
        if not math.isfinite(means["grad_norm"]) and not self._step.scaler.is_enabled():
            raise diverged("the gradient is no longer finite", where=where, got=means["grad_norm"])
        # The loss of a batch is measured before its step: the last step of an epoch shows in the parameters alone.
        if not all_finite(*self._head.parameters()):
            raise diverged("the head is no longer finite", where=where, got="NaN or inf in its parameters")


def _best(history: Sequence[Record]) -> Record | None:
    """The record of the best epoch, the first of equals."""
    return max(history, key=lambda record: record["val_mAP"], default=None)


def _note(history: Sequence[Record]) -> str:
    """The last epoch in one line."""
    last, best = history[-1], _best(history)
    assert best is not None
    shown = [
        f"{name.replace('_', ' ')} {last[name]:.3f}" for name in ("loss", "bce", "hash", "val_mAP") if name in last
    ]
    return f"{', '.join(shown)}, best {best['val_mAP']:.3f}, {last['epoch_s']:.2f} s an epoch"


def summarise(history: Sequence[Record], n_epochs: int) -> FitResult:
    """How a training went, from its records.

    Args:
        history: One record an epoch.
        n_epochs: The most that there might have been.
    """
    best = _best(history)
    return FitResult(
        history=tuple(history),
        best_epoch=0 if best is None else int(best["epoch"]),
        best_value=math.nan if best is None else best["val_mAP"],
        stopped_early=len(history) < n_epochs,
    )
