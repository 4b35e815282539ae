"""COCO's own files: the instances (which categories an image shows) and Karpathy's split (captions and splits).

pycocotools trusts its input and prints; here the records are checked first, so that no traceback of it can reach the
user, and what it prints goes nowhere, so that stdout stays clean.
"""

import json
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from pycocotools.coco import COCO
from pydantic import AfterValidator, FailFast, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from ...cache.strict_json import parse_json
from ...errors import InputError, cannot_read, check_file
from ..core.files import is_inside


class Category(NamedTuple):
    """One category as COCO's instances files list it."""

    id: int
    name: str
    supercategory: str


_GROUPS = """
person: 1 person
vehicle: 2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat
outdoor: 10 traffic light, 11 fire hydrant, 13 stop sign, 14 parking meter, 15 bench
animal: 16 bird, 17 cat, 18 dog, 19 horse, 20 sheep, 21 cow, 22 elephant, 23 bear, 24 zebra, 25 giraffe
accessory: 27 backpack, 28 umbrella, 31 handbag, 32 tie, 33 suitcase
sports: 34 frisbee, 35 skis, 36 snowboard, 37 sports ball, 38 kite, 39 baseball bat, 40 baseball glove, 41 skateboard, 42 surfboard, 43 tennis racket
kitchen: 44 bottle, 46 wine glass, 47 cup, 48 fork, 49 knife, 50 spoon, 51 bowl
food: 52 banana, 53 apple, 54 sandwich, 55 orange, 56 broccoli, 57 carrot, 58 hot dog, 59 pizza, 60 donut, 61 cake
furniture: 62 chair, 63 couch, 64 potted plant, 65 bed, 67 dining table, 70 toilet
electronic: 72 tv, 73 laptop, 74 mouse, 75 remote, 76 keyboard, 77 cell phone
appliance: 78 microwave, 79 oven, 80 toaster, 81 sink, 82 refrigerator
indoor: 84 book, 85 clock, 86 vase, 87 scissors, 88 teddy bear, 89 hair drier, 90 toothbrush
"""  # noqa: E501


def _parse(text: str) -> tuple[Category, ...]:
    rows = []
    for line in text.strip().splitlines():
        group, _, members = line.partition(": ")
        for member in members.split(", "):
            number, _, name = member.partition(" ")
            rows.append(Category(int(number), name, group))
    return tuple(rows)


CATEGORIES = _parse(_GROUPS)
"""All 80, in order of id."""


AGAIN = "download the file again"

Ints = npt.NDArray[np.int64]
Record = dict[str, Any]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
# JSON can spell half a surrogate pair, which no file can hold: encoding it is an error.
Text = Annotated[str, AfterValidator(lambda text: text.encode().decode())]
T = TypeVar("T")
# The first mistake is enough: a file may have a million of them.
Records = Annotated[list[T], FailFast()]


class _Image(TypedDict):
    id: Int64


class _Annotation(TypedDict):
    id: Int64
    image_id: Int64
    category_id: Int64


class _Category(TypedDict):
    id: Int64
    name: Text


class _InstancesFile(TypedDict):
    images: Records[_Image]
    annotations: Records[_Annotation]
    categories: Records[_Category]


class _Sentence(TypedDict):
    raw: Text


class _SplitImage(TypedDict):
    cocoid: Int64
    split: Text
    filepath: Text
    filename: Text
    sentences: Records[_Sentence]


class _SplitFile(TypedDict):
    images: Records[_SplitImage]


# How a mistake that pydantic found reads in an error: what should have stood there.
_WANTED = {"list_type": "a list", "dict_type": "an object", "string_type": "text", "value_error": "text"}
_NAMED = {list: "a list", dict: "an object", type(None): "nothing"}


def read_json(path: Path, form: type[T], slim: Callable[[Record], Record]) -> T:
    """Read a file that holds one JSON object.

    Args:
        path: The file.
        form: The form that it must have, a typed dictionary; other keys are left out.
        slim: Called with every object as soon as it is read, returns what is to be kept of it, so that a large file
            never stands in memory as a whole.

    Raises:
        InputError: The file cannot be read, with line and column where it is not JSON, or it has another form.
    """
    try:
        if path.exists():
            check_file(path, "cannot read JSON", wanted="a whole JSON file", do=AGAIN)
        content = parse_json(path.read_bytes(), slim=slim)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError("a file is missing", where=path, got="no such file", do="download it") from None
    except json.JSONDecodeError as error:
        place = f"{path}, line {error.lineno}, column {error.colno}"
        raise InputError("broken JSON", where=place, got=error.msg, wanted="a whole JSON file", do=AGAIN) from None
    except (OSError, ValueError) as error:
        raise cannot_read("cannot read JSON", path, error, wanted="a whole JSON file", do=AGAIN) from None
    if type(content) is not dict:
        raise _wrong_structure(path, "the file", content, "a JSON object")
    try:
        return TypeAdapter(form).validate_python(content, strict=True)
    except ValidationError as error:
        mistake = error.errors(include_url=False)[0]
    *parents, last = mistake["loc"]
    name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in mistake["loc"]).removeprefix(".")
    if mistake["type"] != "missing":
        wanted = _WANTED.get(mistake["type"], "a whole number of 64 bits")
        raise _wrong_structure(path, name, mistake["input"], wanted)
    if not parents or last == "sentences":
        raise _wrong_structure(path, name, None, "a list")
    where = f"{path}, {name.removesuffix(f'.{last}')}"
    raise InputError(f"missing {last}", where=where, wanted=f"the key {last}", do=AGAIN)


def _wrong_structure(path: Path, name: str, got: object, wanted: str) -> InputError:
    """The error for something of another kind than it should be; lists and objects are named, not shown."""
    shown = _NAMED.get(type(got)) or ascii(got)[:60]
    return InputError("wrong structure", where=f"{path}, {name}", got=shown, wanted=wanted, do=AGAIN)


def _ints(records: Iterable[Any], key: str) -> Ints:
    return np.array([record[key] for record in records], np.int64)


def unique(values: npt.NDArray[Any], what: str, path: Path) -> npt.NDArray[Any]:
    """The values, when every one of them is there once.

    Raises:
        InputError: A value is there more often.
    """
    different, counts = np.unique(values, return_counts=True)
    if (counts > 1).any():
        again = different[counts > 1][0]
        raise InputError(f"a duplicate {what}", where=path, got=f"{again} twice", wanted=f"every {what} once", do=AGAIN)
    return values


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
    """Read and check one of COCO's instances files.

    Args:
        path: The file.

    Raises:
        InputError: The file is missing, not JSON, or something in it is wrong.
    """
    content = read_json(path, _InstancesFile, _slim)
    image_id = unique(_ints(content["images"], "id"), "image", path)
    category_id = unique(_ints(content["categories"], "id"), "category", path)
    names = [category["name"] for category in content["categories"]]
    unique(np.array(names), "category name", path)
    if not names or not all(name.strip() for name in names):
        raise InputError("no categories, or one without a name", where=path, wanted="COCO's categories", do=AGAIN)
    _check_annotations(content["annotations"], {"image_id": image_id, "category_id": category_id}, path)
    order = np.argsort(category_id)
    images_of = _images_of_categories(content)
    of_class = [np.array(images_of.get(int(category), ()), np.int64) for category in category_id[order]]
    return Instances(
        path=path,
        image_id=image_id,
        category_id=category_id[order],
        category_names=tuple(names[index] for index in order),
        annotation_image=np.concatenate(of_class),
        annotation_label=np.repeat(np.arange(len(order)), [len(images) for images in of_class]),
    )


def _check_annotations(annotations: list[_Annotation], ids: dict[str, Ints], path: Path) -> None:
    for key, listed in ids.items():
        values = _ints(annotations, key)
        if len(unknown := np.flatnonzero(~np.isin(values, listed))):
            row = int(unknown[0])
            raise InputError(
                f"an annotation of an unknown {key.removesuffix('_id')}",
                where=f"{path}, annotations[{row}]",
                got=f"{key} {values[row]}",
                wanted="one that the same file lists",
                do=AGAIN,
            )


def _images_of_categories(content: _InstancesFile) -> dict[int, list[int]]:
    """Category id to the image ids of its annotations, one entry an annotation, by pycocotools' index."""
    with redirect_stdout(StringIO()):
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
    return dict(coco.catToImgs)


def read_karpathy(path: Path) -> KarpathySplit:
    """Read Karpathy's ``dataset_coco.json``; of each image the first five captions, blank ones left out.

    Args:
        path: The file.

    Raises:
        InputError: The file is missing, not JSON, or something in it is wrong; the image is named.
    """
    records = read_json(path, _SplitFile, _slim)["images"]
    image_id = unique(_ints(records, "cocoid"), "image", path)
    origin = [record["split"] for record in records]
    folders, filenames = [record["filepath"] for record in records], [record["filename"] for record in records]
    for row, name in enumerate(origin):
        if name not in ORIGINS:
            raise InputError("unknown split", where=_place(path, row), got=repr(name), wanted=", ".join(ORIGINS))
        if not is_inside(folders[row]) or not is_inside(filenames[row]):
            raise InputError(
                "an image path leaves the data folder",
                where=_place(path, row),
                got=repr(f"{folders[row]}/{filenames[row]}"),
                wanted="a path below it, without '..'",
            )
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


def _captions(record: _SplitImage, row: int, path: Path) -> tuple[str, ...]:
    kept = tuple(sentence["raw"] for sentence in record["sentences"] if sentence["raw"].strip())
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
