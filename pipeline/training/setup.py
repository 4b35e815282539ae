"""What a training reads: a store, its splits on the device, and a head that fits them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from ...errors import InputError
from ...heads.model import BaseHead, Head, make_head
from ..core.config import Config, check_frozen
from ..core.device import device_line, pick_device, seed_everything
from ..core.progress import Progress
from ..data.protocols import chosen
from ..extraction.stores import LabelledStore, Reading, find_store, read_store, resolve_config
from .data import Split
from .step import Step


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All that a training needs of a store.

    Attributes:
        config: Resolved: what the store knows is in it.
        labelled: The store.
        splits: Its splits, on the device, each embedding with its own norm.
        device: Where to train.
    """

    config: Config
    labelled: LabelledStore
    splits: dict[str, Split]
    device: torch.device

    @property
    def image_ids(self) -> dict[str, npt.NDArray[Any]]:
        """Of every split, ``(n,)`` int64."""
        ids = self.labelled.listing.image_ids
        return {name: ids[split.rows.cpu().numpy()] for name, split in self.splits.items()}

    def configured(self, config: Config) -> "Prepared":
        """The same store and splits for a further training, which may differ in all but protocol and device.

        Raises:
            InputError: As of :func:`prepare_training`, but for the store.
        """
        check_frozen(config)
        config = resolve_config(config, self.labelled)
        check_splits(self.splits, config, self.labelled.store.folder)
        return replace(self, config=config)

    def splits_of(self, config: Config) -> dict[str, Split]:
        """The splits as a run reads them: with ``fusion.magnitude: shuffled`` norms are shuffled, by the run's seed."""
        if config.fusion.magnitude == "own":
            return self.splits
        return {name: split.shuffle_magnitudes(config.hardware.seed) for name, split in self.splits.items()}

    def make_head(self, config: Config, train: Split) -> BaseHead:
        """A head whose parameters were drawn by the seed of a run, its statistics fitted to what the run trains on."""
        head = draw_head(config, width=self.labelled.store.width, device=self.device)
        fit_statistics(head, train)
        return head


def prepare_training(
    config: Config, store: Path | None, progress: Progress, reading: Reading | None = None
) -> Prepared:
    """Read a store and put its splits where the training will be.

    Args:
        config: As of :func:`train_head`.
        store: The store; the newest below ``data/cache`` when not given.
        progress: Who to tell.
        reading: The store, where reading it has begun already.

    Raises:
        InputError: As of :func:`train_head`, as far as the store and the configuration go.
    """
    check_frozen(config)
    folder = find_store(store) if reading is None else reading.folder
    device = pick_device(config.hardware.device)
    labelled = read_store(folder, config, reading)
    where = device_line(device, Step.autocast_of(device, config).name)
    progress.say(f"training from {folder} on {where}" + ("" if store else " (the newest store)"))
    config = resolve_config(config, labelled)
    splits = place_splits(labelled, config, device)
    check_splits(splits, config, folder)
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


def fit_statistics(head: BaseHead, train: Split) -> None:
    """Give a head the mean and deviation of the log-norms of train, each image with its first caption."""
    if isinstance(head, Head):
        head.fusion.fit_log_norms(train.log_norms())


def check_splits(splits: dict[str, Split], config: Config, folder: Path) -> None:
    """Refuse what would only show after the first epoch.

    Raises:
        InputError: No label in train or val, or fewer train images than a batch or a vote needs.
    """
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
