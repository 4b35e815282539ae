"""Open Images: class descriptions, labels of images or boxes, and captions of localized narratives."""

from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from ....cache.strict_json import parse_json
from ....errors import InputError, cannot_read, read_text
from .samples import SPLITS, Samples, split_name

DESCRIPTIONS = "*class-descriptions*.csv"
UNREADABLE = "cannot read a table of Open Images"


def is_open_images(root: Path) -> bool:
    """Whether a folder holds Open Images' files."""
    return root.is_dir() and any(root.rglob(DESCRIPTIONS))


def read_open_images(root: Path) -> Samples:
    """The samples of Open Images: every image that lies below ``train/``, ``validation/`` or ``test/``.

    Args:
        root: The folder with ``class-descriptions*.csv``, label files whose names begin with a split, such as
            ``validation-annotations-bbox.csv`` or ``train-annotations-human-imagelabels.csv``, and, if there are any,
            localized narratives (``*.jsonl``).

    Raises:
        InputError: A file is missing or cannot be read.
    """
    names = _descriptions(next(iter(sorted(root.rglob(DESCRIPTIONS)))))
    files = [file for file in sorted(root.rglob("*.csv")) if "annotations" in file.name and split_name(_begin(file))]
    if not files:
        raise InputError(
            "no labels of Open Images",
            where=root,
            got="no CSV file of annotations",
            wanted="files such as validation-annotations-bbox.csv",
            do="download them from https://storage.googleapis.com/openimages/web/download.html",
        )
    tags: dict[str, set[str]] = defaultdict(set)
    for file in files:
        for image, label in _labels(file):
            tags[image].add(names.get(label, label))
    captions = _narratives(root)
    paths, splits = [], []
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and split_name(path.name)):
        for file in sorted(folder.rglob("*.jpg")):
            paths.append(file.relative_to(root).as_posix())
            splits.append(split_name(folder.name) or "")
    if not paths:
        raise InputError("no images of Open Images", where=root, wanted=f"JPEG files below {', '.join(SPLITS)}")
    stems = [Path(path).stem for path in paths]
    return Samples(
        root=root,
        paths=paths,
        captions=[captions.get(stem, []) for stem in stems],
        tags=[sorted(tags.get(stem, ())) for stem in stems],
        splits=splits,
        notes=(
            f"labels of {', '.join(file.name for file in files)}",
            f"{sum(stem in captions for stem in stems):,} images with a localized narrative",
        ),
    )


def _begin(file: Path) -> str:
    return file.name.partition("-")[0]


def _descriptions(file: Path) -> dict[str, str]:
    """Names of classes by their codes; the file has a header in newer versions and none in older ones."""
    rows = _csv(file, ["code", "name"])
    return {code: name.strip() for code, name in rows if code != "LabelName"}


def _labels(file: Path) -> list[tuple[str, str]]:
    """Pairs of image and class; labels that people judged absent (confidence 0) are left out."""
    table = _table(file)
    missing = {"ImageID", "LabelName"} - set(table.column_names)
    if missing:
        raise InputError("not labels of Open Images", where=file, got=f"no column {', '.join(sorted(missing))}")
    if "Confidence" in table.column_names:
        try:
            confidence = pc.cast(table.column("Confidence"), pa.float64())
        except pa.ArrowException as error:
            raise cannot_read(UNREADABLE, file, error, wanted="numbers in the column Confidence") from None
        table = table.filter(pc.greater(confidence, 0.0))
    return list(zip(table.column("ImageID").to_pylist(), table.column("LabelName").to_pylist(), strict=True))


def _narratives(root: Path) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = defaultdict(list)
    wanted = "JSON objects with image_id and caption, one a line"
    for file in sorted(root.rglob("*.jsonl")):
        for number, line in enumerate(
            read_text(file, "cannot read localized narratives", wanted=wanted).splitlines(), 1
        ):
            try:
                record = parse_json(line)
                captions[str(record["image_id"])].append(" ".join(str(record["caption"]).split()))
            except (ValueError, KeyError, TypeError) as error:
                where = f"{file}, line {number}"
                raise cannot_read("cannot read localized narratives", where, error, wanted=wanted) from None
    return captions


def _csv(file: Path, names: list[str]) -> list[tuple[str, str]]:
    table = _table(file, pyarrow.csv.ReadOptions(column_names=names))
    return list(zip(*(table.column(name).to_pylist() for name in names), strict=True))


def _table(file: Path, options: pyarrow.csv.ReadOptions | None = None) -> pa.Table:
    texts = dict.fromkeys(("ImageID", "LabelName", "code", "name"), pa.string())
    try:
        options_of_columns = pyarrow.csv.ConvertOptions(column_types=texts)
        table = pyarrow.csv.read_csv(file, read_options=options, convert_options=options_of_columns)
        return table.rename_columns([str(name) for name in table.column_names])  # a name may not be UTF-8
    except (pa.ArrowException, OSError, ValueError) as error:
        raise cannot_read(UNREADABLE, file, error, wanted="a CSV file") from None
