"""Render: figures drawn with matplotlib, as SVG for a page and as PNG."""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .document import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure as Canvas

SERIES = ("#0072b2", "#c74e00", "#00875f", "#a8457f", "#8a6a00", "#5b5fc7")
INK, MUTED, LINE, PAPER = "#1b1d20", "#5a5f66", "#d9dad6", "#fefefe"
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
SIZE = (4.6, 3.1)  # inches; at 96 pixels an inch it fits beside another on a page, and on a phone almost as it is
DPI = 200
# What the page calls each colour.
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--rule", PAPER: "--paper"} | {
    colour: f"--series-{i}" for i, colour in enumerate(SERIES)
}
STYLE = Path(__file__).parent / "templates" / "figures.mplstyle"
# Characters that XML has no way to write.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Drawing(NamedTuple):
    """A drawing as SVG with its own colours, and as PNG."""

    svg: str
    png: bytes


@contextmanager
def canvas(size: tuple[float, float], **options: Any) -> Iterator["Canvas"]:  # noqa: ANN401 - matplotlib's
    """An empty matplotlib figure in the style of all drawings; no window and no user setting has a part in it.

    Args:
        size: Width and height in inches.
        options: Further arguments of the figure.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    with mpl.rc_context(fname=STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box is drawn in its place
        figure = Canvas(figsize=size, layout="constrained", **options)
        FigureCanvasAgg(figure)
        yield figure


def draw(name: str, paint: Callable[["Axes"], object]) -> Drawing:
    """Draw one plot.

    Args:
        name: Begins the ids in the SVG, so that several drawings can stand in one page.
        paint: Paints on the axes that it is given.
    """
    with canvas(SIZE) as figure:
        paint(figure.subplots())
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", dpi=DPI, metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
    return Drawing(svg=_with_unique_ids(_NO_XML.sub("\ufffd", svg.getvalue()), name), png=png.getvalue())


def draw_figure(figure: Figure) -> Drawing:
    """Draw a figure of a document."""

    def paint(axes: "Axes") -> None:
        for method, args, options in figure.marks:
            getattr(axes, method)(*args, **options)
        axes.set(**figure.axes)
        for axis, scale in ((axes.xaxis, axes.get_xscale()), (axes.yaxis, axes.get_yscale())):
            if scale == "log":
                _log_ticks(axis)
        _label_points(axes, figure.labels)
        if figure.colorbar:
            axes.grid(visible=False)
            axes.figure.colorbar(axes.images[0], ax=axes, label=figure.colorbar, shrink=0.9)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            _add_legend(axes, figure.legend)

    return draw(figure.name, paint)


def for_page(svg: str) -> str:
    """The SVG as a part of a page: no prologue, its size left to the page, its colours the page's variables.

    Screen readers skip it, because the page itself says in words what it shows.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r'<svg ([^>]*?)width="[^"]*pt" height="[^"]*pt"', r"<svg \1", body, count=1)

    def recolour(tag: str) -> str:
        for colour, variable in VARIABLES.items():
            tag = tag.replace(colour, f"var({variable})")
        return tag

    return _change_tags(body, recolour).replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def _add_legend(axes: "Axes", place: str) -> None:
    """A legend; ``above`` the plot it takes no width."""
    above = {
        "loc": "lower left",
        "bbox_to_anchor": (0.0, 1.0),
        "ncols": 3,
        "borderaxespad": 0.2,
        "columnspacing": 1.2,
        "handlelength": 2.2,
    }
    axes.legend(**(above if place == "above" else {"loc": place}))


def _log_ticks(axis: "Axis") -> None:
    """Plain numbers on a logarithmic axis: powers of ten, and 2 and 5 between them where there are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    subs = (1.0, 2.0, 5.0) if high / max(low, 1e-300) < 300 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:.4g}"))
    axis.set_minor_formatter(NullFormatter())


def _label_points(axes: "Axes", points: Sequence[tuple[str, float, float]]) -> None:
    """Names beside points, the first ones first; one that would cover another is left out."""
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    taken: list[tuple[float, float, float]] = []
    for name, x, y in points:
        fx, fy = to_axes.transform((x, y))
        is_left = fx > 0.7
        width = 0.02 * len(name) + 0.03
        start = fx - width if is_left else fx
        if any(abs(fy - ty) < 0.065 and start < right and start + width > left for left, right, ty in taken):
            continue
        taken.append((start, start + width, fy))
        axes.annotate(
            name,
            (x, y),
            xytext=(-6 if is_left else 6, 0),
            textcoords="offset points",
            fontsize=7.5,
            color=INK,
            va="center",
            ha="right" if is_left else "left",
        )


def _with_unique_ids(svg: str, name: str) -> str:
    """The SVG with ids that no other drawing has."""

    def rename(tag: str) -> str:
        tag = re.sub(r'\bid="', f'id="{name}-', tag)
        tag = re.sub(r"url\(#", f"url(#{name}-", tag)
        return re.sub(r'href="#', f'href="#{name}-', tag)

    return _change_tags(svg, rename)


def _change_tags(svg: str, change: Callable[[str], str]) -> str:
    """The SVG with its tags changed, and not the texts between them, which are names that may look like anything."""
    return re.sub(r"<[^>]*>", lambda match: change(match[0]), svg)
