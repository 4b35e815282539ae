"""The stage ``prepare``: COCO's files and Karpathy's split become one checked manifest."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ... import InputError
from ..core.files import refuse_existing
from .coco import INSTANCES_FILES, SPLIT_FILE, Instances, KarpathySplit, read_instances, read_karpathy
from .image_files import check_files, place_images
from .manifest import Manifest, says_it_is_of, write_manifest
from .manifest_checks import label_lists
from .statistics import Statistics, count, statistics_tables

__all__ = ["MANIFEST_FILE", "PrepareResult", "Statistics", "prepare", "statistics_tables"]

MANIFEST_FILE = "manifest.parquet"
NAME = "coco"
# What to download for a file that is missing, and where to put it.
GET_INSTANCES = "unpack annotations_trainval2014.zip from https://cocodataset.org/#download there"
GET_SPLIT = (
    f"put {SPLIT_FILE} of caption_datasets.zip there"
    " (https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip)"
)
GET_IMAGES = "unpack train2014.zip and val2014.zip from https://cocodataset.org/#download there"


@dataclass(frozen=True, kw_only=True)
class PrepareResult:
    """What ``prepare`` wrote.

    Attributes:
        path: The manifest.
        sha256: Hash of its content.
        statistics: What it holds.
    """

    path: Path
    sha256: str
    statistics: Statistics

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return {"manifest": str(self.path), "sha256": self.sha256, **self.statistics.to_json()}


def prepare(data: Path, out: Path | None = None, *, check_images: bool = True) -> PrepareResult:
    """Read and check COCO's files and Karpathy's split, and write the manifest; it prints nothing.

    Rows are in the split file's order. Train and restval become train. Killed at any moment, an older manifest stays.

    Args:
        data: The data set's folder: ``train2014`` and ``val2014`` (or both below ``images``),
            ``annotations/instances_train2014.json`` and ``instances_val2014.json``, ``dataset_coco.json``. It is only
            read when ``out`` is another folder.
        out: The folder to write ``manifest.parquet`` into; the data folder when not given. Paths in the manifest stay
            relative to ``data``. A manifest that this function wrote before is replaced, another file is not.
        check_images: Look for every image file.

    Raises:
        InputError: A file is missing or something in it is wrong, or the manifest cannot be written.
    """
    _look_for_files(data)
    path = (out or data) / MANIFEST_FILE
    refuse_existing(
        path, lambda there: says_it_is_of(there, NAME), force=True, what="a manifest of `mmcli prepare`", option="--out"
    )
    split = read_karpathy(data / SPLIT_FILE)
    parts = [read_instances(data / name) for name in INSTANCES_FILES]
    instances = _join(parts)
    paths = place_images(data, split.folders, split.filenames)
    if check_images:
        paths = check_files(data, paths)
    listing, statistics = _merge(split, instances, paths)
    write_manifest(path, listing)
    return PrepareResult(path=path, sha256=listing.sha256, statistics=statistics)


def _look_for_files(data: Path) -> None:
    """Name everything that is missing at once, with where to get it."""
    if not data.is_dir():
        got = "a file" if data.exists() else "no such folder"
        raise InputError(
            "no data folder", where=data, got=got, wanted="a folder with COCO 2014",
            do=f"make it and {GET_IMAGES}, {GET_INSTANCES}, and {GET_SPLIT}; or name another with --data",
        )  # fmt: skip
    needed = dict.fromkeys(INSTANCES_FILES, GET_INSTANCES) | {SPLIT_FILE: GET_SPLIT}
    missing = [name for name in needed if not (data / name).is_file()]
    if missing:
        raise InputError(
            "files are missing", where=data, got=f"no {', no '.join(missing)}",
            do=" and ".join(dict.fromkeys(needed[name] for name in missing)),
        )  # fmt: skip


def _join(parts: list[Instances]) -> Instances:
    """The instances of both files as one."""
    first, second = parts
    names = [dict(zip(part.category_id.tolist(), part.category_names, strict=True)) for part in parts]
    if names[0] != names[1]:
        different = min(category for category, _ in names[0].items() ^ names[1].items())
        said = [repr(found[different]) if different in found else "not listed" for found in names]
        raise InputError(
            "the instances files have different categories", where=second.path,
            got=f"category {different} {said[1]}", wanted=f"{said[0]}, as in {first.path}",
        )  # fmt: skip
    if len(both := np.intersect1d(first.image_id, second.image_id)):
        raise InputError(
            "an image in both instances files", where=second.path, got=f"image {both[0]}, also in {first.path}",
            wanted="every image in one of them",
        )  # fmt: skip
    return Instances(
        path=first.path.parent,
        image_id=np.concatenate([part.image_id for part in parts]),
        category_id=first.category_id,
        category_names=first.category_names,
        annotation_image=np.concatenate([part.annotation_image for part in parts]),
        annotation_label=np.concatenate([part.annotation_label for part in parts]),
    )


def _merge(split: KarpathySplit, instances: Instances, paths: list[str]) -> tuple[Manifest, Statistics]:
    """Give every image of the split its labels: y[c] = 1 where it has an annotation of c, crowds included."""
    if len(unknown := np.flatnonzero(~np.isin(split.image_id, instances.image_id))):
        shown = ", ".join(str(image) for image in split.image_id[unknown[:3]])
        raise InputError(
            "images of the split file that no instances file lists", where=f"{split.path}, images[{unknown[0]}]",
            got=f"{len(unknown):,} unknown: cocoid {shown}", wanted=f"images of {instances.path}",
            do="take both from COCO 2014",
        )  # fmt: skip
    order = np.argsort(split.image_id)
    at = np.searchsorted(split.image_id, instances.annotation_image, sorter=order)
    row = order[np.minimum(at, len(order) - 1)]
    ours = split.image_id[row] == instances.annotation_image
    row, label, n_classes = row[ours], instances.annotation_label[ours], len(instances.category_names)
    is_restval = split.origin == "restval"
    listing = Manifest.from_columns(
        image_ids=split.image_id, paths=paths, splits=np.where(is_restval, "train", split.origin).tolist(),
        captions=split.captions, labels=label_lists(row, label, len(order), n_classes),
        category_names=instances.category_names, name=NAME, where=split.path,
    )  # fmt: skip
    statistics = count(
        listing, np.bincount(label, minlength=n_classes), restval=int(is_restval.sum()),
        captions_left_out=split.n_captions_found - sum(map(len, split.captions)),
        images_left_out=len(instances.image_id) - len(order),
    )  # fmt: skip
    return listing, statistics
