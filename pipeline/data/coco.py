"""COCO's own files: the instances (which categories an image shows) and Karpathy's split (captions and splits).

pycocotools trusts its input and prints; here the records are checked first, so that no traceback of it can reach the
user, and what it prints goes nowhere, so that stdout stays clean.
"""

from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools.coco import COCO

from ... import InputError
from ..core.safe_paths import is_inside
from .json_records import AGAIN, Ints, ints, read_json, records_of, texts_of, unique, wrong_structure

SPLIT_FILE = "dataset_coco.json"
INSTANCES_FILES = ("annotations/instances_train2014.json", "annotations/instances_val2014.json")
# Names of splits in Karpathy's file; restval is the part of val2014 that joins train.
ORIGINS = ("train", "restval", "val", "test")
MAX_CAPTIONS = 5


@dataclass(frozen=True, kw_only=True)
class Instances:
    """One instances file with M images, A annotations and C categories.

    Attributes:
        path: The file.
        image_id: ``(M,)`` int64, in the file's order, every id once.
        category_id: ``(C,)`` int64, ascending: the index is the label.
        category_names: C names.
        annotation_image: ``(A,)`` int64, the image id of every annotation, crowds included.
        annotation_label: ``(A,)`` int64, its label in 0..C-1.
    """

    path: Path
    image_id: Ints
    category_id: Ints
    category_names: tuple[str, ...]
    annotation_image: Ints
    annotation_label: Ints


@dataclass(frozen=True, kw_only=True)
class KarpathySplit:
    """Karpathy's split file with N images, in the file's order.

    Attributes:
        path: The file.
        image_id: ``(N,)`` int64, COCO's ids, every id once.
        origin: ``(N,)`` of train, restval, val, test.
        folders: The image folder of each, such as ``val2014``.
        filenames: The file in it.
        captions: One to five captions each.
        n_captions_found: How many captions the file holds, those beyond five included.
    """

    path: Path
    image_id: Ints
    origin: npt.NDArray[np.str_]
    folders: tuple[str, ...]
    filenames: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    n_captions_found: int


def read_instances(path: Path) -> Instances:
    """Read ``instances_*.json``.

    Args:
        path: The file.

    Raises:
        InputError: The file is missing, not JSON, or something in it is wrong.
    """
    found = read_json(path, _slim)
    data = {key: records_of(found, key, path) for key in ("images", "annotations", "categories")}
    image_id = unique(ints(data["images"], "images", "id", path), "image", path)
    category_id = unique(ints(data["categories"], "categories", "id", path), "category", path)
    names = _category_names(data["categories"], path)
    _check_annotations(data["annotations"], {"image_id": image_id, "category_id": category_id}, path)
    order = np.argsort(category_id)
    images_of = _images_of_categories(data)
    of_class = [np.array(images_of.get(int(category), ()), np.int64) for category in category_id[order]]
    return Instances(
        path=path,
        image_id=image_id,
        category_id=category_id[order],
        category_names=tuple(names[at] for at in order),
        annotation_image=np.concatenate(of_class),
        annotation_label=np.repeat(np.arange(len(order)), [len(images) for images in of_class]),
    )


def _category_names(categories: list[Any], path: Path) -> list[str]:
    names = texts_of(categories, "categories", "name", path)
    unique(np.array(names), "category name", path)
    if not names or not all(name.strip() for name in names):
        raise InputError("no categories, or one without a name", where=path, wanted="COCO's categories", do=AGAIN)
    return names


def _check_annotations(annotations: list[Any], known: dict[str, Ints], path: Path) -> None:
    ints(annotations, "annotations", "id", path)
    for key, ids in known.items():
        values = ints(annotations, "annotations", key, path)
        if len(unknown := np.flatnonzero(~np.isin(values, ids))):
            row = int(unknown[0])
            raise InputError(
                f"an annotation of an unknown {key.removesuffix('_id')}", where=f"{path}, annotations[{row}]",
                got=f"{key} {values[row]}", wanted="one that the same file lists", do=AGAIN,
            )  # fmt: skip


def _images_of_categories(data: dict[str, list[dict[str, Any]]]) -> dict[int, list[int]]:
    """Category id to the image ids of its annotations, one entry an annotation, by pycocotools' index."""
    with redirect_stdout(StringIO()):
        coco = COCO()
        coco.dataset = data
        coco.createIndex()
    return dict(coco.catToImgs)


def read_karpathy(path: Path) -> KarpathySplit:
    """Read Karpathy's ``dataset_coco.json``; of each image the first five captions, blank ones left out.

    Args:
        path: The file.

    Raises:
        InputError: The file is missing, not JSON, or something in it is wrong; the image is named.
    """
    records = records_of(read_json(path, _slim), "images", path)
    image_id = unique(ints(records, "images", "cocoid", path), "image", path)
    origin, folders, filenames = (texts_of(records, "images", key, path) for key in ("split", "filepath", "filename"))
    for row, name in enumerate(origin):
        if name not in ORIGINS:
            raise InputError("unknown split", where=_place(path, row), got=repr(name), wanted=", ".join(ORIGINS))
        if not is_inside(folders[row]) or not is_inside(filenames[row]):
            raise InputError(
                "an image path leaves the data folder", where=_place(path, row),
                got=repr(f"{folders[row]}/{filenames[row]}"), wanted="a path below it, without '..'",
            )  # fmt: skip
    for split, members in (("train", {"train", "restval"}), ("val", {"val"}), ("test", {"test"})):
        if not members.intersection(origin):
            raise InputError(f"no image in split {split}", where=path, wanted="images in train, val and test", do=AGAIN)
    captions = [_captions(record, row, path) for row, record in enumerate(records)]
    return KarpathySplit(
        path=path,
        image_id=image_id,
        origin=np.array(origin),
        folders=tuple(folders),
        filenames=tuple(filenames),
        captions=tuple(texts[:MAX_CAPTIONS] for texts in captions),
        n_captions_found=sum(map(len, captions)),
    )


def _captions(record: dict[str, Any], row: int, path: Path) -> tuple[str, ...]:
    sentences = record.get("sentences")
    if type(sentences) is not list:
        raise wrong_structure(path, f"images[{row}].sentences", sentences, "a list")
    texts = texts_of(sentences, f"images[{row}].sentences", "raw", path)
    kept = tuple(text for text in texts if text.strip())
    if not kept:
        raise InputError(
            "an image with no caption", where=_place(path, row), got="none", wanted="at least one", do=AGAIN
        )
    return kept


def _place(path: Path, row: int) -> str:
    return f"{path}, images[{row}]"


def _slim(record: dict[str, Any]) -> dict[str, Any]:
    """Keep while reading only what is needed: the real instances are 330 MB, nearly all of it outlines of objects."""
    if "image_id" in record and "category_id" in record and "id" in record:
        return {key: record[key] for key in ("id", "image_id", "category_id")}
    return {"raw": record["raw"]} if "raw" in record else record
