"""What a page holds, as plain data: sections of answers, tables, figures, image cards and text.

:mod:`.sections` fills it, and :mod:`.render` writes it out without computing anything.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from .collect import Pictures

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: The text as it is shown; never markup.
        detail: A smaller addition behind the text.
        bold: Whether it is the best of its column, where the interval says so.
        sort: The number to sort by, where that is not the text.
        verdict: ``better``, ``worse`` or ``even``, which a page shows in colour.
        interval: Both ends and the centre of an interval as shares of the width of its drawing.
    """

    text: str
    detail: str = ""
    bold: bool = False
    sort: float | None = None
    verdict: str = ""
    interval: tuple[float, float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table.

    Attributes:
        name: Name of its file and of its heading.
        title: The heading.
        columns: Titles of the columns.
        rows: Cells, as many in each row as there are columns.
        n_words: How many of the leading columns hold words; the others hold numbers.
        note: What a reader has to know, below the table.
        commands: The commands that make the runs in it; those of the document where there are none.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    n_words: int = 1
    note: str = ""
    commands: tuple[str, ...] = ()


class Mark(NamedTuple):
    """Something drawn into a figure: a method of matplotlib's ``Axes`` and its arguments."""

    method: str
    args: tuple[Any, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure, as the calls that draw it.

    Attributes:
        name: Name of its files.
        title: The heading.
        caption: What is to be seen, below it.
        alt: What it shows, in words and numbers, for readers who do not see it.
        marks: What is drawn, in order.
        axes: Arguments of ``Axes.set``: labels, scales, limits.
        labels: Names of points with their x and y, the most important first.
        legend: Place of the legend: ``above``, or one of matplotlib's.
        colorbar: Label of the colour bar of an image.
        commands: The commands that make the runs in it; those of the document where there are none.
    """

    name: str
    title: str
    caption: str
    alt: str
    marks: tuple[Mark, ...]
    axes: Mapping[str, Any]
    labels: tuple[tuple[str, float, float], ...] = ()
    legend: str = "above"
    colorbar: str = ""
    commands: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Text:
    """A paragraph, in which words between backticks are code; for something missing, with the command that makes it."""

    text: str
    command: str = ""


@dataclass(frozen=True, kw_only=True)
class Commands:
    """Lines of code under a title."""

    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A against B, with the 95% interval and the verdict that the interval gives.

    Attributes:
        what: Both sides in words.
        unit: ``mAP`` or ``AP`` for a difference, ``times`` for a ratio.
        A: Mean of A over seeds.
        B: Mean of B over seeds.
        difference: ``A - B``; a ratio in ``times``.
        low: Lower end of the interval; None where there is no interval.
        high: Upper end of the interval; None where there is no interval.
        p: Two-sided p, for the correction of several comparisons.
        p_holm: The same after Holm's correction over all comparisons of the answers.
        seeds: Numbers of seeds of A and of B.
        spread: Standard deviation of the difference over seeds; None with one seed.
        verdict: ``better``, ``worse`` or ``not distinguishable at this size``, of A.
    """

    what: str
    unit: str = "mAP"
    A: float
    B: float
    difference: float
    low: float | None
    high: float | None
    p: float | None = None
    p_holm: float | None = None
    seeds: tuple[int, int]
    spread: float | None = None
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A question with its answer in a sentence or two, and what the answer rests on.

    Attributes:
        name: Name for links and for ``--json``.
        question: The question.
        answer: The answer in words.
        comparisons: The comparisons that it rests on.
        gaps: What was not measured, with the commands that measure it.
        note: What a reader has to know, below the table.
        sides: Titles of the columns of A and B.
        table: The comparisons as a table; None where there are none.
    """

    name: str
    question: str
    answer: str
    comparisons: tuple[Comparison, ...] = ()
    gaps: tuple[Text, ...] = ()
    note: str = ""
    sides: tuple[str, str] = ("A", "B")
    table: Table | None = None


@dataclass(frozen=True, kw_only=True)
class Tag:
    """A tag of an image: ``right``, ``wrong`` or ``missed``, with its score where it has one."""

    name: str
    state: str
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class ImageCard:
    """An image as a page shows it.

    Attributes:
        image_id: The image; picture and caption are looked up by it.
        side: Pixels of the picture's longer side.
        tags: Tags below the picture.
        score: Share of the vote of a neighbour, or score of a class; None for a query.
        distance: Distance of a neighbour, in words.
    """

    image_id: int
    side: int
    tags: tuple[Tag, ...]
    score: float | None = None
    distance: str = ""


@dataclass(frozen=True, kw_only=True)
class Query:
    """A query, the AP of its tags, and its nearest neighbours."""

    image: ImageCard
    AP: float
    neighbours: tuple[ImageCard, ...]


@dataclass(frozen=True, kw_only=True)
class ClassFailures:
    """The surest wrong predictions of a class and the least sure missed ones."""

    category: str
    AP: float
    n_positive: int
    n_false_positive: int
    n_false_negative: int
    false_positives: tuple[ImageCard, ...]
    false_negatives: tuple[ImageCard, ...]


Block = Table | Figure | Text | Commands | Answer | Query | ClassFailures


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a document, under a heading."""

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A whole report.

    Attributes:
        title: The heading of all.
        subtitle: What the report is of.
        facts: Names and values at the top.
        notes: What a reader has to know first.
        sections: The parts in order.
        summary: The comparisons of mAP of all answers in one table; None where there are none.
        commands: The commands that make what names none of its own.
        pictures: Pictures and captions of the images.
    """

    title: str
    subtitle: str
    facts: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    sections: tuple[Section, ...]
    summary: Table | None = None
    commands: tuple[str, ...] = ()
    pictures: Pictures = field(default_factory=Pictures)

    def blocks(self, kind: type[T]) -> Iterator[T]:
        """All blocks of one kind, in order."""
        return (block for section in self.sections for block in section.blocks if isinstance(block, kind))


def number(value: float | None, form: str = "{:.3f}") -> Cell:
    """A cell with a number; a dash where it is undefined or was not measured."""
    if value is None or value != value:  # noqa: PLR0124 - NaN
        return Cell(text="–")
    return Cell(text=form.format(value), sort=float(value))
