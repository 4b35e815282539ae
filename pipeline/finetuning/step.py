"""One optimiser step of a head and the towers below it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..core.config import Config
from ..core.device import autocast
from ..training.data import Split
from ..training.optimisation import Group
from ..training.replicas import Replicas
from ..training.step import Step
from .batches import Feed
from .towers import PARTS


class TowerStep(Step):
    """As :class:`~mmcli.pipeline.training.step.Step`, its batches made by towers that are trained with the head.

    Args:
        members: One head.
        train: The train split.
        config: As of ``Step``, and the finetune section; a batch is a whole optimiser step.
        steps: Optimiser steps in an epoch.
        feed: Makes the batches.
    """

    def __init__(self, members: Replicas, train: Split, config: Config, *, steps: int, feed: Feed) -> None:
        assert not members.stacked
        self._feed, self._towers, self._shards = feed, feed.towers, feed.shards
        super().__init__(members, train, config, steps=steps)

    @classmethod
    def autocast_of(cls, device: torch.device, config: Config) -> autocast:
        """As in the towers, float32 on a CPU: the head is a small part of the step."""
        return autocast(device, config.training.mixed_precision)

    @property
    def others(self) -> Mapping[str, Tensor]:
        """Trained parameters of the towers by name, or what this process has of them."""
        return self._shards.local

    def whole(self, name: str, part: Tensor) -> Tensor:
        """All of what is shaped like a trained parameter."""
        return self._shards.whole(name, part)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """What this process has of it."""
        return self._shards.part(name, whole)

    def _more_groups(self) -> Sequence[Group]:
        return self._towers.groups(self._config.optimizer, self._shards.local)

    def _over_all(self, group: str, square: Tensor) -> Tensor:
        if group.endswith(PARTS):
            square = square.clone()
            self._feed.team.sum_([square])
        return square

    def begin(self, epoch: int, order: Tensor, caption: Tensor, *, done: int = 0, images: int = 0) -> None:
        """Set out on an epoch; images are read ahead from here on."""
        super().begin(epoch, order, caption, done=done, images=images)
        rows = self._train.rows[order].cpu()
        batches = [part.numpy() for part in torch.tensor_split(rows, self._steps)]
        self._feed.begin(epoch, batches[done:])

    def run(self, sizes: tuple[int, ...]) -> None:
        """One step, launched piece by piece: every batch has other grids, so there is no graph to replay."""
        self._body(sizes)

    def _backward(self, at: Tensor, caption: Tensor, parts: int) -> None:
        self._backward_of(self._feed.embed(self._train, at, caption), at, parts)
        self._feed.backward()
        self._shards.take_gradients()
