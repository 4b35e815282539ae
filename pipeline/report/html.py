"""Render: a report as one page that needs nothing else, no network, no script but its own, every picture inside.

The template engine escapes everything that is shown. What is marked as markup here is a drawing of ours, a file of
ours, or text that was escaped before its code spans were made.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ... import __version__
from .document import Document
from .plots import Drawing, for_page

TEMPLATES = Path(__file__).parent / "templates"


def to_html(document: Document, drawings: Mapping[str, Drawing] | None = None) -> str:
    """Write the page.

    Args:
        document: The report.
        drawings: The drawings of its figures by name.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"inline": inline, "kind": _kind}
    environment.tests["a"] = lambda block, kind: _kind(block) == kind
    return environment.get_template("report.html.j2").render(
        document=document,
        drawings={name: Markup(for_page(drawing.svg)) for name, drawing in (drawings or {}).items()},  # noqa: S704
        version=__version__,
        style=_asset("report.css"),
        script=_asset("report.js"),
    )


def inline(text: str) -> Markup:
    """Escaped text, in which words between backticks are code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped first


def _kind(block: object) -> str:
    """Name of the class of a block, by which the templates choose how to show it."""
    return type(block).__name__


def _asset(name: str) -> Markup:
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))  # noqa: S704 - a file of ours
