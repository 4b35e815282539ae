"""Plots: the figures that they draw against slow ones, and drawings that can stand in one page."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mmcli.heads.metrics import evaluate
from mmcli.pipeline.report.document import Figure
from mmcli.pipeline.report.figures import (
    BINS,
    binned_means,
    loss_terms,
    mark,
    micro_curves,
    reliability,
    spearman,
    val_curves,
)
from mmcli.pipeline.report.plots import VARIABLES, Drawing, draw_figure, for_page
from mmcli.pipeline.report.tables import Point, pareto_front


def drawing(name: str) -> Drawing:
    return draw_figure(
        Figure(
            name=name,
            title="",
            caption="",
            alt="",
            marks=(mark("plot", [1, 10, 100], [0.1, 0.4, 0.2]), mark("set_title", "a <b> & $x_1$")),
            axes={"xscale": "log", "xlabel": "x < y"},
            labels=(("one", 1, 0.1), ("covers it", 1.01, 0.1), ("far", 100, 0.4)),
        )
    )


def test_a_drawing_has_unique_ids_and_the_colours_of_its_page() -> None:
    first, second = drawing("first"), drawing("second")
    ids = [set(re.findall(r'\bid="([^"]+)"', one.svg)) for one in (first, second)]
    assert not ids[0] & ids[1]
    for one, names in zip((first, second), ids, strict=True):
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', one.svg)) <= names
    inside = for_page(first.svg)
    assert inside.startswith('<svg aria-hidden="true"')
    assert "<metadata" not in inside
    assert not any(colour in inside.lower() for colour in VARIABLES)
    assert "var(--ink)" in inside
    assert 'width="' not in inside[: inside.index(">")]
    assert first.png.startswith(b"\x89PNG")


def test_a_drawing_is_the_same_each_time_and_its_words_are_plain() -> None:
    first, again = drawing("x"), drawing("x")
    assert first == again
    assert "a &lt;b&gt; &amp; $x_1$" in first.svg
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", first.svg)
    assert {"1", "10", "100"} <= set(texts)
    assert ("one" in texts, "covers it" in texts, "far" in texts) == (True, False, True)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 5, 1000]))
def test_threshold_curves_are_those_of_evaluate(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    labels = (rng.random((12, 3)) < 0.4).astype(np.uint8)
    scores = rng.integers(0, levels, labels.shape) / levels
    at = np.array([0.05, 0.2, 0.5, 0.9])
    precision, recall, F1 = micro_curves(scores, labels, at)
    for place, threshold in enumerate(at):
        wanted = evaluate(scores, labels, threshold=threshold)
        assert precision[place] == pytest.approx(wanted["OP"], nan_ok=True)
        if labels.any():
            assert recall[place] == pytest.approx(wanted["OR"])
            assert F1[place] == pytest.approx(wanted["F1_micro"])


def test_rank_correlation_is_scipys_and_its_interval_holds_it() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 20, 300).astype(float)
    for slope in (0.0, 0.2):
        y = slope * x + rng.normal(size=300)
        rho, low, high = spearman(x, y)
        assert rho == pytest.approx(stats.spearmanr(x, y).statistic)
        assert low < rho < high
        assert (low > 0) == (slope > 0)


def test_bins_hold_every_image_once() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=200), rng.random(200)
    means, ends = binned_means(x, y)
    parts = np.array_split(np.argsort(x), BINS)
    assert means == pytest.approx([y[part].mean() for part in parts])
    assert (ends[:, 0] < means).all()
    assert (means < ends[:, 1]).all()


def test_reliability_is_a_share() -> None:
    rng = np.random.default_rng(2)
    scores = rng.random((400, 5))
    y = (rng.random(scores.shape) < scores).astype(float)
    mean, right = reliability(scores, y)
    assert len(mean) == 10
    for at in range(10):
        inside = (scores >= at / 10) & (scores < (at + 1) / 10)
        assert (mean[at], right[at]) == pytest.approx((scores[inside].mean(), y[inside].mean()))
    assert len(reliability(scores[:1], y[:1])[0]) == 0


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(pairs: list[tuple[int, int]]) -> None:
    points = [Point(str(at), float(cost), float(value), "g") for at, (cost, value) in enumerate(pairs)]
    front = pareto_front(points)
    for one in points:
        beaten = [
            p for p in points if p.cost <= one.cost and p.mAP >= one.mAP and (p.cost, p.mAP) != (one.cost, one.mAP)
        ]
        assert (one in front) == (not beaten)


def test_what_was_not_logged_is_not_drawn() -> None:
    assert loss_terms([], "r") is None
    assert loss_terms([{"epoch": 1, "loss": 1.0}], "r") is None
    found = loss_terms([{"epoch": e, "loss": 1 / e, "cosine": 0.0, "bce": None} for e in (1, 2, 3)], "r")
    assert "whole loss 1 to 0.333" in found.alt
    assert "cosine" not in found.alt
    assert val_curves({"a": [[{"epoch": 1, "val_mAP": 0.5}]]}) is None
    curve = [{"epoch": e, "val_mAP": 0.1 * e} for e in (1, 2, 3)]
    assert "a: best 0.300 (mean of 2 seeds)" in val_curves({"a": [curve, curve]}).alt
