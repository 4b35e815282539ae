"""knn-eval on the command line: predictors, ties, indexes, tables, protocols, and what each refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.metrics import average_precision_score

from mmcli.heads.bootstrap import RESAMPLES
from mmcli.heads.ranking import mean_average_precision
from mmcli.pipeline.core.results import Codes, read_codes, write_codes
from mmcli.pipeline.evaluation.metrics import GRID, mix, mix_with_classifier, tune_mix
from mmcli.pipeline.evaluation.search import NeighbourSearch


def run_of(folder: Path) -> Path:
    return next((folder / "runs").iterdir())


def ask(mmcli, *words: object) -> dict:
    code, out, err = mmcli("knn-eval", *words, "--json")
    assert code == 0, err
    return json.loads(out)


def plain(here: Path) -> Path:
    """The run's folder with the packed codes taken away: a run without hash layer."""
    run = run_of(here)
    for split in ("train", "val", "test"):
        codes = read_codes(run, split)
        write_codes(run, split, Codes(**{**vars(codes), "packed": None}))
    text = (run / "config.yaml").read_text()
    assert "distance_metric: hamming" in text
    (run / "config.yaml").write_text(text.replace("distance_metric: hamming", "distance_metric: cosine"))
    return run


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("predictor", ["knn", "classifier", "hybrid"])
def test_predictors_with_and_without_hash_layer(mmcli, here: Path, predictor: str, hashed: bool) -> None:
    run = run_of(here) if hashed else plain(here)
    row = ask(mmcli, "--predictor", predictor)
    assert row["method"] == predictor
    assert row["n_resamples"] == RESAMPLES
    saved = json.loads((run / "metrics.json").read_text())
    assert saved["method"] == predictor
    others = {other["method"] for other in saved["others"]}
    assert others == {"knn", "classifier", "hybrid"} - {predictor} - (
        {"hybrid"} if predictor != "hybrid" else set()
    ) - ({"knn"} if predictor == "classifier" else set())
    if predictor == "knn":
        assert ("retrieval_mAP@5000" in row, "boundary_tied" in row) == (hashed, hashed)
        assert row["distance_metric"] == ("hamming" if hashed else "cosine")


def test_the_mix_is_tuned_on_val_alone_and_is_convex(mmcli, here: Path) -> None:
    row, run = ask(mmcli, "--predictor", "hybrid"), run_of(here)
    ask(mmcli, "--split", "val")
    on_val = load_file(run / "scores" / "knn-val.safetensors")["scores"]
    val, test = read_codes(run, "val"), read_codes(run, "test")
    found = {a: mean_average_precision(a * on_val + (1 - a) * val.probabilities, val.labels) for a in GRID}
    a = row["hybrid_weight_knn"]
    assert found[a] == max(found.values())
    knn = load_file(run / "scores" / "knn-test.safetensors")["scores"]
    kept = load_file(run / "scores" / "hybrid-test.safetensors")["scores"]
    np.testing.assert_allclose(kept, a * knn + (1 - a) * test.probabilities, atol=1e-7)
    present = test.labels.any(0)
    assert row["mAP"] == pytest.approx(average_precision_score(test.labels[:, present], kept[:, present]), abs=1e-9)
    assert ask(mmcli, "--split", "val", "--predictor", "hybrid")["hybrid_note"]


def test_the_weight_follows_whoever_is_right_on_val() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (60, 5)).astype(np.uint8)
    noise = 3 * rng.random((60, 5))
    assert tune_mix(noise, labels.astype(float), labels) < 0.5
    assert tune_mix(labels.astype(np.float32), noise, labels) > 0.5
    assert tune_mix(labels.astype(float), labels.astype(float), labels) == 0.5
    np.testing.assert_array_equal(mix(1.0, noise, labels), noise)


def test_the_mix_is_what_val_wants_whatever_test_wants() -> None:
    """On val the neighbours are right and the classifier guesses, on test the other way round."""
    rng = np.random.default_rng(0)

    def codes(right: bool) -> tuple[Codes, np.ndarray]:
        labels = rng.integers(0, 2, (40, 80)).astype(np.uint8)
        guess = rng.normal(size=labels.shape)
        logits = (8.0 * labels - 4.0 if right else 4 * guess).astype(np.float32)
        nothing = np.zeros((40, 8), np.float32)
        knn = rng.random(labels.shape) if right else 0.2 * labels
        return Codes(image_id=np.arange(40), soft=nothing, packed=None, labels=labels, logits=logits), knn

    (val, on_val), (test, scores) = codes(False), codes(True)
    weight, mixed, _ = mix_with_classifier(test, val, scores, on_val)
    assert weight > 0.5
    assert mean_average_precision(mixed, test.labels) < 1


@pytest.mark.parametrize("kind", ["flat", "fastscan", "torch"])
def test_exact_indexes_give_the_same_figures(mmcli, here: Path, kind: str) -> None:
    auto, named = ask(mmcli), ask(mmcli, "--index", kind)
    assert named["index_kind"] == kind
    timed = {"index_kind", "index_bytes", "index_build_s", "throughput_qps"}
    for key in auto.keys() - timed - {key for key in auto if key.startswith("query_latency")}:
        assert named[key] == auto[key], key


def permute(run: Path, split: str, seed: int) -> None:
    codes = read_codes(run, split)
    order = np.random.default_rng(seed).permutation(len(codes))
    write_codes(run, split, Codes(**{k: None if v is None else v[order] for k, v in vars(codes).items()}))


@pytest.mark.parametrize("vote", ["softmax", "uniform", "rank", "threshold"])
def test_shared_ties_do_not_depend_on_the_order_of_the_database(mmcli, here: Path, vote: str) -> None:
    run = run_of(here)
    codes = read_codes(run, "train")
    coarse = Codes(**{**vars(codes), "packed": codes.packed & np.uint8(1)})  # one bit a byte: everything ties
    write_codes(run, "train", coarse)
    words = ("--ties", "average", "--vote", vote, "--k", 7, "--predictor", "knn")
    first = ask(mmcli, *words)
    scores = load_file(run / "scores" / "knn-test.safetensors")["scores"]
    permute(run, "train", 1)
    second = ask(mmcli, *words)
    np.testing.assert_array_equal(load_file(run / "scores" / "knn-test.safetensors")["scores"], scores)
    assert (first["mAP"], first["boundary_tied"]) == (second["mAP"], second["boundary_tied"])
    assert first["ties"] == "average"


def test_the_boundary_is_counted(mmcli, here: Path) -> None:
    run, row = run_of(here), ask(mmcli, "--k", 5)
    base, query = read_codes(run, "train"), read_codes(run, "test")
    distance = np.sort(np.bitwise_count(query.packed[:, None] ^ base.packed).sum(-1).astype(int), axis=1)
    size = (distance == distance[:, 4:5]).sum(axis=1)
    assert row["boundary_tied"] == pytest.approx((distance[:, 4] == distance[:, 5]).mean())
    assert row["boundary_group_size"] == pytest.approx(size.mean())


def test_a_list_gives_a_table_and_leaves_metrics_alone(mmcli, here: Path) -> None:
    run = run_of(here)
    headline = ask(mmcli, "--k", 3, "--tau", 0.2)
    before = (run / "metrics.json").read_bytes()
    result = ask(mmcli, "--k", "3,9", "--metric", "all", "--vote", "all", "--tau", "0.03,0.2")
    assert (run / "metrics.json").read_bytes() == before
    saved = json.loads((run / "knn_table.json").read_text())
    assert saved["rows"] == result["rows"]
    assert saved["n_searches"] == 4
    assert len(saved["rows"]) == 4 * 2 * (2 + 3)
    one = next(
        row for row in saved["rows"] if (row["distance_metric"], row["K"], row.get("tau")) == ("hamming", 3, 0.2)
    )
    for key in ("mAP", "F1_micro_tuned", "ci", "tau_bits", "boundary_tied"):
        assert one[key] == headline[key]
    assert all(("tau" in row) == (row["voting_strategy"] == "softmax") for row in saved["rows"])
    code, out, _ = mmcli("knn-eval", "--k", "3,9", "--quiet")
    assert code == 0
    assert "tau * B" in out
    assert "4.48" in out  # 0.07 * 64
    assert f"{run.name}/knn_table.json" in out


def test_one_search_a_metric_serves_the_table(mmcli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    search = NeighbourSearch._search

    def counting(self, query, K, rows=slice(None)):
        calls.append((len(query), K))
        return search(self, query, K, rows)

    monkeypatch.setattr(NeighbourSearch, "_search", counting)
    ask(mmcli, "--k", "2,5,9", "--vote", "all", "--metric", "hamming,cosine")
    assert calls == [(10, 9)] * 4  # test and val, for two metrics


def test_a_table_without_hash_layer_is_by_cosine(mmcli, here: Path) -> None:
    plain(here)
    assert {row["distance_metric"] for row in ask(mmcli, "--k", "3,5", "--metric", "all")["rows"]} == {"cosine"}
    assert {row["distance_metric"] for row in ask(mmcli, "--k", "3,5")["rows"]} == {"cosine"}
    code, _, err = mmcli("knn-eval", "--metric", "hamming,cosine", "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert "no hash layer" in err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--k", "5,abc"), ("--k", "abc")),
        (("--k", "abc"), ("--k", "abc")),
        (("--k", "5,,6"), ("--k",)),
        (("--tau", "0.1,0"), ("--tau",)),
        (("--vote", "softmax,loud"), ("--vote", "loud")),
        (("--metric", "haming"), ("--metric", "haming", "hamming")),
        (("--k", "5,500"), ("--k 500", "at most 40")),
        (("--k", "5,6", "--predictor", "hybrid"), ("a table is of neighbours", "hybrid")),
        (("--ties", "average", "--metric", "cosine"), ("--ties", "only Hamming distances tie")),
        (("--ties", "average", "--metric", "all"), ("--ties", "only Hamming distances tie")),
        (("--index", "torch", "--metric", "cosine"), ("--index", "torch with metric cosine")),
        (("--index", "hnsw"), ("--index", "hnsw", "fastscan", "gpu")),
        (("--index", "gpu"), ("no GPU for FAISS", "--index auto")),
        (("--split", "train", "--predictor", "classifier"), ("no classifier scores", "--split test")),
        (("--protocol", "coco14"), ("another protocol", "wanted karpathy", "train-head --protocol coco14")),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(mmcli, here: Path, words, parts) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_of(here).rglob("*") if path.is_file()}
    code, out, err = mmcli("knn-eval", *words, "--quiet")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    for part in parts:
        assert part in err
    assert {path: path.stat().st_mtime_ns for path in run_of(here).rglob("*") if path.is_file()} == before


def test_a_database_of_its_own_is_what_votes(mmcli, here: Path) -> None:
    """As under the protocol hashnet: train is a part of it, and val too, which never votes for itself."""
    run = run_of(here)
    train, val = read_codes(run, "train"), read_codes(run, "val")
    both = Codes(
        **{k: np.concatenate([v, getattr(val, k)]) for k, v in vars(train).items() if v is not None and k != "logits"},
        logits=None,
    )
    write_codes(run, "database", both)
    assert ask(mmcli)["n_index"] == len(train) + len(val)
    row = ask(mmcli, "--split", "val", "--k", 49)
    assert row["K"] == 49
    for split in ("val", "test"):  # thresholds are tuned on val, whatever is tagged
        code, _, err = mmcli("knn-eval", "--split", split, "--k", 50, "--quiet")
        assert (code, "at most 49" in err) == (2, True)
    assert ask(mmcli, "--k", 49, "--protocol", "karpathy")["K"] == 49


def test_a_run_of_a_missing_device_is_evaluated_all_the_same(mmcli, here: Path) -> None:
    file = run_of(here) / "config.yaml"
    text = file.read_text()
    assert "device: cpu" in text
    file.write_text(text.replace("device: cpu", "device: cuda:63"))
    assert ask(mmcli)["method"] == "knn"
    code, _, err = mmcli("knn-eval", "--device", "cuda:63", "--quiet")
    assert (code, "no such device" in err) == (2, True)
