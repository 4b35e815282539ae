"""COCO's own JSON without Karpathy's split: any instances file, with the captions file of the same images."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from ....errors import InputError
from ..coco import ints, read_json, records_of, texts_of
from .samples import Samples, split_name

KEPT = {"images", "annotations", "categories", "id", "name", "file_name", "image_id", "category_id", "caption"}


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
        data = _read(file)
        categories = records_of(data, "categories", file)
        category_ids = ints(categories, "categories", "id", file).tolist()
        for number, name in zip(category_ids, texts_of(categories, "categories", "name", file), strict=True):
            if names.setdefault(number, name) != name:
                raise InputError(
                    "files with different categories",
                    where=file,
                    got=f"category {number} is '{name}'",
                    wanted=f"'{names[number]}', as in {files[0]}",
                )
        images = records_of(data, "images", file)
        image_ids = ints(images, "images", "id", file).tolist()
        tags_of = _tags(data, names, file)
        captions_of = _captions(file)
        folder = _image_folder(root, file)
        split = _split(file)
        for image, file_name in zip(image_ids, texts_of(images, "images", "file_name", file), strict=True):
            ids.append(image)
            paths.append(f"{folder}{file_name}")
            captions.append(captions_of.get(image, []))
            tags.append(sorted(tags_of.get(image, ())))
            splits.append(split)
        notes.append(f"{file.name}: {len(image_ids):,} images{f' of {split}' if split else ''} in {folder or './'}")
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


def _read(file: Path) -> dict[str, Any]:
    return read_json(file, lambda record: {key: value for key, value in record.items() if key in KEPT})


def _tags(data: dict[str, Any], names: dict[int, str], file: Path) -> dict[int, set[str]]:
    annotations = records_of(data, "annotations", file)
    tags: dict[int, set[str]] = defaultdict(set)
    pairs = zip(
        ints(annotations, "annotations", "image_id", file).tolist(),
        ints(annotations, "annotations", "category_id", file).tolist(),
        strict=True,
    )
    for row, (image, category) in enumerate(pairs):
        if category not in names:
            raise InputError(
                "an annotation of a category that is not listed",
                where=f"{file}, annotations[{row}]",
                got=category,
                wanted="an id of `categories`",
            )
        tags[image].add(names[category])
    return tags


def _captions(file: Path) -> dict[int, list[str]]:
    """The captions beside an instances file, by image id; none where there is no such file."""
    path = file.with_name(file.name.replace("instances", "captions"))
    if path == file or not path.is_file():
        return {}
    annotations = records_of(_read(path), "annotations", path)
    captions: dict[int, list[str]] = defaultdict(list)
    texts = texts_of(annotations, "annotations", "caption", path)
    for image, text in zip(ints(annotations, "annotations", "image_id", path).tolist(), texts, strict=True):
        captions[image].append(" ".join(text.split()))
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
