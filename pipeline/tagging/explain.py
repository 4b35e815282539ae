"""Why a tag, for a person: the tags of an image with the neighbours that voted for each."""

from collections.abc import Collection
from pathlib import PurePosixPath

from rich.console import Group, RenderableType
from rich.text import Text

from ..core.console import FittingTable
from .tagging import Neighbour, Tagging

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
        for at, one in enumerate(shown):
            name, score = (plain(tag.name), f"{tag.score:.2f}") if at == 0 else ("", "")
            distance = f"{one.distance:.3g}"
            table.add_row(Text(name, style), Text(score, style), f"{one.weight:.0%}", distance, _who(one))
        if not shown:
            table.add_row(Text(plain(tag.name), style), Text(f"{tag.score:.2f}", style), "", "", "")
        if len(tag.voters) > len(shown):
            rest = sum(one.weight for one in tag.voters[len(shown) :])
            more = f"and {len(tag.voters) - len(shown)} more"
            table.add_row("", "", Text(f"{rest:.0%}", "dim"), "", Text(more, "dim"))
    return Group(*lines, table)


def _who(one: Neighbour) -> Text:
    name = Text(plain(PurePosixPath(one.path).name) if one.path else f"image {one.image_id}", "cyan")
    return Text.assemble(name, f"  “{plain(one.caption)}”") if one.caption else name


def plain(text: str) -> str:
    """The text in one line, without what a terminal or a font would take for a command."""
    # A byte of a name that is not UTF-8 is half a surrogate pair to Python.
    encodable = text.encode("utf-8", "backslashreplace").decode()
    return " ".join("".join(letter if letter.isprintable() else " " for letter in encodable).split())
