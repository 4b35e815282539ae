"""Render: a report as Markdown, with figures and pictures as files beside it.

Names and captions are escaped, so that nothing in them is read as markup, as HTML or as the end of a table's cell.
"""

import re
from collections.abc import Iterable, Sequence

from .document import (
    Answer,
    Block,
    Cell,
    ClassFailures,
    Commands,
    Document,
    Figure,
    ImageCard,
    Query,
    Table,
    Tag,
    Text,
)

SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$&!])")
MARKS = {"right": "", "wrong": " ✗", "missed": " (missed)"}


def to_markdown(document: Document) -> str:
    """Write the whole report as one text."""
    lines = [f"# {plain(document.title)}", "", inline(document.subtitle), ""]
    if document.facts:
        lines += [" · ".join(f"{plain(name)}: {plain(value)}" for name, value in document.facts), ""]
    for note in document.notes:
        lines += [inline(note), ""]
    writer = _Writer(document)
    for section in document.sections:
        lines += [f"## {plain(section.title)}", ""]
        for block in section.blocks:
            lines += [*writer.block(block), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def plain(text: str) -> str:
    """Text in one line that means itself."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))


def inline(text: str) -> str:
    """Text in one line that means itself, in which words between backticks are code."""
    parts = text.split("`")
    return "".join(
        code(part) if i % 2 and part else SPECIAL.sub(r"\\\1", re.sub(r"\s", " ", part)) for i, part in enumerate(parts)
    )


def code(text: str) -> str:
    """Text as code in one line, between more backticks than it has itself."""
    line = " ".join(text.splitlines())
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{line}{space}{fence}"


class _Writer:
    """Writes the blocks of one document, each as lines."""

    def __init__(self, document: Document) -> None:
        self._pictures, self._commands = document.pictures, document.commands
        self._n_queries = 0

    def block(self, block: Block) -> list[str]:
        match block:
            case Table():
                lines = [f"### {plain(block.title)}", "", *_table(block), *self._made_by(block.commands)]
            case Figure():
                picture = f"![{plain(block.alt)}](figures/{block.name}.png)"
                caption = f"{inline(block.caption)} ([SVG](figures/{block.name}.svg))"
                lines = [f"### {plain(block.title)}", "", picture, "", caption, *self._made_by(block.commands)]
            case Text():
                lines = [inline(block.text) + (f": {code(block.command)}" if block.command else "")]
            case Commands():
                indented = (f"    {part}" for line in block.lines for part in line.splitlines())
                lines = [f"### {plain(block.title)}", "", *indented]
            case Answer():
                lines = [f"### {plain(block.question)}", "", inline(block.answer), ""]
                lines += [] if block.table is None else [*_table(block.table), ""]
                for gap in block.gaps:
                    lines += [*self.block(gap), ""]
                lines.append(inline(block.note))
            case Query():
                lines = self._query(block)
            case ClassFailures():
                lines = self._failures(block)
        return lines

    def _made_by(self, commands: Sequence[str]) -> list[str]:
        commands = commands or self._commands
        return ["", f"Made from: {', '.join(map(code, commands))}"] if commands else []

    def _query(self, query: Query) -> list[str]:
        self._n_queries += 1
        title = f"### Query {self._n_queries}: image {query.image.image_id}, AP {query.AP:.3f}"
        lines = [title, "", self._image(query.image), "", f"Tags: {_tags(query.image.tags) or 'none'}", ""]
        lines += [_row(("neighbour", "share", "distance", "tags", "caption"))]
        lines += [_row(["---", "---:", "---:", "---", "---"])]
        for card in query.neighbours:
            share = "–" if card.score is None else f"{card.score:.0%}"
            caption = plain(self._pictures.caption(card.image_id))
            picture = self._image(card, with_caption=False)
            lines.append(_row((picture, share, plain(card.distance), _tags(card.tags), caption)))
        return lines

    def _failures(self, block: ClassFailures) -> list[str]:
        counts = f"{block.n_positive} positive, {block.n_false_positive} wrong, {block.n_false_negative} missed"
        lines = [f"### {plain(block.category)}: AP {block.AP:.3f}", "", counts, ""]
        for name, cards in (("Wrong", block.false_positives), ("Missed", block.false_negatives)):
            if cards:
                lines += [f"{name}: {' '.join(self._image(card, with_score=True) for card in cards)}", ""]
        return lines

    def _image(self, card: ImageCard, *, with_score: bool = False, with_caption: bool = True) -> str:
        score = [f"score {card.score:.2f}"] if with_score else []
        words = ", ".join([f"image {card.image_id}", *(plain(tag.name) for tag in card.tags), *score])
        picture = self._pictures.picture(card.image_id, card.side)
        shown = f"({words}, no picture)" if picture is None else f"![{words}](pictures/{picture.file})"
        caption = self._pictures.caption(card.image_id) if with_caption else ""
        return f"{shown} {plain(caption)}" if caption else shown


def _table(table: Table) -> list[str]:
    rules = ["---" if i < table.n_words else "---:" for i in range(len(table.columns))]
    lines = [_row(map(plain, table.columns)), _row(rules), *(_row(map(_cell, row)) for row in table.rows)]
    return [*lines, *(["", inline(table.note)] if table.note else [])]


def _cell(cell: Cell) -> str:
    text = f"**{plain(cell.text)}**" if cell.bold else plain(cell.text)
    return f"{text} {plain(cell.detail)}" if cell.detail else text


def _tags(tags: Iterable[Tag]) -> str:
    return ", ".join(
        plain(tag.name) + MARKS[tag.state] + ("" if tag.score is None else f" {tag.score:.2f}") for tag in tags
    )


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
