"""Plots of runs and experiments: learning curves, a figure against a setting, quality against cost."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..evaluation.arms import Arm
from .document import Figure
from .plots_part import DASHES, MARKERS, MUTED, SERIES, draw, legend, legend_above, log_axis, name_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

History = Sequence[Mapping[str, Any]]
# Terms of the loss in the order of SPEC section 6, with the names that a reader knows.
TERMS = {
    "loss": "whole loss", "bce": "classification", "code": "classification of bits", "fused": "classification of z",
    "nested": "nested code", "cosine": "cosine", "quant": "quantisation", "balance": "balance",
    "decorr": "decorrelation",
}  # fmt: skip
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
        name="loss-terms", title="Loss terms", caption=f"Means of every epoch, as logged, unweighted. {run}",
        alt=f"Line chart of loss terms over {len(epochs)} epochs, first to last: {ends}.", svg=drawing.svg,
        png=drawing.png,
    )  # fmt: skip


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
                    epochs, values, color=SERIES[at], linestyle=DASHES[at], linewidth=1.2,
                    label=name if seed == 0 else None,
                )  # fmt: skip
        axes.set(xlabel="epoch", ylabel="val mAP")
        legend(axes, loc="lower right")

    said = "; ".join(
        f"{name}: best {np.mean([np.max(values) for _, values in found]):.3f}"
        + (f" (mean of {len(found)} seeds)" if len(found) > 1 else "")
        for name, found in shown.items()
    )
    drawing = draw("val-curves", paint)
    return Figure(
        name="val-curves", title="Learning curves", caption="mAP on val after every epoch; a line for every seed.",
        alt=f"Line chart of val mAP by epoch. {said}.", svg=drawing.svg, png=drawing.png, commands=commands,
    )  # fmt: skip


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
            at, means, yerr=errors, color=SERIES[0], marker="o", capsize=3, linewidth=1.3, markersize=6,
            label="mean, 95% interval over images",
        )  # fmt: skip
        for place, (arm, _) in enumerate(known):
            values = arm.values("mAP")
            if len(values) > 1:
                axes.plot(
                    np.full(len(values), place + 0.12), values, linestyle="none", marker="x", color=SERIES[1],
                    label="a seed" if place == 0 else None, markersize=5,
                )  # fmt: skip
        axes.set_xticks(at, [arm.name for arm, _ in known])
        axes.set(xlabel=setting, ylabel="mAP on test", xlim=(-0.4, len(known) - 0.6))
        legend_above(axes, 2)

    said = "; ".join(
        f"{arm.name}: {mAP:.3f} [{low:.3f}, {high:.3f}]" for (arm, mAP), (low, high) in zip(known, ends, strict=True)
    )
    drawing = draw(name, paint)
    return Figure(
        name=name, title=title, caption=caption, alt=f"mAP against {setting}. {said}.", svg=drawing.svg,
        png=drawing.png, commands=commands,
    )  # fmt: skip


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
                [p.cost for p in own], [p.mAP for p in own], linestyle="none", marker=MARKERS[at % len(MARKERS)],
                color=SERIES[at % len(SERIES)], label=group, markersize=6.5, alpha=0.9,
            )  # fmt: skip
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
        name=name, title=title, caption=caption,
        alt=f"Scatter of mAP against {cost}, {len(points)} configurations. On the front: {said}.", svg=drawing.svg,
        png=drawing.png, commands=commands,
    )  # fmt: skip


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats: none costs at most as much and has a mAP at least as high, one of both strictly."""
    return [
        one for one in points
        if not any(
            other.cost <= one.cost and other.mAP >= one.mAP and (other.cost < one.cost or other.mAP > one.mAP)
            for other in points
        )
    ]  # fmt: skip


def _curve(history: History) -> tuple[list[float], list[float]]:
    known = [(line["epoch"], line["val_mAP"]) for line in history if line.get("val_mAP") is not None]
    return [epoch for epoch, _ in known], [value for _, value in known]
