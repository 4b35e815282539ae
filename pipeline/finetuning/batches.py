"""Batches of a training whose towers take part: images and captions in, a batch of embeddings out, and gradients back.

The head and its losses look at a whole batch at once (batch normalisation, bit balance, covariance, mixtures), the
towers at packs of it. So the embeddings of a batch are leaves of the head's graph, and the gradient that arrives at
them goes on into the towers pack by pack (GradCache: Gao et al. 2021, section 3). With ``accumulation_steps`` the
first pass keeps no graph and every pack is computed again: memory of one pack, the gradient of the whole batch.

Symbols: n images of a batch, D embedding width.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...heads.model import BaseHead
from ..core.config import Config
from ..core.device import autocast, to_device
from ..extraction.images import Box, Grid, Pixels
from ..extraction.reader import Piece
from ..extraction.towers import ImageTower
from ..training.data import Split
from ..training.step import Step
from .distributed import Shards
from .embeddings import LiveStore, Rows, refuse_unreadable
from .towers import PARTS, Towers

# The smallest part of an image, as a share of its sides: at 0.7 half of its area.
SMALLEST_SIDE = 0.7


class Views(NamedTuple):
    """What is seen of n images.

    Attributes:
        boxes: The part of each image.
        mirrored: Whether left and right are exchanged, ``(n,)``.
    """

    boxes: list[Box]
    mirrored: npt.NDArray[np.bool_]


def draw_views(rows: Rows, *, seed: int, epoch: int) -> Views:
    """Draw a view of every image: a side uniform in [0.7, 1] of the whole, its place uniform, half of them mirrored.

    Args:
        rows: Rows of the manifest ``(n,)``.
        seed: The run's seed.
        epoch: The epoch, from 1 on.
    """
    drawn = np.array([np.random.default_rng((seed, epoch, int(row))).random(4) for row in rows]).reshape(-1, 4)
    side = SMALLEST_SIDE + (1 - SMALLEST_SIDE) * drawn[:, 0]
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


@dataclass(kw_only=True)
class _Pack:
    """What goes through one tower in one pass.

    Attributes:
        side: The tower, ``image`` or ``text``.
        places: Places in the batch, ``(n,)`` on the device.
        inputs: On the CPU, patches and grid of pieces of images, or token ids ``(n, T)``.
        features: Embeddings with their graph, where it is kept.
    """

    side: str
    places: Tensor
    inputs: Any
    features: Tensor | None = None


class TowerBatches:
    """Gives batches of embeddings, and sends their gradients back through the towers.

    Args:
        towers: The towers, of which something is trained or sees other views.
        store: Images, captions, and the embeddings of what does not change.
        config: The configuration; its finetune, training, data and hardware sections are used.
        shards: The trained parameters where they are spread over the processes; whole in each when not given.
    """

    def __init__(self, towers: Towers, store: LiveStore, config: Config, shards: Shards | None = None) -> None:
        self.towers, self._store, self.group = towers, store, store.group
        self.shards = shards or Shards(towers, store.group)
        self._augment, self._seed = config.finetune.augment, config.hardware.seed
        self._live = sorted({*towers.sides, *(["image"] if self._augment else [])})
        self._keeps_graph = config.training.accumulation_steps == 1
        self._text_length = int(store.encoder.identity.text_length)
        most = config.finetune.batch_tokens or store.encoder.batch_tokens
        self._most_tokens = {"image": most, "text": most}
        if not self._keeps_graph:
            longest = {"image": store.encoder.spec.most_tokens, "text": self._text_length}
            self._most_tokens = {side: min(most, config.training.batch_size * n) for side, n in longest.items()}
        self._precision = autocast(self.group.device, config.training.mixed_precision)
        self._put = partial(to_device, device=self.group.device, pin=config.data.pin_memory)
        self._pieces: Iterator[Piece] = iter(())
        self._mirrored: list[npt.NDArray[np.bool_]] = []
        self._packs: list[_Pack] = []
        self._leaves: dict[str, Tensor] = {}

    def begin(self, epoch: int, batches: Sequence[Rows]) -> None:
        """Begin an epoch, or what is left of it: rows of the manifest of each batch."""
        mine = [rows[self.group.share(len(rows))] for rows in batches]
        boxes = None
        if self._augment:
            views = [draw_views(rows, seed=self._seed, epoch=epoch) for rows in mine]
            boxes, self._mirrored = [view.boxes for view in views], [view.mirrored for view in views]
        if "image" in self._live:
            self._pieces = self._store.read(mine, boxes, tokens=self._most_tokens["image"])

    def embed(self, train: Split, places: Tensor, caption: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A batch as :meth:`~mmcli.pipeline.training.data.Split.batch` gives it, embedded by the towers as they are.

        Args:
            train: The train split.
            places: Places in it ``(n,)``.
            caption: Which caption of each ``(n,)``.
        """
        v_img, v_txt, y = train.batch(places, caption.clamp(max=train.v_txt.shape[1] - 1))
        self._packs = [
            *self._in_step("image", list(self._image_packs(len(places)))),
            *self._in_step("text", list(self._text_packs(train.rows[places], caption))),
        ]
        embeddings = {"image": v_img, "text": v_txt}
        for side in self._live:
            embeddings[side] = torch.zeros_like(embeddings[side])
        for pack in self._packs:
            keeps_graph = self._keeps_graph and pack.side in self.towers.sides
            with contextlib.nullcontext() if keeps_graph else torch.no_grad():
                features = self._run(pack)
            pack.features = features if keeps_graph else None
            embeddings[pack.side][pack.places] = features.detach()[: len(pack.places)]
        self.group.all_reduce([embeddings[side] for side in self._live])
        self._leaves = {side: embeddings[side].requires_grad_() for side in self.towers.sides}
        return embeddings["image"], embeddings["text"], y

    def backward(self) -> None:
        """Send the gradient at the embeddings of the last batch through the towers, and sum it over all processes."""
        features, gradients = [], []
        for pack in self._packs:
            gradient = self._leaves[pack.side].grad if pack.side in self._leaves else None
            if gradient is None:
                continue
            gradient = gradient[pack.places] if len(pack.places) else torch.zeros_like(gradient[:1])
            if pack.features is None:
                torch.autograd.backward(self._run(pack), gradient)
            else:
                features.append(pack.features)
                gradients.append(gradient)
        if features:
            torch.autograd.backward(features, gradients)
        self._packs, self._leaves = [], {}
        self._sum_gradients()

    def _sum_gradients(self) -> None:
        """Sum what every process has whole; gradients of shards are summed as they arrive."""
        if self.group.size > 1:
            whole = [parameter for name, parameter in self.towers.trained.items() if not self.shards.is_part(name)]
            for parameter in whole:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self.group.all_reduce([parameter.grad for parameter in whole if parameter.grad is not None])
        self.shards.take_gradients()

    def _in_step(self, side: str, packs: list[_Pack]) -> list[_Pack]:
        """The packs, with idle ones added until every process has equally many, as sharded parameters require."""
        if not self.shards.sharded or side not in self.towers.sides:
            return packs
        spec = self._store.encoder.spec
        grid = spec.fixed or Grid(1, 1)
        inputs: Any = torch.zeros((1, self._text_length), dtype=torch.int64)
        if side == "image":
            inputs = [(torch.zeros((1, grid.tokens, spec.width), dtype=torch.uint8), grid)]
        nothing = torch.zeros(0, dtype=torch.int64, device=self.group.device)
        idle = _Pack(side=side, places=nothing, inputs=inputs)
        return [*packs, *(replace(idle) for _ in range(self.group.maximum(len(packs)) - len(packs)))]

    def _image_packs(self, n: int) -> Iterator[_Pack]:
        """This process's images of the next batch of n, as many tokens a pack as a pass may have."""
        mine = torch.arange(n)[self.group.share(n)]
        if "image" not in self._live or not len(mine):
            return
        images, places, tokens = list[tuple[Tensor, Grid]](), list[Tensor](), 0
        for piece in self._pieces:
            refuse_unreadable(piece.bad)
            if piece.batch is not None:
                if images and tokens + piece.batch.tokens > self._most_tokens["image"]:
                    yield _Pack(side="image", places=self._put(torch.cat(places)), inputs=images)
                    images, places, tokens = [], [], 0
                grid, rows = piece.batch.grid, list(piece.batch.rows)
                pixels = flip(piece.pixels, grid, self._mirrored[piece.number][rows]) if self._augment else piece.pixels
                images.append((torch.from_numpy(pixels), grid))
                places.append(mine[rows])
                tokens += piece.batch.tokens
            if piece.last:
                break
        if images:
            yield _Pack(side="image", places=self._put(torch.cat(places)), inputs=images)

    def _text_packs(self, rows: Tensor, caption: Tensor) -> Iterator[_Pack]:
        mine = torch.arange(len(rows))[self.group.share(len(rows))]
        if "text" not in self._live or not len(mine):
            return
        chosen = torch.stack([rows, caption], dim=1).cpu()[mine].tolist()  # a GPU is waited for once
        ids = self._store.encoder.tokenize([self._store.listing.captions[row][which] for row, which in chosen])
        n = max(1, self._most_tokens["text"] // ids.shape[1])
        for places, part in zip(torch.split(mine, n), torch.split(ids, n), strict=True):
            yield _Pack(side="text", places=self._put(places), inputs=part)

    def _run(self, pack: _Pack) -> Tensor:
        tower = self.towers.sides.get(pack.side)
        if tower is None:  # frozen, but of other views of the images
            encoder = self._store.encoder
            return torch.cat([encoder.image_features(patches.numpy(), grid) for patches, grid in pack.inputs])
        with self._precision:
            if isinstance(tower, ImageTower):
                return tower.encode_pack([(self._put(patches), grid) for patches, grid in pack.inputs])
            return tower(self._put(pack.inputs))


class TowerStep(Step):
    """A :class:`~mmcli.pipeline.training.step.Step` on batches of towers that are trained with the head.

    Args:
        head: The head, on the device of the split; trained in place.
        train: The train split.
        config: The configuration, in which a batch is a whole optimiser step.
        steps: Optimiser steps in an epoch.
        batches: The batches.
    """

    def __init__(self, head: BaseHead, train: Split, config: Config, *, steps: int, batches: TowerBatches) -> None:
        self._tower_batches, self._shards = batches, batches.shards
        super().__init__(head, train, config, steps=steps)

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
        """What this process has of what is shaped like a trained parameter."""
        return self._shards.part(name, whole)

    def _more_groups(self) -> Sequence[dict[str, Any]]:
        return self._tower_batches.towers.groups(self._config.optimizer, self._shards.local)

    def _over_all(self, group: str, square: Tensor) -> Tensor:
        if group.endswith(PARTS):
            square = square.clone()
            self._tower_batches.group.all_reduce([square])
        return square

    def begin(self, epoch: int, order: Tensor, caption: Tensor, *, done: int = 0, images: int = 0) -> None:
        """Begin an epoch; images are read ahead from here on."""
        super().begin(epoch, order, caption, done=done, images=images)
        rows = self._train.rows[order].cpu()
        self._tower_batches.begin(epoch, [part.numpy() for part in torch.tensor_split(rows, self._steps)][done:])

    def _uses_graphs(self) -> bool:
        """Every batch has other grids, so there is no graph to replay."""
        return False

    def _backward(self, places: Tensor, caption: Tensor, parts: int) -> None:
        self._backward_of(self._tower_batches.embed(self._train, places, caption), places, parts)
        self._tower_batches.backward()
