"""Where figures come from: thresholds from val, statistics from train, ranks from logits; and that none is lost."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.metrics import average_precision_score, f1_score

from mmcli import InputError
from mmcli.cache import Store
from mmcli.heads.metrics import best_threshold, evaluate
from mmcli.heads.sigmoid import sigmoid
from mmcli.pipeline.core.checkpoint import best_checkpoint, load_head
from mmcli.pipeline.core.metrics_file import merge_rows, read_metrics, write_metrics
from mmcli.pipeline.core.results import Codes, read_codes
from mmcli.pipeline.data.manifest import Manifest, read_manifest, write_manifest
from mmcli.pipeline.evaluation.metrics import classifier_row, metrics_row

TINY = ("--set", "fusion.mlp_dims=[64, 32]", "--epochs", "3", "--device", "cpu")


def run_of(folder: Path) -> Path:
    return next((folder / "runs").iterdir())


def store_of(folder: Path) -> Path:
    return next(path for path in (folder / "data" / "cache").iterdir() if path.is_dir())


def make_codes(logits: np.ndarray, labels: np.ndarray) -> Codes:
    n = len(logits)
    return Codes(
        image_id=np.arange(n),
        soft=np.zeros((n, 8), np.float32),
        packed=np.zeros((n, 1), np.uint8),
        labels=labels.astype(np.uint8),
        logits=logits.astype(np.float32),
    )


@pytest.mark.parametrize("centre", [-40.0, -20.0, 0.0, 20.0, 40.0])
def test_the_classifier_is_ranked_as_its_logits_are(centre: float) -> None:
    """Around 40 every probability is 1, around -40 (1 + tanh(x / 2)) / 2 is 0: both would tie what logits keep apart."""
    rng = np.random.default_rng(0)
    labels = rng.random((60, 7)) < 0.3
    logits = (centre + rng.normal(size=(60, 7)) + 2 * labels).astype(np.float32)
    codes = make_codes(logits, labels)
    row, wanted = classifier_row("test", codes, val=codes), evaluate(logits, codes.labels, threshold=0.0)
    assert row["mAP"] == pytest.approx(average_precision_score(labels, logits, average="macro"), abs=1e-12)
    for key in ("mAP_sample", "CP@3", "CR@3", *(f"{what}@{K}" for what in "PR" for K in (1, 3, 5, 10))):
        assert row[key] == pytest.approx(wanted[key], abs=1e-12)
    assert row["F1_micro"] == pytest.approx(f1_score(labels, logits >= 0, average="micro", zero_division=0), abs=1e-12)
    best = best_threshold(logits, codes.labels)
    assert row["F1_micro_tuned"] == pytest.approx(f1_score(labels, logits >= best, average="micro"), abs=1e-12)
    assert (row["threshold"], row["threshold_tuned"]) == (0.5, pytest.approx(float(sigmoid(best)), rel=1e-12))
    if centre < 40:
        assert average_precision_score(labels, codes.probabilities, average="macro") == pytest.approx(row["mAP"])


def check_tuned_on_val(row: dict, scores: Callable[[str], np.ndarray], codes: Callable[[str], Codes]) -> None:
    """The threshold is the one that is best on val, where test would have had another."""
    on_val, on_test = (best_threshold(scores(split), codes(split).labels) for split in ("val", "test"))
    assert row["split"] == "test"
    assert row["threshold_tuned"] == pytest.approx(on_val, rel=1e-6)
    assert on_test != pytest.approx(on_val, rel=1e-4)
    f1 = f1_score(codes("test").labels, scores("test") >= on_val, average="micro", zero_division=0)
    assert row["F1_micro_tuned"] == pytest.approx(f1, abs=1e-12)


def test_the_threshold_of_the_classifier_is_tuned_on_val(mmcli, here: Path) -> None:
    run = run_of(here)

    def codes(split: str) -> Codes:
        return read_codes(run, split)

    def saved(split: str) -> np.ndarray:
        return load_file(run / "scores" / f"classifier-{split}.safetensors")["scores"]

    def from_logits(split: str) -> np.ndarray:
        return 1 / (1 + np.exp(-codes(split).logits.astype(np.float64)))

    rows = {(row["method"], row["split"]): row for row in read_metrics(run)}
    after_training = rows["classifier", "test"]
    for scores in (saved, from_logits):
        check_tuned_on_val(after_training, scores, codes)
    (run / "metrics.json").unlink()
    assert mmcli("knn-eval", "--quiet")[0] == 0
    beside = read_metrics(run)[1]
    assert beside["method"] == "classifier"
    check_tuned_on_val(beside, from_logits, codes)


def test_zero_shots_threshold_is_vals(mmcli, here: Path) -> None:
    assert mmcli("zero-shot", "--out", "zs", "--quiet")[0] == 0
    check_tuned_on_val(
        read_metrics(here / "zs")[0],
        lambda split: load_file(here / "zs" / "scores" / f"zero-shot-{split}.safetensors")["scores"],
        lambda split: read_codes(run_of(here), split),
    )


def test_log_norms_are_standardised_by_train(here: Path) -> None:
    """Mean and deviation in the checkpoint are those of train's images and first captions, not of another split."""
    store, arrays = Store.open(store_of(here)), Store.open(store_of(here)).load()
    splits = np.array(store.index["split"].to_pylist())
    fusion = load_head(best_checkpoint(run_of(here)), torch.device("cpu")).fusion

    def statistics(split: str) -> np.ndarray:
        at = splits == split
        m = [
            np.log(np.linalg.norm(v[at].astype(np.float64), axis=1) + 1e-6) for v in (arrays.v_img, arrays.v_txt[:, 0])
        ]
        return np.array([[column.mean(), column.std()] for column in m])

    kept = np.stack([fusion.m_mean.numpy(), fusion.m_std.numpy()], axis=1)
    np.testing.assert_allclose(kept, statistics("train"), rtol=2e-2, atol=1e-5)
    np.testing.assert_allclose(kept[:, 0], statistics("train")[:, 0], atol=1e-5)
    for split in ("val", "test"):
        assert np.abs(kept[:, 0] - statistics(split)[:, 0]).max() > 1e-4


def test_metrics_keep_what_is_known(mmcli, here: Path) -> None:
    """One row a method and split: the newest flat, the classifier's latency and the figures of test beside it."""
    run = run_of(here)
    trained = next(row for row in read_metrics(run) if (row["method"], row["split"]) == ("classifier", "test"))
    for split, k in (("test", 5), ("val", 5), ("test", 3), ("train", 3)):
        code, out, err = mmcli("knn-eval", "--split", split, "--k", k, "--json")
        assert code == 0, err
        first = json.loads((run / "metrics.json").read_text())
        assert (first["method"], first["split"], first["K"]) == ("knn", split, k)
    rows = {(row["method"], row["split"]): row for row in read_metrics(run)}
    assert len(rows) == len(read_metrics(run)) == 5
    assert {key: row.get("K") for key, row in rows.items()} == {
        ("knn", "train"): 3,
        ("knn", "test"): 3,
        ("knn", "val"): 5,
        ("classifier", "test"): None,
        ("classifier", "val"): None,
    }
    assert rows["classifier", "test"] == trained
    assert trained["query_latency_ms"] > 0
    code, out, err = mmcli("knn-eval", "--split", "val")
    assert out.count("classifier") == 2  # one line and the footnote: the table is of one split


def test_a_new_row_replaces_the_headline_and_merges_others() -> None:
    known = [
        {"method": "a", "split": "x", "tau_bits": 1, "mAP": 1},
        {"method": "b", "split": "x", "latency": 2, "mAP": 3},
    ]
    new = [{"method": "a", "split": "x", "mAP": 4}, {"method": "b", "split": "x", "mAP": 5}]
    assert merge_rows(known, new) == [new[0], {"method": "b", "split": "x", "latency": 2, "mAP": 5}]
    assert merge_rows([], new) == new
    assert merge_rows(known, [{"method": "b", "split": "y"}]) == [{"method": "b", "split": "y"}, *known]


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"others": []}', '{"method": "a", "split": "b", "others": [3]}', "\xff"]
)
def test_damaged_metrics_are_one_line_and_stay(mmcli, here: Path, text: str) -> None:
    path = run_of(here) / "metrics.json"
    path.write_bytes(text.encode("latin-1"))
    code, _, err = mmcli("knn-eval", "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert "damaged metrics" in err
    assert path.read_bytes() == text.encode("latin-1")


def test_metrics_read_back(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    rows = [{"method": m, "split": "test", "mAP": None, "n": 3} for m in "abc"]
    write_metrics(tmp_path, rows)
    assert read_metrics(tmp_path) == rows


def test_without_a_label_in_val_a_note_says_nothing_is_tuned() -> None:
    scores, labels = np.array([[0.2, 0.7]], np.float32), np.array([[0, 1]], np.uint8)
    for val in ((scores, np.zeros_like(labels)), (scores[:0], labels[:0])):
        row = metrics_row("m", "test", scores, labels, tuned_on=val)
        assert row["mAP"] == 1.0
        assert "no val image has a label" in row["note"]
        assert not any(key.endswith("_tuned") for key in row)
    assert "no val image has a label" not in metrics_row("m", "test", scores, labels, tuned_on=(scores, labels))["note"]
    assert "note" not in metrics_row("m", "val", scores, labels, tuned_on=None)


@pytest.fixture(scope="module")
def listing(miniature) -> Manifest:
    """Twelve images of the miniature, their splits a third each."""
    table = read_manifest(miniature.data / "manifest.parquet").table
    splits = np.array(table.column("split").to_pylist())
    rows = np.sort(np.concatenate([np.flatnonzero(splits == split)[:4] for split in ("train", "val", "test")]))
    return Manifest.from_table(table.take(rows))


@pytest.mark.parametrize("val", ["absent", "without labels"])
def test_zero_shot_needs_no_val(mmcli, miniature, listing: Manifest, tmp_path: Path, val: str) -> None:
    """Its figures are there, the tuned ones left out with a note, and the run is finished."""
    table = listing.table
    of_val = listing.splits == "val"
    if val == "absent":
        table = table.filter(~of_val)
    else:
        labels = [[] if no else tags for no, tags in zip(of_val, table.column("labels").to_pylist(), strict=True)]
        table = table.set_column(4, table.schema.field("labels"), pa.array(labels, table.schema.field("labels").type))
    write_manifest(tmp_path / "m.parquet", Manifest.from_table(table))
    code, _, err = mmcli(
        "extract", "--data", miniature.data, "--manifest", "m.parquet", "--model", miniature.model, "--patches", 64
    )
    assert code == 0, err
    code, out, err = mmcli("zero-shot", "--json")
    assert code == 0, err
    row = json.loads(out)
    assert row["mAP"] > 0
    assert "no val image has a label" in row["note"]
    assert "no val image has a label" in err
    assert not any(key.endswith("_tuned") for key in row)
    assert json.loads((Path(row["run"]) / "run.json").read_text())["status"] == "finished"
    assert mmcli("zero-shot", "--quiet")[0] == 0  # the table has no figure to show there
    # What cannot do without val says so before it makes a run.
    for words in (("zero-shot", "--split", "val"), ("train-head", *TINY))[val == "without labels" :]:
        code, _, err = mmcli(*words, "--out", "refused", "--quiet")
        assert (code, err.count("\n")) == (2, 1)
        assert "no val image" in err
        assert not Path("refused").exists()


def test_a_test_split_without_labels_has_no_mAP_and_no_error(mmcli, here: Path) -> None:
    run = run_of(here)
    codes = read_codes(run, "test")
    empty = replace(codes, labels=np.zeros_like(codes.labels))
    row = classifier_row("test", empty, val=read_codes(run, "val"))
    assert row["mAP"] is None
    assert row["threshold_tuned"] is not None
    with pytest.raises(InputError, match="no positive label"):
        best_threshold(empty.logits, empty.labels)
