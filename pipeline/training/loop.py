"""The training loop of heads: epochs of steps, each followed by a look at val.

Symbols: R replicas, n images of train.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...heads.config import LossConfig
from ...heads.dropout import reseed_dropout, skip_dropout
from ...heads.model import BaseHead
from ..core.config import Config
from ..core.progress import Task
from .data import Diverged, Split, all_finite, diverged
from .replicas import Replicas
from .state import TrainingState, gather_state, restore_state
from .step import Step, count_batches

Record = dict[str, float]
Monitor = Callable[[BaseHead], Mapping[str, float]]
OnEpoch = Callable[[BaseHead, Record], None]
Keep = Callable[[TrainingState], None]
MakeStep = Callable[..., Step]

NOTE_EVERY_S = 1.0
# What is kept for a resumed training is as large as three heads: not after every epoch of a second.
KEEP_EVERY_S = 10.0
# The first codes are random projections, and good ones; training has to get past them before a val mAP that does not
# rise means anything. With few images that takes many epochs.
PATIENT_STEPS = 1000


@dataclass(kw_only=True)
class Member:
    """One head in training, and who looks at it.

    Attributes:
        head: On the device of train, its block statistics fitted; trained in place.
        seed: Of its draws: the order of images, captions and dropout.
        monitor: Gives ``val_mAP`` of the head in ``eval()`` mode, and what else is to be recorded.
        on_epoch: Called after every epoch with the head that was looked at and the epoch's record.
        loss: Its loss section, which may differ from the others' in the weights of terms; the configuration's when not
            given.
        keep: Called now and then with all that is needed to go on from here.
        resumed: Where to go on; None begins.
        error: Why it ended before its time.
    """

    head: BaseHead
    seed: int
    monitor: Monitor
    on_epoch: OnEpoch
    loss: LossConfig | None = None
    keep: Keep | None = None
    resumed: TrainingState | None = None
    history: list[Record] = field(default_factory=list)
    error: Diverged | None = None

    @property
    def best(self) -> Record | None:
        """The record of the best epoch, the first of equals."""
        return max(self.history, key=lambda record: record["val_mAP"], default=None)

    def is_done(self, patience: int, after: int) -> bool:
        """Whether it diverged, or val mAP has not risen for ``patience`` epochs since epoch ``after``; 0 is never."""
        best = self.best
        if self.error is not None:
            return True
        return bool(patience and best and self.history[-1]["epoch"] - max(best["epoch"], after) >= patience)


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """How a training went.

    Attributes:
        history: One record an epoch.
        best_epoch: The first of the best; 0 where there is none.
        best_value: Its val mAP.
        stopped_early: Whether patience ended it.
        error: Why it diverged, where it did and others of the same pass did not.
    """

    history: tuple[Record, ...]
    best_epoch: int
    best_value: float
    stopped_early: bool
    error: Diverged | None = None

    @property
    def seconds(self) -> float:
        """Of all epochs, also of those before it was resumed."""
        return sum(record["epoch_s"] for record in self.history)


def fit(
    members: Sequence[Member],
    train: Split,
    config: Config,
    *,
    task: Task,
    stacked: bool | None = None,
    make_step: MakeStep = Step,
    keep_within_s: float = math.inf,
    keep_every_s: float | None = None,
) -> list[FitResult]:
    """Train heads in place, several of one shape in one pass.

    Args:
        members: The heads; with more than one, all begin or all go on after the same epoch.
        train: The train split.
        config: Loss, optimiser, scheduler, training and hardware sections are used; ``hardware.seed`` and the weights
            of the loss's terms are each member's own.
        task: Counts epochs.
        stacked: Whether parameters of several heads lie side by side; as many heads as there are ask for by default.
        make_step: Makes the steps, of :class:`Step`'s arguments.
        keep_within_s: Seconds after which a state is kept in the middle of an epoch.
        keep_every_s: Seconds after which one is kept at the end of an epoch; ``KEEP_EVERY_S`` when not given.

    Returns:
        One result a member; a member that diverges beside others leaves them alone.

    Raises:
        Diverged: No member has a loss and a head that are finite.
        InputError: Fewer images than a batch needs.
    """
    stacked = len(members) > 1 if stacked is None else stacked
    losses = [member.loss or config.loss for member in members]
    if not stacked:
        config = config.model_copy(update={"loss": losses[0]})
    replicas = Replicas([member.head for member in members], stacked=stacked, losses=losses)
    loop = _Loop(replicas, members, train, config, make_step=make_step, keep_within_s=keep_within_s)
    first = loop.resume()
    task.advance(first - 1)
    patience, n_epochs = config.training.early_stopping_patience, config.training.num_epochs
    kept_at = time.perf_counter()
    for epoch in range(first, n_epochs + 1):
        open_members = [member for member in members if not member.is_done(patience, loop.settled_at)]
        if not open_members:
            break
        started = time.perf_counter()
        means = loop.run(epoch, task)
        train_s = time.perf_counter() - started
        for member in open_members:
            try:
                loop.look(member, epoch, means[members.index(member)], train_s)
            except Diverged as error:
                member.error = error
        if all(member.error for member in members):
            raise members[0].error  # type: ignore[misc]
        task.advance(1, _note(open_members))
        if time.perf_counter() - kept_at >= (KEEP_EVERY_S if keep_every_s is None else keep_every_s):
            loop.keep(epoch)
            kept_at = time.perf_counter()
    return [summarise(member.history, n_epochs, member.error) for member in members]


class _Loop:
    """One epoch at a time; the random draws of an epoch depend on the seed and the epoch alone."""

    def __init__(
        self,
        replicas: Replicas,
        members: Sequence[Member],
        train: Split,
        config: Config,
        *,
        make_step: MakeStep,
        keep_within_s: float,
    ) -> None:
        self._replicas, self._members, self._train = replicas, members, train
        self._batches = count_batches(members[0].head, len(train), config.training.batch_size)
        self._every = config.training.accumulation_steps
        self._n_epochs = config.training.num_epochs
        self._step = make_step(replicas, train, config, steps=math.ceil(self._batches / self._every))
        self._keep_within_s, self._done = keep_within_s, 0

    @property
    def settled_at(self) -> int:
        """The epoch that patience counts from: that of the ``PATIENT_STEPS``-th step."""
        return math.ceil(PATIENT_STEPS / math.ceil(self._batches / self._every))

    def resume(self) -> int:
        """Go on from the members' states, where they have one; the first epoch to do, some of it perhaps done."""
        states = [member.resumed for member in self._members]
        for place, (member, state) in enumerate(zip(self._members, states, strict=True)):
            if state is not None:
                restore_state(self._step, place, state)
                member.history = [dict(record) for record in state.history]
                self._done = state.batches
        return 1 + max((state.epoch for state in states if state is not None), default=0)

    def run(self, epoch: int, task: Task) -> list[Record]:
        """Train one epoch, or what is left of it; mean of each loss term and of the norms, of every member."""
        drawn = [self._draw(member, epoch) for member in self._members]
        order, caption = (torch.stack([one[at] for one in drawn]) for at in (0, 1))
        if not self._replicas.stacked:
            order, caption = order[0], caption[0]
        self._replicas.train()
        for member in self._members:
            set_progress(member.head, (epoch - 1) / max(1, self._n_epochs - 1))
        sizes = [len(part) for part in torch.tensor_split(torch.empty(len(self._train)), self._batches)]
        first, self._done = self._done, 0
        for member in self._members if first else ():
            skip_dropout(member.head, first)
        self._step.begin(epoch, order, caption, done=first // self._every, images=sum(sizes[:first]))
        told = kept = time.perf_counter()
        for at in range(first, self._batches, self._every):
            self._step.run(tuple(sizes[at : at + self._every]))
            now = time.perf_counter()
            if now - told >= NOTE_EVERY_S:
                told = now
                task.advance(0, f"epoch {epoch}: batch {at:,} of {self._batches:,}")
            if now - kept >= self._keep_within_s:
                self.keep(epoch - 1, batches=at + self._every)
                kept = time.perf_counter()
        table = self._step.means(self._batches)
        columns = torch.stack([value.reshape(-1) for value in table.values()]).T.tolist()
        return [dict(zip(table, column, strict=True)) for column in columns]

    def look(self, member: Member, epoch: int, means: Record, train_s: float) -> None:
        """Record an epoch of a member: its means, and what its monitor finds.

        With a running average of the weights, it is the averaged head that is looked at and kept.

        Raises:
            Diverged: The loss, the gradient or the head is no longer finite.
        """
        started = time.perf_counter()
        self._check(member, epoch, means)
        head = self._step.averaged(self._members.index(member))
        record = {"epoch": float(epoch), **means, "lr": self._step.last_rates[0], "train_s": train_s}
        record |= member.monitor(head)
        record["epoch_s"] = train_s + time.perf_counter() - started
        member.history.append(record)
        member.on_epoch(head, record)

    def keep(self, epoch: int, *, batches: int = 0) -> None:
        """Offer every member what a resumed training needs, after an epoch and so many batches of the next."""
        for place, member in enumerate(self._members):
            if member.keep is not None:
                member.keep(gather_state(self._step, place, epoch, member.history, batches=batches))

    def _draw(self, member: Member, epoch: int) -> tuple[Tensor, Tensor]:
        seed = member.seed * 1_000_003 + epoch
        generator = torch.Generator().manual_seed(seed)
        reseed_dropout(member.head, seed)
        order = torch.randperm(len(self._train), generator=generator).to(self._train.device)
        draw = torch.rand(len(self._train), generator=generator).to(self._train.device)
        # Even batches: every image is seen, and none is left over for a batch of its own.
        return order, (draw * self._train.captions_of).long()[order]

    def _check(self, member: Member, epoch: int, means: Record) -> None:
        where = f"epoch {epoch}"
        if not math.isfinite(means["loss"]):
            raise diverged("the loss is no longer finite", where=where, got=means["loss"])
        # A loss scaler looks for the largest scale that overflows nothing: then such a norm is no sign of anything.
        if not math.isfinite(means["grad_norm"]) and not self._step.scaler.is_enabled():
            raise diverged("the gradient is no longer finite", where=where, got=means["grad_norm"])
        # The loss of a batch is measured before its step: the last step of an epoch shows in the parameters alone.
        if not all_finite(*member.head.parameters()):
            raise diverged("the head is no longer finite", where=where, got="NaN or inf in its parameters")


def set_progress(head: BaseHead, progress: float) -> None:
    """Tell a head how much of its training is done, in [0, 1]: some parts of it change on the way."""
    for part in head.children():
        told = getattr(part, "set_progress", None)
        if told is not None:
            told(progress)


def _note(members: Sequence[Member]) -> str:
    going = [member for member in members if member.error is None]
    shown = []
    for name in ("loss", "bce", "hash", "val_mAP"):
        values = [member.history[-1][name] for member in going if name in member.history[-1]]
        if values:
            shown.append(f"{name.replace('_', ' ')} {sum(values) / len(values):.3f}")
    best = max((record["val_mAP"] for member in going for record in member.history), default=0.0)
    seconds = [member.history[-1]["epoch_s"] for member in going]
    return f"{', '.join(shown)}, best {best:.3f}, {max(seconds, default=0.0):.2f} s an epoch"


def summarise(history: Sequence[Record], n_epochs: int, error: Diverged | None = None) -> FitResult:
    """How a training went, from its records.

    Args:
        history: One an epoch.
        n_epochs: How many there might have been.
        error: Why it diverged.
    """
    best = max(history, key=lambda record: record["val_mAP"], default=None)
    return FitResult(
        history=tuple(history),
        best_epoch=0 if best is None else int(best["epoch"]),
        best_value=math.nan if best is None else best["val_mAP"],
        error=error,
        stopped_early=error is None and len(history) < n_epochs,
    )
