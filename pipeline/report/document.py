"""What a report consists of, whatever it is written as: sections of answers, tables, figures, queries and failures."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from PIL import Image

from ...errors import InputError
from ..core.files import resolve_image
from ..data.manifest import Manifest
from ..extraction.images import UnreadableImage, open_rgb

QUALITY = 72


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A small picture: a WebP file's bytes, its size in pixels, and the name of a file for it."""

    webp: bytes = field(repr=False)
    width: int
    height: int
    file: str

    @cached_property
    def uri(self) -> str:
        """The picture itself as an address."""
        return "data:image/webp;base64," + base64.b64encode(self.webp).decode("ascii")


class Pictures:
    """Pictures and captions by image id.

    Args:
        data: The data folder; None where there is none.
        listing: Its manifest, likewise.
    """

    def __init__(self, data: Path | None, listing: Manifest | None) -> None:
        self._data, self._listing = data, listing
        ids = [] if listing is None else listing.image_ids.tolist()
        self._row = {image: row for row, image in enumerate(ids)}
        self._made: dict[tuple[int, int], Picture | None] = {}

    def __bool__(self) -> bool:
        return self._listing is not None

    def caption(self, image_id: int) -> str:
        """The first caption, which val and test are tagged by; nothing where it is not known."""
        row = self._row.get(image_id)
        if row is None or self._listing is None:
            return ""
        return self._listing.captions[row][0]

    def picture(self, image_id: int, side: int) -> Picture | None:
        """The picture, its longer side at most ``side`` pixels; None where it cannot be read."""
        if (image_id, side) not in self._made:
            self._made[image_id, side] = self._make(image_id, side)
        return self._made[image_id, side]

    def _make(self, image_id: int, side: int) -> Picture | None:
        row = self._row.get(image_id)
        if row is None or self._listing is None or self._data is None:
            return None
        try:
            path = resolve_image(self._data, self._listing.paths[row])
        except InputError:
            return None
        try:
            image = open_rgb(path)
        except UnreadableImage:
            return None
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        image.save(stream, "WEBP", quality=QUALITY)
        return Picture(webp=stream.getvalue(), width=image.width, height=image.height, file=f"{image_id}-{side}.webp")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: As it is shown; never markup.
        detail: What stands behind it or below it, smaller.
        bold: The best of its column, where the interval says so.
        sort: What it is sorted by, where that is not the text.
    """

    text: str
    detail: str = ""
    bold: bool = False
    sort: float | None = None

    @property
    def whole(self) -> str:
        """Text and detail in one line."""
        return f"{self.text} {self.detail}".strip()


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: its title, and whether it holds figures."""

    title: str
    numeric: bool = True


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with a name that files are named by, a title, and what has to be known to read it."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    commands: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing.

    Attributes:
        name: Files are named by it.
        title: Above it.
        caption: Below it: what is to be seen.
        alt: What it shows, in words and figures, for who does not see it.
        svg: The drawing as a file of its own.
        png: The same in pixels.
        commands: What makes the runs that it shows.
    """

    name: str
    title: str
    caption: str
    alt: str
    svg: str
    png: bytes
    commands: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Text:
    """A paragraph; words between backticks are code."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Something that was not made, and the command that makes it."""

    text: str
    command: str


@dataclass(frozen=True, kw_only=True)
class Commands:
    """Command lines under a title."""

    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A less B, with its 95% interval and the verdict that the interval gives.

    Attributes:
        what: Both, in words.
        unit: ``mAP``, or ``times`` for a ratio.
        A: Mean over seeds.
        B: Likewise.
        difference: ``A - B``, or ``A / B``.
        low: Lower end of the interval; None where there is no interval.
        high: Upper end.
        p: Two-sided, for the correction of several comparisons.
        p_holm: The same after Holm's correction over all comparisons of the answers.
        seeds: Seeds of A and of B.
        spread: Standard deviation of the difference over seeds; None with one seed.
        verdict: ``better``, ``worse`` or ``not distinguishable at this size``; of A.
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
    """A question, its answer in a sentence or two, and what that rests on; ``sides`` are the names of A and B."""

    name: str
    question: str
    answer: str
    comparisons: tuple[Comparison, ...] = ()
    gaps: tuple[Gap, ...] = ()
    note: str = ""
    sides: tuple[str, str] = ("A", "B")

    @property
    def has_spread(self) -> bool:
        """Whether a comparison has more than one seed."""
        return any(one.spread is not None for one in self.comparisons)

    @property
    def has_p(self) -> bool:
        """Whether a comparison has a corrected p."""
        return any(one.p_holm is not None for one in self.comparisons)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """All questions."""

    answers: tuple[Answer, ...]


@dataclass(frozen=True, kw_only=True)
class Tag:
    """A tag of an image: ``right``, ``wrong`` or ``missed``, and its score; None where nobody scored it."""

    name: str
    state: str
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An image as it is shown: its picture if there is one, its caption if it is known, and what is said of it."""

    image_id: int
    picture: Picture | None
    caption: str
    tags: tuple[Tag, ...]
    share: float | None = None
    distance: str = ""


@dataclass(frozen=True, kw_only=True)
class Query:
    """A query, how well it was tagged, and its nearest neighbours."""

    image: Shown
    AP: float
    neighbours: tuple[Shown, ...]


@dataclass(frozen=True, kw_only=True)
class Queries:
    """Queries with their neighbours."""

    queries: tuple[Query, ...]


@dataclass(frozen=True, kw_only=True)
class ClassFailures:
    """The worst false positives and false negatives of a class; ``share`` of an image is its score."""

    category: str
    AP: float
    n_positive: int
    n_false_positive: int
    n_false_negative: int
    false_positives: tuple[Shown, ...]
    false_negatives: tuple[Shown, ...]


@dataclass(frozen=True, kw_only=True)
class Failures:
    """Failures by class, the class with the lowest AP first."""

    classes: tuple[ClassFailures, ...]


Block = Table | Figure | Text | Gap | Commands | Answers | Queries | Failures


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report."""

    name: str
    title: str
    blocks: tuple[Block, ...]

    @property
    def figures(self) -> tuple[Figure, ...]:
        """Its figures."""
        return tuple(block for block in self.blocks if isinstance(block, Figure))


@dataclass(frozen=True, kw_only=True)
class Document:
    """The whole report."""

    title: str
    subtitle: str
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = ()

    @property
    def figures(self) -> tuple[Figure, ...]:
        """Every figure."""
        return tuple(figure for section in self.sections for figure in section.figures)

    @property
    def tables(self) -> tuple[Table, ...]:
        """Every table."""
        return tuple(block for section in self.sections for block in section.blocks if isinstance(block, Table))


def text_cells(values: Sequence[object]) -> tuple[Cell, ...]:
    """Cells of words."""
    return tuple(Cell(text=str(value)) for value in values)


def number(value: float | None, form: str = "{:.3f}", *, bold: bool = False) -> Cell:
    """A cell of a figure; a dash where it is undefined or was not measured."""
    if value is None or value != value:  # noqa: PLR0124 - NaN
        return Cell(text="–")
    return Cell(text=form.format(value), bold=bold, sort=float(value))
