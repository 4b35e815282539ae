"""Data sets of the Hugging Face library: a folder that ``save_to_disk`` wrote, or a hub id (extra ``datasets``)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ....errors import InputError, first_line
from .samples import Samples, split_name
from .tables import GUESSES, Columns, texts_of_cell, write_image


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``save_to_disk`` of the library wrote a folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json"))


def read_dataset(source: str, root: Path, columns: Columns) -> Samples:
    """The samples of a data set; its images are written below ``root/images`` as they are, without another encoding.

    Args:
        source: A folder that ``save_to_disk`` wrote, or a hub id.
        root: The data folder, which gets the images.
        columns: Which columns hold what; ``path`` names the column of images.

    Raises:
        InputError: The extra is not installed, there is no such data set, or it has no images.
    """
    datasets = _library()
    try:
        loaded = datasets.load_from_disk(source) if Path(source).is_dir() else datasets.load_dataset(source)
    except Exception as error:  # noqa: BLE001 - the library raises whatever its readers raise
        raise InputError("cannot load the data set", where=source, got=first_line(error)) from None
    parts = dict(loaded) if isinstance(loaded, dict) else {"": loaded}
    paths: list[str] = []
    captions: list[list[str]] = []
    tags: list[list[str]] = []
    splits: list[str | None] = []
    notes = []
    for name, part in parts.items():
        roles, image = _roles(part, columns, datasets, source)
        names = _class_names(part.features.get(roles.get("tags", "")))
        for row, record in enumerate(part.cast_column(image, datasets.Image(decode=False))):
            paths.append(write_image(record[image], root, f"{name or 'all'}-{row:08d}"))
            captions.append(list(texts_of_cell(record.get(roles.get("captions", "")), None)))
            tags.append([names[int(tag)] if names else tag for tag in _tags(record.get(roles.get("tags", "")), names)])
            splits.append(split_name(name))
        notes.append(f"{len(part):,} images of '{name or 'all'}'; images from '{image}', " + _described(roles))
    return Samples(
        root=root,
        paths=paths,
        captions=captions,
        tags=tags,
        splits=[split or "" for split in splits] if splits and all(splits) else None,
        notes=tuple(notes),
    )


def _library() -> Any:  # noqa: ANN401 - the library, which is optional
    try:
        import datasets
    except ImportError:
        raise InputError(
            "the extra datasets is not installed", do="pip install -c constraints.txt -e '.[datasets]'"
        ) from None
    return datasets


def _roles(part: Any, columns: Columns, datasets: Any, source: str) -> tuple[dict[str, str], str]:  # noqa: ANN401
    """Which column holds what, and the column of images."""
    features = dict(part.features)
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if columns.path is not None and columns.path not in images:
        raise InputError("no such column of images", where=source, got=columns.path, wanted=", ".join(images) or "none")
    if not images:
        raise InputError("a data set without images", where=source, got=f"columns {', '.join(features)}")
    roles = {}
    for role in ("captions", "tags"):
        given = getattr(columns, role)
        if given is not None and given not in features:
            raise InputError("no such column", where=source, got=given, wanted=f"one of {', '.join(features)}")
        column = given or next((name for name in GUESSES[role] if name in features), None)
        if column is not None:
            roles[role] = column
    return roles, columns.path or images[0]


def _class_names(feature: Any) -> list[str] | None:  # noqa: ANN401 - a feature of the library
    """Names of classes where labels are numbers."""
    inner = getattr(feature, "feature", feature)
    names = getattr(inner, "names", None)
    return list(names) if names else None


def _tags(value: Any, names: list[str] | None) -> Iterator[str]:  # noqa: ANN401 - a cell
    values = value if isinstance(value, list) else [value]
    if names:
        yield from (str(item) for item in values if item is not None and int(item) >= 0)
    else:
        for item in values:
            yield from texts_of_cell(item, None)


def _described(roles: dict[str, str]) -> str:
    return ", ".join(f"{role} from '{column}'" for role, column in roles.items()) or "no captions and no tags"
