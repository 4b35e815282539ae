"""A folder of images: ``split/class/x.jpg``, ``class/x.jpg``, or images with ``x.txt`` or ``x.json`` beside them."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from ....cache.strict_json import parse_json
from ....errors import InputError, cannot_read, read_text
from .samples import Problems, Samples, split_name

CAPTION_KEYS = ("captions", "caption", "text", "description")
UNREADABLE = "cannot read what lies beside an image"
TAG_KEYS = ("tags", "labels", "label", "categories", "classes", "class", "keywords")


def image_suffixes() -> frozenset[str]:
    """The suffixes of image files that Pillow reads, in lower case, with the dot."""
    Image.init()
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def read_folder(root: Path) -> Samples:
    """The samples of a folder, in the order of their paths; hidden files are passed over.

    Args:
        root: The folder.

    Raises:
        InputError: There is no image in it, or a file beside an image cannot be read.
    """
    suffixes = image_suffixes()
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names += [
            (Path(folder) / name).relative_to(root).as_posix()
            for name in files
            if not name.startswith(".") and Path(name).suffix.casefold() in suffixes
        ]
    if not names:
        raise InputError("no images in the folder", where=root, wanted=f"files {', '.join(sorted(suffixes)[:6])}, ...")
    return samples_of_names(root, sorted(names), partial(_beside, root), lambda name: PurePosixPath(name).parts[:-1])


Described = tuple[list[str], list[str]] | None


def samples_of_names(
    root: Path, names: list[str], beside: Callable[[str], Described], folders_of: Callable[[str], tuple[str, ...]]
) -> Samples:
    """The samples of image names, whose folders may name a split and a class.

    Args:
        root: What the names are relative to.
        names: The names, with forward slashes.
        beside: Gives what lies beside an image: captions and tags, or ``None`` where nothing does.
        folders_of: Gives the folders that an image lies in, the outermost first.

    Raises:
        InputError: What lies beside an image cannot be read; all of them are listed.
    """
    problems = Problems(root)
    splits, captions, tags, described = [], [], [], 0
    for name in names:
        folders = folders_of(name)
        split = split_name(folders[0]) if folders else None
        splits.append(split)
        try:
            description = beside(name)
        except InputError as error:
            problems.add(name, str(error), "mend or remove the file beside the image")
            description = None
        texts, names_of_tags = description or ([], [])
        described += description is not None
        classes = folders[1:] if split else folders
        captions.append(texts)
        tags.append(names_of_tags or ([] if description is not None else list(classes[:1])))
    problems.check()
    partly = any(splits) and not all(splits)
    if partly:
        outside = next(name for name, split in zip(names, splits, strict=True) if split is None)
        raise InputError(
            "only some images lie in a folder of a split",
            where=root,
            got=f"{outside}",
            wanted="all below train, val and test, or none",
            do="move it into one of them",
        )
    kind = "text or JSON files beside the images" if described else "folders as tags"
    layout = ["split folders"] if any(splits) else []
    return Samples(
        root=root,
        paths=names,
        captions=captions,
        tags=tags,
        splits=[split or "" for split in splits] if all(splits) else None,
        notes=(f"{len(names):,} images; {', '.join([*layout, kind])}",),
    )


def parse_description(suffix: str, text: str) -> tuple[list[str], list[str]]:
    """Captions and tags of what lies beside an image: lines of a text, or keys of a JSON object.

    Raises:
        ValueError: It is not JSON, or not an object.
    """
    if suffix == ".txt":
        return [line.strip() for line in text.splitlines() if line.strip()], []
    record = parse_json(text)
    if not isinstance(record, Mapping):
        raise ValueError("no JSON object")
    return _first(record, CAPTION_KEYS), _first(record, TAG_KEYS)


def _beside(root: Path, name: str) -> Described:
    stem = root / PurePosixPath(name).with_suffix("")
    texts: list[str] = []
    tags: list[str] = []
    seen = False
    for suffix in (".txt", ".json"):
        path = stem.with_name(stem.name + suffix)
        if path.is_file():
            seen = True
            try:
                more_texts, more_tags = parse_description(suffix, read_text(path, UNREADABLE))
            except ValueError as error:
                if isinstance(error, InputError):
                    raise
                raise cannot_read(UNREADABLE, path, error) from None
            texts, tags = texts + more_texts, tags + more_tags
    return (texts, tags) if seen else None


def _first(record: Mapping[str, Any], keys: tuple[str, ...]) -> list[str]:
    value: object = next((record[key] for key in keys if record.get(key)), [])
    values = value if isinstance(value, list) else [value]
    return [str(text).strip() for text in values if str(text).strip()]
