"""Training as a first script writes it, which ``mmcli bench train`` and ``mmcli bench finetune`` are measured against.

A ``DataLoader`` with worker processes, torch's own dropout and AdamW, and the losses as their formulas stand
(docs/method.md), each classifier by itself, with autograd finding every gradient. The same maths as ours.

Symbols: N images of a batch, C classes, B bits, x logits, y labels, h soft code.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, Dataset

from ...heads.config import LossConfig
from ...heads.dropout import Dropout
from ...heads.model import BaseHead, HeadOutput
from ..core.config import Config
from ..training.data import Split

WORKERS = 4


class Items(Dataset[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]]):
    """A split whose items are one image, one of its captions at random, and its labels."""

    def __init__(self, split: Split) -> None:
        self._rows = split.rows.cpu().numpy()
        self._arrays = [value.cpu().numpy() for value in (split.v_img, split.v_txt, split.n_captions, split.labels)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        v_img, v_txt, n_captions, labels = self._arrays
        row = self._rows[index]
        caption = np.random.randint(n_captions[row])  # noqa: NPY002
        return v_img[row].astype(np.float32), v_txt[row, caption].astype(np.float32), labels[row].astype(np.float32)


def plain_steps(head: BaseHead, train: Split, config: Config, batch: int, *, workers: int = WORKERS) -> Iterator[None]:
    """Steps of the plain loop over a store, epoch after epoch, without end.

    Args:
        head: Trained in place, in ``train()`` mode; its dropout becomes torch's.
        train: The train split.
        config: Loss and optimiser sections are used.
        batch: Images of a step.
        workers: Processes of the loader.
    """
    use_torch_dropout(head)
    pin = config.data.pin_memory and train.device.type == "cuda"
    loader = make_loader(Items(train), batch, workers=workers, pin_memory=pin)
    step = plain_step(list(head.parameters()), config, rate=3e-4)
    while True:
        for arrays in loader:
            v_img, v_txt, y = (array.to(train.device) for array in arrays)
            step(head(v_img, v_txt), y)
            yield


def make_loader(items: Any, batch: int, *, workers: int = WORKERS, **options: Any) -> "DataLoader[Any]":  # noqa: ANN401
    """A shuffling ``DataLoader`` whose worker processes stay; as many as asked for, however few cores there are."""
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    return DataLoader(
        items, batch_size=batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0, **options
    )


def plain_step(parameters: Sequence[Tensor], config: Config, *, rate: float) -> Callable[[HeadOutput, Tensor], None]:
    """The function that updates parameters after each forward pass, from the head's output and the labels."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=config.optimizer.weight_decay)

    def step(output: HeadOutput, y: Tensor) -> None:
        loss = plain_loss(config.loss, output, y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        loss.item()

    return step


def use_torch_dropout(module: nn.Module) -> None:
    """Put torch's dropout in the place of ours, everywhere in a module."""
    for name, child in module.named_children():
        if isinstance(child, Dropout):
            setattr(module, name, nn.Dropout(child.p))
        else:
            use_torch_dropout(child)


def plain_loss(config: LossConfig, output: HeadOutput, y: Tensor) -> Tensor:
    """The same loss as :func:`~mmcli.heads.losses.total_loss`, without weights of classes."""
    total = config.bce_weight * plain_label_loss(config, output.logits, y)
    if output.fused_logits is not None:
        total = total + config.fused_weight * plain_label_loss(config, output.fused_logits, y)
    for logits in output.prefix_logits:
        total = total + config.nested_weight / len(output.prefix_logits) * plain_label_loss(config, logits, y)
    if output.h is not None and output.hash_reg:
        reg, (quant, balance, decorr) = config.hash_reg, plain_hash_losses(output.h)
        hashed = reg.lambda_quant * quant + reg.lambda_balance * balance + reg.lambda_decorr * decorr
        total = total + config.hash_weight * hashed
    if output.d_img is not None and output.d_txt is not None and output.both:
        total = total + config.cosine_weight * (1 - (output.d_img * output.d_txt).sum(-1)).mean()
    return total


def plain_label_loss(config: LossConfig, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, focal or asymmetric loss of one classifier."""
    if config.focal_loss:
        return plain_focal(x, y, config.focal_alpha, config.focal_gamma)
    if config.asymmetric_loss:
        gammas = config.asymmetric_gamma_pos, config.asymmetric_gamma_neg
        return plain_asymmetric(x, y, *gammas, config.asymmetric_shift)
    return F.binary_cross_entropy_with_logits(x, y)


def plain_focal(x: Tensor, y: Tensor, alpha: float, gamma: float, w: float | Tensor = 1.0) -> Tensor:
    """Lin et al. 2017, eq. 5; ``w (C,)`` weighs positives."""
    p = torch.sigmoid(x)
    positive = -w * alpha * (1 - p) ** gamma * torch.log(p.clamp_min(1e-8))
    return (y * positive - (1 - y) * (1 - alpha) * p**gamma * torch.log((1 - p).clamp_min(1e-8))).mean()


def plain_asymmetric(x: Tensor, y: Tensor, pos: float, neg: float, shift: float, w: float | Tensor = 1.0) -> Tensor:
    """Ridnik et al. 2021, eq. 4, 5 and 7; ``w (C,)`` weighs positives."""
    p = torch.sigmoid(x)
    shifted = (p - shift).clamp_min(1e-12)
    positive = -w * (1 - p) ** pos * torch.log(p.clamp_min(1e-8))
    negative = torch.where(p > shift, -(shifted**neg) * torch.log((1 - shifted).clamp_min(1e-8)), 0.0)
    return (y * positive + (1 - y) * negative).mean()


def plain_hash_losses(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantisation, balance and decorrelation of soft codes ``(N, B)``."""
    centred = h - h.mean(0)
    covariance = centred.T @ centred / len(h)
    off = covariance - torch.diag(covariance.diagonal())
    return (h.abs() - 1).square().mean(), h.mean(0).square().mean(), off.square().sum() / h.shape[1] ** 2
