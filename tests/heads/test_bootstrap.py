"""Resampled figures against resampled arrays, intervals against what they promise, p against what it means."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from mmcli.heads import bootstrap
from mmcli.heads.bootstrap import difference, draw, interval, resample
from mmcli.heads.metrics import best_threshold_per_class, evaluate


def make(seed: int, N: int, C: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores that tie where levels are few; classes without a positive, with one, and full ones."""
    rng = np.random.default_rng(seed)
    labels = rng.random((N, C)) < rng.choice([0.0, 1.5 / N, 0.3, 1.0], C)
    scores = (rng.integers(0, levels, (N, C)) + rng.integers(0, 2) * labels) / levels
    return scores.astype(np.float32), labels.astype(np.uint8)


cases = st.builds(
    make, st.integers(0, 2**32 - 1), st.integers(1, 25), st.integers(1, 6), st.sampled_from([1, 2, 4, 1000])
)


def rows(W: np.ndarray, r: int) -> np.ndarray:
    """The images that resample r drew, each as often as it was drawn."""
    return np.repeat(np.arange(len(W)), W[:, r].astype(int))


@settings(max_examples=60)
@given(cases)
def test_every_figure_is_that_of_the_resampled_arrays(case) -> None:
    scores, labels = case
    per_class = np.where(
        np.isnan(best_threshold_per_class(scores, labels)), 0.5, best_threshold_per_class(scores, labels)
    )
    thresholds = {"": 0.5, "_tuned": 0.25, "_tuned_per_class": per_class}
    got = resample(scores, labels, thresholds, n=3, seed=7)
    W = draw(len(scores), 3, seed=(7, 0))
    for r in range(3):
        drawn = rows(W, r)
        for ending, threshold in thresholds.items():
            wanted = evaluate(scores[drawn], labels[drawn], threshold=threshold)
            for key in ("F1_micro", "F1_macro", "CP", "CR", "CF1", "OP", "OR", "OF1", "hamming_loss"):
                assert got[key + ending][r] == pytest.approx(wanted[key], abs=1e-9, nan_ok=True), key + ending
        for key in ("mAP", "mAP_sample", "P@1", "P@5", "P@10", "R@1", "R@5", "CF1@3", "OF1@3", "OP@3"):
            assert got[key][r] == pytest.approx(wanted[key], abs=1e-9, nan_ok=True), key


def test_map_of_1000_resamples_is_scikit_learns() -> None:
    """Classes that lost their positives in a resample are left out of its mean, and of no other's."""
    scores, labels = make(2, 30, 8, 10)
    got, lost = resample(scores, labels, seed=3)["mAP"], 0
    for start in range(0, 1000, bootstrap.CHUNK):
        W = draw(30, min(bootstrap.CHUNK, 1000 - start), seed=(3, start))
        for r in range(W.shape[1]):
            s, y = scores[rows(W, r)], labels[rows(W, r)]
            each = [average_precision_score(y[:, c], s[:, c]) for c in range(8) if y[:, c].any()]
            lost += len(each) < labels.any(axis=0).sum()
            assert got[start + r] == pytest.approx(np.mean(each), abs=1e-9)
    assert lost > 20


def test_draws_are_with_replacement_from_all_images_and_seeded() -> None:
    W = draw(50, 400, seed=1)
    assert (W.sum(axis=0) == 50).all()
    assert W.mean(axis=1) == pytest.approx(1, abs=0.25)
    assert (W == 0).mean() == pytest.approx((1 - 1 / 50) ** 50, abs=0.01)
    np.testing.assert_array_equal(W, draw(50, 400, seed=1))
    assert not np.array_equal(W, draw(50, 400, seed=2))
    a, b = (resample(*make(seed, 20, 3, 9), n=100)["mAP"] for seed in (5, 5))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_no_resample_is_lost_between_chunks(monkeypatch, chunk: int) -> None:
    monkeypatch.setattr(bootstrap, "CHUNK", chunk)
    assert all(values.shape == (20,) for values in resample(*make(1, 9, 3, 4), n=20).values())


def test_what_is_undefined_is_left_out_and_counted() -> None:
    """One image of four has the one label: most resamples with it, some without."""
    scores, labels = np.arange(4.0)[:, None], np.array([[0], [0], [0], [1]])
    low, high, n = interval(resample(scores, labels)["mAP"])
    assert (low, high) == (1.0, 1.0)
    assert n == pytest.approx(1000 * 0.75**4, abs=50)
    assert interval(np.full(5, np.nan))[2] == 5
    assert math.isnan(interval(np.full(5, np.nan)).low)
    nothing = resample(scores, np.zeros((4, 1), int))
    assert np.isnan(nothing["mAP"]).all()
    assert np.isnan(difference(nothing["mAP"], nothing["mAP"])).all()


def test_the_interval_is_of_percentiles() -> None:
    assert interval(np.arange(1001.0))[:2] == pytest.approx((25.0, 975.0))


def test_the_interval_holds_the_figure_where_classes_are_rare() -> None:
    """Two positives a class: an image drawn twice raises AP, and the resamples' mean lies above the figure."""
    rng = np.random.default_rng(0)
    labels = np.zeros((200, 40), int)
    for column in labels.T:
        column[rng.choice(200, 2, replace=False)] = 1
    scores = rng.normal(size=labels.shape) + 2 * labels
    figure, values = evaluate(scores, labels)["mAP"], resample(scores, labels)["mAP"]
    assert values.mean() > figure + 0.02
    low, high, _ = interval(values, figure=figure)
    assert low < figure < high
    assert high - low == pytest.approx(np.diff(interval(values)[:2])[0])
    assert difference(values, np.zeros(1000), figure=0.0).p > 0.5


def test_p_by_hand() -> None:
    d = np.r_[np.full(990, 0.1), np.full(9, -0.1)]
    for a, b in ((d, np.zeros(999)), (np.zeros(999), d)):
        found = difference(a, b)
        assert found.p == pytest.approx(2 * (1 + 9) / 1000)
        assert found.low == found.high == pytest.approx(0.1 if a is d else -0.1)
    assert difference(d, d) == (0.0, 0.0, 1.0)
    assert difference(np.ones(999), np.zeros(999)).p == pytest.approx(2 / 1000)
    with pytest.raises(ValueError, match="resamples"):
        difference(d, d[1:])


@given(st.integers(0, 2**32 - 1))
def test_the_interval_leaves_out_zero_where_p_is_below_0_05(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = difference(rng.normal(rng.uniform(-3, 3), 1, 1000), np.zeros(1000))
    assert found.p >= 0.05 or found.low > 0 or found.high < 0


def test_pairs_see_what_two_intervals_do_not() -> None:
    """B is A, a little worse on every image: their intervals overlap, and their difference is certain."""
    rng = np.random.default_rng(0)
    labels = (rng.random((300, 5)) < 0.3).astype(int)
    a = rng.normal(size=labels.shape) + labels
    b = a - 0.15 * labels
    A, B = resample(a, labels)["mAP"], resample(b, labels)["mAP"]
    assert interval(A).low < interval(B).high
    found = difference(A, B)
    assert found.low > 0
    assert found.p < 0.01


def test_bad_input_is_refused_as_everywhere() -> None:
    with pytest.raises(ValueError, match=r"must be one \(N, C\)"):
        resample(np.zeros((3, 4)), np.zeros((4, 3)))
    with pytest.raises(ValueError, match="not a number"):
        resample(np.full((3, 4), np.nan), np.zeros((3, 4)))


def test_fast_enough() -> None:
    """All figures of Karpathy's test split, 1,000 resamples: about 2 s of a core."""
    rng = np.random.default_rng(0)
    scores = (rng.integers(0, 21, (5000, 80)) / 20).astype(np.float32)
    labels = rng.random((5000, 80)) < 0.035
    started = time.process_time()
    resample(scores, labels, {"": 0.5, "_tuned": 0.3, "_tuned_per_class": np.full(80, 0.3)})
    assert time.process_time() - started < 10.0


@pytest.mark.slow
@pytest.mark.parametrize("key", ["mAP", "F1_micro", "P@1", "mAP_sample"])
def test_intervals_cover_what_they_promise(key: str) -> None:
    """Of 400 samples of 500 images, about 95% have an interval around the population's figure."""
    rng = np.random.default_rng(0)
    prior = np.array([0.4, 0.2, 0.1, 0.05])

    def sample(n: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.random((n, 4)) < prior
        return 1 / (1 + np.exp(-(rng.normal(size=labels.shape) + 2 * labels - 1))), labels

    truth = evaluate(*sample(400_000))[key]
    samples = [sample(500) for _ in range(400)]
    intervals = [interval(resample(*one)[key], figure=evaluate(*one)[key]) for one in samples]
    coverage = np.mean([low <= truth <= high for low, high, _ in intervals])
    assert 0.92 <= coverage <= 0.98, coverage


@pytest.mark.slow
def test_equal_methods_are_called_different_one_time_in_twenty() -> None:
    """Two methods of the same quality on the same images: p < 0.05 in about 5% of 400 samples."""
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(400):
        labels = rng.random((300, 3)) < 0.2
        shared = rng.normal(size=labels.shape) + 1.5 * labels
        scores = [shared + rng.normal(size=labels.shape) for _ in "ab"]
        a, b = (resample(one, labels, n=400)["mAP"] for one in scores)
        A, B = (evaluate(one, labels)["mAP"] for one in scores)
        found += difference(a, b, figure=A - B).p < 0.05
    assert 0.02 <= found / 400 <= 0.08, found / 400


@settings(max_examples=20)
@given(cases)
def test_the_mean_over_classes_is_the_resampled_mAP(case) -> None:
    scores, labels = case
    by_class = bootstrap.resample_classes(scores, labels, n=70, seed=3)
    assert by_class.shape == (70, labels.shape[1])
    whole = resample(scores, labels, n=70, seed=3)["mAP"]
    for r in range(70):
        defined = by_class[r][~np.isnan(by_class[r])]
        wanted = defined.mean() if len(defined) else np.nan
        assert whole[r] == pytest.approx(wanted, abs=1e-12, nan_ok=True)


def test_means_over_seeds_are_paired_in_images_alone() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(size=400)  # what every seed of both finds hard in a resample
    a = [hard + 0.3 + 0.01 * rng.normal(size=400) for _ in range(3)]
    b = [hard + 0.2 + 0.01 * rng.normal(size=400) for _ in range(2)]
    found = bootstrap.mean_difference(a, b, figure=0.1)
    by_hand = difference(sum(a) / 3, sum(b) / 2, figure=0.1)
    assert found == pytest.approx(by_hand)
    assert 0.05 < found.low < 0.1 < found.high < 0.15
    alone = bootstrap.mean_difference(a, [rng.permutation(one) for one in b], figure=0.1)
    assert alone.low < 0 < alone.high  # not of the same resamples: what is hard does not cancel
    with pytest.raises(ValueError, match="no seed"):
        bootstrap.mean_difference([], b, figure=0.0)
