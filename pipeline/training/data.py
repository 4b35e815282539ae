"""A split of a store, resident on a device: rows are gathered in bulk, and no loader touches them one by one.

Symbols: N images of the store, n images of a split, D embedding width, C classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import InputError
from ...heads.decompose import EPS
from ...heads.model import BaseHead

CHUNK_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Split:
    """The n images of one split, by their rows in arrays that all splits share.

    Attributes:
        v_img: Raw image embeddings of the store ``(N, D)``, float16 or float32.
        v_txt: Raw caption embeddings ``(N, 5, D)``.
        n_captions: Real captions of each image ``(N,)`` int64.
        labels: ``(N, C)`` uint8.
        norm_img: Norms of image embeddings ``(N,)`` float32.
        norm_txt: Norms of caption embeddings ``(N, 5)`` float32.
        rows: Which rows are this split's, ``(n,)`` int64, in manifest order.
        stretch_img: Factors of image embeddings ``(N,)`` float32; None where they are left as they are.
        stretch_txt: Factors of caption embeddings ``(N, 5)``; None where they are left as they are.
    """

    v_img: Tensor
    v_txt: Tensor
    n_captions: Tensor
    labels: Tensor
    norm_img: Tensor
    norm_txt: Tensor
    rows: Tensor
    stretch_img: Tensor | None = None
    stretch_txt: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def device(self) -> torch.device:
        """The device that the tensors are on."""
        return self.rows.device

    @classmethod
    def place(
        cls,
        v_img: npt.NDArray[Any],
        v_txt: npt.NDArray[Any],
        n_captions: npt.NDArray[Any],
        labels: npt.NDArray[np.uint8],
        device: torch.device,
        norms: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None = None,
    ) -> "Split":
        """Put arrays onto a device once; a CPU reads them where they are.

        Args:
            v_img: Image embeddings of the store ``(N, D)``.
            v_txt: Caption embeddings of the store ``(N, 5, D)``.
            n_captions: Real captions of each image ``(N,)``, of any integer dtype.
            labels: ``(N, C)`` uint8.
            device: The device to put them on.
            norms: ``(N,)`` of images and ``(N, 5)`` of captions, as a store has them; computed when not given.
        """
        norms = (_norms(v_img), _norms(v_txt)) if norms is None else norms
        norm_img, norm_txt = (torch.from_numpy(norm.astype(np.float32)).to(device) for norm in norms)
        return cls(
            v_img=torch.from_numpy(v_img).to(device),
            v_txt=torch.from_numpy(v_txt).to(device),
            n_captions=torch.from_numpy(n_captions.astype(np.int64)).to(device),
            labels=torch.from_numpy(labels).to(device),
            norm_img=norm_img,
            norm_txt=norm_txt,
            rows=torch.arange(len(v_img), device=device),
        )

    def part(self, rows: npt.NDArray[np.int64]) -> "Split":
        """Another split of the same store: rows ``(n,)`` of the store."""
        return replace(self, rows=torch.from_numpy(rows).to(self.device))

    def sample(self, most: int, seed: int) -> "Split":
        """At most ``most`` images of this split, drawn once by the seed, in manifest order."""
        if len(self) <= most:
            return self
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(self), generator=generator)[:most].sort().values
        return replace(self, rows=self.rows[drawn.to(self.device)])

    @property
    def own_labels(self) -> Tensor:
        """Labels of this split ``(n, C)`` uint8."""
        return self.labels[self.rows]

    @property
    def captions_of(self) -> Tensor:
        """Real captions of each image of this split ``(n,)`` int64."""
        return self.n_captions[self.rows]

    def batch(self, places: Tensor, caption: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
        """Image embeddings, one caption's embedding and labels of some images, in float32.

        Args:
            places: Places in this split, of any shape S.
            caption: Which caption of each, shape S, or one number for all.

        Returns:
            ``S + (D,)``, ``S + (D,)`` and ``S + (C,)``.
        """
        rows = self.rows[places]
        v_img, v_txt = self.v_img[rows].float(), self.v_txt[rows, caption].float()
        if self.stretch_img is not None and self.stretch_txt is not None:
            v_img = v_img * self.stretch_img[rows, None]
            v_txt = v_txt * self.stretch_txt[rows, caption, None]
        return v_img, v_txt, self.labels[rows].float()

    def chunks(self, size: int = CHUNK_ROWS) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All of the split in order, with the first caption, as :meth:`batch` gives it: ``size`` images at a time."""
        for places in torch.split(torch.arange(len(self), device=self.device), size):
            yield self.batch(places, 0)

    def shuffle_magnitudes(self, seed: int) -> "Split":
        """The control of the magnitude: every embedding keeps its direction and takes the norm of another one.

        Norms are permuted over the images of this split, those of captions over its real captions. A zero vector
        stays one.

        Args:
            seed: Of the permutations.
        """
        generator = torch.Generator().manual_seed(seed)
        stretch_img = torch.ones(len(self.v_img), device=self.device)
        stretch_txt = torch.ones(self.v_txt.shape[:2], device=self.device)
        real = torch.arange(self.v_txt.shape[1], device=self.device) < self.captions_of[:, None]
        rows, captions = self.rows[real.nonzero()[:, 0]], real.nonzero()[:, 1]
        stretch_img[self.rows] = _others(self.norm_img[self.rows], generator)
        stretch_txt[rows, captions] = _others(self.norm_txt[rows, captions], generator)
        norms = {"norm_img": self.norm_img * stretch_img, "norm_txt": self.norm_txt * stretch_txt}
        return replace(self, stretch_img=stretch_img, stretch_txt=stretch_txt, **norms)

    def norms(self) -> tuple[Tensor, Tensor]:
        """Norms of every image and of its first caption, ``(n,)`` float32 each, as the head will see them."""
        return self.norm_img[self.rows], self.norm_txt[self.rows, 0]

    def log_norms(self) -> Tensor:
        """M of every image and its first caption, ``(n, 2)`` float32, as the head will see them at the start."""
        return torch.log(torch.stack(self.norms(), dim=-1) + EPS)


def _norms(v: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    squares: npt.NDArray[np.float32] = np.einsum("...d,...d->...", v, v, dtype=np.float32)
    return np.sqrt(squares)


def _others(norms: Tensor, generator: torch.Generator) -> Tensor:
    """Factors that give each vector the norm of another one, drawn at random; zero vectors stay as they are."""
    some = norms.nonzero()[:, 0]
    order = torch.randperm(len(some), generator=generator).to(norms.device)
    factors = torch.ones_like(norms)
    factors[some] = norms[some[order]] / norms[some]
    return factors


@torch.inference_mode()
def encode_split(head: BaseHead, split: Split, *, batch_size: int = CHUNK_ROWS) -> tuple[Tensor, Tensor]:
    """Features and logits of a whole split in ``eval()`` mode, from the first caption.

    Returns:
        Soft codes h ``(n, B)``, or z without hash layer, and logits ``(n, C)``, both float32 on the split's device.

    Raises:
        InputError: An output is NaN or infinite, which finite but large parameters can produce.
    """
    head.eval()
    features, logits = [], []
    for v_img, v_txt, _ in split.chunks(batch_size):
        output = head(v_img, v_txt)
        features.append(output.features.float())
        logits.append(output.logits.float())
    codes, scores = torch.cat(features), torch.cat(logits)
    if not all_finite(codes, scores):
        raise diverged("the head gives no numbers", got="NaN or inf in codes or logits")
    return codes, scores


def all_finite(*tensors: Tensor) -> bool:
    """Whether every value of every tensor is a number; one look at the device for all of them."""
    return bool(torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all())


class Diverged(InputError):  # noqa: N818 - what a training did, as its statuses are named
    """Raised when a training or a head gives no numbers."""


def diverged(what: str, *, got: object, where: str | None = None) -> Diverged:
    """The error of a training or a head that gives no numbers."""
    return Diverged(
        what,
        where=where,
        got=got,
        wanted="numbers",
        do="lower the learning rates, or check the store with `mmcli cache verify`",
    )
