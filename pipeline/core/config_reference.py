"""``docs/configuration.md``, written from the schema: every key, its type, default and range, and one line.

``python -m mmcli.pipeline.core.config_reference > docs/configuration.md`` writes it; a test compares the two.
"""

import json
from functools import reduce
from typing import Any

from .config import Config, load_config
from .presets import PRESETS

HEADER = """# Configuration

Every key of a configuration, as `--config FILE` (YAML) and `--set KEY=VALUE` take it. Defaults give way to the preset,
the preset to the file, the file to options; defaults below are those of the preset `recommended`, with those of other
presets where they differ. An unknown key, a wrong type or a value out of range is refused in one line that names the
key. `mmcli train-head --print-config` prints what a command line resolves to, without training, and every run folder
keeps it as `config.yaml`. A choice may be written in any case; `null` is written where it is a value.

A file is UTF-8 and at most 256 KiB, nested at most 20 deep, with at most ten aliases. A key that stands twice or is no
text, a merge key `<<`, a tag such as `!!python/name`, a whole number beyond 64 bits, and one that YAML 1.1 reads in
another base (`010`, `1:30`) are refused in one line with their place, and so is a truth value (`yes`, `on`, `true`)
where a number belongs; a date is text. Files of experiments and grids are read in the same way.

What a step sees is decided in one file, `pipeline/core/config.py`: `load_config` reads and checks what was given, and
`resolve` then decides, once, what the keys and the store say about one another (a head without hash layer has 0 bits
and looks for neighbours by cosine; a store gives its model, patch budget and number of classes).

This page is written from the schema: `python -m mmcli.pipeline.core.config_reference > docs/configuration.md`.
"""
LIMITS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minItems": "{} items or more",
    "maxItems": "{} items or fewer",
}
NAMES = {"integer": "int", "number": "float", "string": "text", "boolean": "bool", "array": "list"}


def reference() -> str:
    """Write the whole page as Markdown."""
    schema = Config.model_json_schema()
    return "\n".join([HEADER, *_sections(schema, schema, "")])


def _sections(schema: dict[str, Any], section: dict[str, Any], path: str) -> list[str]:
    """A section as a title, its text and a table of its keys, and then the sections inside it."""
    fields = {name: field for name, field in section["properties"].items() if "$ref" not in field}
    rows = [_row(path + name, field) for name, field in fields.items()]
    title = f"`{path.rstrip('.')}`" if path else "At the top"
    text = " ".join(section["description"].split()).replace("``", "`") if path else "Beside the sections."
    table = "\n".join(["| key | type | default | range | what |", "|---|---|---|---|---|", *rows])
    parts = [f"## {title}\n\n{text}\n\n{table}\n"]
    for name, field in section["properties"].items():
        if "$ref" in field:
            parts += _sections(schema, schema["$defs"][field["$ref"].rpartition("/")[2]], f"{path}{name}.")
    return parts


def _row(key: str, field: dict[str, Any]) -> str:
    trees = (load_config(options={"preset": preset}).model_dump(mode="json") for preset in PRESETS)
    usual, *others = (reduce(dict.__getitem__, key.split("."), tree) for tree in trees)
    changed = [
        f"{name}: {_shown(value)}" for name, value in zip(list(PRESETS)[1:], others, strict=True) if value != usual
    ]
    default = ", ".join([_shown(usual), *(changed if key != "preset" else [])])
    return f"| `{key}` | {_kind(field)} | {default} | {_limits(field)} | {field['description']} |"


def _kind(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(map(_kind, field["anyOf"]))
    kind = NAMES.get(field.get("type", ""), field.get("type", ""))
    if kind == "list":
        return f"list of {_kind(field.get('items') or field['prefixItems'][0])}"
    return "choice" if "enum" in field or "const" in field else kind


def _limits(field: dict[str, Any]) -> str:
    words = [text.format(_number(field[name])) for name, text in LIMITS.items() if name in field]
    if "minItems" in field and field["minItems"] == field.get("maxItems"):
        words = [f"{field['minItems']} items"]
    if "enum" in field or "const" in field:
        words.append(", ".join(_shown(choice) for choice in field.get("enum", [field.get("const")])))
    items = [field["items"]] if field.get("items") else field.get("prefixItems", [])[:1]
    inner = [*field.get("anyOf", []), *items]
    return ", ".join([*words, *filter(None, map(_limits, inner))])


def _number(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ") if value >= 1e4 else f"{value:g}"


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    print(reference(), end="")  # noqa: T201
