r"""Render: the tables of a report for LaTeX, one file each, with booktabs' rules, to be read in by ``\input``."""

import re
from collections.abc import Iterable

from .document import Cell, Document, Table

SPECIAL = {
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
_PATTERN = re.compile("|".join(map(re.escape, SPECIAL)))


def to_latex(document: Document) -> dict[str, str]:
    """Write every table, by the name of its file; the comparisons of all answers are the first."""
    summary = [] if document.summary is None else [document.summary]
    return {table.name: _file(table) for table in (*summary, *document.blocks(Table))}


def plain(text: str) -> str:
    """Text that means itself, in one line."""
    return _PATTERN.sub(lambda match: SPECIAL[match[0]], " ".join(text.split()))


def _file(table: Table) -> str:
    kinds = "l" * table.n_words + "r" * (len(table.columns) - table.n_words)
    lines = [
        "% written by mmcli report; needs \\usepackage{booktabs} and, for quotation marks, \\usepackage[T1]{fontenc}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{plain(table.title)}. {plain(table.note.replace('`', ''))}}}",
        f"\\label{{tab:{table.name}}}",
        f"\\begin{{tabular}}{{{kinds}}}",
        "\\toprule",
        _row(map(plain, table.columns)),
        "\\midrule",
        *(_row(map(_cell, row)) for row in table.rows),
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _cell(cell: Cell) -> str:
    text = f"\\textbf{{{plain(cell.text)}}}" if cell.bold else plain(cell.text)
    return f"{text} {plain(cell.detail)}" if cell.detail else text


def _row(cells: Iterable[str]) -> str:
    # After the end of a row, "[" would be read as a length and "*" as a part of the command.
    return " & ".join(f"{{{cell}}}" if cell.startswith(("[", "*")) else cell for cell in cells) + r" \\"
