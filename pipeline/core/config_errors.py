"""One line for every key of a configuration that is refused."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ...errors import InputError

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
    where = _name(".".join(path), file, chosen, flags)
    if first["type"] == "extra_forbidden":
        names = _keys(root, path[:-1])
        symbol = SYMBOLS.get(path[-1])
        near = [symbol] if symbol in names else difflib.get_close_matches(path[-1], names, n=1, cutoff=0.0)
        return InputError(
            "unknown key",
            where=where,
            got=path[-1],
            wanted=f"one of {', '.join(names)}",
            do=f"did you mean {near[0]}?",
        )
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']+)'", first["ctx"]["expected"])
        meant = difflib.get_close_matches(str(first["input"]).lower(), choices, n=1)
        do = f"did you mean {meant[0]}?" if meant else "change it"
        wanted = first["ctx"]["expected"].replace("'", "")
        return InputError("refused value", where=where, got=repr(first["input"]), wanted=wanted, do=do)
    if first["type"] == "model_type":
        keys = ", ".join(_keys(root, path))
        return InputError(
            "refused value", where=where, got=repr(first["input"]), wanted=f"keys: {keys}", do="change it"
        )
    wanted = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return InputError("refused value", where=where, got=repr(first["input"]), wanted=wanted, do="change it")


def refuse_truth_values(
    tree: Mapping[str, Any], root: type[BaseModel], file: Path | None, chosen: set[str], flags: Mapping[str, str]
) -> None:
    """Refuse a truth value where a number belongs: YAML reads ``yes`` and ``on`` as one, which Python calls 1.

    ``tree`` is the configuration, not yet checked; the other arguments are as for :func:`readable`.

    Raises:
        InputError: There is one.
    """
    for key, value in _truth_values(tree, root, ""):
        raise InputError(
            "refused value",
            where=_name(key, file, chosen, flags),
            got=f"{str(value).lower()} (YAML reads yes, no, on and off as true and false)",
            wanted="a number",
            do="change it",
        )


def _truth_values(tree: Mapping[str, Any], model: type[BaseModel], path: str) -> Iterator[tuple[str, bool]]:
    for name, field in model.model_fields.items():
        value, kind = tree.get(name), field.annotation
        if isinstance(value, Mapping) and isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _truth_values(value, kind, f"{path}{name}.")
        elif any(part in (int, float) for part in _parts(kind)) and bool not in _parts(kind):
            items = value if isinstance(value, list | tuple) else [value]
            yield from ((path + name, item) for item in items if isinstance(item, bool))


def _parts(kind: Any) -> list[Any]:  # noqa: ANN401 - any annotation
    """A type and all types that it is made of."""
    return [kind, *(part for inner in get_args(kind) for part in _parts(inner))]


def _name(key: str, file: Path | None, chosen: set[str], flags: Mapping[str, str]) -> str:
    """A key as its owner wrote it: the option, or the key in a file."""
    option = next((flags.get(c) for c in chosen if key == c or key.startswith(c + ".")), None)
    return option or (f"{file}, key {key}" if file else key)


def one_of(choices: Iterable[str]) -> str:
    """Join choices to ``a, b or c``."""
    *most, last = choices
    return f"{', '.join(most)} or {last}" if most else last


def _keys(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        inner = model.model_fields[part].annotation
        assert isinstance(inner, type)
        assert issubclass(inner, BaseModel)
        model = inner
    return list(model.model_fields)
