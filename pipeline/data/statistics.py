"""What a prepared data set holds, counted: for a person as tables, for a program as one JSON object."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich import box
from rich.table import Table

from ..core.console import FittingTable
from .manifest import SPLITS, Manifest


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
