"""The stage ``prepare``: COCO's files and Karpathy's split become one checked manifest."""

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from rich import box
from rich.table import Table

from ...errors import InputError, cannot_read, read_text
from ..core.console import FittingTable
from ..core.files import refuse_existing, resolve_image
from ..core.json_result import JsonResult
from .coco import INSTANCES_FILES, SPLIT_FILE, Instances, KarpathySplit, read_instances, read_karpathy
from .manifest import SPLITS, Manifest, says_it_is_of, write_manifest
from .manifest_checks import label_lists
from .sources.recognise import DESCRIPTIONS, Source, SourceOptions, read_source
from .sources.samples import to_manifest

MANIFEST_FILE = "manifest.parquet"
NAME = "coco"
# What to download for a file that is missing, and where to put it.
GET_INSTANCES = "unpack annotations_trainval2014.zip from https://cocodataset.org/#download there"
GET_SPLIT = (
    f"put {SPLIT_FILE} of caption_datasets.zip there"
    " (https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip)"
)
GET_IMAGES = "unpack train2014.zip and val2014.zip from https://cocodataset.org/#download there"
SHOWN = 3
# Categories in the table of a person; a data set may have thousands.
MOST_CLASSES = 100


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

    Folders are listed, since looking for each file by itself takes minutes on a network's disk.

    Args:
        data: The data folder.
        paths: N paths relative to it.

    Returns:
        The N paths, each under the name that its file has: macOS and some archives write letters with accents in
        another Unicode form than the lists that name them.

    Raises:
        InputError: Some are missing (how many, and the first three), or a link leads out of the data folder.
    """
    folders: dict[str, _Folder] = {}
    missing, on_disk = [], []
    for path in paths:
        parent, slash, name = path.rpartition("/")
        if parent not in folders:
            # A folder that is itself a link out of the data folder shows in any of its images.
            resolve_image(data, path)
            folders[parent] = _Folder(data / parent)
        name = folders[parent].name_on_disk(name)
        is_link = folders[parent].files.get(name)
        on_disk.append(f"{parent}{slash}{name}")
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
            do=f"{GET_IMAGES}, or give --no-check-images",
        )
    return on_disk


class _Folder:
    """A folder's files.

    Attributes:
        files: The name of every file, and whether it is a link; dangling links are left out.
    """

    def __init__(self, folder: Path) -> None:
        try:
            with os.scandir(folder) as entries:
                self.files = {entry.name: entry.is_symlink() for entry in entries if entry.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            self.files = {}
        except OSError as error:
            raise cannot_read("cannot look into a folder", folder, error) from None

    def name_on_disk(self, name: str) -> str:
        """The one file whose name is the same in another Unicode form, where there is none of this form."""
        if name in self.files or name.isascii():
            return name
        alike = self._by_composed_form.get(unicodedata.normalize("NFC", name), [])
        return alike[0] if len(alike) == 1 else name

    @cached_property
    def _by_composed_form(self) -> dict[str, list[str]]:
        alike: dict[str, list[str]] = {}
        for name in self.files:
            alike.setdefault(unicodedata.normalize("NFC", name), []).append(name)
        return alike


@dataclass(frozen=True, kw_only=True)
class ClassCount:
    """One category: its images per split, and its annotations in all of them."""

    name: str
    images: dict[str, int]
    annotations: int


@dataclass(frozen=True, kw_only=True)
class Statistics(JsonResult):
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


def count(
    listing: Manifest,
    *,
    annotations: npt.NDArray[np.int64] | None = None,
    restval: int = 0,
    captions_left_out: int = 0,
    images_left_out: int = 0,
) -> Statistics:
    """Count a manifest.

    Args:
        listing: The manifest.
        annotations: Annotations of each category ``(C,)``; one an image that shows it by default.
        restval: Images of train that come from restval.
        captions_left_out: Captions beyond the fifth of their image.
        images_left_out: Images of the data set that are in no split.
    """
    labels, rows = listing.labels_matrix(), {name: np.flatnonzero(listing.splits == name) for name in SPLITS}
    n_captions = np.array([len(texts) for texts in listing.captions])
    of_class = {name: labels[chosen].sum(axis=0, dtype=np.int64) for name, chosen in rows.items()}
    positives = {name: int(counts.sum()) for name, counts in of_class.items()}
    if annotations is None:
        annotations = labels.sum(axis=0, dtype=np.int64)
    return Statistics(
        images={name: len(chosen) for name, chosen in rows.items()},
        restval=restval,
        captions={name: int(n_captions[chosen].sum()) for name, chosen in rows.items()},
        captions_left_out=captions_left_out,
        images_left_out=images_left_out,
        unlabelled={name: int((~labels[chosen].any(axis=1)).sum()) for name, chosen in rows.items()},
        positives=positives,
        tags_per_image={name: positives[name] / max(len(chosen), 1) for name, chosen in rows.items()}
        | {"all": sum(positives.values()) / len(listing)},
        classes=tuple(
            ClassCount(name=name, images={s: int(of_class[s][c]) for s in SPLITS}, annotations=int(annotations[c]))
            for c, name in enumerate(listing.category_names)
        ),
    )


_RULED: dict[str, Any] = {"box": box.HEAVY_HEAD, "pad_edge": True, "collapse_padding": False}


def statistics_tables(statistics: Statistics) -> list[Table]:
    """Two tables: one line per split, and one per category."""
    return [_split_table(statistics), _class_table(statistics)]


def _split_table(statistics: Statistics) -> Table:
    notes = [f"train holds {statistics.restval:,} images of restval"] if statistics.restval else []
    if statistics.captions_left_out:
        notes.append(f"{statistics.captions_left_out:,} captions beyond five an image were left out")
    if statistics.images_left_out:
        notes.append(f"{statistics.images_left_out:,} annotated images are in no split")
    table = FittingTable(title="Splits", caption="; ".join(notes), caption_justify="left", **_RULED)
    table.add_column("split", style="bold")
    for name in ("images", "captions", "no label", "tags an image"):
        table.add_column(name, justify="right")
    counts = (statistics.images, statistics.captions, statistics.unlabelled)
    for split in SPLITS:
        table.add_row(split, *(f"{column[split]:,}" for column in counts), f"{statistics.tags_per_image[split]:.2f}")
    table.add_section()
    totals = (f"{sum(column.values()):,}" for column in counts)
    table.add_row("all", *totals, f"{statistics.tags_per_image['all']:.2f}")
    return table


def _class_table(statistics: Statistics) -> Table:
    table = FittingTable(title="Categories: images of each split, and annotations", **_RULED)
    table.add_column("label", justify="right")
    table.add_column("category", style="bold")
    for name in (*SPLITS, "annotations"):
        table.add_column(name, justify="right")
    shown = statistics.classes[:MOST_CLASSES]
    if len(shown) < len(statistics.classes):
        table.caption = f"the first {len(shown)} of {len(statistics.classes):,} categories; --json has all"
    for label, row in enumerate(shown):
        table.add_row(str(label), row.name, *(f"{row.images[split]:,}" for split in SPLITS), f"{row.annotations:,}")
    return table


@dataclass(frozen=True, kw_only=True)
class PrepareResult:
    """The manifest that ``prepare`` has written.

    Attributes:
        path: The manifest.
        sha256: Hash of its content.
        statistics: What it holds.
        notes: What was recognised and decided, a line each.
    """

    path: Path
    sha256: str
    statistics: Statistics
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return {"manifest": str(self.path), "sha256": self.sha256, "notes": self.notes, **self.statistics.to_json()}


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
        path,
        lambda existing: says_it_is_of(existing, NAME),
        force=True,
        what="a manifest of `mmcli prepare`",
        option="--out",
    )
    split = read_karpathy(data / SPLIT_FILE)
    parts = [read_instances(data / name) for name in INSTANCES_FILES]
    instances = _join(parts)
    paths = place_images(data, split.folders, split.filenames)
    if check_images:
        paths = check_files(data, paths)
    listing = _merge(split, instances, paths)
    write_manifest(path, listing)
    in_split = np.isin(instances.annotation_image, split.image_id)
    statistics = count(
        listing,
        annotations=np.bincount(instances.annotation_label[in_split], minlength=len(listing.category_names)),
        restval=int((split.origin == "restval").sum()),
        captions_left_out=split.n_captions_found - sum(map(len, listing.captions)),
        images_left_out=len(instances.image_id) - len(listing),
    )
    return PrepareResult(path=path, sha256=listing.sha256, statistics=statistics)


def prepare_source(source: Source, options: SourceOptions) -> PrepareResult:
    """Read a data set of any kind, and write its manifest; COCO with Karpathy's split is read by :func:`prepare`.

    Args:
        source: The data set, as :func:`~mmcli.pipeline.data.sources.recognise.recognise` knows it.
        options: How it is read.

    Raises:
        InputError: It cannot be read, an image is missing, or the manifest cannot be written; everything that is wrong
            with its rows is listed at once.
    """
    if source.kind == "coco":
        return prepare(source.root, options.out)
    name = options.name or Path(source.name).stem
    samples = read_source(source, options.columns, options.split_file)
    path = (options.out or samples.root) / MANIFEST_FILE
    refuse_existing(
        path,
        lambda existing: says_it_is_of(existing, name),
        force=True,
        what=f"the manifest of {name}",
        option="--out",
    )
    if options.categories is not None:
        lines = read_text(options.categories, "cannot read the categories", wanted="one name a line").splitlines()
        samples = replace(samples, category_names=[line.strip() for line in lines if line.strip()])
    listing, notes = to_manifest(
        samples, name=name, rule=options.rule, least_images=options.least_images, where=source.name
    )
    write_manifest(path, listing)
    notes = (f"{source.name} is {DESCRIPTIONS[source.kind]}", *notes)
    return PrepareResult(path=path, sha256=listing.sha256, statistics=count(listing), notes=notes)


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
        shown = [repr(part[different]) if different in part else "not listed" for part in names]
        raise InputError(
            "the instances files have different categories",
            where=second.path,
            got=f"category {different} {shown[1]}",
            wanted=f"{shown[0]}, as in {first.path}",
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


def _merge(split: KarpathySplit, instances: Instances, paths: list[str]) -> Manifest:
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
    place = np.searchsorted(split.image_id, instances.annotation_image, sorter=order)
    row = order[np.minimum(place, len(order) - 1)]
    in_split = split.image_id[row] == instances.annotation_image
    n_classes = len(instances.category_names)
    return Manifest.from_columns(
        image_ids=split.image_id,
        paths=paths,
        splits=np.where(split.origin == "restval", "train", split.origin).tolist(),
        captions=split.captions,
        labels=label_lists(row[in_split], instances.annotation_label[in_split], len(order), n_classes),
        category_names=instances.category_names,
        name=NAME,
        where=split.path,
    )
