"""The code reads as its conventions say: the formatter decides, names say what they are, docstrings are sentences."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

# Names of variables that a reader has to decode.
VAGUE = {"told", "found", "one", "known", "made", "at", "there", "own"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@pytest.fixture(scope="module")
def modules(repo: Path) -> dict[str, ast.Module]:
    """Every module of the package by its path."""
    files = [
        *repo.glob("*.py"),
        *(file for room in ("cache", "heads", "pipeline") for file in (repo / room).rglob("*.py")),
    ]
    assert len(files) > 100
    return {str(file.relative_to(repo)): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def functions(modules: dict[str, ast.Module]) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for name, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, FUNCTIONS):
                yield f"{name}:{node.lineno} {node.name}", node


def test_the_formatter_decides_the_layout(repo: Path) -> None:
    marks = re.compile(r"#\s*fmt:\s*(skip|off|on)")
    files = [
        *repo.glob("*.py"),
        *(file for room in ("cache", "heads", "pipeline", "tests") for file in (repo / room).rglob("*.py")),
    ]
    assert [
        str(file) for file in files if file.name != "test_style.py" and marks.search(file.read_text(encoding="utf-8"))
    ] == []


def test_variables_say_what_they_are(modules: dict[str, ast.Module]) -> None:
    vague = [
        f"{name}:{node.lineno} {node.id if isinstance(node, ast.Name) else node.arg}"
        for name, tree in modules.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in VAGUE)
        or (isinstance(node, ast.arg) and node.arg in VAGUE)
    ]
    assert vague == []


def test_docstrings_are_sentences(modules: dict[str, ast.Module]) -> None:
    short = [
        f"{name}:{getattr(node, 'lineno', 1)} {text!r}"
        for name, tree in modules.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and (text := ast.get_docstring(node)) is not None
        and len(text.split()) <= 4
    ]
    assert short == []


def test_functions_take_few_parameters(modules: dict[str, ast.Module]) -> None:
    """At most eight; a command has one for each of its options."""
    many = []
    for where, node in functions(modules):
        arguments = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        if len([name for name in arguments if name not in {"self", "cls"}]) > 8 and not where.startswith(
            "pipeline/commands/"
        ):
            many.append(where)
    assert many == []


def test_functions_are_short(modules: dict[str, ast.Module]) -> None:
    """At most 80 lines with their docstring; a command has a line for each of its options."""
    long = [
        f"{where}: {node.end_lineno - node.lineno + 1} lines"
        for where, node in functions(modules)
        if node.end_lineno - node.lineno + 1 > 80 and not where.startswith("pipeline/commands/")
    ]
    assert long == []


def test_no_document_is_named_that_is_not_here(modules: dict[str, ast.Module], repo: Path) -> None:
    named = re.compile(r"SPEC(\.md)? section|SPEC\.md|HOUSE\.md")
    assert [name for name in modules if named.search((repo / name).read_text(encoding="utf-8"))] == []


def test_test_names_are_short(repo: Path) -> None:
    long = [
        f"{file.relative_to(repo)} {node.name}"
        for file in (repo / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and len(node.name) > 60
    ]
    assert long == []
