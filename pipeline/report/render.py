"""The report as Markdown: the same sections, figures and pictures as files beside it.

Names and captions are escaped, so that nothing in them is read as markup, as HTML or as the end of a table's cell.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from .document import (
    Answer,
    Answers,
    Cell,
    Commands,
    Comparison,
    Document,
    Failures,
    Figure,
    Gap,
    Queries,
    Shown,
    Table,
    Tag,
    Text,
)

SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$&!])")
MARKS = {"right": "", "wrong": " ✗", "missed": " (missed)"}


def to_markdown(document: Document) -> str:
    """All of it."""
    lines = [f"# {plain(document.title)}", "", inline(document.subtitle), ""]
    if document.facts:
        lines += [" · ".join(f"{plain(name)}: {plain(value)}" for name, value in document.facts), ""]
    for note in document.notes:
        lines += [inline(note), ""]
    for section in document.sections:
        lines += [f"## {plain(section.title)}", ""]
        for block in section.blocks:
            lines += [*WRITERS[type(block)](block), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def plain(text: str) -> str:
    """Text in one line that means itself."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))


def inline(text: str) -> str:
    """The same, but for what stands between backticks, which is code."""
    parts = text.split("`")
    return "".join(code(part) if at % 2 and part else plain_spaced(part) for at, part in enumerate(parts))


def code(text: str) -> str:
    """Text as code in one line, between more backticks than it has itself."""
    line = " ".join(text.splitlines())
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{line}{space}{fence}"


def plain_spaced(text: str) -> str:
    """Escaped, its spaces kept."""
    return SPECIAL.sub(r"\\\1", re.sub(r"\s", " ", text))


def _table(table: Table) -> list[str]:
    heads = [plain(column.title) for column in table.columns]
    rule = ["---:" if column.numeric else "---" for column in table.columns]
    rows = [[_cell(cell) for cell in row] for row in table.rows]
    lines = [f"### {plain(table.title)}", "", _row(heads), _row(rule), *map(_row, rows)]
    return [*lines, *(["", inline(table.note)] if table.note else []), *_made_by(table.commands)]


def _cell(cell: Cell) -> str:
    text = f"**{plain(cell.text)}**" if cell.bold else plain(cell.text)
    return f"{text} {plain(cell.detail)}" if cell.detail else text


def _figure(figure: Figure) -> list[str]:
    picture = f"![{plain(figure.alt)}](figures/{figure.name}.png)"
    caption = f"{inline(figure.caption)} ([SVG](figures/{figure.name}.svg))"
    return [f"### {plain(figure.title)}", "", picture, "", caption, *_made_by(figure.commands)]


def _made_by(commands: Sequence[str]) -> list[str]:
    return ["", f"Made from: {', '.join(map(code, commands))}"] if commands else []


def _text(block: Text) -> list[str]:
    return [inline(block.text)]


def _gap(block: Gap) -> list[str]:
    return [f"{inline(block.text)}: {code(block.command)}"]


def _commands(block: Commands) -> list[str]:
    return [f"### {plain(block.title)}", "", *(f"    {part}" for line in block.lines for part in line.splitlines())]


def _answers(block: Answers) -> list[str]:
    lines = []
    for answer in block.answers:
        lines += [*_answer(answer), ""]
    return lines


def _answer(answer: Answer) -> list[str]:
    lines = [f"### {plain(answer.question)}", "", inline(answer.answer), ""]
    if answer.comparisons:
        A, B = answer.sides
        head = ("comparison", f"{A} is", f"{A} − {B}", "95% interval", A, B, "SD over seeds", "p (Holm)")
        lines += [_row(head), _row(["---", "---", *["---:"] * 6]), *map(_comparison, answer.comparisons), ""]
    for gap in answer.gaps:
        lines += [*_gap(gap), ""]
    return [*lines, *([inline(answer.note)] if answer.note else [])]


def _comparison(one: Comparison) -> str:
    times = one.unit == "times"
    signed, value = ("{:.2f} ×", "{:.3f}") if times else ("{:+.3f}", "{:.3f}")
    verdict = {"better": "faster", "worse": "slower"}.get(one.verdict, one.verdict) if times else one.verdict
    ends = "–" if one.low is None or one.high is None else f"{signed.format(one.low)} to {signed.format(one.high)}"
    cells = (
        plain(one.what),
        plain(verdict),
        signed.format(one.difference),
        ends,
        value.format(one.A),
        value.format(one.B),
        "–" if one.spread is None else f"{one.spread:.3f}",
        "–" if one.p_holm is None else f"{one.p_holm:.3f}",
    )
    return _row(cells)


def _queries(block: Queries) -> list[str]:
    lines = []
    for at, query in enumerate(block.queries, 1):
        lines += [f"### Query {at}: image {query.image.image_id}, AP {query.AP:.3f}", "", _picture(query.image, "")]
        lines += ["", _tags(query.image.tags), "", _row(("neighbour", "share", "distance", "tags", "caption"))]
        lines += [_row(["---", "---:", "---:", "---", "---"])]
        for one in query.neighbours:
            share = "–" if one.share is None else f"{one.share:.0%}"
            words = ", ".join(plain(tag.name) + MARKS[tag.state] for tag in one.tags)
            picture = _picture(one, "", caption=False)
            lines.append(_row((picture, share, plain(one.distance), words, plain(one.caption))))
        lines.append("")
    return lines


def _tags(tags: Sequence[Tag]) -> str:
    words = [
        plain(tag.name) + MARKS[tag.state] + (f" {tag.score:.2f}" if tag.score is not None else "") for tag in tags
    ]
    return f"Tags: {', '.join(words) or 'none'}"


def _failures(block: Failures) -> list[str]:
    lines = []
    for one in block.classes:
        title = f"### {plain(one.category)}: AP {one.AP:.3f}"
        counts = f"{one.n_positive} positive, {one.n_false_positive} wrong, {one.n_false_negative} missed"
        lines += [title, "", counts, ""]
        for name, images in (("Wrong", one.false_positives), ("Missed", one.false_negatives)):
            if images:
                lines += [f"{name}: " + " ".join(_picture(image, f"score {image.share:.2f}") for image in images), ""]
    return lines


def _picture(image: Shown, said: str, *, caption: bool = True) -> str:
    words = ", ".join(plain(tag.name) for tag in image.tags)
    text = f"image {image.image_id}" + (f", {words}" if words else "") + (f", {said}" if said else "")
    shown = f"![{text}](pictures/{image.picture.file})" if image.picture is not None else f"({text}, no picture)"
    return f"{shown} {plain(image.caption)}" if caption and image.caption else shown


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


WRITERS: dict[type, Callable[[Any], list[str]]] = {
    Table: _table,
    Figure: _figure,
    Text: _text,
    Gap: _gap,
    Commands: _commands,
    Answers: _answers,
    Queries: _queries,
    Failures: _failures,
}
