"""Visual Genome: names of objects as tags, phrases of regions as captions."""

from pathlib import Path
from typing import Any

from ....cache.strict_json import parse_json
from ....errors import InputError, cannot_read, check_file
from .samples import Samples

OBJECTS, REGIONS = "objects.json", "region_descriptions.json"
FOLDERS = ("VG_100K", "VG_100K_2", "images/VG_100K", "images/VG_100K_2", "images")


def is_visual_genome(root: Path) -> bool:
    """Whether a folder holds Visual Genome's files."""
    return (root / OBJECTS).is_file()


def read_visual_genome(root: Path) -> Samples:
    """The samples of Visual Genome, in the order of ``objects.json``.

    Args:
        root: The folder with ``objects.json``, ``region_descriptions.json`` if captions are wanted, and the images in
            ``VG_100K`` and ``VG_100K_2``.

    Raises:
        InputError: A file cannot be read or has another structure, or an image is missing.
    """
    tags = {_image_id(record, root / OBJECTS): sorted(_object_names(record)) for record in _records(root / OBJECTS)}
    captions: dict[int, list[str]] = {}
    if (root / REGIONS).is_file():
        for record in _records(root / REGIONS):
            regions = [region for region in _list(record, "regions") if isinstance(region, dict)]
            phrases = [" ".join(str(region.get("phrase", "")).split()) for region in regions]
            captions[_image_id(record, root / REGIONS)] = [phrase for phrase in phrases if phrase]
    paths = [_path(root, image) for image in tags]
    return Samples(
        root=root,
        paths=paths,
        captions=[captions.get(image, []) for image in tags],
        tags=list(tags.values()),
        image_ids=list(tags),
        notes=("tags are names of objects, captions the first phrases of regions",),
    )


def _object_names(record: dict[str, Any]) -> set[str]:
    names = (name for item in _list(record, "objects") for name in _list(item, "names"))
    return {text for name in names if (text := str(name).strip().casefold())}


def _list(record: Any, key: str) -> list[Any]:  # noqa: ANN401 - JSON
    """The list under a key; an empty one where there is none."""
    value = record.get(key) if isinstance(record, dict) else None
    return value if isinstance(value, list) else []


def _records(path: Path) -> list[dict[str, Any]]:
    check_file(path, "cannot read Visual Genome")
    try:
        records = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise cannot_read("cannot read Visual Genome", path, error, wanted="a JSON list") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError("not a file of Visual Genome", where=path, wanted="a JSON list of objects")
    return records


def _image_id(record: dict[str, Any], path: Path) -> int:
    value = record.get("image_id", record.get("id"))
    if type(value) is not int:
        raise InputError("not a file of Visual Genome", where=path, got=f"image_id {value!r}", wanted="whole numbers")
    return value


def _path(root: Path, image: int) -> str:
    for folder in FOLDERS:
        if (root / folder / f"{image}.jpg").is_file():
            return f"{folder}/{image}.jpg"
    raise InputError(
        "an image of Visual Genome is missing",
        where=root,
        got=f"no {image}.jpg in {', '.join(FOLDERS)}",
        do="unpack images.zip and images2.zip there",
    )
