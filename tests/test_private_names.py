"""No private name of another library is used: a release may drop it, as one once broke the main command."""

import ast
from pathlib import Path

# Documented in the standard library in spite of their names.
PUBLIC = {"_replace", "_asdict", "_fields", "_exit", "_make"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def private_names(source: str) -> tuple[set[str], set[str]]:
    """Private names that a module defines, and those that it takes from something else."""
    defined, used = set(), set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                defined.add(name)
            case ast.Attribute(attr=name, value=ast.Name(id="self" | "cls"), ctx=ast.Store()):
                defined.add(name)
            case ast.Attribute(attr=name):
                used.add(name)
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_]):
                used.add(name)
            case ast.ImportFrom(level=0, module=str(module), names=names):
                used.update(part for name in names for part in (*module.split("."), name.name))
            case ast.Import(names=names):
                used.update(part for name in names for part in name.name.split("."))
    return defined, {name for name in used if is_private(name)}


def test_no_private_name_of_another_library_is_used(repo: Path) -> None:
    files = [
        *repo.glob("*.py"),
        *(file for room in ("cache", "heads", "pipeline") for file in (repo / room).rglob("*.py")),
    ]
    names = {str(file.relative_to(repo)): private_names(file.read_text(encoding="utf-8")) for file in files}
    # A class may use what its base in another module of ours defines; that no other library has the same name.
    ours = set().union(*(defined for defined, _ in names.values()))
    foreign = {(file, name) for file, (defined, used) in names.items() for name in used - defined - ours}
    assert len(files) > 100
    assert foreign == set()


def test_a_private_name_is_seen_however_it_is_reached() -> None:
    lines = {
        "config._commit_hash": "_commit_hash",
        "getattr(config, '_commit_hash', None)": "_commit_hash",
        "from transformers.utils._x import y": "_x",
        "from torch import _dynamo": "_dynamo",
        "import torch._inductor.config": "_inductor",
        "self._hub_mixin_info.data": "_hub_mixin_info",
        "for process in pool._processes: pass": "_processes",
    }
    for line, name in lines.items():
        assert private_names(line)[1] == {name}, line
    assert private_names("os._exit(1)\nrow._replace(a=1)\nself.__dict__")[1] == set()
