"""How every plot of a report looks, and a drawing as SVG and PNG.

Colours are those of Okabe and Ito (2008), darkened where they would be weak on white, and never the only difference:
lines have patterns and points have shapes too. Text stays text in the SVG. The page that an SVG stands in replaces the
colours by its own for a dark room (:func:`for_page`).
"""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

SERIES = ("#0072b2", "#c74e00", "#00875f", "#a8457f", "#8a6a00", "#5b5fc7")
INK, MUTED, LINE, PAPER = "#1b1d20", "#5a5f66", "#d9dad6", "#fefefe"
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
SIZE = (4.6, 3.1)  # inches; at 96 pixels an inch it fits beside another on a page, and on a phone almost as it is
DPI = 200
# What the page calls each colour.
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--rule", PAPER: "--paper"} | {
    colour: f"--series-{at}" for at, colour in enumerate(SERIES)
}
# Nothing of a user's matplotlibrc counts: TeX would run over the names of categories.
STYLE: Any = {
    "text.usetex": False, "text.parse_math": False, "font.family": ["DejaVu Sans"], "font.size": 9,
    "svg.fonttype": "none", "svg.hashsalt": "mmcli", "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER, "figure.facecolor": PAPER, "savefig.facecolor": PAPER, "xtick.color": INK,
    "ytick.color": INK, "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "lines.linewidth": 1.7,
    "lines.markersize": 5, "legend.frameon": False, "legend.fontsize": 8, "axes.labelsize": 9, "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5, "xtick.major.size": 3, "ytick.major.size": 3, "axes.titlesize": 9,
}  # fmt: skip


# What a picture that a person asked for says of its maker, so that it can be told from any other before it is replaced.
DRAWN = {"Software": "mmcli"}


def is_drawn(path: Path) -> bool:
    """Whether a file is a PNG picture that mmcli drew."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            return bool(image.info.get("Software") == DRAWN["Software"])
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


# Characters that XML has no way to write.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Drawing(NamedTuple):
    """A drawing as SVG with its own colours, and as PNG."""

    svg: str
    png: bytes


def draw(name: str, paint: Callable[["Axes"], object], size: tuple[float, float] = SIZE) -> Drawing:
    """Draw one plot.

    Args:
        name: Salts the ids of the SVG, so that several can stand in one page.
        paint: Paints on the axes that it is given.
        size: Inches.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box is drawn in its place
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure.subplots())
        return Drawing(svg=_own_ids(_svg(figure), name), png=_png(figure))


def legend(axes: "Axes", **options: Any) -> None:  # noqa: ANN401 - matplotlib's
    """A legend where there is something to tell apart."""
    handles, _ = axes.get_legend_handles_labels()
    if len(handles) > 1:
        axes.legend(**options)


def legend_above(axes: "Axes", columns: int = 3) -> None:
    """A legend above the plot, where it takes no width."""
    legend(
        axes, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, borderaxespad=0.2, columnspacing=1.2,
        handlelength=2.2,
    )  # fmt: skip


def log_axis(axis: "Axis") -> None:
    """A logarithmic axis with plain numbers: powers of ten, and 2 and 5 between them where there are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    subs = (1.0, 2.0, 5.0) if high / max(low, 1e-300) < 300 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:.4g}"))
    axis.set_minor_formatter(NullFormatter())


def name_points(axes: "Axes", points: Sequence[tuple[str, float, float]]) -> None:
    """Names beside points, the first ones first; one that would cover another is left out.

    Args:
        axes: With its scales and limits as they will be.
        points: Name, x and y.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    taken: list[tuple[float, float, float]] = []
    for name, x, y in points:
        fx, fy = to_axes.transform((x, y))
        left = fx > 0.7
        width = 0.02 * len(name) + 0.03
        start = fx - width if left else fx
        if any(abs(fy - ty) < 0.065 and start < right and start + width > begin for begin, right, ty in taken):
            continue
        taken.append((start, start + width, fy))
        axes.annotate(
            name, (x, y), xytext=(-6 if left else 6, 0), textcoords="offset points", fontsize=7.5, color=INK,
            va="center", ha="right" if left else "left",
        )  # fmt: skip


def for_page(svg: str) -> str:
    """The SVG as a part of a page: no prologue, its size left to the page, its colours the page's variables.

    What it shows is told by the page, so it is hidden from who reads the page aloud.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r'<svg ([^>]*?)width="[^"]*pt" height="[^"]*pt"', r"<svg \1", body, count=1)

    def recolour(tag: str) -> str:
        for colour, variable in VARIABLES.items():
            tag = tag.replace(colour, f"var({variable})")
        return tag

    body = _change_tags(body, recolour)
    return body.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def _svg(figure: "Figure") -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", dpi=DPI, metadata={"Date": None, "Creator": None})
    return _NO_XML.sub("\ufffd", stream.getvalue())


def _png(figure: "Figure") -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    return stream.getvalue()


def _own_ids(svg: str, name: str) -> str:
    """Ids that no other drawing has."""

    def rename(tag: str) -> str:
        tag = re.sub(r'\bid="', f'id="{name}-', tag)
        tag = re.sub(r"url\(#", f"url(#{name}-", tag)
        return re.sub(r'href="#', f'href="#{name}-', tag)

    return _change_tags(svg, rename)


def _change_tags(svg: str, change: Callable[[str], str]) -> str:
    """The SVG with its tags changed, and not the texts between them, which are names that may look like anything."""
    return re.sub(r"<[^>]*>", lambda found: change(found[0]), svg)
