"""Which kind of data set a source is, and the reader of that kind."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, assert_never, get_args

from ....errors import InputError
from ...core.archives import SUFFIXES as ARCHIVES
from . import archives, tables
from .coco_general import read_instances_set
from .folders import read_folder
from .huggingface import is_saved_dataset, read_dataset
from .open_images import is_open_images, read_open_images
from .samples import Problems, Samples, SplitRule, split_name
from .tables import Columns, load_table, read_table
from .visual_genome import is_visual_genome, read_visual_genome

Kind = Literal["coco", "instances", "table", "folder", "archive", "huggingface", "openimages", "visualgenome"]
KINDS: tuple[str, ...] = get_args(Kind)
DESCRIPTIONS: dict[str, str] = {
    "coco": "COCO 2014 with Karpathy's split",
    "instances": "COCO's instances JSON",
    "table": "a table",
    "folder": "a folder of images",
    "archive": "images in archives",
    "huggingface": "a Hugging Face data set",
    "openimages": "Open Images",
    "visualgenome": "Visual Genome",
}
# What lies in a folder with COCO 2014 and Karpathy's split.
SPLIT_FILE = "dataset_coco.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Folders in which the images of a table may lie, beside the table.
IMAGE_FOLDERS = ("images", "Images", "imgs", "img", "photos")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set as a person names it.

    Attributes:
        name: A file, a folder or a hub id.
        kind: What it is.
    """

    name: str
    kind: Kind

    @property
    def root(self) -> Path:
        """The data folder: that of a file, the folder itself, or ``data/NAME`` for a hub id."""
        path = Path(self.name)
        if path.is_dir():
            return path.parent if self.kind == "huggingface" and is_saved_dataset(path) else path
        return path.parent if path.exists() else Path("data") / self.name.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How a data set is read.

    Attributes:
        out: The folder that gets the manifest; the data folder when not given.
        columns: Columns of tables and of Hugging Face's data sets.
        split_file: A table of splits, which counts before the data set's own.
        rule: How images are split where the data set does not say.
        categories: A file with a category name a line, in label order; those of the data when not given.
        least_images: Tags of fewer images are left out.
        name: The data set's name; that of its file or folder when not given.
    """

    out: Path | None = None
    columns: Columns = field(default_factory=Columns)
    split_file: Path | None = None
    rule: SplitRule = field(default_factory=SplitRule)
    categories: Path | None = None
    least_images: int = 1
    name: str | None = None


def recognise(name: str, kind: str | None = None) -> Source:
    """The kind of a source, from what lies there.

    Args:
        name: A table, an archive, an instances JSON, a folder, or a hub id.
        kind: The kind, where the person knows better.

    Raises:
        InputError: Nothing is there, or it is of no kind that can be read.
    """
    if kind is not None:
        if kind not in KINDS:
            raise InputError("no such format", got=kind, wanted=", ".join(KINDS))
        return Source(name=name, kind=kind)  # type: ignore[arg-type]
    if "://" in name:
        raise InputError("a URL is no source", got=name, do="download it, and name the file or folder")
    path = Path(name)
    if path.is_dir():
        return Source(name=name, kind=_kind_of_folder(path))
    if not path.exists():
        if HUB_ID.fullmatch(name) and not path.parent.is_dir():
            return Source(name=name, kind="huggingface")
        raise InputError("no such data set", where=name, got="nothing there", wanted=f"a file or folder ({_known()})")
    suffix = path.suffix.casefold()
    if suffix in tables.SUFFIXES:
        return Source(name=name, kind="table")
    if suffix in ARCHIVES:
        return Source(name=name, kind="archive")
    if suffix == ".json":
        return Source(name=name, kind="instances")
    raise InputError(
        "a file of no kind that can be read", where=name, wanted=_known(), do="name its kind with --format"
    )


def read_source(source: Source, columns: Columns, split_file: Path | None = None) -> Samples:
    """The samples of a source other than COCO with Karpathy's split.

    Args:
        source: What :func:`recognise` gave.
        columns: Columns of tables and of Hugging Face's data sets.
        split_file: A table with the columns path (or image_id) and split, which counts before the data set's own.

    Raises:
        InputError: It cannot be read, or an image is missing; all of these are listed.
    """
    path = Path(source.name)
    named = [f"--{option}" for option, column in columns.options().items() if column is not None]
    if named and source.kind not in {"table", "huggingface"}:
        raise InputError(
            "columns are for tables",
            where=source.name,
            got=f"{', '.join(named)} with {DESCRIPTIONS[source.kind]}",
            do="leave them out, or name the table itself",
        )
    match source.kind:
        case "table":
            samples = _found_images(read_table(path if path.is_file() else _table_in(path), columns))
        case "folder":
            samples = read_folder(path)
        case "archive":
            files = [path] if path.is_file() else _archives_in(path)
            samples = archives.read_archives(files, source.root)
        case "instances":
            files = [path] if path.is_file() else _instances_in(path)
            root = path if path.is_dir() else path.parent.parent if path.parent.name == "annotations" else path.parent
            samples = _found_images(read_instances_set(files, root))
        case "openimages":
            samples = read_open_images(path)
        case "visualgenome":
            samples = read_visual_genome(path)
        case "huggingface":
            samples = read_dataset(source.name, source.root, columns)
        case "coco":
            raise ValueError("COCO with Karpathy's split is read by prepare, not as samples")
        case _:
            assert_never(source.kind)
    return samples if split_file is None else _with_splits(samples, split_file)


def _known() -> str:
    return "a table, an instances JSON, an archive (tar, zip), a folder of images, a Hugging Face data set"


def _kind_of_folder(path: Path) -> Kind:
    if (path / SPLIT_FILE).is_file():
        return "coco"
    signs: tuple[tuple[Kind, Callable[[Path], object]], ...] = (
        ("huggingface", is_saved_dataset),
        ("visualgenome", is_visual_genome),
        ("openimages", is_open_images),
        ("instances", _instances_in),
        ("table", _tables_in),
        ("archive", _archives_in),
    )
    return next((kind for kind, sign in signs if sign(path)), "folder")


def _instances_in(folder: Path) -> list[Path]:
    return sorted([*folder.glob("instances*.json"), *folder.glob("annotations/instances*.json")])


def _archives_in(folder: Path) -> list[Path]:
    return sorted(file for suffix in ARCHIVES for file in folder.glob(f"*{suffix}"))


def _tables_in(folder: Path) -> list[Path]:
    """The tables of a folder but its manifest."""
    files = [file for suffix in tables.SUFFIXES for file in folder.glob(f"*{suffix}")]
    return sorted(file for file in files if file.name != "manifest.parquet" and not file.name.startswith("."))


def _table_in(folder: Path) -> Path:
    files = _tables_in(folder)
    if len(files) != 1:
        raise InputError(
            "which table is the data set",
            where=folder,
            got=", ".join(file.name for file in files[:5]) or "no table",
            wanted="one table",
            do="name its file",
        )
    return files[0]


def _found_images(samples: Samples) -> Samples:
    """The samples with every image file found, directly or in the folder of images beside the table.

    Raises:
        InputError: Lists the images that are not there.
    """
    missing = [path for path in samples.paths if not (samples.root / path).is_file()]
    for folder in IMAGE_FOLDERS if len(missing) == len(samples.paths) else ():
        if (samples.root / folder / samples.paths[0]).is_file():
            moved = tuple(f"{folder}/{path}" for path in samples.paths)
            notes = (*samples.notes, f"images are in {folder}/")
            return _found_images(replace(samples, paths=moved, notes=notes))
    problems = Problems(samples.root)
    for path in missing:
        problems.add(path, "no such image", "mend its path, or take its row out")
    problems.check()
    return samples


def _with_splits(samples: Samples, file: Path) -> Samples:
    """The samples with the splits of a table; every image has to have one there."""
    table = load_table(file)
    names = {name.casefold(): name for name in table.column_names}
    key = next(
        (names[name] for name in ("path", "file_name", "filename", "image", "image_id", "id") if name in names), None
    )
    if key is None or "split" not in names:
        raise InputError(
            "no file of splits", where=file, got=f"columns {', '.join(names)}", wanted="path (or image_id) and split"
        )
    rows = zip(table.column(key).to_pylist(), table.column(names["split"]).to_pylist(), strict=True)
    given: Mapping[str, str] = {str(image): str(split) for image, split in rows}
    problems = Problems(file)
    splits = []
    for row, path in enumerate(samples.paths):
        image = str(samples.image_ids[row]) if key.casefold() in {"image_id", "id"} and samples.image_ids else path
        split = split_name(given.get(image, ""))
        if split is None:
            problems.add(
                image, "no split" if image not in given else f"the split {given[image]!r}", "add it to the file"
            )
        splits.append(split or "")
    problems.check()
    return replace(samples, splits=splits, notes=(*samples.notes, f"splits of {file.name}"))
