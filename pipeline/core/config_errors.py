"""What a wrong configuration is told: one line that names the key as it was written."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import BaseModel, ValidationError

from ... import InputError

# What the keys are called in formulas.
SYMBOLS = {"alpha": "cosine_weight", "gamma": "hash_weight", "B": "bits", "C": "num_classes"}


def readable(
    error: ValidationError, root: type[BaseModel], file: Path | None, chosen: set[str], flags: Mapping[str, str]
) -> InputError:
    """Turn the first refused key into one line that names it as its owner wrote it.

    Args:
        error: What pydantic says.
        root: The model that was filled.
        file: The file that was read, if any.
        chosen: Dotted keys given as options.
        flags: Dotted keys to the option's name on the command line.
    """
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    option = next((flags.get(c) for c in chosen if key == c or key.startswith(c + ".")), None)
    where = option or (f"{file}, key {key}" if file else key)
    if first["type"] == "extra_forbidden":
        known = _known_keys(root, path[:-1])
        symbol = SYMBOLS.get(path[-1])
        near = [symbol] if symbol in known else difflib.get_close_matches(path[-1], known, n=1, cutoff=0.0)
        return InputError(
            "unknown key",
            where=where,
            got=path[-1],
            wanted=f"one of {', '.join(known)}",
            do=f"did you mean {near[0]}?",
        )
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']+)'", first["ctx"]["expected"])
        meant = difflib.get_close_matches(str(first["input"]).lower(), choices, n=1)
        do = f"did you mean {meant[0]}?" if meant else "change it"
        wanted = first["ctx"]["expected"].replace("'", "")
        return InputError("refused value", where=where, got=repr(first["input"]), wanted=wanted, do=do)
    if first["type"] == "model_type":
        keys = ", ".join(_known_keys(root, path))
        return InputError(
            "refused value", where=where, got=repr(first["input"]), wanted=f"keys: {keys}", do="change it"
        )
    wanted = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return InputError("refused value", where=where, got=repr(first["input"]), wanted=wanted, do="change it")


def one_of(choices: Iterable[str]) -> str:
    """``a, b or c``."""
    *most, last = choices
    return f"{', '.join(most)} or {last}" if most else last


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        inner = model.model_fields[part].annotation
        assert isinstance(inner, type)
        assert issubclass(inner, BaseModel)
        model = inner
    return list(model.model_fields)
