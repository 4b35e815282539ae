"""Two runs on the same images: matched by image id, refused where they are not, and verdicts that are earned."""

import json
from pathlib import Path

import numpy as np
import pytest

from kit.runs import make_info
from mmcli.heads.metrics import evaluate
from mmcli.pipeline.core.config import Config
from mmcli.pipeline.core.metrics_file import read_metrics
from mmcli.pipeline.core.run import finish_run, start_run
from mmcli.pipeline.evaluation.compare import EQUAL, FIGURES, compare
from mmcli.pipeline.evaluation.metrics import metrics_row, write_scores

NAMES = "abcd"
N = 300


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image ids, labels, and scores that know something of them."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((N, 4)) < 0.3).astype(np.uint8)
    return rng.permutation(10 * N)[:N], labels, 1 / (1 + np.exp(-(rng.normal(size=labels.shape) + 2.5 * labels - 1)))


def make_run(folder: Path, image_id, labels, scores, *, names=NAMES, method="zero-shot", tuned=True) -> Path:
    run = start_run(make_info(names), Config(), label="x", out=folder, runs=folder.parent, device="cpu")
    write_scores(run.folder, method, "test", image_id, scores, labels)
    val = (scores[::2], labels[::2]) if tuned else None
    return finish_run(run, [metrics_row(method, "test", scores, labels, tuned_on=val)]).folder


def test_a_difference_is_found_whatever_the_order_of_the_images(tmp_path: Path) -> None:
    ids, labels, scores = data()
    order = np.random.default_rng(1).permutation(N)
    worse = np.clip(scores - 0.25 * labels, 0, 1)
    a = make_run(tmp_path / "a", ids, labels, scores)
    b = make_run(tmp_path / "b", ids[order], labels[order], worse[order])
    found = {figure.figure: figure for figure in compare(a, b).figures}
    assert found["mAP"].verdict == found["R@1"].verdict == "better"
    by_hand = [evaluate(s, labels)["mAP"] for s in (scores, worse)]
    mAP = found["mAP"]
    assert [mAP.A, mAP.B, mAP.difference] == pytest.approx([*by_hand, by_hand[0] - by_hand[1]])
    low, high = mAP.ci
    assert 0 < low < mAP.difference < high
    assert found["mAP"].p == pytest.approx(2 / 1001)
    other = {figure.figure: figure for figure in compare(b, a).figures}
    assert other["mAP"].verdict == "worse"
    assert other["mAP"].ci == pytest.approx((-high, -low))
    assert other["mAP"].p == found["mAP"].p


def test_fewer_errors_are_better(tmp_path: Path) -> None:
    ids, labels, scores = data()
    a = make_run(tmp_path / "a", ids, labels, 0.2 + 0.6 * labels.astype(float))
    found = {figure.figure: figure for figure in compare(a, make_run(tmp_path / "b", ids, labels, scores)).figures}
    assert found["hamming_loss_tuned"].difference < 0
    assert found["hamming_loss_tuned"].verdict == "better"


def test_what_cannot_be_told_apart_is_said(tmp_path: Path) -> None:
    ids, labels, scores = data()
    noisy = scores + np.random.default_rng(3).normal(0, 0.02, scores.shape)
    a, b = make_run(tmp_path / "a", ids, labels, scores), make_run(tmp_path / "b", ids, labels, noisy)
    assert {figure.figure: figure for figure in compare(a, b).figures}["mAP"].verdict == EQUAL
    for figure in compare(a, a).figures:
        assert (figure.difference, figure.ci, figure.p, figure.verdict) == (0.0, (0.0, 0.0), 1.0, EQUAL)


def test_thresholds_are_those_that_each_run_tuned_on_val(tmp_path: Path) -> None:
    ids, labels, scores = data()
    a, b = make_run(tmp_path / "a", ids, labels, scores), make_run(tmp_path / "b", ids, labels, scores**2)
    result = compare(a, b)
    for at, run in enumerate((a, b)):
        row = read_metrics(run)[0]
        assert result.thresholds[at] == row["threshold_tuned"]
        for figure in result.figures:
            assert getattr(figure, "AB"[at]) == pytest.approx(row[figure.figure], abs=1e-12), figure.figure
    untuned = make_run(tmp_path / "c", ids, labels, scores, tuned=False)
    result = compare(untuned, b)
    assert result.thresholds == (0.5, 0.5)
    assert [figure.figure for figure in result.figures] == list(FIGURES)


def test_what_is_undefined_has_no_verdict(tmp_path: Path) -> None:
    ids, labels, scores = data()
    run = make_run(tmp_path / "a", ids, np.zeros_like(labels), scores, tuned=False)
    found = {figure.figure: figure for figure in compare(run, run).figures}
    assert (found["mAP"].A, found["mAP"].ci, found["mAP"].verdict) == (None, None, "undefined")
    assert found["hamming_loss"].verdict == EQUAL


def changed(what: str, folder: Path) -> Path:
    ids, labels, scores = data()
    if what == "images":
        return make_run(folder, np.r_[-1, ids[1:]], labels, scores)
    if what == "fewer images":
        return make_run(folder, ids[1:], labels[1:], scores[1:])
    if what == "labels":
        labels[np.flatnonzero(ids == ids.min())[0], 2] ^= 1
    names = "abCd" if what == "categories" else NAMES
    return make_run(folder, ids, labels, scores, names=names)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("images", "300 and 300 images, 299 in common"),
        ("fewer images", "300 and 299 images, 299 in common"),
        ("labels", "runs of other labels"),
        ("categories", "'c' and 'C'"),
    ],
)
def test_other_data_is_refused_in_one_line(mmcli, tmp_path: Path, what: str, said: str) -> None:
    a, b = make_run(tmp_path / "a", *data()), changed(what, tmp_path / "b")
    code, out, err = mmcli("compare", a, b)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert str(a) in err
    assert str(b) in err


def test_missing_runs_and_methods_are_refused_in_one_line(mmcli, tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", *data())
    unfinished = make_run(tmp_path / "u", *data())
    record = json.loads((unfinished / "run.json").read_text())
    (unfinished / "run.json").write_text(json.dumps({**record, "status": "running"}))
    for words, parts in (
        ((a, "nowhere"), ("nowhere", "no run")),
        ((a, unfinished), ("running",)),
        ((a, a, "--method", "knn"), ("scores of knn", "got zero-shot", "mmcli knn-eval")),
        ((a, a, "--split", "val"), ("no val scores", "got none")),
        ((a,), ("RUN_B",)),
    ):
        code, out, err = mmcli("compare", *words)
        assert (code, out, err.count("\n")) == (2, "", 1), words
        assert all(part in err for part in parts), err


def test_old_scores_without_labels_say_how_to_get_them(mmcli, tmp_path: Path) -> None:
    ids, labels, scores = data()
    run = make_run(tmp_path / "a", ids, labels, scores)
    write_scores(run, "zero-shot", "test", ids, scores)
    code, _, err = mmcli("compare", run, run)
    assert (code, err.count("\n")) == (2, 1)
    assert "mmcli zero-shot" in err


def test_methods_of_trained_runs(mmcli, here: Path) -> None:
    """Neighbours where both have them, else the classifier, else what there is; and what they are named."""
    run = next((here / "runs").iterdir())
    assert json.loads(mmcli("compare", run, run, "--json")[1])["method_a"] == "classifier"
    code, out, err = mmcli("knn-eval", "--json")
    assert code == 0, err
    voted = json.loads(out)
    assert json.loads(mmcli("compare", run, run, "--json")[1])["method_b"] == "knn"
    assert mmcli("zero-shot", "--out", "zs", "--quiet")[0] == 0
    code, out, err = mmcli("compare", run, "zs", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["method_a"], result["method_b"], result["n_images"]) == ("knn", "zero-shot", 10)
    found = {line["figure"]: line for line in result["figures"]}
    assert found["mAP"]["A"] == pytest.approx(voted["mAP"], abs=1e-12)
    assert found["mAP"]["B"] == pytest.approx(read_metrics(here / "zs")[0]["mAP"], abs=1e-12)
    code, out, err = mmcli("compare", run, run, "--method-a", "knn", "--method-b", "classifier", "--json")
    assert code == 0, err
    result = json.loads(out)
    rows = {row["method"]: row for row in read_metrics(run)}
    assert (result["method_a"], result["method_b"]) == ("knn", "classifier")
    for line in result["figures"]:
        assert line["A"] == pytest.approx(rows["knn"][line["figure"]], abs=1e-12)
        assert line["B"] == pytest.approx(rows["classifier"][line["figure"]], abs=1e-12)


def test_the_table_names_both_and_says_the_verdict(monkeypatch, mmcli, tmp_path: Path) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # lines of a table that is not folded
    ids, labels, scores = data()
    a = make_run(tmp_path / "a", ids, labels, scores)
    b = make_run(tmp_path / "b", ids, labels, np.clip(scores - 0.25 * labels, 0, 1))
    code, out, err = mmcli("compare", a, b)
    assert (code, err) == (0, "")
    line = next(line for line in out.splitlines() if " mAP " in line)
    assert "better" in line
    assert "0.002" in line
    assert f"zero-shot of {a}" in out
    assert f"{N} test images" in out
