"""The training loop of a head: tensors resident on the device, one gather a batch, no per-item loader.

Symbols: N images, D embedding width, C classes.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .. import InputError
from ..heads.losses import class_balanced_weights, total_loss
from ..heads.model import Head
from .config import Config
from .device import autocast
from .optimisation import learning_rate, make_optimizer
from .progress import Task

Monitor = Callable[[Head], float]
OnEpoch = Callable[[Head, dict[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split, resident on a device.

    Attributes:
        v_img: Raw image embeddings ``(N, D)``, float16 or float32.
        v_txt: Raw caption embeddings ``(N, 5, D)``.
        n_captions: Real captions of each image ``(N,)`` int64.
        labels: ``(N, C)`` uint8.
    """

    v_img: Tensor
    v_txt: Tensor
    n_captions: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.v_img)

    @classmethod
    def place(
        cls, v_img: npt.NDArray[Any], v_txt: npt.NDArray[Any], n_captions: npt.NDArray[Any],
        labels: npt.NDArray[np.uint8], device: torch.device,
    ) -> "Split":  # fmt: skip
        """Put arrays onto a device once."""
        return cls(
            v_img=torch.from_numpy(v_img).to(device),
            v_txt=torch.from_numpy(v_txt).to(device),
            n_captions=torch.from_numpy(n_captions.astype(np.int64)).to(device),
            labels=torch.from_numpy(labels).to(device),
        )

    def batch(self, rows: Tensor, caption: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
        """Image embeddings, one caption's embedding and labels of some rows, in float32."""
        text = self.v_txt[rows, caption]
        return self.v_img[rows].float(), text.float(), self.labels[rows].float()


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """How a training went: one record an epoch, the best epoch, and whether patience ended it."""

    history: tuple[dict[str, float], ...]
    best_epoch: int
    best_value: float
    stopped_early: bool


def fit(
    head: Head,
    train: Split,
    config: Config,
    *,
    monitor: Monitor,
    on_epoch: OnEpoch,
    task: Task,
    device: torch.device,
) -> FitResult:
    """Train a head in place.

    Args:
        head: On ``device``, its block statistics fitted.
        train: The train split on ``device``.
        config: Loss, optimiser, scheduler, training and hardware sections are used.
        monitor: Gives val mAP of the head in ``eval()`` mode; training stops when it has not risen for
            ``early_stopping_patience`` epochs (0: never stops).
        on_epoch: Called after every epoch with the head and the epoch's record.
        task: Counts epochs.
        device: Where the tensors are.

    Raises:
        InputError: Fewer images than a batch needs, or a loss or a head that is no longer finite.
    """
    loop = _Loop(head, train, config, device)
    history: list[dict[str, float]] = []
    best_epoch, best_value = 0, -math.inf
    patience = config.training.early_stopping_patience
    for epoch in range(1, config.training.num_epochs + 1):
        started = time.perf_counter()
        record = {"epoch": float(epoch), **loop.run(epoch)}
        record["train_s"] = time.perf_counter() - started
        record["val_mAP"] = monitor(head)
        record["epoch_s"] = time.perf_counter() - started
        history.append(record)
        on_epoch(head, record)
        if record["val_mAP"] > best_value:
            best_epoch, best_value = epoch, record["val_mAP"]
        task.advance(1, f"loss {record['loss']:.4f}, val mAP {record['val_mAP']:.3f}, best {best_value:.3f}")
        if patience and epoch - best_epoch >= patience:
            break
    return FitResult(
        history=tuple(history), best_epoch=best_epoch, best_value=best_value,
        stopped_early=len(history) < config.training.num_epochs,
    )  # fmt: skip


class _Loop:
    """One epoch at a time; the random draws of an epoch depend on the seed and the epoch alone."""

    def __init__(self, head: Head, train: Split, config: Config, device: torch.device) -> None:
        self._head, self._train, self._config, self._device = head, train, config, device
        self._seed = config.hardware.seed
        self._batches = count_batches(head, len(train), config.training.batch_size)
        self._every = config.training.accumulation_steps
        self._steps = math.ceil(self._batches / self._every)
        self._epochs = config.scheduler.total_epochs or config.training.num_epochs
        self._optimizer, self._peaks = make_optimizer(head, config.optimizer)
        self._precision = autocast(device, config.training.mixed_precision)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._precision.dtype == torch.float16)
        balanced = config.loss.class_weights == "balanced"
        counts = train.labels.sum(0, dtype=torch.float32) if balanced else None
        self._pos_weight = None if counts is None else class_balanced_weights(counts, len(train))
        self._step = 0

    def run(self, epoch: int) -> dict[str, float]:
        """Train one epoch; mean of each loss term, the last learning rate and the mean gradient norm."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        torch.manual_seed(self._seed * 1_000_003 + epoch)
        order = torch.randperm(len(self._train), generator=generator)
        draw = torch.rand(len(self._train), generator=generator).to(self._device)
        caption = (draw * self._train.n_captions).long()
        # Even batches: every image is seen, and none is left over for a batch of its own.
        batches = torch.tensor_split(order.to(self._device), self._batches)
        sums: dict[str, Tensor] = {}
        self._head.train()
        for number, rows in enumerate(batches):
            terms = self._forward(rows, caption[rows])
            first = number - number % self._every
            group = min(self._every, self._batches - first)
            self._scaler.scale(terms["loss"] / group).backward()  # type: ignore[no-untyped-call]
            if number + 1 == first + group:
                terms["grad_norm"] = self._update() * group
            for name, value in terms.items():
                sums[name] = sums.get(name, torch.zeros((), device=self._device)) + value.detach()
        means = {name: float(value) / self._batches for name, value in sums.items()}
        if not math.isfinite(means["loss"]):
            raise _diverged("the loss is no longer finite", where=f"epoch {epoch}", got=means["loss"])
        # The loss of a batch is measured before its step: the last step of an epoch shows in the parameters alone.
        if not all_finite(*self._head.parameters()):
            raise _diverged("the head is no longer finite", where=f"epoch {epoch}", got="NaN or inf in its parameters")
        return {**means, "lr": self._optimizer.param_groups[0]["lr"]}

    def _forward(self, rows: Tensor, caption: Tensor) -> dict[str, Tensor]:
        v_img, v_txt, y = self._train.batch(rows, caption)
        with self._precision:
            output = self._head(v_img, v_txt)
        terms = total_loss(self._config.loss, output, y, self._pos_weight)
        named = {"loss": terms.total, "bce": terms.bce, "cosine": terms.cosine, "hash": terms.hash}
        parts = {"quant": terms.quant, "balance": terms.balance, "decorr": terms.decorr}
        return {name: value for name, value in {**named, **parts}.items() if value is not None}

    def _update(self) -> Tensor:
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = learning_rate(
                self._step,
                steps_per_epoch=self._steps,
                epochs=self._epochs,
                peak=peak,
                schedule=self._config.scheduler,
            )
        self._scaler.unscale_(self._optimizer)
        limit = self._config.training.gradient_clip_norm
        norm = nn.utils.clip_grad_norm_(self._head.parameters(), math.inf if limit is None else limit)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self._step += 1
        return norm


@torch.inference_mode()
def encode_split(head: Head, split: Split, *, batch_size: int = 4096) -> tuple[Tensor, Tensor]:
    """Features and logits of a whole split in ``eval()`` mode, from the first caption.

    Returns:
        Soft codes h ``(N, B)``, or z without hash layer, and logits ``(N, C)``, both float32 on the split's device.

    Raises:
        InputError: One of them is not finite: large parameters may still be numbers where what they give is none.
    """
    head.eval()
    features, logits = [], []
    for rows in torch.split(torch.arange(len(split), device=split.v_img.device), batch_size):
        v_img, v_txt, _ = split.batch(rows, 0)
        output = head(v_img, v_txt)
        features.append((output.z if output.h is None else output.h).float())
        logits.append(output.logits.float())
    codes, scores = torch.cat(features), torch.cat(logits)
    if not all_finite(codes, scores):
        raise _diverged("the head gives no numbers", got="NaN or inf in codes or logits")
    return codes, scores


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


def all_finite(*tensors: Tensor) -> bool:
    """Whether every value of every tensor is a number; one look at the device for all of them."""
    return bool(torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all())


def _diverged(what: str, *, got: object, where: str | None = None) -> InputError:
    return InputError(
        what, where=where, got=got, wanted="numbers",
        do="lower the learning rates, or check the store with `mmcli cache verify`",
    )  # fmt: skip
