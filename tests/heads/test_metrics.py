"""Every metric against scikit-learn or a plain loop; ties, empty classes, and real COCO ceilings."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from mmcli import InputError
from mmcli.heads.metrics import (
    average_precision,
    best_threshold,
    best_threshold_per_class,
    evaluate,
    mean_average_precision,
    per_class,
    tune_thresholds,
)

cases = st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 25), st.integers(1, 12), st.sampled_from([2, 4, 1000]))


def make_case(case: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Scores on a grid, so that most tie; some classes and images without a label, some full."""
    seed, n, c, levels = case
    rng = np.random.default_rng(seed)
    scores = (rng.integers(0, levels, (n, c)) / levels).astype(np.float32)
    labels = (rng.random((n, c)) < rng.choice([0.0, 0.2, 0.6, 1.0], c)).astype(np.uint8)
    labels[rng.random(n) < 0.2] = 0
    return scores, labels


@given(cases)
def test_average_precision_is_scikit_learns(case) -> None:
    scores, labels = make_case(case)
    got = average_precision(scores, labels)
    for c in range(labels.shape[1]):
        if labels[:, c].any():
            assert got[c] == pytest.approx(sk.average_precision_score(labels[:, c], scores[:, c]), abs=1e-12)
        else:
            assert math.isnan(got[c])
    present = labels.any(axis=0)
    if present.any():
        wanted = sk.average_precision_score(labels[:, present], scores[:, present], average="macro")
        assert mean_average_precision(scores, labels) == pytest.approx(wanted, abs=1e-12)
    else:
        assert math.isnan(mean_average_precision(scores, labels))


@given(cases)
def test_map_sample_is_the_mean_over_images_with_a_label(case) -> None:
    scores, labels = make_case(case)
    each = [sk.average_precision_score(y, s) for y, s in zip(labels, scores, strict=True) if y.any()]
    got = evaluate(scores, labels)["mAP_sample"]
    assert got == pytest.approx(np.mean(each), abs=1e-12) if each else math.isnan(got)


def test_spec10_8_per_class_and_per_sample_map_are_two_figures() -> None:
    scores, labels = make_case((0, 25, 12, 1000))
    row = evaluate(scores, labels)
    assert row["mAP"] != pytest.approx(row["mAP_sample"], abs=1e-3)


@given(cases)
def test_order_of_images_and_of_ties_does_not_matter(case) -> None:
    scores, labels = make_case(case)
    order = np.random.default_rng(case[0]).permutation(len(scores))
    np.testing.assert_allclose(
        average_precision(scores[order], labels[order]), average_precision(scores, labels), atol=1e-12
    )


def test_constant_scores_give_the_prior() -> None:
    labels = np.array([[1, 0], [0, 0], [0, 1], [0, 1]])
    assert average_precision(np.zeros((4, 2)), labels).tolist() == [0.25, 0.5]


@given(cases)
def test_precision_and_recall_at_k_equal_the_loop(case) -> None:
    scores, labels = make_case(case)
    C = labels.shape[1]
    got = evaluate(scores, labels)
    for K in (1, 3, 5, 10):
        P, R, best_P, best_R = [], [], [], []
        for s, y in zip(scores.tolist(), labels.tolist(), strict=True):
            top = sorted(range(C), key=lambda c: (-s[c], c))[:K]
            hits, tags = sum(y[c] for c in top), sum(y)
            P.append(hits / K)
            best_P.append(min(K, tags) / K)
            if tags:
                R.append(hits / tags)
                best_R.append(min(K, tags) / tags)
        assert got[f"P@{K}"] == pytest.approx(np.mean(P))
        assert got[f"P@{K}_ceiling"] == pytest.approx(np.mean(best_P))
        if R:
            assert got[f"R@{K}"] == pytest.approx(np.mean(R))
            assert got[f"R@{K}_ceiling"] == pytest.approx(np.mean(best_R))
        else:
            assert math.isnan(got[f"R@{K}"])
    reached = evaluate(labels.astype(float), labels)
    for key in [f"{letter}@{K}" for letter in "PR" for K in (1, 3, 5, 10)]:
        assert reached[key] == pytest.approx(reached[f"{key}_ceiling"], nan_ok=True)


def slow_cp_cr(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    P, R, tp, fp, fn = [], [], 0, 0, 0
    for c in range(labels.shape[1]):
        hit = sum(int(p and y) for p, y in zip(predicted[:, c], labels[:, c], strict=True))
        n_predicted, n_true = int(predicted[:, c].sum()), int(labels[:, c].sum())
        P += [hit / n_predicted] if n_predicted else []
        R += [hit / n_true] if n_true else []
        tp, fp, fn = tp + hit, fp + n_predicted - hit, fn + n_true - hit
    CP, CR = (np.mean(x) if x else math.nan for x in (P, R))
    return {
        "CP": CP,
        "CR": CR,
        "CF1": 0.0 if CP == CR == 0 else 2 * CP * CR / (CP + CR),
        "OP": tp / (tp + fp) if tp + fp else math.nan,
        "OR": tp / (tp + fn) if tp + fn else math.nan,
        "OF1": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else math.nan,
        "n_undefined_CP": labels.shape[1] - len(P),
    }


@given(cases, st.sampled_from([0.25, 0.5, 0.9, 2.0]))
def test_thresholded_metrics_equal_scikit_learn_and_the_loop(case, threshold: float) -> None:
    scores, labels = make_case(case)
    row = evaluate(scores, labels, threshold=threshold)
    predicted = scores >= threshold
    for key, value in slow_cp_cr(predicted, labels).items():
        assert row[key] == pytest.approx(value, nan_ok=True), key
    top = np.zeros_like(predicted)
    for n, s in enumerate(scores.tolist()):
        top[n, sorted(range(len(s)), key=lambda c: (-s[c], c))[:3]] = True
    for key, value in slow_cp_cr(top, labels).items():
        assert row[f"{key}@3"] == pytest.approx(value, nan_ok=True), key
    assert row["hamming_loss"] == pytest.approx(sk.hamming_loss(labels, predicted.astype(np.uint8)))
    if (predicted | labels.astype(bool)).any():
        for average in ("micro", "macro"):
            each = [sk.f1_score(labels[:, c], predicted[:, c], zero_division=np.nan) for c in range(labels.shape[1])]
            wanted = np.nanmean(each) if average == "macro" else sk.f1_score(labels.ravel(), predicted.ravel())
            assert row[f"F1_{average}"] == pytest.approx(wanted)
        assert row["n_undefined_F1_macro"] == np.isnan(each).sum()
    else:
        assert math.isnan(row["F1_micro"])
    assert row["OF1"] == pytest.approx(row["F1_micro"], nan_ok=True)
    assert row["n_images_without_label"] == (labels.sum(1) == 0).sum()
    assert row["n_classes_without_positive"] == (labels.sum(0) == 0).sum()


@given(cases)
def test_per_class_figures_are_scikit_learns(case) -> None:
    scores, labels = make_case(case)
    got = per_class(scores, labels, threshold=0.5)
    for c in range(labels.shape[1]):
        predicted = scores[:, c] >= 0.5
        P, R, F, _ = sk.precision_recall_fscore_support(labels[:, c], predicted, average="binary", zero_division=np.nan)
        assert [got[k][c] for k in ("precision", "recall", "F1")] == pytest.approx([P, R, F], nan_ok=True)
        assert got["n_positive"][c] == labels[:, c].sum()
        assert got["n_predicted"][c] == predicted.sum()
    np.testing.assert_array_equal(got["AP"], average_precision(scores, labels))


def test_cf1_is_not_macro_f1() -> None:
    labels = np.array([[1, 1], [0, 1], [0, 1], [0, 1]])
    row = evaluate(np.array([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), labels)
    assert row["CF1"] == pytest.approx(2 * 0.625 * 0.625 / 1.25)
    assert row["F1_macro"] == pytest.approx(0.4)


@given(cases)
def test_best_threshold_is_the_best_of_all(case) -> None:
    scores, labels = make_case(case)
    if not labels.any():
        with pytest.raises(InputError, match="no positive label"):
            best_threshold(scores, labels)
        return
    f1 = {t: sk.f1_score(labels.ravel(), scores.ravel() >= t) for t in sorted(set(scores.ravel().tolist()))}
    best = best_threshold(scores, labels)
    assert evaluate(scores, labels, threshold=best)["F1_micro"] == pytest.approx(max(f1.values()))
    assert best == max(t for t, value in f1.items() if value > max(f1.values()) - 1e-12)


@settings(max_examples=50)
@given(cases)
def test_best_threshold_of_each_class(case) -> None:
    scores, labels = make_case(case)
    thresholds = best_threshold_per_class(scores, labels)
    row = evaluate(scores, labels, threshold=thresholds)
    assert "threshold" not in row
    tuned = per_class(scores, labels, threshold=thresholds)
    for c in range(labels.shape[1]):
        if not labels[:, c].any():
            assert math.isnan(thresholds[c])
            assert tuned["n_predicted"][c] == 0
            continue
        best = max(sk.f1_score(labels[:, c], scores[:, c] >= t) for t in set(scores[:, c].tolist()))
        assert tuned["F1"][c] == pytest.approx(best)


def test_a_class_without_a_positive_keeps_the_overall_threshold() -> None:
    scores, labels = np.array([[0.9, 0.3], [0.4, 0.2], [0.1, 0.8]]), np.array([[1, 0], [1, 0], [0, 0]])
    tuned = tune_thresholds(scores, labels)
    assert (tuned.overall, tuned.n_kept_overall) == (best_threshold(scores, labels), 1)
    assert tuned.per_class.tolist() == [0.4, tuned.overall]
    with pytest.raises(InputError, match="no positive label"):
        tune_thresholds(scores, np.zeros_like(labels))


EDGES = {
    "one image": ([[0.2, 0.7, 0.7]], [[1, 0, 1]]),
    "one class": ([[0.2], [0.7], [0.2]], [[1], [0], [1]]),
    "one pair": ([[0.5]], [[1]]),
    "all scores zero": ([[0.0] * 3] * 4, [[1, 0, 0], [0, 1, 0], [0, 0, 0], [1, 1, 0]]),
    "all labels": ([[0.1, 0.9]] * 3, [[1, 1]] * 3),
    "a missing class": ([[0.9, 0.1], [0.2, 0.8]], [[1, 0], [0, 0]]),
    "nothing predicted": ([[0.1, 0.2], [0.3, 0.1]], [[1, 0], [0, 1]]),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges_equal_scikit_learn_and_warn_of_nothing(name: str) -> None:
    scores, labels = (np.array(part) for part in EDGES[name])
    row, present, tagged = evaluate(scores, labels), labels.any(axis=0), labels.any(axis=1)
    each = [sk.average_precision_score(labels[:, c], scores[:, c]) for c in np.flatnonzero(present)]
    assert row["mAP"] == pytest.approx(np.mean(each))
    each = [sk.average_precision_score(labels[n], scores[n]) for n in np.flatnonzero(tagged)]
    assert row["mAP_sample"] == pytest.approx(np.mean(each))
    flat = sk.precision_recall_fscore_support(
        labels.ravel(), scores.ravel() >= 0.5, average="binary", zero_division=np.nan
    )
    assert [row[key] for key in ("OP", "OR", "OF1")] == pytest.approx(flat[:3], nan_ok=True)
    figures = per_class(scores, labels)
    tables = sk.multilabel_confusion_matrix(labels, scores >= 0.5) if labels.shape[1] > 1 else None
    if tables is not None:
        assert figures["n_predicted"].tolist() == (tables[:, 1, 1] + tables[:, 0, 1]).tolist()
    assert row["n_classes_without_positive"] == (~present).sum()


def test_undefined_is_nan_never_a_silent_zero_or_one() -> None:
    row = evaluate(np.zeros((3, 4)), np.zeros((3, 4), int))
    undefined = {key for key, value in row.items() if math.isnan(value)}
    both = {"CP", "OP", "CR", "OR", "CF1", "OF1"}
    assert undefined == {"mAP", "mAP_sample", "F1_micro", "F1_macro", *both, "CR@3", "OR@3", "CF1@3"} | {
        f"R@{K}{end}" for K in (1, 3, 5, 10) for end in ("", "_ceiling")
    }
    assert row["n_images_without_label"] == 3
    assert row["n_classes_without_positive"] == row["n_undefined_CP"] == row["n_undefined_F1_macro"] == 4
    assert row["hamming_loss"] == 0


def test_keys_are_flat_numbers() -> None:
    scores, labels = make_case((1, 20, 12, 4))
    row = evaluate(scores, labels, threshold=0.3)
    wanted = {
        "mAP",
        "mAP_sample",
        "F1_micro",
        "F1_macro",
        "hamming_loss",
        "n_images",
        "n_images_without_label",
        "n_classes_without_positive",
        "threshold",
    }
    wanted |= {f"{key}{end}" for key in ("CP", "CR", "CF1", "OP", "OR", "OF1") for end in ("", "@3")}
    wanted |= {f"{key}@{K}{end}" for key in "PR" for K in (1, 3, 5, 10) for end in ("", "_ceiling")}
    assert wanted <= row.keys()
    assert all(type(value) is float for value in row.values())
    assert row["threshold"] == 0.3


@pytest.mark.parametrize("labels_dtype", [bool, np.uint8, np.int64, np.float32])
@pytest.mark.parametrize("scores_dtype", [np.uint8, np.float32, np.float64])
def test_dtypes_do_not_matter(scores_dtype, labels_dtype) -> None:
    scores = np.random.default_rng(0).integers(0, 5, (30, 6))
    labels = np.random.default_rng(1).integers(0, 2, (30, 6))
    wanted = evaluate(scores.astype(float), labels, threshold=2)
    assert evaluate(scores.astype(scores_dtype), labels.astype(labels_dtype), threshold=2) == pytest.approx(wanted)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_named(bad: float) -> None:
    scores, labels = make_case((0, 10, 5, 4))
    scores[3, 2] = bad
    for metric in (evaluate, average_precision, mean_average_precision, best_threshold, per_class):
        with pytest.raises(ValueError, match="image 3, class 2"):
            metric(scores, labels)


def test_shapes_and_labels_that_do_not_fit_are_refused() -> None:
    for scores, labels in (
        (np.zeros((3, 4)), np.zeros((4, 3))),
        (np.zeros(3), np.zeros(3)),
        (np.zeros((0, 4)), np.zeros((0, 4))),
    ):
        with pytest.raises(ValueError, match=r"must be one \(N, C\)"):
            evaluate(scores, labels)
    with pytest.raises(ValueError, match="0 or 1"):
        evaluate(np.zeros((3, 4)), np.full((3, 4), 2))


def test_no_loop_over_images(count_calls) -> None:
    rng = np.random.default_rng(0)
    scores = (rng.integers(0, 21, (5000, 80)) / 20).astype(np.float32)
    labels = (rng.random((5000, 80)) < 0.035).astype(np.uint8)
    assert count_calls(lambda: (evaluate(scores, labels), best_threshold(scores, labels))) < 4000


@pytest.mark.realdata
def test_spec10_11_the_ceiling_of_p_at_5_on_karpathy_test(realdata: Path) -> None:
    """With 2.8 tags an image; the labels at hand lack some positives, so the last digit is theirs."""
    stored = np.load(realdata / "full" / "labels.npz")
    ids = json.loads(gzip.decompress((realdata / "full" / "karpathy_ids.json.gz").read_bytes()))["test"]
    rows = np.searchsorted(stored["image_id"], ids)
    assert (stored["image_id"][rows] == ids).all()
    labels = np.unpackbits(stored["labels"][rows], axis=1)
    assert labels.shape == (5000, 80)
    row = evaluate(labels.astype(np.float32), labels)
    slow = sum(min(5, int(n)) / 5 for n in labels.sum(axis=1)) / 5000
    assert row["P@5_ceiling"] == row["P@5"] == pytest.approx(slow)
    assert slow == pytest.approx(0.524, abs=0.002)
    assert row["R@5_ceiling"] < 1
    assert row["n_images_without_label"] == (labels.sum(axis=1) == 0).sum() > 0
    assert row["mAP"] == row["F1_micro"] == 1
