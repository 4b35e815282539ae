"""Records of a JSON file that a user brings: read and checked, each mistake as one line that says where it is."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ... import InputError, cannot_read, check_file
from ...cache.strict_json import parse_json

AGAIN = "download the file again"

Ints = npt.NDArray[np.int64]
Record = dict[str, Any]


def read_json(path: Path, slim: Callable[[Record], Record]) -> Record:
    """Read a file that holds one JSON object.

    Args:
        path: The file.
        slim: Given every object as soon as it is read, returns what is to be kept of it, so that a large file never
            stands in memory as a whole.

    Raises:
        InputError: It cannot be read, with line and column where it is not JSON.
    """
    try:
        if path.exists():
            check_file(path, "cannot read JSON", wanted="a whole JSON file", do=AGAIN)
        found = parse_json(path.read_bytes(), slim=slim)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError("a file is missing", where=path, got="no such file", do="download it") from None
    except json.JSONDecodeError as error:
        place = f"{path}, line {error.lineno}, column {error.colno}"
        raise InputError("broken JSON", where=place, got=error.msg, wanted="a whole JSON file", do=AGAIN) from None
    except (OSError, ValueError) as error:
        raise cannot_read("cannot read JSON", path, error, wanted="a whole JSON file", do=AGAIN) from None
    if type(found) is not dict:
        raise wrong_structure(path, "the file", found, "a JSON object")
    return found


def records_of(data: Record, key: str, path: Path) -> list[Any]:
    """The list under a key; its entries are yet to be checked.

    Raises:
        InputError: There is none.
    """
    records = data.get(key)
    if type(records) is not list:
        raise wrong_structure(path, key, records, "a list")
    return records


def ints(records: Sequence[Any], name: str, key: str, path: Path) -> Ints:
    """The whole numbers under a key of n records ``(n,)`` int64.

    Args:
        records: The entries of a list of the file.
        name: The list's name, for the error.
        key: The key in every record.
        path: The file, for the error.

    Raises:
        InputError: An entry is not an object, lacks the key, or has something else there.
    """
    values = _values(records, name, key, path)
    for row, value in enumerate(values):
        # bool is an int to Python, not to COCO.
        if type(value) is not int or not -(2**63) <= value < 2**63:
            raise wrong_structure(path, f"{name}[{row}].{key}", value, "a whole number of 64 bits")
    return np.array(values, np.int64)


def texts_of(records: Sequence[Any], name: str, key: str, path: Path) -> list[str]:
    """The texts under a key of n records; see :func:`ints`."""
    values = _values(records, name, key, path)
    for row, value in enumerate(values):
        if type(value) is not str or not (value.isascii() or _is_unicode(value)):
            raise wrong_structure(path, f"{name}[{row}].{key}", value, "text")
    return values


def _values(records: Sequence[Any], name: str, key: str, path: Path) -> list[Any]:
    for row, record in enumerate(records):
        if type(record) is not dict:
            raise wrong_structure(path, f"{name}[{row}]", record, "an object")
        if key not in record:
            raise InputError(f"missing {key}", where=f"{path}, {name}[{row}]", wanted=f"the key {key}", do=AGAIN)
    return [record[key] for record in records]


def _is_unicode(text: str) -> bool:
    """JSON can spell half a surrogate pair, which no file can hold."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def unique(values: npt.NDArray[Any], what: str, path: Path) -> npt.NDArray[Any]:
    """The values, when every one of them is there once.

    Raises:
        InputError: One is there more often.
    """
    found, counts = np.unique(values, return_counts=True)
    if (counts > 1).any():
        again = found[counts > 1][0]
        raise InputError(f"a duplicate {what}", where=path, got=f"{again} twice", wanted=f"every {what} once", do=AGAIN)
    return values


def wrong_structure(path: Path, name: str, got: object, wanted: str) -> InputError:
    """The error for something of another kind than it should be; lists and objects are named, not shown."""
    kinds = {list: "a list", dict: "an object", type(None): "nothing"}
    shown = kinds.get(type(got)) or ascii(got)[:60]
    return InputError("wrong structure", where=f"{path}, {name}", got=shown, wanted=wanted, do=AGAIN)
