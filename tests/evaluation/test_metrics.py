"""Rows of metrics: thresholds of every kind, intervals, rows of the classes, kept scores."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, precision_recall_fscore_support

from kit.runs import make_info
from mmcli import InputError
from mmcli.heads.bootstrap import RESAMPLES, interval, resample
from mmcli.heads.metrics import evaluate
from mmcli.heads.sigmoid import sigmoid
from mmcli.pipeline.core.config import Config
from mmcli.pipeline.core.console import cells, metrics_table
from mmcli.pipeline.core.results import write_per_class
from mmcli.pipeline.core.run import Run, start_run
from mmcli.pipeline.core.run_folders import RunPaths
from mmcli.pipeline.evaluation.metrics import metrics_row, read_scores, with_intervals, write_scores

C = 5


def make(seed: int, n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, C)) < 0.3).astype(np.uint8)
    return (rng.integers(0, 8, (n, C)) / 10 + 0.2 * labels).astype(np.float32), labels


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return start_run(make_info("abcde"), Config(), label="x", out=tmp_path / "run", runs=tmp_path, device="cpu")


def best_by_hand(s: np.ndarray, y: np.ndarray) -> float:
    """The highest of the thresholds with the best F1."""
    f1 = {t: f1_score(y, s >= t) for t in np.unique(s)}
    return float(max(t for t, value in f1.items() if value > max(f1.values()) - 1e-12))


def test_thresholds_per_class_are_tuned_on_val() -> None:
    scores, labels = make(0)
    on_val, val = make(1)
    val[:, 2] = 0
    row = metrics_row("m", "test", scores, labels, tuned_on=(on_val, val))
    overall = best_by_hand(on_val.ravel(), val.ravel())
    each = [best_by_hand(on_val[:, c], val[:, c]) if c != 2 else overall for c in range(C)]
    assert row["threshold_tuned"] == pytest.approx(overall)
    predicted = scores >= np.array(each)
    for average in ("micro", "macro"):
        assert row[f"F1_{average}_tuned_per_class"] == pytest.approx(f1_score(labels, predicted, average=average))
        tuned = f1_score(labels, scores >= np.float32(overall), average=average)
        assert row[f"F1_{average}_tuned"] == pytest.approx(tuned)
    assert row["hamming_loss_tuned_per_class"] == pytest.approx((predicted != labels).mean())
    assert row["n_classes_without_own_threshold"] == 1
    assert "1 class has no positive val image" in row["note"]
    assert "n_classes_without_own_threshold" not in metrics_row("m", "val", on_val, val, tuned_on=None)


def test_test_tunes_nothing() -> None:
    """Other test labels, the same thresholds; and they are not the ones that are best on test."""
    (scores, labels), val = make(0), make(1)
    rows = [metrics_row("m", "test", scores, y, tuned_on=val) for y in (labels, 1 - labels)]
    assert rows[0]["threshold_tuned"] == rows[1]["threshold_tuned"]
    best = metrics_row("m", "test", scores, labels, tuned_on=(scores, labels))
    assert best["F1_macro_tuned_per_class"] > rows[0]["F1_macro_tuned_per_class"]


def test_every_headline_figure_has_its_interval() -> None:
    (scores, labels), val = make(0), make(1)
    row = metrics_row("m", "test", scores, labels, tuned_on=val)
    ends = ("", "_tuned", "_tuned_per_class")
    wanted = {f"{key}{end}" for key in ("F1_micro", "F1_macro", "CF1", "OF1", "hamming_loss") for end in ends}
    wanted |= {"mAP", "mAP_sample", "CF1@3", "OF1@3"} | {f"{what}@{K}" for what in "PR" for K in (1, 3, 5, 10)}
    assert wanted <= row["ci"].keys() <= row.keys()
    for key, (low, high) in row["ci"].items():
        assert low <= high, key
        assert low - 0.1 <= row[key] <= high + 0.1, key
    assert row["ci"]["mAP"] == list(interval(resample(scores, labels)["mAP"], figure=row["mAP"])[:2])
    assert row["n_resamples"] == 1000
    json.dumps(row, allow_nan=False)
    assert "ci" not in metrics_row("m", "train", scores, labels, tuned_on=val)


def test_what_is_undefined_has_no_interval_and_is_counted() -> None:
    scores, labels = make(0, n=6)
    row = metrics_row("m", "test", scores, np.zeros_like(labels), tuned_on=None)
    assert row["mAP"] is None
    assert "mAP" not in row["ci"]
    one = np.zeros_like(labels)
    one[0, 0] = 1
    row = metrics_row("m", "test", scores, one, tuned_on=None)
    assert row["ci_undefined"]["mAP"] == pytest.approx(1000 * (5 / 6) ** 6, abs=60)
    json.dumps(row, allow_nan=False)


def test_with_intervals_changes_no_figure() -> None:
    scores, labels = make(0)
    row = {"method": "m", **evaluate(scores, labels)}
    more = with_intervals(row, scores, labels, {"": 0.5})
    assert {key: more[key] for key in row} == row
    assert more["n_resamples"] == RESAMPLES


@pytest.mark.parametrize("logits", [False, True])
def test_rows_of_the_classes_are_scikit_learns(run: Run, logits: bool) -> None:
    (scores, labels), (on_val, val) = make(0), make(1)
    labels[:, 1], val[:, 3] = 0, 0
    shift = 0.5 if logits else 0.0
    row = metrics_row("m", "test", scores - shift, labels, tuned_on=(on_val - shift, val), logits=logits, run=run)
    record = json.loads(run.paths.per_class("m", "test").read_text())
    assert (record["method"], record["split"], record["n_images"]) == ("m", "test", 60)
    assert [line["category"] for line in record["classes"]] == list("abcde")
    for c, line in enumerate(record["classes"]):
        assert line["index"] == c
        assert line["n_positive"] == labels[:, c].sum()
        for ending in ("", "_tuned", "_tuned_per_class"):
            at = line[f"threshold{ending}"]
            predicted = (sigmoid(scores[:, c] - shift) if logits else scores[:, c]) >= at - 1e-9
            P, R, F, _ = precision_recall_fscore_support(
                labels[:, c], predicted, average="binary", zero_division=np.nan
            )
            for key, value in (("precision", P), ("recall", R), ("F1", F)):
                got = line[key + ending]
                assert np.isnan(value) if got is None else got == pytest.approx(value), (c, key + ending)
            assert line[f"n_predicted{ending}"] == predicted.sum()
        assert line["threshold"] == 0.5
        assert line["threshold_tuned"] == pytest.approx(row["threshold_tuned"])
        wanted = None if c == 1 else pytest.approx(average_precision_score(labels[:, c], scores[:, c]))
        assert line["AP"] == wanted
    assert record["classes"][3]["threshold_tuned_per_class"] == pytest.approx(row["threshold_tuned"])
    assert row["mAP"] == pytest.approx(np.mean([line["AP"] for line in record["classes"] if line["AP"] is not None]))


def test_rows_of_the_classes_need_their_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 names do not name 5 classes"):
        write_per_class(tmp_path, "m", "test", ["a", "b"], *make(0))


def test_scores_are_read_as_they_were_written(tmp_path: Path) -> None:
    scores, labels = make(0)
    write_scores(tmp_path, "m", "test", np.arange(60), scores, labels)
    again = read_scores(tmp_path, "m", "test")
    for name, values in (("image_id", np.arange(60)), ("scores", scores), ("labels", labels)):
        np.testing.assert_array_equal(again[name], values)
    write_scores(tmp_path, "m", "test", np.arange(60), scores)
    assert read_scores(tmp_path, "m", "test").keys() == {"image_id", "scores"}


def test_damaged_scores_are_one_line(tmp_path: Path) -> None:
    scores, labels = make(0)
    with pytest.raises(InputError, match=r"no scores: .*knn-test.*mmcli knn-eval"):
        read_scores(tmp_path, "knn", "test")
    write_scores(tmp_path, "m", "test", np.arange(59), scores, labels)
    with pytest.raises(InputError, match="lengths"):
        read_scores(tmp_path, "m", "test")
    scores[7, 1] = np.nan
    write_scores(tmp_path, "m", "test", np.arange(60), scores, labels)
    with pytest.raises(InputError, match=r"row 7.*NaN"):
        read_scores(tmp_path, "m", "test")
    path = RunPaths(tmp_path).scores("m", "test")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match="damaged scores"):
        read_scores(tmp_path, "m", "test")


def test_the_table_shows_map_with_its_interval() -> None:
    row = {"method": "m", "mAP": 0.5, "P@5": 0.2, "ci": {"mAP": [0.45, 0.5512], "P@5": [0.1, 0.3]}}
    assert cells(row)[0] == "0.500 [0.450, 0.551]"
    assert "0.200" in cells(row)
    assert cells({"mAP": 0.5})[0] == "0.500"
    assert metrics_table([row], "t")
