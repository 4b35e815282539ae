"""Training as a first script writes it, which ``mmcli bench train`` and ``mmcli bench finetune`` are measured against.

A ``Dataset`` and a ``DataLoader`` with worker processes, torch's own AdamW, and an eager float32 loop; the head and its
loss are the same as ours.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ...heads.losses import total_loss
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
        head: Trained in place, in ``train()`` mode.
        train: The train split.
        config: Loss and optimiser sections are used.
        batch: Images of a step.
        workers: Processes of the loader.
    """
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
        loss = total_loss(config.loss, output, y).loss
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        loss.item()

    return step
