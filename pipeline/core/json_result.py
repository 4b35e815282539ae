"""Results whose JSON is their attributes."""

from typing import Any

from pydantic_core import to_jsonable_python


class JsonResult:
    """A dataclass that ``--json`` prints as it is: its attributes, with paths as text and tuples as lists."""

    def to_json(self) -> dict[str, Any]:
        """The attributes as one JSON object."""
        attributes: dict[str, Any] = to_jsonable_python(self, fallback=str)
        return attributes
