"""YAML as every reader of this project takes it: bounded before anything is built, with one meaning.

What a configuration needs is taken and nothing else: mappings with text as keys, lists, text, numbers, truth values and
null. A date is text, as a user who writes one means it.
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from ...errors import InputError, cannot_read, check_file, first_line

MOST_BYTES, MOST_DEPTH, MOST_ALIASES = 1 << 18, 20, 10
_LARGEST = 2**63
_OTHER_BASE = re.compile(r"[-+]?0_*[0-9]|[^:]*:")
_TIMESTAMP = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, without what makes two meanings of one text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as the base class has it
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise _refused(key, "a merge key <<, which is not taken")
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise _refused(key, f"{_shown(key)} as a key, which is no text (put it into quotes)")
            if key.value in seen:
                raise _refused(key, f"the key {_shown(key)} twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: yaml.ScalarNode) -> float:
        """A number that fits 64 bits, and that YAML 1.1 does not take for one of another base: 010 is 8 there."""
        if _OTHER_BASE.match(node.value):
            raise _refused(node, f"{_shown(node)}, which YAML reads in another base than ten (put text into quotes)")
        try:
            if node.tag == "tag:yaml.org,2002:float":
                return self.construct_yaml_float(node)
            whole = self.construct_yaml_int(node)
        except (ValueError, OverflowError, IndexError):
            whole = _LARGEST
        if abs(whole) >= _LARGEST:
            raise _refused(node, f"{_shown(node)}, which is no number of 64 bits")
        return whole


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def _refused(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _shown(node: yaml.Node) -> str:
    text = node.value if isinstance(node, yaml.ScalarNode) else "a list or mapping"
    return text if len(text) <= 40 else f"{text[:40]}... ({len(text):,} characters)"


def parse_yaml(text: str) -> Any:  # noqa: ANN401 - YAML
    """The value that a YAML text stands for; None for an empty one.

    Raises:
        yaml.YAMLError: It is not YAML, or more than is taken: too long, nested too deeply, many aliases, tags, a key
            twice or that is no text, a whole number that does not fit 64 bits. ``problem_mark`` says where.
    """
    if len(text) > MOST_BYTES:
        raise yaml.MarkedYAMLError(problem=f"{len(text):,} characters, more than {MOST_BYTES:,}")
    try:
        _check_size(text)
        return yaml.load(text, _Loader)  # noqa: S506 - a safe loader
    except (ValueError, OverflowError) as error:  # what PyYAML lets through
        raise yaml.MarkedYAMLError(problem=first_line(error)) from None


def _check_size(text: str) -> None:
    """Go through the events of a text, which takes little, before objects are built, which may take anything."""
    aliases, inside = 0, list[str | None]()
    for event in yaml.parse(text, _Loader):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.CollectionStartEvent):
            inside.append(anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            inside.pop()
        elif isinstance(event, yaml.ScalarEvent):
            event.value.encode()  # an escape can spell half a surrogate pair, which no file can hold
        aliases += isinstance(event, yaml.AliasEvent)
        problem = (
            f"more than {MOST_DEPTH} levels"
            if len(inside) > MOST_DEPTH
            else f"the alias {anchor} of what it stands in"
            if isinstance(event, yaml.AliasEvent) and anchor in inside
            else f"more than {MOST_ALIASES} aliases"
            if aliases > MOST_ALIASES
            else f"the tag {tag}, which is not taken"
            if (tag := getattr(event, "tag", None)) is not None
            else None
        )
        if problem is not None:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)  # type: ignore[arg-type]


def yaml_problem(error: yaml.YAMLError, where: object) -> tuple[str, str]:
    """What is wrong with a text, and where in it."""
    mark = getattr(error, "problem_mark", None)
    place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(where)
    return getattr(error, "problem", None) or first_line(error), place


def read_yaml(path: Path, what: str, *, wanted: str, do: str | None = None) -> Any:  # noqa: ANN401 - YAML
    """The value of a YAML file in UTF-8; None for an empty one. ``what`` says in messages what it holds.

    Raises:
        InputError: It cannot be read, or is not YAML as :func:`parse_yaml` takes it.
    """
    check_file(path, f"cannot read {what}", wanted=wanted, do=do)
    try:
        with path.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise yaml.MarkedYAMLError(problem=f"more than {MOST_BYTES:,} bytes")
        return parse_yaml(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError(f"broken {what}", where=path, got="text that is not UTF-8", wanted="YAML", do=do) from None
    except (OSError, ValueError) as error:
        raise cannot_read(f"cannot read {what}", path, error, wanted=wanted, do=do) from None
    except yaml.YAMLError as error:
        problem, place = yaml_problem(error, path)
        raise InputError(f"broken {what}", where=place, got=problem, wanted="YAML", do=do) from None
