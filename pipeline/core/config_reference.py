"""``docs/configuration.md``, written from the schema: every key, its type, default and range, and one line.

``python -m mmcli.pipeline.core.config_reference > docs/configuration.md`` writes it; a test compares the two.
"""

import json
import re
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
another base (`010`, `1:30`) are refused in one line with their place; a date is text. Files of experiments and grids
are read in the same way.

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
    """The page as Markdown."""
    schema = Config.model_json_schema()
    own = {name: field for name, field in schema["properties"].items() if "$ref" not in field}
    parts = [HEADER, _section("At the top", "", own, "Beside the sections.")]
    parts += _sections(schema, schema, "")
    return "\n".join(parts)


def _sections(schema: dict[str, Any], node: dict[str, Any], path: str) -> list[str]:
    parts = []
    for name, field in node["properties"].items():
        if "$ref" in field:
            inner = schema["$defs"][field["$ref"].rpartition("/")[2]]
            own = {key: value for key, value in inner["properties"].items() if "$ref" not in value}
            text = re.sub(r" \(SPEC section \d+\)", "", " ".join(inner["description"].split())).replace("``", "`")
            parts.append(_section(f"`{path}{name}`", f"{path}{name}.", own, text))
            parts += _sections(schema, inner, f"{path}{name}.")
    return parts


def _section(title: str, path: str, fields: dict[str, Any], text: str) -> str:
    rows = [_row(path + name, field) for name, field in fields.items()]
    table = "\n".join(["| key | type | default | range | what |", "|---|---|---|---|---|", *rows])
    return f"## {title}\n\n{text}\n\n{table}\n"


def _row(key: str, field: dict[str, Any]) -> str:
    kind, limits = _kind(field), _limits(field)
    usual, *others = (_value(preset, key) for preset in PRESETS)
    changed = [
        f"{name}: {_shown(value)}" for name, value in zip(list(PRESETS)[1:], others, strict=True) if value != usual
    ]
    default = ", ".join([_shown(usual), *(changed if key != "preset" else [])])
    return f"| `{key}` | {kind} | {default} | {limits} | {field['description']} |"


def _value(preset: str, key: str) -> Any:  # noqa: ANN401
    """What a key is with a preset and nothing else given."""
    value: Any = load_config(options={"preset": preset}).model_dump(mode="json")
    for part in key.split("."):
        value = value[part]
    return value


def _kind(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_kind(one) for one in field["anyOf"])
    kind = NAMES.get(field.get("type", ""), field.get("type", ""))
    if kind == "list":
        inner = field.get("items") or field["prefixItems"][0]
        return f"list of {_kind(inner)}"
    return "choice" if "enum" in field or "const" in field else kind


def _limits(field: dict[str, Any]) -> str:
    words = [text.format(_number(field[name])) for name, text in LIMITS.items() if name in field]
    if "minItems" in field and field["minItems"] == field.get("maxItems"):
        words = [f"{field['minItems']} items"]
    if "enum" in field or "const" in field:
        words += [", ".join(_shown(choice) for choice in field.get("enum", [field.get("const")]))]
    inner = [
        *field.get("anyOf", []),
        *field.get("prefixItems", [])[:1],
        *([field["items"]] if field.get("items") else []),
    ]
    words += [limits for one in inner if (limits := _limits(one))]
    return ", ".join(words)


def _number(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ") if value >= 1e4 else f"{value:g}"


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    print(reference(), end="")  # noqa: T201
