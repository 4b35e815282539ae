"""Render: a report as one HTML page, as Markdown, and its tables for LaTeX.

The page needs nothing else: no network, no script but its own, every picture inside. In all three, names and captions
are escaped, so that nothing in them is read as markup or as the end of a table's cell.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from ... import __version__
from .document import Cell, Document, Table
from .plots import Drawing, for_page

TEMPLATES = Path(__file__).parent / "templates"
MARKDOWN_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$&!])")
LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "–": "--",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "`": r"\textasciigrave{}",
}
_LATEX_PATTERN = re.compile("|".join(map(re.escape, LATEX_SPECIAL)))


def to_html(document: Document, drawings: Mapping[str, Drawing] | None = None) -> str:
    """Write the page.

    Args:
        document: The report.
        drawings: The drawings of its figures by name.
    """
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return _render(
        "report.html.j2",
        {"inline": _html_inline},
        document=document,
        drawings={name: Markup(for_page(drawing.svg)) for name, drawing in (drawings or {}).items()},  # noqa: S704 - matplotlib escapes
        version=__version__,
        style=Markup(style),  # noqa: S704 - a file of ours
        script=Markup(script),  # noqa: S704 - a file of ours
    )


def to_markdown(document: Document) -> str:
    """Write the whole report as Markdown, with figures and pictures as files beside it."""
    filters = {"plain": _markdown_plain, "inline": _markdown_inline, "code": _markdown_code}
    text = _render("report.md.j2", filters, document=document)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def to_latex(document: Document) -> dict[str, str]:
    r"""Write every table for LaTeX, to be read in by ``\input``; the comparisons of all answers are the first.

    Returns:
        By the names of their files.
    """
    summary = [] if document.summary is None else [document.summary]
    return {table.name: _latex_file(table) for table in (*summary, *document.blocks(Table))}


def _render(template: str, filters: Mapping[str, Callable[[str], str]], **values: object) -> str:
    """Fill a template; a page's is escaped by the engine, the Markdown's by its filters."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters, kind=_kind)
    environment.tests["a"] = lambda block, kind: _kind(block) == kind
    return environment.get_template(template).render(**values)


def _kind(block: object) -> str:
    """Name of the class of a block, by which the templates choose how to show it."""
    return type(block).__name__


def _html_inline(text: str) -> Markup:
    """Escaped text, in which words between backticks are code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped first


def _markdown_plain(text: str) -> str:
    """Text in one line that means itself."""
    return MARKDOWN_SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _markdown_inline(text: str) -> str:
    """Text in one line that means itself, in which words between backticks are code."""
    parts = re.sub(r"\s", " ", text).split("`")
    escaped = (_markdown_code(p) if i % 2 and p else MARKDOWN_SPECIAL.sub(r"\\\1", p) for i, p in enumerate(parts))
    return "".join(escaped)


def _markdown_code(text: str) -> str:
    """Text as code in one line, between more backticks than it has itself."""
    line = " ".join(text.splitlines())
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{line}{space}{fence}"


def _latex_plain(text: str) -> str:
    """Text in one line that means itself."""
    return _LATEX_PATTERN.sub(lambda match: LATEX_SPECIAL[match[0]], " ".join(text.split()))


def _latex_file(table: Table) -> str:
    kinds = "l" * table.n_words + "r" * (len(table.columns) - table.n_words)
    lines = [
        "% written by mmcli report; needs \\usepackage{booktabs} and, for quotation marks, \\usepackage[T1]{fontenc}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{_latex_plain(table.title)}. {_latex_plain(table.note.replace('`', ''))}}}",
        f"\\label{{tab:{table.name}}}",
        f"\\begin{{tabular}}{{{kinds}}}",
        "\\toprule",
        _latex_row(map(_latex_plain, table.columns)),
        "\\midrule",
        *(_latex_row(map(_latex_cell, row)) for row in table.rows),
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_cell(cell: Cell) -> str:
    text = f"\\textbf{{{_latex_plain(cell.text)}}}" if cell.bold else _latex_plain(cell.text)
    return f"{text} {_latex_plain(cell.detail)}" if cell.detail else text


def _latex_row(cells: Iterable[str]) -> str:
    # After the end of a row, "[" would be read as a length and "*" as a part of the command.
    return " & ".join(f"{{{cell}}}" if cell.startswith(("[", "*")) else cell for cell in cells) + r" \\"
