"""A table of images, captions and tags (CSV, TSV, JSON lines or parquet), with its columns named or guessed."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from ....errors import InputError, cannot_read, check_file
from .samples import SPLITS, Problems, Samples, split_name

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
# What columns are called; the first that a table has is taken.
GUESSES = {
    "path": ("path", "file_name", "filename", "file", "filepath", "image_path", "image_file", "image", "img", "photo"),
    "captions": ("captions", "caption", "text", "texts", "description", "sentence", "sentences", "title", "comment"),
    "tags": ("tags", "tag", "labels", "label", "categories", "category", "classes", "class", "keywords"),
    "split": ("split", "set", "subset", "partition", "fold"),
    "image_id": ("image_id", "imageid", "cocoid", "id"),
}
DELIMITERS = ("|", ";", ",")
# Where images go that a table holds itself.
IMAGES = "images"
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which column of a table holds what; a name that is not given is guessed.

    Attributes:
        path: The image's path, relative to the table's folder.
        captions: One caption, or a list of them.
        tags: A list of tag names, or one text that ``delimiter`` separates.
        split: The split's name.
        image_id: A whole number for every image.
        delimiter: Between the tags of one text.
    """

    path: str | None = None
    captions: str | None = None
    tags: str | None = None
    split: str | None = None
    image_id: str | None = None
    delimiter: str | None = None

    def options(self) -> dict[str, str | None]:
        """The names of the command line's options, to what they give."""
        return {
            "path-column": self.path,
            "caption-column": self.captions,
            "tag-column": self.tags,
            "split-column": self.split,
            "id-column": self.image_id,
            "delimiter": self.delimiter,
        }

    def resolve(self, names: Sequence[str], where: Path) -> dict[str, str]:
        """The column of every role that the table has.

        Raises:
            InputError: A named column is not there, or there is no column of paths.
        """
        folded = {name.strip().casefold(): name for name in names}
        columns = {}
        for role, guesses in GUESSES.items():
            given = getattr(self, role)
            if given is not None and given not in names:
                raise InputError("no such column", where=where, got=given, wanted=f"one of {', '.join(names)}")
            column = given or next((folded[guess] for guess in guesses if guess in folded), None)
            if column is not None:
                columns[role] = column
        if "path" not in columns:
            raise InputError(
                "no column of image paths",
                where=where,
                got=f"columns {', '.join(names) or 'none'}",
                wanted=f"one called {', '.join(GUESSES['path'][:5])} or alike",
                do="name it with --path-column",
            )
        return columns


def read_table(path: Path, columns: Columns) -> Samples:
    """The samples of a table; rows of one image are one sample, as where every caption has a row.

    Args:
        path: The table; its folder is the data folder.
        columns: Which columns hold what.

    Raises:
        InputError: It cannot be read, a column is missing, or rows are wrong; all of them are listed.
    """
    table = load_table(path)
    if not table.num_rows:
        raise InputError("an empty table", where=path, got="no rows", wanted="one row an image or a caption")
    names = columns.resolve(table.column_names, path)
    delimiter = columns.delimiter or _delimiter(table, names.get("tags"))
    problems = Problems(path)
    images: dict[str, Row] = {}
    for number, row in enumerate(table.select(list(names.values())).to_pylist(), 1):
        _add(images, {role: row[column] for role, column in names.items()}, number, delimiter, path.parent, problems)
    problems.check()
    notes = ["columns: " + ", ".join(f"{role} from '{column}'" for role, column in names.items())]
    if delimiter and "tags" in names:
        notes.append(f"tags are separated by '{delimiter}'")
    if len(images) < table.num_rows:
        notes.append(f"{table.num_rows:,} rows of {len(images):,} images")
    samples = list(images.values())
    return Samples(
        root=path.parent,
        paths=list(images),
        captions=[sample["captions"] for sample in samples],
        tags=[sample["tags"] for sample in samples],
        splits=[sample["split"] for sample in samples] if "split" in names else None,
        image_ids=[sample["image_id"] for sample in samples] if "image_id" in names else None,
        notes=tuple(notes),
    )


def load_table(path: Path) -> pa.Table:
    """A table as it stands in its file; every value of CSV and TSV is text.

    Raises:
        InputError: It is no table that can be read.
    """
    check_file(path, "cannot read the table", wanted=f"a table ({', '.join(SUFFIXES)})")
    suffix = path.suffix.casefold()
    try:
        if suffix == ".parquet":
            table = pq.read_table(path)
        elif suffix in {".jsonl", ".ndjson"}:
            table = _json_lines(path)
        else:
            table = _separated(path, "\t" if suffix == ".tsv" else ",")
        table.validate(full=True)  # texts of parquet are not checked when they are read
        return table.rename_columns([str(name) for name in table.column_names])  # a name may not be UTF-8
    except (pa.ArrowException, OSError, ValueError) as error:
        raise cannot_read("cannot read the table", path, error, wanted="a whole table in UTF-8") from None


def _separated(path: Path, delimiter: str) -> pa.Table:
    parsing = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with pyarrow.csv.open_csv(path, parse_options=parsing) as reader:
        names = reader.schema.names
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the column {doubled[0]} twice")
    return pyarrow.csv.read_csv(
        path,
        parse_options=parsing,
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False, quoted_strings_can_be_null=False
        ),
    )


def _json_lines(path: Path) -> pa.Table:
    return pyarrow.json.read_json(path, read_options=pyarrow.json.ReadOptions(block_size=64 << 20))


def _delimiter(table: pa.Table, column: str | None) -> str | None:
    """What separates the tags of a text: the first of the usual signs that stands in any of them."""
    if column is None or pa.types.is_list(table.schema.field(column).type):
        return None
    texts = [value for value in table.column(column).to_pylist() if isinstance(value, str)]
    return next((sign for sign in DELIMITERS if any(sign in text for text in texts if not text.startswith("["))), None)


def _add(
    images: dict[str, Row], row: Mapping[str, Any], number: int, delimiter: str | None, root: Path, problems: Problems
) -> None:
    """Put one row of the table to its image; what is wrong with it goes to the problems."""
    place = f"row {number:,}"
    path = row["path"]
    if isinstance(path, Mapping):  # an image as Hugging Face writes it: bytes with a path
        path = write_image(path, root, f"{number:08d}")
    if not isinstance(path, str) or not path.strip():
        problems.add(place, "no path", "name the image's file")
        return
    sample = images.setdefault(path, {"captions": [], "tags": [], "split": None, "image_id": None})
    sample["captions"] += list(texts_of_cell(row.get("captions"), None))
    sample["tags"] += [tag for tag in texts_of_cell(row.get("tags"), delimiter) if tag not in sample["tags"]]
    if "split" in row:
        split = split_name(str(row["split"] or ""))
        if split is None:
            problems.add(place, f"the split {row['split']!r}", f"write {', '.join(SPLITS)}")
        elif sample["split"] not in {None, split}:
            problems.add(place, f"{path} is in {sample['split']} and in {split}", "give an image one split")
        else:
            sample["split"] = split
    if "image_id" in row:
        try:
            sample["image_id"] = int(row["image_id"])
        except (TypeError, ValueError):
            problems.add(place, f"the image id {row['image_id']!r}", "write whole numbers, or leave the column out")


def texts_of_cell(value: object, delimiter: str | None) -> Iterator[str]:
    """The texts of a cell: a list, a JSON list, a text with delimiters, or one text; nothing for an empty cell."""
    if value is None:
        return
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("[") and text.endswith("]"):
            try:
                value = json.loads(text)
            except ValueError:
                value = [text]
        else:
            value = text.split(delimiter) if delimiter else [text]
    for part in value if isinstance(value, list | tuple) else [value]:
        text = "" if part is None else str(part).strip()
        if text:
            yield text


def write_image(image: Mapping[str, Any], root: Path, stem: str) -> str:
    """Write an image of a table below the data folder, its bytes as they are.

    Args:
        image: ``bytes`` of the encoded image, or ``path`` of its file.
        root: The data folder.
        stem: The new file's name without its suffix.

    Returns:
        The file's path relative to the data folder.

    Raises:
        InputError: There are no bytes, and no such file.
    """
    data, source = image.get("bytes"), image.get("path") or ""
    if data is None:
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise InputError("an image of the data set is missing", where=source, got=error.strerror) from None
    suffix = Path(source).suffix or (".png" if data.startswith(b"\x89PNG") else ".jpg")
    relative = f"{IMAGES}/{stem}{suffix}"
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_bytes() != data:
        raise InputError(
            "a file of another content has the name of an image",
            where=path,
            wanted="nothing there, or the same image",
            do="move it away",
        )
    if not path.exists():
        path.write_bytes(data)
    return relative
