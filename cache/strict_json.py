"""JSON as every reader of this project takes it: bounded, with one meaning, and a ValueError for all that is wrong."""

import json
from collections.abc import Callable
from typing import Any

Record = dict[str, Any]


def parse_json(text: str | bytes, *, slim: Callable[[Record], Record] | None = None) -> Any:  # noqa: ANN401 - JSON
    """The value that a JSON text stands for.

    Args:
        text: The text; bytes may be UTF-8, UTF-16 or UTF-32.
        slim: Given every object as soon as it is read, returns what is to be kept of it.

    Raises:
        ValueError: It is not JSON, a key stands twice in one object, a number is NaN, infinite or of thousands of
            digits, or it is nested too deeply. Where the place is known it is a ``json.JSONDecodeError``.
    """

    def record(pairs: list[tuple[str, Any]]) -> Record:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} twice in one object")
        return values if slim is None else slim(values)

    try:
        return json.loads(text, object_pairs_hook=record, parse_constant=_no_number)
    except UnicodeDecodeError:
        raise ValueError("bytes that are not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply: the limit of recursion is reached") from None


def _no_number(name: str) -> float:
    raise ValueError(f"{name}, which is no number")
