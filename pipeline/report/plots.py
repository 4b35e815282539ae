"""Plots of runs and experiments: learning curves, a figure against a setting, quality against cost."""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..evaluation.compare import Arm
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
    colour: f"--series-{at}" for at, colour in enumerate(SERIES)
}
# Nothing of a user's matplotlibrc counts: TeX would run over the names of categories.
STYLE: Any = {
    "text.usetex": False,
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "mmcli",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.7,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "axes.titlesize": 9,
}


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
    from matplotlib.figure import Figure as Canvas

    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box is drawn in its place
        figure = Canvas(figsize=size, layout="constrained")
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
        axes,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=columns,
        borderaxespad=0.2,
        columnspacing=1.2,
        handlelength=2.2,
    )


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
            name,
            (x, y),
            xytext=(-6 if left else 6, 0),
            textcoords="offset points",
            fontsize=7.5,
            color=INK,
            va="center",
            ha="right" if left else "left",
        )


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


def _svg(figure: "Canvas") -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", dpi=DPI, metadata={"Date": None, "Creator": None})
    return _NO_XML.sub("\ufffd", stream.getvalue())


def _png(figure: "Canvas") -> bytes:
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


History = Sequence[Mapping[str, Any]]
# Terms of the loss in the order of SPEC section 6, with the names that a reader knows.
TERMS = {
    "loss": "whole loss",
    "bce": "classification",
    "code": "classification of bits",
    "fused": "classification of z",
    "nested": "nested code",
    "cosine": "cosine",
    "quant": "quantisation",
    "balance": "balance",
    "decorr": "decorrelation",
}
MOST_LINES = 6


class Point(NamedTuple):
    """A configuration: its name, its cost, its mAP, and what its colour stands for."""

    name: str
    cost: float
    mAP: float
    group: str


def loss_terms(history: History, run: str) -> Figure | None:
    """Every loss term by epoch, on a logarithmic scale."""
    epochs = np.array([line["epoch"] for line in history], float)
    lines = {key: np.array([line.get(key) or np.nan for line in history], float) for key in TERMS}
    lines = {key: values for key, values in lines.items() if np.isfinite(values).any()}
    if len(epochs) < 2 or not lines:
        return None

    def paint(axes: "Axes") -> None:
        for at, (key, values) in enumerate(lines.items()):
            axes.plot(
                epochs, values, label=TERMS[key], color=SERIES[at % len(SERIES)], linestyle=DASHES[at % len(DASHES)]
            )
        axes.set(xlabel="epoch", ylabel="loss term, log scale", yscale="log")
        log_axis(axes.yaxis)
        legend_above(axes)

    ends = "; ".join(f"{TERMS[key]} {values[0]:.3g} to {values[-1]:.3g}" for key, values in lines.items())
    drawing = draw("loss-terms", paint)
    return Figure(
        name="loss-terms",
        title="Loss terms",
        caption=f"Means of every epoch, as logged, unweighted. {run}",
        alt=f"Line chart of loss terms over {len(epochs)} epochs, first to last: {ends}.",
        svg=drawing.svg,
        png=drawing.png,
    )


def val_curves(groups: Mapping[str, Sequence[History]], commands: tuple[str, ...] = ()) -> Figure | None:
    """Val mAP by epoch: a colour and pattern a configuration, a line a seed."""
    curves = {name: [_curve(one) for one in histories] for name, histories in groups.items()}
    curves = {name: [one for one in found if len(one[0]) > 1] for name, found in curves.items()}
    shown = {name: found for name, found in curves.items() if found}
    shown = dict(list(shown.items())[:MOST_LINES])
    if not shown:
        return None

    def paint(axes: "Axes") -> None:
        for at, (name, found) in enumerate(shown.items()):
            for seed, (epochs, values) in enumerate(found):
                axes.plot(
                    epochs,
                    values,
                    color=SERIES[at],
                    linestyle=DASHES[at],
                    linewidth=1.2,
                    label=name if seed == 0 else None,
                )
        axes.set(xlabel="epoch", ylabel="val mAP")
        legend(axes, loc="lower right")

    said = "; ".join(
        f"{name}: best {np.mean([np.max(values) for _, values in found]):.3f}"
        + (f" (mean of {len(found)} seeds)" if len(found) > 1 else "")
        for name, found in shown.items()
    )
    drawing = draw("val-curves", paint)
    return Figure(
        name="val-curves",
        title="Learning curves",
        caption="mAP on val after every epoch; a line for every seed.",
        alt=f"Line chart of val mAP by epoch. {said}.",
        svg=drawing.svg,
        png=drawing.png,
        commands=commands,
    )


def against(
    name: str, title: str, arms: Sequence[Arm], *, setting: str, caption: str, commands: tuple[str, ...]
) -> Figure | None:
    """A figure of mAP against the values of an experiment: mean with its interval, and every seed."""
    known = [(arm, mAP) for arm in arms if (mAP := arm.mean("mAP")) is not None]
    if len(known) < 2:
        return None
    means = np.array([mAP for _, mAP in known])
    ends = [arm.ends("mAP") or (mAP, mAP) for arm, mAP in known]

    def paint(axes: "Axes") -> None:
        at = np.arange(len(known))
        errors = np.abs(np.array(ends).T - means)
        axes.errorbar(
            at,
            means,
            yerr=errors,
            color=SERIES[0],
            marker="o",
            capsize=3,
            linewidth=1.3,
            markersize=6,
            label="mean, 95% interval over images",
        )
        for place, (arm, _) in enumerate(known):
            values = arm.values("mAP")
            if len(values) > 1:
                axes.plot(
                    np.full(len(values), place + 0.12),
                    values,
                    linestyle="none",
                    marker="x",
                    color=SERIES[1],
                    label="a seed" if place == 0 else None,
                    markersize=5,
                )
        axes.set_xticks(at, [arm.name for arm, _ in known])
        axes.set(xlabel=setting, ylabel="mAP on test", xlim=(-0.4, len(known) - 0.6))
        legend_above(axes, 2)

    said = "; ".join(
        f"{arm.name}: {mAP:.3f} [{low:.3f}, {high:.3f}]" for (arm, mAP), (low, high) in zip(known, ends, strict=True)
    )
    drawing = draw(name, paint)
    return Figure(
        name=name,
        title=title,
        caption=caption,
        alt=f"mAP against {setting}. {said}.",
        svg=drawing.svg,
        png=drawing.png,
        commands=commands,
    )


def pareto(
    name: str, title: str, points: Sequence[Point], *, cost: str, caption: str, commands: tuple[str, ...]
) -> Figure | None:
    """A figure of mAP against a cost, with the front: the points that no other beats in both."""
    points = [point for point in points if point.cost > 0]
    if len(points) < 2:
        return None
    front = pareto_front(points)
    groups = list(dict.fromkeys(point.group for point in points))

    def paint(axes: "Axes") -> None:
        steps = sorted(front, key=lambda point: point.cost)
        axes.step([p.cost for p in steps], [p.mAP for p in steps], where="post", color=MUTED, linewidth=1, zorder=1)
        for at, group in enumerate(groups):
            own = [point for point in points if point.group == group]
            axes.plot(
                [p.cost for p in own],
                [p.mAP for p in own],
                linestyle="none",
                marker=MARKERS[at % len(MARKERS)],
                color=SERIES[at % len(SERIES)],
                label=group,
                markersize=6.5,
                alpha=0.9,
            )
        axes.set(xscale="log", xlabel=f"{cost}, log scale", ylabel="mAP on test")
        axes.margins(x=0.15, y=0.1)
        axes.autoscale_view()
        log_axis(axes.xaxis)
        others = [point for point in points if point not in front]
        name_points(axes, [(p.name, p.cost, p.mAP) for p in [*reversed(steps), *others]])
        legend_above(axes)

    said = "; ".join(f"{p.name}: {p.cost:,.4g}, mAP {p.mAP:.3f}" for p in sorted(front, key=lambda p: p.cost))
    drawing = draw(name, paint)
    return Figure(
        name=name,
        title=title,
        caption=caption,
        alt=f"Scatter of mAP against {cost}, {len(points)} configurations. On the front: {said}.",
        svg=drawing.svg,
        png=drawing.png,
        commands=commands,
    )


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats: none costs at most as much and has a mAP at least as high, one of both strictly."""
    return [
        one
        for one in points
        if not any(
            other.cost <= one.cost and other.mAP >= one.mAP and (other.cost < one.cost or other.mAP > one.mAP)
            for other in points
        )
    ]


def _curve(history: History) -> tuple[list[float], list[float]]:
    known = [(line["epoch"], line["val_mAP"]) for line in history if line.get("val_mAP") is not None]
    return [epoch for epoch, _ in known], [value for _, value in known]
