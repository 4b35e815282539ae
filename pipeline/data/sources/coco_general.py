"""COCO's own JSON without Karpathy's split: any instances file, with the captions file of the same images."""

import re
from collections import defaultdict
from pathlib import Path
from typing import TypeVar

from typing_extensions import TypedDict

from ....errors import InputError
from ..coco import Int64, Records, Text, read_json
from .samples import Samples, split_name

KEPT = {"images", "annotations", "categories", "id", "name", "file_name", "image_id", "category_id", "caption"}
T = TypeVar("T")


class _Image(TypedDict):
    id: Int64
    file_name: Text


class _Category(TypedDict):
    id: Int64
    name: Text


class _Annotation(TypedDict):
    image_id: Int64
    category_id: Int64


class _InstancesFile(TypedDict):
    images: Records[_Image]
    annotations: Records[_Annotation]
    categories: Records[_Category]


class _Caption(TypedDict):
    image_id: Int64
    caption: Text


class _CaptionsFile(TypedDict):
    annotations: Records[_Caption]


def read_instances_set(files: list[Path], root: Path) -> Samples:
    """The samples of instances files; the split of each is the one that its name holds.

    Args:
        files: Instances files, such as ``annotations/instances_val2017.json``.
        root: The data folder: images lie in it, in ``images/``, or in a folder named like the file's ending.

    Raises:
        InputError: A file cannot be read or is no instances file, or the files do not fit together.
    """
    paths: list[str] = []
    captions: list[list[str]] = []
    tags: list[list[str]] = []
    splits: list[str | None] = []
    ids: list[int] = []
    names: dict[int, str] = {}
    notes = []
    for file in files:
        data = _read(file, _InstancesFile)
        for category in data["categories"]:
            number, name = category["id"], category["name"]
            if names.setdefault(number, name) != name:
                raise InputError(
                    "files with different categories",
                    where=file,
                    got=f"category {number} is '{name}'",
                    wanted=f"'{names[number]}', as in {files[0]}",
                )
        images = data["images"]
        tags_of = _tags(data, names, file)
        captions_of = _captions(file)
        folder = _image_folder(root, file)
        split = _split(file)
        for record in images:
            image = record["id"]
            ids.append(image)
            paths.append(f"{folder}{record['file_name']}")
            captions.append(captions_of.get(image, []))
            tags.append(sorted(tags_of.get(image, ())))
            splits.append(split)
        notes.append(f"{file.name}: {len(images):,} images{f' of {split}' if split else ''} in {folder or './'}")
    if len(set(ids)) < len(ids):
        raise InputError("an image in two files", where=files[-1], got=f"{len(ids) - len(set(ids)):,} image ids twice")
    return Samples(
        root=root,
        paths=paths,
        captions=captions,
        tags=tags,
        splits=[split or "" for split in splits] if all(splits) else None,
        image_ids=ids,
        category_names=[names[number] for number in sorted(names)],
        notes=tuple(notes),
    )


def _read(file: Path, form: type[T]) -> T:
    return read_json(file, form, lambda record: {key: value for key, value in record.items() if key in KEPT})


def _tags(data: _InstancesFile, names: dict[int, str], file: Path) -> dict[int, set[str]]:
    tags: dict[int, set[str]] = defaultdict(set)
    for row, annotation in enumerate(data["annotations"]):
        category = annotation["category_id"]
        if category not in names:
            raise InputError(
                "an annotation of a category that is not listed",
                where=f"{file}, annotations[{row}]",
                got=category,
                wanted="an id of `categories`",
            )
        tags[annotation["image_id"]].add(names[category])
    return tags


def _captions(file: Path) -> dict[int, list[str]]:
    """The captions beside an instances file, by image id; none where there is no such file."""
    path = file.with_name(file.name.replace("instances", "captions"))
    if path == file or not path.is_file():
        return {}
    captions: dict[int, list[str]] = defaultdict(list)
    for annotation in _read(path, _CaptionsFile)["annotations"]:
        captions[annotation["image_id"]].append(" ".join(annotation["caption"].split()))
    return captions


def _split(file: Path) -> str | None:
    words = re.findall("[a-z]+", file.stem.casefold())
    return next((name for word in words if (name := split_name(word))), None)


def _image_folder(root: Path, file: Path) -> str:
    """The folder of a file's images below the data folder, with a slash at its end; empty for the data folder."""
    ending = file.stem.rpartition("_")[2]
    for folder in (ending, f"images/{ending}", "images"):
        if (root / folder).is_dir():
            return f"{folder}/"
    return ""
