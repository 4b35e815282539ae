"""The inputs of a training: a store, its splits on the device, and a head that fits them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from ...errors import InputError
from ...heads.model import BaseHead, make_head
from ..core.config import Config, check_frozen
from ..core.device import device_line, pick_device, seed_everything
from ..core.progress import Progress
from ..data.protocols import chosen
from ..extraction.stores import LabelledStore, Reading, read_store, resolve_config
from .data import Split
from .step import Step


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A store that was read for a training.

    Attributes:
        config: The resolved configuration: it says what the store knows.
        labelled: The store.
        splits: Its splits, on the device, each embedding with its own norm.
        device: The device to train on.
    """

    config: Config
    labelled: LabelledStore
    splits: dict[str, Split]
    device: torch.device

    @property
    def image_ids(self) -> dict[str, npt.NDArray[Any]]:
        """Image ids of every split, ``(n,)`` int64."""
        ids = self.labelled.listing.image_ids
        return {name: ids[split.rows.cpu().numpy()] for name, split in self.splits.items()}

    @property
    def run_splits(self) -> dict[str, Split]:
        """The splits as a run reads them: with ``fusion.magnitude: shuffled`` norms are shuffled, by the run's seed."""
        if self.config.fusion.magnitude == "own":
            return self.splits
        return {name: split.shuffle_magnitudes(self.config.hardware.seed) for name, split in self.splits.items()}

    @property
    def precision(self) -> str:
        """The name of the precision that the forward pass computes in."""
        return Step.autocast_of(self.device, self.config).name

    def make_head(self, train: Split) -> BaseHead:
        """A head whose parameters are drawn by the seed of the run, its statistics fitted to what the run trains on."""
        head = draw_head(self.config, width=self.labelled.store.width, device=self.device)
        head.fit_log_norms(train.log_norms())
        return head


def prepare_training(config: Config, store: Path | Reading | Prepared | None, progress: Progress) -> Prepared:
    """Read a store, put its splits onto the device and resolve the configuration by what the store says.

    Args:
        config: Everything but the data section is used.
        store: The store's folder, the newest below ``data/cache`` when not given; or a store that is being read, or
            that an earlier training of this process has read: then protocol and device must be the same.
        progress: Shows which store is read, and where the training computes.

    Raises:
        InputError: A bad store, an empty split, no label to learn or to choose the best epoch by, or fewer train images
            than neighbours.
    """
    check_frozen(config)
    if isinstance(store, Prepared):
        prepared = replace(store, config=resolve_config(config, store.labelled))
        check_splits(prepared.splits, prepared.config, store.labelled.store.folder)
        return prepared
    reading = store if isinstance(store, Reading) else Reading(store, config)
    device = pick_device(config.hardware.device)
    labelled = read_store(reading.folder, config, reading)
    place = device_line(device, Step.autocast_of(device, config).name)
    progress.say(f"training from {reading.folder} on {place}" + (" (the newest store)" if reading.is_newest else ""))
    config = resolve_config(config, labelled)
    splits = place_splits(labelled, config, device)
    check_splits(splits, config, reading.folder)
    return Prepared(config=config, labelled=labelled, splits=splits, device=device)


def place_splits(labelled: LabelledStore, config: Config, device: torch.device) -> dict[str, Split]:
    """The splits of the protocol on a device, in arrays that they share: train, val, test, and database if it has one.

    Raises:
        InputError: The store or the lists do not give them.
    """
    arrays, listing = labelled.embeddings, labelled.listing
    whole = Split.place(
        arrays.v_img,
        arrays.v_txt,
        arrays.n_captions,
        listing.labels_matrix(),
        device,
        norms=(arrays.norm_img, arrays.norm_txt),
    )
    return {split: whole.part(rows) for split, rows in chosen(config.data, listing).items()}


def draw_head(config: Config, *, width: int, device: torch.device) -> BaseHead:
    """A head whose parameters were drawn by the seed of a run, its statistics not fitted."""
    seed_everything(config.hardware.seed, deterministic=config.hardware.deterministic)
    return make_head(config.head, config.fusion, config.hash, config.classifier, width=width).to(device)


def check_splits(splits: dict[str, Split], config: Config, folder: Path) -> None:
    """Refuse what would only show after the first epoch.

    Raises:
        InputError: No label in train or val, an image without a caption where the head reads captions, or fewer train
            images than a batch or a vote needs.
    """
    missing = sum(int((split.captions_of == 0).sum()) for split in splits.values())
    if missing and config.fusion.inputs != "image":
        raise InputError(
            f"{missing:,} of {sum(map(len, splits.values())):,} images have no caption",
            where=folder,
            wanted=f"a caption for every image, because the head reads {config.fusion.inputs}",
            do="give --inputs image, or add captions",
        )
    for name in ("train", "val"):
        if not splits[name].own_labels.any():
            raise InputError(
                f"no {name} image has a label",
                where=folder,
                got="all-zero labels",
                wanted="at least one",
                do="give the manifest labels, or another split",
            )
    least = max(2, config.knn.K if config.training.monitor == "knn" else 0)
    if len(splits["train"]) < least:
        raise InputError(
            "too few train images",
            where=folder,
            got=len(splits["train"]),
            wanted=f"at least {least}",
            do="lower it (--set knn.K=N) or give --monitor classifier" if least > 2 else "add images to the manifest",
        )
