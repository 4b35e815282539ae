"""Plots of one run's codes and scores: bits, norms, thresholds, calibration, classes.

Symbols: N images, Q test images, B bits, C classes.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ...heads.bootstrap import interval
from ...heads.ranking import average_precision
from .document import Figure
from .inputs import Depth
from .plots import DASHES, INK, MARKERS, MUTED, SERIES, draw, legend, legend_above, log_axis, name_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = npt.NDArray[np.float64]
BINS, RESAMPLES, SEED = 8, 1000, 42


def class_scatter(depth: Depth) -> Figure | None:
    """AP of every class against how often it stands in train."""
    AP, n = average_precision(depth.scores, depth.query.labels), depth.base.labels.sum(axis=0).astype(float)
    known = ~np.isnan(AP) & (n > 0)
    if known.sum() < 2:
        return None
    ranked = np.argsort(np.where(known, AP, np.inf))[: int(known.sum())].tolist()
    order = ranked[:4]

    def paint(axes: "Axes") -> None:
        axes.plot(n[known], AP[known], linestyle="none", marker="o", color=SERIES[0], alpha=0.75)
        axes.axhline(float(AP[known].mean()), color=MUTED, linestyle=DASHES[1], linewidth=1)
        axes.set(xscale="log", xlabel="train images with the class, log scale", ylabel="AP on test", ylim=(-0.04, 1.04))
        axes.margins(x=0.1)
        axes.autoscale_view(scaley=False)
        log_axis(axes.xaxis)
        name_points(axes, [(depth.names[c], n[c], AP[c]) for c in order])

    rho, low, high = spearman(np.log(n[known]), AP[known])
    worst = ", ".join(f"{depth.names[c]} {AP[c]:.2f}" for c in order[:4])
    drawing = draw("class-ap", paint)
    return Figure(
        name="class-ap",
        title="AP and how rare a class is",
        caption="A point a class; the dashed line is their mean, mAP. The lowest are named.",
        alt=f"Scatter of AP against train images for {int(known.sum())} classes; rank correlation {rho:.2f}"
        f" [{low:.2f}, {high:.2f}]. Lowest: {worst}.",
        svg=drawing.svg,
        png=drawing.png,
    )


def bit_balance(depth: Depth) -> Figure | None:
    """Share of train images at which each bit is set, sorted."""
    bits = _bits(depth)
    if bits is None:
        return None
    share = np.sort(bits.mean(axis=0))

    def paint(axes: "Axes") -> None:
        axes.bar(np.arange(len(share)), share - 0.5, bottom=0.5, width=1.0, color=SERIES[0])
        axes.axhline(0.5, color=INK, linewidth=0.9)
        axes.set(xlabel="bit, sorted", ylabel="share of train images with +1", ylim=(0, 1), xlim=(-1, len(share)))

    off = float(np.abs(share - 0.5).mean())
    dead = int(((share < 0.01) | (share > 0.99)).sum())
    drawing = draw("bit-balance", paint)
    return Figure(
        name="bit-balance",
        title="Bit balance",
        caption="A balanced bit is set for half of the images and tells most. A bit at 0 or 1 tells nothing.",
        alt=f"Bars of {len(share)} bits: set for {share[0]:.0%} to {share[-1]:.0%} of train images, on average"
        f" {off:.2f} away from one half; {dead} bits nearly constant.",
        svg=drawing.svg,
        png=drawing.png,
    )


def bit_correlation(depth: Depth) -> Figure | None:
    """Absolute correlations between bits over train."""
    bits = _bits(depth)
    if bits is None:
        return None
    moving = bits.std(axis=0) > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        absolute = np.abs(np.nan_to_num(np.corrcoef(bits.T)))
    np.fill_diagonal(absolute, 0.0)

    def paint(axes: "Axes") -> None:
        axes.grid(visible=False)
        image = axes.imshow(
            absolute, cmap="cividis", vmin=0, vmax=max(0.2, float(absolute.max())), interpolation="none"
        )
        axes.figure.colorbar(image, ax=axes, label="|correlation|", shrink=0.9)
        axes.set(xlabel="bit", ylabel="bit")

    off = absolute[np.ix_(moving, moving)][~np.eye(int(moving.sum()), dtype=bool)]
    mean, most = (float(off.mean()), float(off.max())) if len(off) else (0.0, 0.0)
    drawing = draw("bit-correlation", paint)
    return Figure(
        name="bit-correlation",
        title="Correlation of bits",
        caption="Bits that say the same waste room. The diagonal is left dark.",
        alt=f"Heat map of absolute correlations between {len(absolute)} bits on train: mean {mean:.3f}, largest"
        f" {most:.3f}.",
        svg=drawing.svg,
        png=drawing.png,
    )


def norms(depth: Depth) -> Figure | None:
    """Per-image AP in bins of the embedding's norm: were the norm a confidence, the line would rise."""
    if depth.query.norm_img is None or depth.query.norm_txt is None:
        return None
    known = ~np.isnan(depth.AP)
    series = {
        "image": np.asarray(depth.query.norm_img, float)[known],
        "caption": np.asarray(depth.query.norm_txt, float)[known],
    }
    AP = depth.AP[known]
    if len(AP) < 2 * BINS:
        return None
    binned = {name: _binned(np.log(np.maximum(values, 1e-12)), AP) for name, values in series.items()}
    found = {name: spearman(np.log(np.maximum(values, 1e-12)), AP) for name, values in series.items()}

    def paint(axes: "Axes") -> None:
        for at, (name, (means, ends)) in enumerate(binned.items()):
            place = np.arange(1, len(means) + 1) + 0.08 * (2 * at - 1)
            axes.errorbar(
                place,
                means,
                yerr=np.abs(ends.T - means),
                color=SERIES[at],
                marker=MARKERS[at],
                linestyle=DASHES[at],
                capsize=2.5,
                label=f"norm of the {name}",
            )
        axes.set(xlabel=f"images by norm, {BINS} equal parts, small to large", ylabel="mean AP of an image")
        legend_above(axes)

    told = "; ".join(
        f"{name}: rank correlation {rho:+.2f} [{low:+.2f}, {high:+.2f}]" for name, (rho, low, high) in found.items()
    )
    sure = [name for name, (_, low, high) in found.items() if low > 0 or high < 0]
    says = (
        f"It goes with correctness for the {' and the '.join(sure)}"
        if sure
        else "It does not tell how well an image is tagged, at this size"
    )
    if depth.known.is_control:
        says = f"Shuffled norms, the control. {says}"
    drawing = draw("norms", paint)
    return Figure(
        name="norms",
        title="Is the magnitude a confidence?",
        caption=f"{says}. {told[:1].upper()}{told[1:]}. Bars: 95% bootstrap interval over images.",
        alt=f"Mean AP of test images in {BINS} parts by the norm of their embeddings. {told}.",
        svg=drawing.svg,
        png=drawing.png,
    )


def threshold_curves(depth: Depth, *, method: str) -> Figure | None:
    """Precision, recall and F1, micro, by the threshold; and the one that val chose."""
    scores = depth.scores if method == "neighbours" else depth.classifier
    chosen = depth.threshold if method == "neighbours" else depth.classifier_threshold
    if scores is None or not depth.query.labels.any():
        return None
    at = np.linspace(0, 1, 201)[1:]
    precision, recall, F1 = micro_curves(np.asarray(scores, float), depth.query.labels, at)

    def paint(axes: "Axes") -> None:
        for place, (label, values) in enumerate((("precision", precision), ("recall", recall), ("F1", F1))):
            axes.plot(at, values, color=SERIES[place], linestyle=DASHES[place], label=label)
        if chosen is not None:
            axes.axvline(chosen, color=MUTED, linewidth=1)
            axes.annotate(
                f"val: {chosen:.2f}",
                (chosen, 1.0),
                xytext=(4, -2),
                textcoords="offset points",
                fontsize=7.5,
                va="top",
                color=MUTED,
            )
        axes.set(xlabel="threshold", ylabel="micro, on test", xlim=(0, 1), ylim=(0, 1.02))
        legend(axes, loc="best")

    best = int(np.argmax(F1))
    name = f"threshold-{method}"
    drawing = draw(name, paint)
    val = "" if chosen is None else f" Val chose {chosen:.3f}."
    return Figure(
        name=name,
        title=f"Thresholds, {method}",
        caption="The vertical line is the threshold that is best on val; test tunes nothing.",
        alt=f"Precision, recall and F1 by threshold. F1 is highest, {F1[best]:.3f}, at {at[best]:.2f}.{val}",
        svg=drawing.svg,
        png=drawing.png,
    )


def calibration(depth: Depth) -> Figure | None:
    """How often a tag of a score is right: on the diagonal a score is a probability."""
    series = {"neighbours": depth.scores, "classifier": depth.classifier}
    y = depth.query.labels.astype(float)
    curves = {name: _reliability(np.asarray(s, float), y) for name, s in series.items() if s is not None}
    if not y.any():
        return None

    def paint(axes: "Axes") -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1)
        for at, (name, (x, right)) in enumerate(curves.items()):
            axes.plot(x, right, color=SERIES[at], marker=MARKERS[at], linestyle=DASHES[at], label=name)
        axes.set(xlabel="score of a tag, in bins", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02))
        legend(axes, loc="upper left")

    told = "; ".join(
        f"{name}: scores near {x[-1]:.2f} are right {right[-1]:.0%} of the time"
        for name, (x, right) in curves.items()
        if len(x)
    )
    drawing = draw("calibration", paint)
    return Figure(
        name="calibration",
        title="Are scores probabilities?",
        caption="Above the line: right more often than the score says. Bins with fewer than ten tags are left out.",
        alt=f"Reliability of scores on test. {told}.",
        svg=drawing.svg,
        png=drawing.png,
    )


def micro_curves(scores: Floats, labels: npt.NDArray[np.uint8], at: Floats) -> tuple[Floats, Floats, Floats]:
    """Micro precision, recall and F1 of ``scores >= threshold`` at every threshold; precision NaN where none is."""
    y = labels.astype(bool).reshape(-1)
    every, right = np.sort(scores.reshape(-1)), np.sort(scores.reshape(-1)[y])
    n = len(every) - np.searchsorted(every, at, side="left")
    tp = len(right) - np.searchsorted(right, at, side="left")
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(n > 0, tp / n, np.nan)
    return precision, tp / max(1, len(right)), 2 * tp / np.maximum(1, n + len(right))


def spearman(x: Floats, y: Floats) -> tuple[float, float, float]:
    """Rank correlation with its 95% bootstrap interval over the points; ranks of equals are averaged."""
    ranks = np.stack([_ranks(x), _ranks(y)])
    rho = _correlation(ranks[0], ranks[1])
    rng = np.random.default_rng(SEED)
    drawn = [_correlation(*ranks[:, rng.integers(0, len(x), len(x))]) for _ in range(RESAMPLES)]
    found = interval(np.array(drawn), figure=rho)
    return rho, found.low, found.high


def _correlation(a: Floats, b: Floats) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale else 0.0


def _ranks(values: Floats) -> Floats:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Floats = (ends - (counts - 1) / 2)[place]
    return ranks


def _binned(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Means of y ``(bins,)`` in equal parts by x, and their 95% bootstrap intervals ``(bins, 2)``."""
    rng, means, ends = np.random.default_rng(SEED), [], []
    for part in np.array_split(np.argsort(x, kind="stable"), BINS):
        drawn = y[part][rng.integers(0, len(part), (RESAMPLES, len(part)))].mean(axis=1)
        found = interval(drawn, figure=float(y[part].mean()))
        means.append(float(y[part].mean()))
        ends.append((found.low, found.high))
    return np.array(means), np.array(ends)


def _reliability(scores: Floats, y: Floats, least: int = 10) -> tuple[Floats, Floats]:
    """Mean score and share of right tags of every tenth of [0, 1] with at least ten tags."""
    bins = np.minimum((scores * 10).astype(int), 9).reshape(-1)
    n = np.bincount(bins, minlength=10)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean, right = (np.bincount(bins, weights=values.reshape(-1), minlength=10) / n for values in (scores, y))
    return mean[n >= least], right[n >= least]


def _bits(depth: Depth) -> Floats | None:
    """Bits of the train codes ``(N, B)`` of 0 and 1; None without hash layer."""
    packed = depth.base.packed
    return None if packed is None else np.unpackbits(packed, axis=1).astype(np.float64)
