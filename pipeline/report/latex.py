r"""Tables of a report for LaTeX: one file each, with booktabs' rules, to be read in by ``\input``."""

import re
from collections.abc import Sequence

from .document import Answers, Cell, Column, Comparison, Document, Table, number, text_cells

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
    """Every table by the name of its file, the answers first."""
    return {table.name: _file(table) for table in (*_answers(document), *document.tables)}


def plain(text: str) -> str:
    """Text that means itself, in one line."""
    return _PATTERN.sub(lambda found: SPECIAL[found[0]], " ".join(text.split()))


def _file(table: Table) -> str:
    kinds = "".join("r" if column.numeric else "l" for column in table.columns)
    lines = [
        "% written by mmcli report; needs \\usepackage{booktabs} and, for quotation marks, \\usepackage[T1]{fontenc}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{plain(table.title)}. {plain(table.note.replace('`', ''))}}}",
        f"\\label{{tab:{table.name}}}",
        f"\\begin{{tabular}}{{{kinds}}}",
        "\\toprule",
        _row([plain(column.title) for column in table.columns]),
        "\\midrule",
        *(_row([_cell(cell) for cell in row]) for row in table.rows),
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _cell(cell: Cell) -> str:
    text = f"\\textbf{{{plain(cell.text)}}}" if cell.bold else plain(cell.text)
    return f"{text} {plain(cell.detail)}" if cell.detail else text


def _row(cells: Sequence[str]) -> str:
    # After the end of a row, "[" would be read as a length and "*" as a part of the command.
    return " & ".join(f"{{{cell}}}" if cell.startswith(("[", "*")) else cell for cell in cells) + r" \\"


def _answers(document: Document) -> list[Table]:
    """The comparisons of all answers as one table."""
    found = [
        one
        for section in document.sections
        for block in section.blocks
        if isinstance(block, Answers)
        for answer in block.answers
        for one in answer.comparisons
        if one.unit == "mAP"
    ]
    if not found:
        return []
    figures = ("A", "B", "A − B", "low", "high", "SD over seeds", "p (Holm)")
    columns = (
        Column(title="comparison", numeric=False),
        *(Column(title=title) for title in figures),
        Column(title="A is", numeric=False),
    )
    note = "mAP; paired 95% bootstrap intervals over test images, not corrected for their number"
    return [
        Table(name="table-answers", title="Answers", columns=columns, rows=tuple(map(_comparison, found)), note=note)
    ]


def _comparison(one: Comparison) -> tuple[Cell, ...]:
    return (
        *text_cells([one.what]),
        number(one.A),
        number(one.B),
        number(one.difference, "{:+.3f}"),
        number(one.low, "{:+.3f}"),
        number(one.high, "{:+.3f}"),
        number(one.spread),
        number(one.p_holm),
        *text_cells([one.verdict]),
    )
