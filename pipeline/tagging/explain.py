"""The reasons of tags as text and as a picture: the neighbours that voted for each."""

import textwrap
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from ...errors import InputError
from ..core.console import FittingTable
from ..core.files import DRAWN, is_drawn, refuse_existing, resolve_image, write_whole
from ..extraction.images import Pixels, UnreadableImage, open_rgb
from .voting import Neighbour, Tagging

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN_VOTERS = 3


def show(tagging: Tagging, *, voters: int = SHOWN_VOTERS, truth: Collection[str] | None = None) -> RenderableType:
    """A heading and a table: a line a tag, and below it the neighbours that voted, the nearest first.

    Args:
        tagging: An image with its tags.
        voters: Neighbours shown a tag; the rest are counted.
        truth: The image's true tags where they are known; then right tags are green and others yellow.
    """
    lines: list[RenderableType] = [Text(plain(tagging.image or "an image"), "bold")]
    if tagging.caption:
        lines.append(Text(f"“{plain(tagging.caption)}”"))
    if truth is not None:
        lines.append(Text.assemble(("truth  ", "dim"), ", ".join(map(plain, truth))))
    if not tagging.tags:
        return Group(*lines, Text("no tag: none of the neighbours has any", "dim"))
    table = FittingTable(box=None, padding=(0, 2, 0, 0))
    table.add_column("tag")
    table.add_column("score", no_wrap=True)
    table.add_column("vote", justify="right")
    table.add_column(tagging.unit, justify="right")
    table.add_column("because of")
    for tag in tagging.tags:
        style = "bold" if truth is None else "bold green" if tag.name in truth else "bold yellow"
        shown = tag.voters[:voters]
        heads = [Text(plain(tag.name), style), Text(f"{tag.score:.2f}", style)]
        if not shown:
            table.add_row(*heads, "", "", "")
        for voter in shown:
            table.add_row(*heads, f"{voter.weight:.0%}", f"{voter.distance:.3g}", _name(voter))
            heads = [Text(""), Text("")]
        if len(tag.voters) > len(shown):
            rest = sum(voter.weight for voter in tag.voters[len(shown) :])
            more = f"and {len(tag.voters) - len(shown)} more"
            table.add_row("", "", Text(f"{rest:.0%}", "dim"), "", Text(more, "dim"))
    return Group(*lines, table)


def _name(voter: Neighbour) -> Text:
    name = Text(plain(PurePosixPath(voter.path).name) if voter.path else f"image {voter.image_id}", "cyan")
    return Text.assemble(name, f"  “{plain(voter.caption)}”") if voter.caption else name


def plain(text: str) -> str:
    """The text in one line, without characters that a terminal or a font would take for a command."""
    # A byte of a name that is not UTF-8 is half a surrogate pair to Python.
    encodable = text.encode("utf-8", "backslashreplace").decode()
    return " ".join("".join(letter if letter.isprintable() else " " for letter in encodable).split())


PANELS, NEIGHBOURS = 16, 5
SIDE = 320  # pixels of a picture's longer side
# Okabe and Ito (2008), told apart with every kind of colour vision; the dash says the same without colour.
QUERY, AGREES, DIFFERS, MISSING = "#0072B2", "#009E73", "#E69F00", "#BBBBBB"
CELL = (2.3, 3.7)  # inches
LETTERS, LINES = 30, 5


def check_panel(path: Path | None, *, force: bool = False) -> None:
    """Refuse a picture that cannot be drawn before anything is computed.

    Args:
        path: The picture; none is wanted when not given.
        force: Replace one that is there.

    Raises:
        InputError: Another suffix than ``.png``, a folder, or a file that is there.
    """
    if path is None:
        return
    if path.suffix.lower() != ".png" or path.is_dir():
        raise InputError("no such picture", where="--panel", got=path, wanted="a file .png", do="as in --panel why.png")
    refuse_existing(path, is_drawn, force=force, what="a picture that mmcli drew", option="--panel")


def draw(path: Path, taggings: Sequence[Tagging], *, data: Path) -> None:
    """Draw the first images, a row each: the image on the left, then its neighbours by their share of the vote.

    A neighbour that has the best tag has a solid green frame, another one a dashed orange frame. A picture that cannot
    be found below the data folder, or read, is a grey box with its id.

    Args:
        path: The PNG file to write.
        taggings: What is drawn.
        data: The folder that paths of neighbours are relative to; nothing outside it is read.

    Raises:
        InputError: The file cannot be written, or the file system fails.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = taggings[:PANELS]
    columns = 1 + min(NEIGHBOURS, max(len(tagging.neighbours) for tagging in shown))
    # Whatever a user's matplotlibrc says: TeX would run over captions.
    style: Any = {"text.usetex": False, "text.parse_math": False, "font.family": ["DejaVu Sans"], "font.size": 7}
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box is drawn in its place
        figure = Figure(figsize=(CELL[0] * columns, CELL[1] * len(shown)), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        axes: Any = figure.subplots(len(shown), columns, squeeze=False)
        for row, tagging in zip(axes, shown, strict=True):
            _row(row, tagging, data)
        write_whole(path, lambda temporary: figure.savefig(temporary, format="png", metadata=DRAWN))


def _row(axes: "Sequence[Axes]", tagging: Tagging, data: Path) -> None:
    tags = ", ".join(f"{plain(tag.name)} {tag.score:.2f}" for tag in tagging.tags) or "no tag"
    pixels = None if tagging.image is None else _pixels(Path(tagging.image))
    _cell(axes[0], pixels, "the image", (tags, tagging.caption), QUERY)
    best = tagging.tags[0].name if tagging.tags else None
    nearest = sorted(tagging.neighbours, key=lambda neighbour: -neighbour.weight)
    for axis in axes[1 + len(nearest) :]:
        axis.axis("off")
    for axis, neighbour in zip(axes[1:], nearest, strict=False):
        labels = ", ".join(map(plain, neighbour.labels))
        title = f"{neighbour.weight:.0%} of the vote\n{neighbour.distance:.3g} {tagging.unit}: {labels}"
        colour = AGREES if best in neighbour.labels else DIFFERS
        name = f"image {neighbour.image_id}"
        _cell(axis, _neighbour_pixels(neighbour, data), name, (title, neighbour.caption), colour)


def _cell(axis: "Axes", pixels: Pixels | None, name: str, texts: tuple[str, str | None], colour: str) -> None:
    """One picture in its frame, between its title and its caption; a grey box with its name where it is missing."""
    axis.set_xticks([])
    axis.set_yticks([])
    if pixels is None:
        axis.set_facecolor(MISSING)
        axis.set_box_aspect(1)
        axis.text(0.5, 0.5, name, ha="center", va="center", transform=axis.transAxes)
    else:
        axis.imshow(pixels)
        height, width = pixels.shape[:2]
        side = max(height, width)  # in the middle of a square, so that rows are of one height
        axis.set(xlim=((width - side) / 2, (width + side) / 2), ylim=((height + side) / 2, (height - side) / 2))
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=3, linestyle=(0, (2, 1)) if colour == DIFFERS else "-", capstyle="butt")
    title, caption = texts
    axis.set_title("\n".join(_wrapped(line) for line in title.split("\n")), fontsize=7)
    axis.set_xlabel(_wrapped(plain(caption or "")), fontsize=7)


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, LETTERS, max_lines=LINES, placeholder=" ..."))


def _neighbour_pixels(neighbour: Neighbour, data: Path) -> Pixels | None:
    if neighbour.path is None:
        return None
    try:
        return _pixels(resolve_image(data, neighbour.path))
    except InputError:
        return None


def _pixels(path: Path) -> Pixels | None:
    try:
        image = open_rgb(path)
    except UnreadableImage:
        return None
    image.thumbnail((SIDE, SIDE))
    return np.asarray(image)
