"""The stage ``prepare``: COCO's files and Karpathy's split become one checked manifest."""

import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from rich import box
from rich.table import Table

from ...errors import InputError, cannot_read
from ..core.console import FittingTable
from ..core.files import refuse_existing, resolve_image
from .coco import INSTANCES_FILES, SPLIT_FILE, Instances, KarpathySplit, read_instances, read_karpathy
from .manifest import SPLITS, Manifest, says_it_is_of, write_manifest
from .manifest_checks import label_lists

SHOWN = 3
DOWNLOAD = "unpack train2014.zip and val2014.zip from https://cocodataset.org/#download there"


def place_images(data: Path, folders: Sequence[str], filenames: Sequence[str]) -> list[str]:
    """Paths of N images relative to the data folder: below ``train2014`` or below ``images/train2014``.

    An image folder is looked up once, with its first image, so all images of a folder lie in the same place.

    Args:
        data: The data folder.
        folders: The image folder of each, as the split file names it.
        filenames: The file in it.

    Returns:
        N POSIX paths.
    """
    first = dict(zip(reversed(folders), reversed(filenames), strict=True))
    where = {folder: _place(data, folder, name) for folder, name in first.items()}
    return [(where[folder] / name).as_posix() for folder, name in zip(folders, filenames, strict=True)]


def _place(data: Path, folder: str, name: str) -> PurePosixPath:
    candidates = [PurePosixPath(folder), PurePosixPath("images", folder)]
    with_image = [place for place in candidates if (data / place / name).is_file()]
    present = [place for place in candidates if (data / place).is_dir()]
    return (with_image or present or candidates)[0]


def check_files(data: Path, paths: Sequence[str]) -> list[str]:
    """Look for every image.

    Folders are listed rather than files asked for one by one, which takes minutes on a network's disk.

    Args:
        data: The data folder.
        paths: N paths relative to it.

    Returns:
        The N paths, each under the name that its file has: macOS and some archives write letters with accents in
        another Unicode form than the lists that name them.

    Raises:
        InputError: Some are missing (how many, and the first three), or a link leads out of the data folder.
    """
    present: dict[str, dict[str, bool]] = {}
    composed: dict[str, dict[str, list[str]]] = {}
    missing = []
    on_disk = []
    for path in paths:
        folder, slash, name = path.rpartition("/")
        if folder not in present:
            # A folder that is itself a link out of the data folder shows in any of its images.
            resolve_image(data, path)
            present[folder] = _list_files(data / folder)
        if name not in present[folder] and not name.isascii():
            if folder not in composed:
                composed[folder] = _by_composed_form(present[folder])
            alike = composed[folder].get(unicodedata.normalize("NFC", name), [])
            name = alike[0] if len(alike) == 1 else name
        is_link = present[folder].get(name)
        on_disk.append(f"{folder}{slash}{name}")
        if is_link is None:
            missing.append(path)
        elif is_link:
            resolve_image(data, on_disk[-1])
    if missing:
        shown = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        raise InputError(
            "image files are missing",
            where=data,
            got=f"{len(missing):,} of {len(paths):,} missing: {shown}",
            wanted="every image of the split file",
            do=f"{DOWNLOAD}, or give --no-check-images",
        )
    return on_disk


def _by_composed_form(names: Iterable[str]) -> dict[str, list[str]]:
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    return alike


def _list_files(folder: Path) -> dict[str, bool]:
    """Name of every file of a folder, and whether it is a link; dangling links are left out."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_symlink() for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise cannot_read("cannot look into a folder", folder, error) from None


@dataclass(frozen=True, kw_only=True)
class ClassCount:
    """One category: its images per split, and its annotations in all of them."""

    name: str
    images: dict[str, int]
    annotations: int


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Counts of a prepared data set.

    Attributes:
        images: Images per split; those of restval are among train.
        restval: Images of train that come from restval.
        captions: Captions per split, at most five an image.
        captions_left_out: Captions beyond the fifth of their image.
        images_left_out: Images that the instances list and the split file does not.
        unlabelled: Images with no label, per split.
        positives: Pairs of an image and a category it shows, per split.
        tags_per_image: Mean number of categories an image shows, per split and over ``all``.
        classes: One entry per category, in label order.
    """

    images: dict[str, int]
    restval: int
    captions: dict[str, int]
    captions_left_out: int
    images_left_out: int
    unlabelled: dict[str, int]
    positives: dict[str, int]
    tags_per_image: dict[str, float]
    classes: tuple[ClassCount, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return asdict(self) | {"classes": [asdict(row) for row in self.classes]}


def count(
    listing: Manifest,
    annotations: npt.NDArray[np.int64],
    *,
    restval: int,
    captions_left_out: int,
    images_left_out: int,
) -> Statistics:
    """Count a manifest.

    Args:
        listing: The manifest of N images and C categories.
        annotations: Annotations per category in its images, ``(C,)`` int64.
        restval: As in :class:`Statistics`, like the two after it.
        captions_left_out: See there.
        images_left_out: See there.
    """
    labels, rows = listing.labels_matrix(), {split: listing.rows(split) for split in SPLITS}
    n_captions = np.array([len(texts) for texts in listing.captions])
    per_class = {split: labels[at].sum(axis=0, dtype=np.int64) for split, at in rows.items()}
    positives = {split: int(counts.sum()) for split, counts in per_class.items()}
    tags = {split: positives[split] / len(at) for split, at in rows.items()}
    return Statistics(
        images={split: len(at) for split, at in rows.items()},
        restval=restval,
        captions={split: int(n_captions[at].sum()) for split, at in rows.items()},
        captions_left_out=captions_left_out,
        images_left_out=images_left_out,
        unlabelled={split: int((~labels[at].any(axis=1)).sum()) for split, at in rows.items()},
        positives=positives,
        tags_per_image=tags | {"all": sum(positives.values()) / len(listing)},
        classes=tuple(
            ClassCount(name=name, images={s: int(per_class[s][c]) for s in SPLITS}, annotations=int(annotations[c]))
            for c, name in enumerate(listing.category_names)
        ),
    )


_RULED: dict[str, Any] = {"box": box.HEAVY_HEAD, "pad_edge": True, "collapse_padding": False}


def statistics_tables(statistics: Statistics) -> list[Table]:
    """Two tables: one line per split, and one per category."""
    return [_split_table(statistics), _class_table(statistics)]


def _split_table(found: Statistics) -> Table:
    notes = [f"train holds {found.restval:,} images of restval"]
    if found.captions_left_out:
        notes.append(f"{found.captions_left_out:,} captions beyond five an image were left out")
    if found.images_left_out:
        notes.append(f"{found.images_left_out:,} annotated images are in no split")
    table = FittingTable(title="Splits", caption="; ".join(notes), caption_justify="left", **_RULED)
    table.add_column("split", style="bold")
    for name in ("images", "captions", "no label", "tags an image"):
        table.add_column(name, justify="right")
    counts = (found.images, found.captions, found.unlabelled)
    for split in SPLITS:
        table.add_row(split, *(f"{column[split]:,}" for column in counts), f"{found.tags_per_image[split]:.2f}")
    table.add_section()
    totals = (f"{sum(column.values()):,}" for column in counts)
    table.add_row("all", *totals, f"{found.tags_per_image['all']:.2f}")
    return table


def _class_table(found: Statistics) -> Table:
    table = FittingTable(title="Categories: images of each split, and annotations", **_RULED)
    table.add_column("label", justify="right")
    table.add_column("category", style="bold")
    for name in (*SPLITS, "annotations"):
        table.add_column(name, justify="right")
    for label, row in enumerate(found.classes):
        table.add_row(str(label), row.name, *(f"{row.images[split]:,}" for split in SPLITS), f"{row.annotations:,}")
    return table


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
            "no data folder",
            where=data,
            got=got,
            wanted="a folder with COCO 2014",
            do=f"make it and {GET_IMAGES}, {GET_INSTANCES}, and {GET_SPLIT}; or name another with --data",
        )
    needed = dict.fromkeys(INSTANCES_FILES, GET_INSTANCES) | {SPLIT_FILE: GET_SPLIT}
    missing = [name for name in needed if not (data / name).is_file()]
    if missing:
        raise InputError(
            "files are missing",
            where=data,
            got=f"no {', no '.join(missing)}",
            do=" and ".join(dict.fromkeys(needed[name] for name in missing)),
        )


def _join(parts: list[Instances]) -> Instances:
    """The instances of both files as one."""
    first, second = parts
    names = [dict(zip(part.category_id.tolist(), part.category_names, strict=True)) for part in parts]
    if names[0] != names[1]:
        different = min(category for category, _ in names[0].items() ^ names[1].items())
        said = [repr(found[different]) if different in found else "not listed" for found in names]
        raise InputError(
            "the instances files have different categories",
            where=second.path,
            got=f"category {different} {said[1]}",
            wanted=f"{said[0]}, as in {first.path}",
        )
    if len(both := np.intersect1d(first.image_id, second.image_id)):
        raise InputError(
            "an image in both instances files",
            where=second.path,
            got=f"image {both[0]}, also in {first.path}",
            wanted="every image in one of them",
        )
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
            "images of the split file that no instances file lists",
            where=f"{split.path}, images[{unknown[0]}]",
            got=f"{len(unknown):,} unknown: cocoid {shown}",
            wanted=f"images of {instances.path}",
            do="take both from COCO 2014",
        )
    order = np.argsort(split.image_id)
    at = np.searchsorted(split.image_id, instances.annotation_image, sorter=order)
    row = order[np.minimum(at, len(order) - 1)]
    ours = split.image_id[row] == instances.annotation_image
    row, label, n_classes = row[ours], instances.annotation_label[ours], len(instances.category_names)
    is_restval = split.origin == "restval"
    listing = Manifest.from_columns(
        image_ids=split.image_id,
        paths=paths,
        splits=np.where(is_restval, "train", split.origin).tolist(),
        captions=split.captions,
        labels=label_lists(row, label, len(order), n_classes),
        category_names=instances.category_names,
        name=NAME,
        where=split.path,
    )
    statistics = count(
        listing,
        np.bincount(label, minlength=n_classes),
        restval=int(is_restval.sum()),
        captions_left_out=split.n_captions_found - sum(map(len, split.captions)),
        images_left_out=len(instances.image_id) - len(order),
    )
    return listing, statistics
