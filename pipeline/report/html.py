"""The report as one page that needs nothing else: no network, no script but its own, every picture inside.

Everything that is shown passes the template engine's escaping; what is marked as markup is a drawing of ours, or
text that was escaped before its code spans were made.
"""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ... import __version__
from .document import Comparison, Document
from .plots import for_page

TEMPLATES = Path(__file__).parent / "templates"
WIDTH = 240  # of the interval's drawing


def to_html(document: Document) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"inline": inline, "kind": kind, "drawing": drawing, "slug": slug}
    scales = {unit: _scale(document, unit) for unit in ("mAP", "AP")}
    environment.globals |= {"bar": lambda one: interval_bar(one, scales.get(one.unit, 0.0))}
    return environment.get_template("report.html.j2").render(
        document=document, version=__version__, style=_asset("report.css"), script=_asset("report.js")
    )


def inline(text: str) -> Markup:
    """Escaped text; what stands between backticks is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped first


def kind(block: object) -> str:
    """What a block is, for the template."""
    return type(block).__name__


def drawing(svg: str) -> Markup:
    """A drawing of ours as a part of the page; matplotlib escaped its texts."""
    return Markup(for_page(svg))  # noqa: S704


def slug(text: str) -> str:
    """An id."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def interval_bar(one: Comparison, scale: float) -> dict[str, Any] | None:
    """Where the interval's bar, its dot and zero lie, in units of the drawing; None for what has another unit."""
    if one.low is None or one.high is None or not scale:
        return None

    def place(value: float) -> float:
        return round(WIDTH / 2 * (1 + max(-1.0, min(1.0, value / scale))), 1)

    return {
        "low": place(one.low),
        "high": place(one.high),
        "at": place(one.difference),
        "zero": WIDTH / 2,
        "width": WIDTH,
    }


def _scale(document: Document, unit: str) -> float:
    """The largest end of an interval: all bars of a unit share one scale, so that they can be compared."""
    ends = [
        abs(end)
        for section in document.sections
        for block in section.blocks
        for answer in getattr(block, "answers", ())
        for one in answer.comparisons
        if one.unit == unit
        for end in (one.low, one.high)
        if end is not None
    ]
    return 1.06 * max(ends, default=0.0)


def _asset(name: str) -> Markup:
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))  # noqa: S704 - a file of ours
