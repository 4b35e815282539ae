"""The stages in a row through the command line, on the miniature and on real COCO images; and what they refuse."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.metrics import average_precision_score, f1_score
from transformers import AutoModel, AutoTokenizer

from mmcli import InputError
from mmcli.cache import Store
from mmcli.heads.metrics import best_threshold
from mmcli.pipeline.core.checkpoint import best_checkpoint, load_head
from mmcli.pipeline.core.config import load_config
from mmcli.pipeline.core.results import read_codes
from mmcli.pipeline.evaluation.metrics import metrics_row
from mmcli.pipeline.evaluation.zero_shot import TEMPLATES
from mmcli.pipeline.training.data import Split
from mmcli.pipeline.training.setup import check_splits

TINY = ("--set", "fusion.mlp_dims=[64, 32]", "--epochs", "3", "--device", "cpu")


def store_of(folder: Path) -> Path:
    return next(path for path in (folder / "data" / "cache").iterdir() if path.is_dir())


def run_of(folder: Path) -> Path:
    return next((folder / "runs").iterdir())


def test_every_stage_finds_what_the_last_one_wrote(mmcli, miniature) -> None:
    code, out, err = mmcli("prepare", "--data", miniature.data, "--out", "m", "--json")
    assert code == 0, err
    assert json.loads(out)
    manifest = ("--manifest", "m/manifest.parquet")
    code, out, err = mmcli(
        "extract", "--data", miniature.data, *manifest, "--model", miniature.model, "--patches", 64, "--json"
    )
    assert code == 0, err
    store = json.loads(out)["store"]
    assert Path(store).parent == Path("data/cache")
    code, out, err = mmcli("train-head", "--bits", 32, *TINY, "--set", "knn.K=5", "--json")
    assert code == 0, err
    assert json.loads(out)["store"] == store
    assert store in err
    run = Path(json.loads(out)["run"])
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "config.yaml",
        "metrics.json",
        "history.jsonl",
        "checkpoints",
        "codes",
        "environment.json",
        "run.json",
    }
    code, out, err = mmcli("knn-eval", "--json")
    assert code == 0, err
    row = json.loads(out)
    assert row["run"] == str(run)
    assert str(run) in err
    saved = json.loads((run / "metrics.json").read_text())
    wanted = {
        "mAP",
        "mAP_sample",
        "F1_micro",
        "F1_macro",
        "P@5",
        "R@5",
        "hamming_loss",
        "query_latency_ms",
        "query_latency_ms_p50",
        "query_latency_ms_p95",
        "throughput_qps",
        "index_build_s",
        "index_bytes",
        "float_over_binary_bytes",
        "split",
        "method",
        "tau_bits",
    }
    assert wanted <= saved.keys()
    assert (saved["method"], saved["split"], saved["bits"], saved["K"]) == ("knn", "test", 32, 5)
    assert [other["method"] for other in saved["others"]] == ["classifier"]
    code, out, err = mmcli("zero-shot", "--json")
    assert code == 0, err
    assert json.loads(out)["method"] == "zero-shot"
    code, out, err = mmcli("knn-eval", "--quiet")  # the newest run is not the zero-shot one
    assert (code, err) == (0, "")
    assert "mAP" in out
    assert str(run) in out
    for words in (("cache", "info"), ("cache", "verify")):
        assert mmcli(*words)[0] == 0


def votes_by_hand(base, query, K: int, tau: float, *, own: bool = False) -> np.ndarray:
    """Neighbours by (distance, index) and softmax votes, one query at a time; ``own`` leaves out the query's image."""
    bits = 8 * base.packed.shape[1]
    scores = np.zeros((len(query), base.labels.shape[1]))
    for q in range(len(query)):
        distance = [int(np.unpackbits(query.packed[q] ^ code).sum()) for code in base.packed]
        rows = [i for i in range(len(base)) if not (own and base.image_id[i] == query.image_id[q])]
        nearest = sorted(rows, key=lambda i: (distance[i], i))[:K]
        weight = np.exp([(1 - distance[i] / bits) / tau for i in nearest])
        for i, w in zip(nearest, weight / weight.sum(), strict=True):
            scores[q] += w * base.labels[i]
    return scores


def test_figures_are_those_of_the_saved_codes_and_scores(mmcli, here: Path) -> None:
    """The metrics again, from the files alone, by NumPy loops and scikit-learn."""
    code, out, err = mmcli("knn-eval", "--k", 5, "--tau", 0.1, "--json")
    assert code == 0, err
    row, run = json.loads(out), run_of(here)
    base, val, query = (read_codes(run, split) for split in ("train", "val", "test"))
    kept = load_file(run / "scores" / "knn-test.safetensors")["scores"]
    np.testing.assert_allclose(kept, votes_by_hand(base, query, 5, 0.1), atol=1e-5)
    present = query.labels.any(0)
    macro = average_precision_score(query.labels[:, present], kept[:, present], average="macro")
    assert row["mAP"] == pytest.approx(macro, abs=1e-9)
    assert ((base.soft >= 0) == (np.unpackbits(base.packed, axis=1) == 1)).all()
    # The threshold is the best of val, where test would have chosen another one.
    on_val = best_threshold(votes_by_hand(base, val, 5, 0.1).astype(np.float32), val.labels)
    assert row["threshold_tuned"] == pytest.approx(on_val, abs=1e-5)
    f1 = f1_score(query.labels, kept >= row["threshold_tuned"], average="micro")
    assert row["F1_micro_tuned"] == pytest.approx(f1, abs=1e-9)


def test_thresholds_are_tuned_on_val_alone() -> None:
    """Where val and test want different thresholds, val's is taken, whatever it costs on test."""
    scores, labels = np.array([[0.2], [0.4], [0.6], [0.8]], np.float32), np.array([[0], [0], [1], [1]], np.uint8)
    val = (np.array([[0.1], [0.2]], np.float32), np.array([[1], [1]], np.uint8))
    row = metrics_row("m", "test", scores, labels, tuned_on=val)
    assert row["threshold_tuned"] == pytest.approx(0.1)
    assert row["F1_micro"] == 1.0
    assert row["F1_micro_tuned"] == pytest.approx(2 * 2 / (2 * 2 + 2))
    assert "threshold_tuned" not in metrics_row("m", "val", *val, tuned_on=None)


def test_codes_are_of_eval_mode_and_the_first_caption(here: Path) -> None:
    store, run = Store.open(store_of(here)), run_of(here)
    arrays, head = store.load(), load_head(best_checkpoint(run_of(here)), torch.device("cpu"))
    splits, ids = np.array(store.index["split"].to_pylist()), store.index["image_id"].to_numpy()
    for split in ("train", "val", "test"):
        rows, codes = np.flatnonzero(splits == split), read_codes(run, split)
        np.testing.assert_array_equal(codes.image_id, ids[rows])
        with torch.inference_mode():
            for position, row in enumerate(rows[:5]):
                one = (
                    torch.from_numpy(arrays.v_img[row : row + 1]).float(),
                    torch.from_numpy(arrays.v_txt[row : row + 1, 0]).float(),
                )
                np.testing.assert_allclose(head(*one).h[0].numpy(), codes.soft[position], rtol=1e-4, atol=1e-5)


def test_codes_keep_the_norms_that_the_head_read(mmcli, here: Path) -> None:
    """Of the image and of its first caption, as the store has them; permuted over the split where they are shuffled."""
    store = Store.open(store_of(here))
    arrays, ids = store.load(), store.index["image_id"].to_numpy()
    row_of = {int(image): row for row, image in enumerate(ids)}
    run = next((here / "runs").iterdir())
    assert mmcli("train-head", "--epochs", 1, "--magnitude", "shuffled", "--out", "runs/shuffled", "--quiet")[0] == 0
    for split in ("train", "val", "test"):
        codes, shuffled = read_codes(run, split), read_codes(here / "runs" / "shuffled", split)
        rows = [row_of[int(image)] for image in codes.image_id]
        np.testing.assert_array_equal(codes.norm_img, arrays.norm_img[rows])
        np.testing.assert_array_equal(codes.norm_txt, arrays.norm_txt[rows, 0])
        assert not np.array_equal(shuffled.norm_img, codes.norm_img)
        np.testing.assert_allclose(np.sort(shuffled.norm_img), np.sort(codes.norm_img), rtol=1e-5)


def test_codes_are_those_of_the_best_epoch_not_of_the_last(mmcli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.9, 0.5, 0.4])
    monkeypatch.setattr("mmcli.pipeline.training.monitor.Monitor.__call__", lambda *_: {"val_mAP": next(values)})
    code, out, err = mmcli("train-head", *TINY, "--json", "--out", "runs/best")
    assert code == 0, err
    assert json.loads(out)["best_epoch"] == 1
    run, store = here / "runs" / "best", Store.open(store_of(here))
    assert best_checkpoint(run).name == "epoch-001.safetensors"
    rows = np.flatnonzero(np.array(store.index["split"].to_pylist()) == "test")
    arrays, codes = store.load(), read_codes(run, "test")
    pair = (torch.from_numpy(arrays.v_img[rows]).float(), torch.from_numpy(arrays.v_txt[rows, 0]).float())
    for name, same in (("epoch-001", True), ("epoch-003", False)):
        head = load_head(run / "checkpoints" / f"{name}.safetensors", torch.device("cpu"))
        with torch.inference_mode():
            assert np.allclose(head(*pair).h.numpy(), codes.soft, atol=1e-5) == same


def test_zero_shot_scores_are_siglips_probabilities(mmcli, here: Path, miniature) -> None:
    """Mean of normalised prompts, cosine, learned scale and bias: by a plain loop over the checkpoint."""
    assert mmcli("zero-shot", "--out", "runs/zs")[0] == 0
    kept = load_file(here / "runs" / "zs" / "scores" / "zero-shot-test.safetensors")
    model, tokenizer = AutoModel.from_pretrained(miniature.model).eval(), AutoTokenizer.from_pretrained(miniature.model)
    store = Store.open(store_of(here))
    ids = store.index["image_id"].to_numpy()
    v_img = store.load().v_img.astype(np.float32)[[int(np.flatnonzero(ids == i)[0]) for i in kept["image_id"]]]
    d_img = v_img / np.linalg.norm(v_img, axis=1, keepdims=True)
    names = json.loads(store.index.schema.metadata[b"category_names"])
    for c in (0, 7, 79):
        prompts = [template.format(names[c]) for template in TEMPLATES]
        tokens = tokenizer(prompts, padding="max_length", padding_side="right", max_length=64, return_tensors="pt")
        with torch.inference_mode():
            v = model.get_text_features(input_ids=tokens.input_ids).pooler_output.numpy()
        t = (v / np.linalg.norm(v, axis=1, keepdims=True)).mean(0)
        x = float(model.logit_scale.detach().exp()) * d_img @ (t / np.linalg.norm(t)) + float(model.logit_bias.detach())
        np.testing.assert_allclose(kept["scores"][:, c], 1 / (1 + np.exp(-x)), rtol=1e-3, atol=1e-6)


def test_an_image_never_votes_for_itself(mmcli, here: Path) -> None:
    """Its own code is at distance 0, and would be first."""
    code, _, err = mmcli("knn-eval", "--split", "train", "--k", 3)
    assert code == 0, err
    base = read_codes(run_of(here), "train")
    scores = load_file(run_of(here) / "scores" / "knn-train.safetensors")["scores"]
    np.testing.assert_allclose(scores, votes_by_hand(base, base, 3, 0.07, own=True), atol=1e-5)
    assert np.abs(scores - votes_by_hand(base, base, 3, 0.07)).max() > 0.01


def test_without_hash_neighbours_are_found_by_cosine(mmcli, here: Path) -> None:
    code, _, err = mmcli("train-head", "--bits", 0, *TINY, "--set", "knn.K=5")
    assert code == 0, err
    code, out, err = mmcli("knn-eval", "--json")
    assert code == 0, err
    assert json.loads(out)["distance_metric"] == "cosine"
    code, _, err = mmcli("knn-eval", "--metric", "hamming")
    assert (code, err.count("\n")) == (2, 1)
    assert "no hash layer" in err


@pytest.mark.parametrize("fusion", ["concat", "hadamard", "hadamard_magnitude"])
@pytest.mark.parametrize("preset", ["plan", "recommended"])
def test_all_fusions_and_presets_train(mmcli, here: Path, fusion: str, preset: str) -> None:
    code, out, err = mmcli("train-head", "--fusion", fusion, "--preset", preset, *TINY, "--set", "knn.K=5", "--json")
    assert code == 0, err
    assert json.loads(out)["preset"] == preset


def test_spec10_09_a_dead_cosine_term_is_said_once_and_logged(mmcli, here: Path) -> None:
    code, _, err = mmcli("train-head", *TINY, "--set", "knn.K=5", "--alpha", 1, "--out", "runs/dead")
    assert code == 0
    assert err.count("no trainable input") == 1
    history = [json.loads(line) for line in (here / "runs" / "dead" / "history.jsonl").read_text().splitlines()]
    assert all(row["cosine"] > 0 for row in history)
    code, _, err = mmcli("train-head", *TINY, "--set", "knn.K=5", "--adapter", "linear")
    assert code == 0
    assert "no trainable input" not in err


def test_same_seed_same_run(mmcli, here: Path) -> None:
    for name in ("a", "b"):
        assert mmcli("train-head", *TINY, "--set", "knn.K=5", "--deterministic", "--out", f"runs/{name}")[0] == 0
    a, b = (read_codes(here / "runs" / name, "test") for name in "ab")
    np.testing.assert_array_equal(a.soft, b.soft)


def mistakes(here: Path) -> dict[str, tuple[tuple[object, ...], tuple[str, ...]]]:
    store, run = store_of(here), run_of(here)
    return {
        "a store of another model": (("train-head", "--model", "google/siglip2-large"), ("another model", store.name)),
        "a store of another budget": (
            ("train-head", "--set", "model.max_num_patches=512"),
            ("patches 64", "patches 512"),
        ),
        "K too large": (("knn-eval", "--k", 500), ("--k 500", "at most 40")),
        "a class count that is not the store's": (
            ("train-head", "--set", "classifier.num_classes=7"),
            ("num_classes", "80"),
        ),
        "an out folder in use": (("train-head", "--out", run), (str(run), "--force")),
        "a run that is a store": (("knn-eval", "--run", store), ("run.json",)),
        "a store that is a run": (("train-head", "--store", run), (str(run),)),
    }


@pytest.mark.parametrize(
    "name",
    [
        "a store of another model",
        "a store of another budget",
        "K too large",
        "a class count that is not the store's",
        "an out folder in use",
        "a run that is a store",
        "a store that is a run",
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_lost(mmcli, here: Path, name: str) -> None:
    words, parts = mistakes(here)[name]
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file() and path.name != ".lock"}
    code, out, err = mmcli(*words, "--quiet")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    for part in parts:
        assert part in err
    assert {
        path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file() and path.name != ".lock"
    } == before


def test_a_store_with_changed_weights_is_refused_by_zero_shot(mmcli, here: Path, miniature) -> None:
    other = here / "model"
    shutil.copytree(miniature.model, other)
    raw = bytearray((other / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (other / "model.safetensors").write_bytes(raw)
    code, _, err = mmcli("zero-shot", "--model", other, "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert "another model" in err


def test_a_run_of_another_data_set_is_refused(mmcli, here: Path) -> None:
    """Evaluated against a store of another manifest, the run's neighbours would be other images."""
    record = json.loads((run_of(here) / "run.json").read_text())
    (run_of(here) / "run.json").write_text(json.dumps({**record, "manifest_sha256": "0" * 64}))
    code, _, err = mmcli("knn-eval", "--store", store_of(here), "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert "another data set" in err


def test_a_nan_in_a_store_is_named(mmcli, here: Path) -> None:
    """Also where the checksums agree with it: such a store came from elsewhere."""
    store = store_of(here)
    with h5py.File(store / "image-00001.h5", "r+") as file:
        file["v_img"][3, 5] = np.nan
    code, _, err = mmcli("train-head", "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert "image-00001.h5" in err


def test_spec10_07_scores_stay_in_class_order(mmcli, here: Path) -> None:
    assert mmcli("knn-eval", "--quiet")[0] == 0
    scores = load_file(run_of(here) / "scores" / "knn-test.safetensors")["scores"]
    assert (np.diff(scores, axis=1) > 0).any()
    assert (np.diff(scores, axis=1) < 0).any()


@pytest.mark.realdata
def test_the_main_job_on_real_coco(mmcli, realdata: Path, miniature) -> None:
    """428 real images with their captions, labels and splits, through every stage."""
    data = realdata / "coco_slice"
    code, out, err = mmcli("prepare", "--data", data, "--out", "coco", "--json")
    assert code == 0, err
    code, out, err = mmcli(
        "extract",
        "--data",
        data,
        "--manifest",
        "coco/manifest.parquet",
        "--model",
        miniature.model,
        "--patches",
        64,
        "--json",
    )
    assert code == 0, err
    result = json.loads(out)
    assert result["n_images"] == 428
    assert result["n_captions"] == 428 * 5
    code, out, err = mmcli("train-head", "--bits", 64, "--epochs", 3, "--json")
    assert code == 0, err
    code, out, err = mmcli("knn-eval", "--json")
    assert code == 0, err
    row = json.loads(out)
    assert (row["n_images"], row["n_index"]) == (48, 337)
    assert 0 < row["mAP"] < 1
    assert mmcli("zero-shot")[0] == 0


def test_the_monitor_is_what_was_asked_for(mmcli, here: Path) -> None:
    """Val mAP of the classifier is that of its logits, of the neighbours that of their votes."""
    for monitor in ("classifier", "knn"):
        run = here / "runs" / monitor
        code, out, err = mmcli("train-head", *TINY, "--set", "knn.K=5", "--monitor", monitor, "--out", run, "--json")
        assert code == 0, err
        base, val = read_codes(run, "train"), read_codes(run, "val")
        scores = val.logits if monitor == "classifier" else votes_by_hand(base, val, 5, 0.07)
        present = val.labels.any(0)
        wanted = average_precision_score(val.labels[:, present], scores[:, present].astype(np.float32), average="macro")
        assert json.loads(out)["best_val_mAP"] == pytest.approx(wanted, abs=1e-6)


def test_speeds_are_of_the_size_that_a_clock_says(mmcli, here: Path) -> None:
    """Loose on purpose: units, not speeds."""
    code, out, err = mmcli("knn-eval", "--json")
    assert code == 0, err
    row = json.loads(out)
    assert 1e-3 < row["query_latency_ms_p50"] <= row["query_latency_ms_p95"] < 1e3
    assert row["query_latency_ms_p50"] <= 10 * row["query_latency_ms"]
    assert row["throughput_qps"] * 1e-3 > 10 / 60
    assert row["binary_code_bytes"] == 40 * 8
    assert row["index_kind"] == "fastscan"
    assert row["index_bytes"] == 64 * 9  # a byte more a code, in blocks of 32
    assert row["float_over_binary_bytes"] == 32


@pytest.mark.parametrize(
    ("train", "val", "options", "said"),
    [
        ([[0]] * 30, [[1]], {}, "no train image has a label"),
        ([[1]] * 30, [[0]], {}, "no val image has a label"),
        ([[1]] * 19, [[1]], {}, "too few train images.*got 19, wanted at least 20.*--monitor classifier"),
        ([[1]], [[1]], {"training.monitor": "classifier"}, "too few train images.*got 1, wanted at least 2"),
        ([[1]] * 20, [[1]], {}, None),
        ([[1]] * 2, [[1]], {"training.monitor": "classifier"}, None),
    ],
)
def test_what_cannot_be_trained_on_is_refused_at_once(train, val, options, said: str | None) -> None:
    def split(rows) -> Split:
        v, n = np.zeros((len(rows), 4), np.float32), np.ones(len(rows))
        return Split.place(v, v[:, None], n, np.array(rows, np.uint8), torch.device("cpu"))

    splits = {"train": split(train), "val": split(val)}
    with nullcontext() if said is None else pytest.raises(InputError, match=said):
        check_splits(splits, load_config(options=options), Path("store"))
