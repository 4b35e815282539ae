"""Batches of a training whose towers take part: packs of images and captions in, a batch of embeddings out, and back.

The head and its losses look at a whole batch at once (batch normalisation, bit balance, covariance, mixtures), the
towers at pieces of it. So the embeddings of a batch are leaves of the head's graph, and the gradient that arrives at
them goes on into the towers piece by piece (GradCache: Gao et al. 2021, section 3). With ``accumulation_steps`` the
first pass keeps no graph and every piece is computed again: memory of one piece, the gradient of the whole batch.

Symbols: n images of a batch, D embedding width.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..core.config import Config
from ..core.device import autocast, to_device
from ..extraction.images import Box, Grid, Pixels
from ..extraction.reader import Piece
from ..training.data import Split
from ..training.replicas import Replicas
from ..training.step import Group, Step
from .distributed import Shards
from .embeddings import LiveStore, refuse_unreadable
from .towers import PARTS, Towers

# The smallest part of an image, as a share of its sides: at 0.7 half of its area.
LEAST = 0.7


class Views(NamedTuple):
    """What is seen of n images.

    Attributes:
        boxes: The part of each.
        mirrored: Whether left and right are exchanged, ``(n,)``.
    """

    boxes: list[Box]
    mirrored: npt.NDArray[np.bool_]


def draw_views(rows: npt.NDArray[np.int64], *, seed: int, epoch: int) -> Views:
    """Draw a view of every image: a side uniform in [0.7, 1] of the whole, its place uniform, half of them mirrored.

    Args:
        rows: Rows of the manifest ``(n,)``.
        seed: Of the run.
        epoch: From 1 on.
    """
    drawn = np.array([np.random.default_rng((seed, epoch, int(row))).random(4) for row in rows]).reshape(-1, 4)
    side = LEAST + (1 - LEAST) * drawn[:, 0]
    left, upper = (1 - side) * drawn[:, 1], (1 - side) * drawn[:, 2]
    edges = np.stack([left, upper, left + side, upper + side], axis=1)
    return Views([(a, b, min(c, 1.0), min(d, 1.0)) for a, b, c, d in edges.tolist()], drawn[:, 3] < 0.5)


def flip(pixels: Pixels, grid: Grid, mirrored: npt.NDArray[np.bool_]) -> Pixels:
    """Patches ``(n, P, 3 p^2)`` uint8 in which some images are mirrored."""
    if not mirrored.any():
        return pixels
    side = round((pixels.shape[-1] / 3) ** 0.5)
    seen = pixels[mirrored].reshape(-1, grid.rows, grid.columns, side, side, 3)
    out = pixels.copy()
    out[mirrored] = seen[:, :, ::-1, :, ::-1].reshape(-1, grid.tokens, 3 * side**2)
    return out


Rows = npt.NDArray[np.int64]


@dataclass(kw_only=True)
class _Part:
    """What goes through one tower in one pass.

    Attributes:
        places: Its places in the batch.
        images: Patches of each grid, on the CPU.
        ids: Token ids, on the CPU; None for images.
        made: Embeddings, with their graph where it is kept.
    """

    places: Tensor
    images: Sequence[tuple[Tensor, Grid]] = ()
    ids: Tensor | None = None
    made: Tensor | None = None

    @property
    def side(self) -> str:
        """``image`` or ``text``."""
        return "image" if self.ids is None else "text"


class Feed:
    """Gives batches of embeddings, and takes their gradients.

    Args:
        towers: What is trained.
        store: Images, captions, and embeddings of what is not.
        config: Finetune, training and hardware sections are used.
        shards: Where trained blocks are spread over the processes; whole in each when not given.
    """

    def __init__(self, towers: Towers, store: LiveStore, config: Config, shards: Shards | None = None) -> None:
        self.towers, self._store, self.team = towers, store, store.team
        self.shards = shards or Shards(towers, store.team, sharded=False)
        self._augment, self._seed = config.finetune.augment, config.hardware.seed
        self._pin_memory = config.data.pin_memory
        self._live = set(towers.sides) | ({"image"} if self._augment else set())
        self._keeps_graph = config.training.accumulation_steps == 1
        most = config.finetune.batch_tokens or store.encoder.batch_tokens
        budget = store.encoder.spec.most_tokens
        self._tokens = {"image": most, "text": most}
        if not self._keeps_graph:
            largest = config.training.batch_size
            self._tokens = {"image": min(most, largest * budget), "text": min(most, largest * _text_length(store))}
        self._precision = autocast(store.team.device, config.training.mixed_precision)
        self._pieces: Iterator[Piece] = iter(())
        self._mirrored: list[npt.NDArray[np.bool_]] = []
        self._parts: list[_Part] = []
        self._leaves: dict[str, Tensor] = {}

    def begin(self, epoch: int, batches: Sequence[Rows]) -> None:
        """Set out on an epoch, or on what is left of it: rows of each batch."""
        mine = [rows[self.team.share(len(rows))] for rows in batches]
        boxes = None
        if self._augment:
            views = [draw_views(rows, seed=self._seed, epoch=epoch) for rows in mine]
            boxes, self._mirrored = [view.boxes for view in views], [view.mirrored for view in views]
        if "image" in self._live:
            self._pieces = self._store.read(mine, boxes, tokens=self._tokens["image"])

    def embed(self, train: Split, at: Tensor, caption: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A batch as :meth:`~mmcli.pipeline.training.data.Split.batch` gives it, what is live made anew.

        Args:
            train: The train split.
            at: Places in it ``(n,)``.
            caption: Which caption of each ``(n,)``.
        """
        rows = train.rows[at]
        read = caption.clamp(max=train.v_txt.shape[1] - 1)
        v_img, v_txt, y = train.batch(at, read)
        self._parts = [
            *self._in_step("image", list(self._image_parts(len(at)))),
            *self._in_step("text", list(self._text_parts(rows, caption))),
        ]
        made = {"image": v_img, "text": v_txt}
        for side in self._live:
            made[side] = torch.zeros_like(made[side])
        for part in self._parts:
            keeps = self._keeps_graph and part.side in self.towers.sides
            with contextlib.nullcontext() if keeps else torch.no_grad():
                found = self._run(part)
            part.made = found if keeps else None
            made[part.side][part.places] = found.detach()[: len(part.places)]
        if self._live:
            self.team.sum_([made[side] for side in sorted(self._live)])
        self._leaves = {side: made[side].requires_grad_() for side in self.towers.sides}
        return made["image"], made["text"], y

    def backward(self) -> None:
        """Send the gradient at the embeddings of the last batch through the towers, and sum it over all processes."""
        kept, slopes = [], []
        # Gradients of shards arrive as means over the processes.
        scale = self.team.size if self.shards.sharded else 1
        for part in self._parts:
            if part.side not in self.towers.sides:
                continue
            slope = self._leaves[part.side].grad
            if slope is None:
                continue
            own = slope[part.places] * scale
            if not len(part.places):
                own = torch.zeros_like(slope[:1])
            if part.made is None:
                torch.autograd.backward(self._run(part), own)
            else:
                kept.append(part.made)
                slopes.append(own)
        if kept:
            torch.autograd.backward(kept, slopes)
        self._parts, self._leaves = [], {}
        if self.team.size > 1:
            self._share_gradients()

    def _share_gradients(self) -> None:
        """What every process has whole; gradients of shards are summed where they are."""
        whole = [one for name, one in self.towers.trained.items() if not self.shards.is_part(name)]
        for parameter in whole:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [one.grad for one in whole if one.grad is not None]
        self.team.sum_(gradients)
        for gradient in gradients if self.shards.sharded else ():
            gradient.div_(self.team.size)

    def _in_step(self, side: str, parts: list[_Part]) -> list[_Part]:
        """As many parts as any process has: who has none left computes what goes nowhere, or shards would wait."""
        if not self.shards.sharded or side not in self.towers.sides:
            return parts
        spec = self._store.encoder.spec
        grid = spec.fixed or Grid(1, 1)
        nothing = torch.zeros(0, dtype=torch.int64, device=self.team.device)
        pixels = torch.zeros((1, grid.tokens, spec.width), dtype=torch.uint8)
        ids = torch.zeros((1, _text_length(self._store)), dtype=torch.int64)
        idle = _Part(places=nothing, images=[(pixels, grid)]) if side == "image" else _Part(places=nothing, ids=ids)
        return [*parts, *(replace(idle) for _ in range(self.team.most(len(parts)) - len(parts)))]

    def _image_parts(self, n: int) -> Iterator[_Part]:
        """Packs of pieces, each of as many tokens as a pass may have."""
        pack, places, tokens = list[tuple[Tensor, Grid]](), list[Tensor](), 0
        for images, grid, at in self._image_pieces(n):
            more = len(images) * grid.tokens
            if pack and tokens + more > self._tokens["image"]:
                yield _Part(places=torch.cat(places), images=pack)
                pack, places, tokens = [], [], 0
            pack, places, tokens = [*pack, (images, grid)], [*places, at], tokens + more
        if pack:
            yield _Part(places=torch.cat(places), images=pack)

    def _image_pieces(self, n: int) -> Iterator[tuple[Tensor, Grid, Tensor]]:
        """This process's images of the next batch of n, a grid at a time: patches, grid, places in the batch."""
        if "image" not in self._live:
            return
        mine = torch.arange(n)[self.team.share(n)]
        for piece in self._pieces if len(mine) else ():
            refuse_unreadable(piece.bad)
            if piece.batch is not None:
                inside = list(piece.batch.rows)
                pixels = self._seen(piece.pixels, piece.batch.grid, piece.number, inside)
                places = to_device(mine[inside], self.team.device, pin=self._pin_memory)
                yield torch.from_numpy(pixels), piece.batch.grid, places
            if piece.last:
                return

    def _seen(self, pixels: Pixels, grid: Grid, number: int, rows: Sequence[int]) -> Pixels:
        return flip(pixels, grid, self._mirrored[number][rows]) if self._augment else pixels

    def _text_parts(self, rows: Tensor, caption: Tensor) -> Iterator[_Part]:
        mine = torch.arange(len(rows))[self.team.share(len(rows))]
        if "text" not in self._live or not len(mine):
            return
        chosen = torch.stack([rows, caption], dim=1).cpu()[mine].tolist()  # a GPU is waited for once
        ids = self._store.encoder.tokenize([self._store.listing.captions[row][which] for row, which in chosen])
        most = max(1, self._tokens["text"] // ids.shape[1])
        for places, given in zip(torch.split(mine, most), torch.split(ids, most), strict=True):
            yield _Part(places=to_device(places, self.team.device, pin=self._pin_memory), ids=given)

    def _run(self, part: _Part) -> Tensor:
        tower: Any = self.towers.sides.get(part.side)
        if tower is None:
            encoder = self._store.encoder
            return torch.cat([encoder.image_features(patches.numpy(), grid) for patches, grid in part.images])
        device, pin = self.team.device, self._pin_memory
        with self._precision:
            found: Tensor = (
                tower.encode_pack([(to_device(patches, device, pin=pin), grid) for patches, grid in part.images])
                if part.ids is None
                else tower(to_device(part.ids, device, pin=pin))
            )
        return found


def _text_length(store: LiveStore) -> int:
    return int(store.encoder.identity.text_length)


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
