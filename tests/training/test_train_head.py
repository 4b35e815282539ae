"""``mmcli train-head`` as a command: replicas, a run that is killed and goes on, baselines and controls."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from mmcli.cache import Store
from mmcli.pipeline.bench.data import make_full_store
from mmcli.pipeline.core.checkpoint import write_model_folder
from mmcli.pipeline.core.config import load_config
from mmcli.pipeline.core.progress import Progress
from mmcli.pipeline.core.results import read_codes
from mmcli.pipeline.core.run import environment, read_info
from mmcli.pipeline.core.run_folders import hold
from mmcli.pipeline.training.data import diverged
from mmcli.pipeline.training.loop import fit
from mmcli.pipeline.training.setup import prepare_training

TINY = ("--set", "fusion.mlp_dims=[64, 32]", "--epochs", 3, "--device", "cpu", "--set", "knn.K=5")
# The command line with training kept after every epoch, however short.
EAGER = "from mmcli.pipeline.training import loop; loop.KEEP_EVERY_S = 0; from mmcli.cli import main; main()"


def weights(run: Path) -> dict[str, np.ndarray]:
    index = json.loads((run / "checkpoints" / "checkpoints.json").read_text())
    return {one["file"]: load_file(run / "checkpoints" / one["file"]) for one in index}


def same(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same checkpoints and codes, bit for bit."""
    mine, theirs = weights(one), weights(other)
    equal = mine.keys() == theirs.keys() and all(
        np.array_equal(mine[file][name], theirs[file][name]) for file in mine for name in mine[file]
    )
    for split in ("train", "val", "test"):
        codes = [vars(read_codes(run, split)) for run in (one, other)]
        equal &= all(np.array_equal(codes[0][name], codes[1][name]) for name in codes[0])
    return equal


def history(run: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name[-2:] != "_s"} for record in records]


def test_seeds_are_the_runs_of_each_seed(mmcli, here) -> None:
    code, out, err = mmcli("train-head", *TINY, "--seeds", 3, "--seed", 7, "--out", "runs/many", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["seeds"] == [7, 8, 9]
    maps = [row["mAP"] for row in result["runs"]]
    assert result["mean"]["mAP"] == pytest.approx(np.mean(maps))
    assert result["std"]["mAP"] == pytest.approx(np.std(maps, ddof=1))
    assert mmcli("train-head", *TINY, "--seed", 8, "--out", "runs/one")[0] == 0
    assert same(here / "runs" / "many-seed8", here / "runs" / "one")
    assert not same(here / "runs" / "many-seed7", here / "runs" / "one")
    code, out, _ = mmcli("train-head", *TINY, "--seeds", 2, "--out", "runs/few")
    assert code == 0
    assert all(word in out for word in ("mean", "std", "few-seed42", "few-seed43"))


@pytest.mark.parametrize("options", [(), ("--ema", 0.9, "--adapter", "linear")])
def test_killed_in_the_middle_and_resumed_it_is_the_same_run(mmcli, here, options) -> None:
    words = ["train-head", *TINY, "--patience", 0, *options, "--epochs", 60]
    assert mmcli(*words, "--out", "runs/whole")[0] == 0
    command = [sys.executable, "-c", EAGER, *map(str, words), "--out", "runs/killed"]
    run = here / "runs" / "killed"
    process = subprocess.Popen(command, cwd=here, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (run / "training.safetensors").exists() or len(history(run)) < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_info(run).status == "running"
    code, _, err = mmcli("knn-eval", "--run", run)
    assert (code, "--resume" in err) == (2, True)
    code, _, err = mmcli("train-head", "--resume", run)
    assert code == 0, err
    assert "resuming after epoch" in err
    assert history(run) == history(here / "runs" / "whole")
    assert same(run, here / "runs" / "whole")
    assert read_info(run).status == "finished"
    assert not (run / "training.safetensors").exists()
    code, _, err = mmcli("train-head", "--resume", run)
    assert (code, "finished already" in err) == (0, True)


def test_a_polite_signal_leaves_a_run_that_says_so(here) -> None:
    run = here / "runs" / "stopped"
    words = ["train-head", *TINY, "--patience", 0, "--epochs", 2000, "--out", "runs/stopped"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mmcli", *map(str, words)], cwd=here, stderr=subprocess.PIPE, text=True
    )
    while not (run / "history.jsonl").exists() or len((run / "history.jsonl").read_text().splitlines()) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert read_info(run).status == "interrupted"


def test_what_cannot_be_resumed_is_said(mmcli, here) -> None:
    run = next((here / "runs").iterdir())
    shutil.copytree(run, here / "runs" / "copy")
    record = json.loads((run / "run.json").read_text())
    (here / "runs" / "copy" / "run.json").write_text(json.dumps(record | {"status": "running", "store_digest": "00"}))
    for words, said in [
        (("--resume", "runs/absent"), "no run"),
        (("--resume", "runs/copy"), "store 00"),
        (("--resume", run, "--bits", 32), "--bits"),
        (("--resume", run, "--seeds", 2), "--seeds"),
        (("--resume", run, "--out", "runs/other"), "--out"),
    ]:
        code, out, err = mmcli("train-head", "--quiet", *words)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert said in err


def test_a_training_that_diverges_leaves_a_failed_run(mmcli, here) -> None:
    words = ("--set", "loss.bce_weight=1e300", "--out", "runs/wild")
    assert mmcli("train-head", *TINY, *words)[0] == 2
    assert read_info(here / "runs" / "wild").status == "failed"


def test_seeds_after_one_that_diverges_are_trained(mmcli, here, monkeypatch) -> None:
    calls = []

    def first_diverges(*words: object, **named: object) -> object:
        calls.append(words)
        if len(calls) == 1:
            raise diverged("the loss is no longer finite", got="nan")
        return fit(*words, **named)

    monkeypatch.setattr("mmcli.pipeline.training.train_head.fit", first_diverges)
    code, _, err = mmcli("train-head", *TINY, "--seeds", 2, "--out", "runs/many", "--quiet")
    assert (code, "no longer finite" in err) == (2, True)
    assert [read_info(here / "runs" / f"many-seed{seed}").status for seed in (42, 43)] == ["failed", "finished"]


def test_the_mlp_baseline_runs_and_its_codes_are_of_z(mmcli, here) -> None:
    code, out, err = mmcli("train-head", *TINY, "--head", "mlp", "--out", "runs/mlp", "--json")
    assert code == 0, err
    assert json.loads(out)["monitor"] == "classifier"
    codes = read_codes(here / "runs" / "mlp", "test")
    assert codes.packed is None
    assert codes.soft.shape[1] == 32
    assert {"bce", "loss"} <= history(here / "runs" / "mlp")[0].keys()
    assert not {"quant", "cosine"} & history(here / "runs" / "mlp")[0].keys()


def test_shuffled_magnitudes_give_another_head(mmcli, here) -> None:
    for name in ("own", "shuffled"):
        code, _, err = mmcli("train-head", *TINY, "--magnitude", name, "--out", f"runs/{name}")
        assert code == 0, err
    own, shuffled = (read_codes(here / "runs" / name, "test") for name in ("own", "shuffled"))
    assert np.array_equal(own.labels, shuffled.labels)
    assert not np.array_equal(own.soft, shuffled.soft)


def test_twice_with_deterministic_gives_the_same_bits(mmcli, here) -> None:
    for name in ("a", "b"):
        assert mmcli("train-head", *TINY, "--deterministic", "--out", f"runs/{name}")[0] == 0
    assert same(here / "runs" / "a", here / "runs" / "b")


def test_the_plan_says_that_it_collapses(mmcli, tmp_path) -> None:
    """A few epochs of the plan to the letter: val mAP stays that of the class frequencies, and the trainer says so."""
    store = make_full_store(tmp_path / "s", n_train=300, n_val=100, n_test=20, width=32)
    code, _, err = mmcli("train-head", "--preset", "plan", "--epochs", 3, "--store", store, "--device", "cpu")
    assert code == 0, err
    assert "warning: epoch 3: val mAP" in err


def test_a_run_is_trained_by_one_process(mmcli, here) -> None:
    run = next((here / "runs").iterdir())
    with hold(run):
        for words in (("--resume", run), ("--out", run, "--force", *TINY)):
            record = json.loads((run / "run.json").read_text())
            (run / "run.json").write_text(json.dumps(record | {"status": "running"}))
            code, out, err = mmcli("train-head", "--quiet", *words)
            assert (code, out, err.count("\n")) == (2, "", 1), err
            assert "under way" in err
    assert (run / "history.jsonl").exists()


@pytest.mark.parametrize("folder", ["new", "an older run"])
def test_a_run_folder_is_held_from_its_claim_on(mmcli, here, monkeypatch, folder: str) -> None:
    """A second process that comes while the first one is still asking git is refused, whatever it would replace."""
    run, refused = next((here / "runs").iterdir()) if folder == "an older run" else here / "runs" / "new", []

    def second_starts(device: str, seed: int) -> dict[str, object]:
        monkeypatch.setattr("mmcli.pipeline.core.run.environment", environment)
        refused.append(mmcli("train-head", *TINY, "--out", run, "--force"))
        return environment(device, seed)

    monkeypatch.setattr("mmcli.pipeline.core.run.environment", second_starts)
    assert mmcli("train-head", *TINY, "--out", run, "--force")[0] == 0
    ((code, _, err),) = refused
    assert (code, "the run is under way" in err) == (2, True)
    assert read_info(run).status == "finished"


def test_a_finished_seed_stays_so_when_a_later_one_is_stopped(mmcli, here, monkeypatch) -> None:
    calls = []

    def second_time(*words: object) -> object:
        calls.append(words)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write_model_folder(*words)

    monkeypatch.setattr("mmcli.pipeline.training.run.write_model_folder", second_time)
    code, _, _ = mmcli("train-head", *TINY, "--seeds", 3, "--out", "runs/many")
    assert code == 130
    statuses = [read_info(here / "runs" / f"many-seed{seed}").status for seed in (42, 43, 44)]
    assert statuses == ["finished", "interrupted", "interrupted"]
    monkeypatch.undo()
    monkeypatch.chdir(here)


def test_a_run_without_a_kept_state_begins_again(mmcli, here) -> None:
    code, _, err = mmcli("train-head", *TINY, "--out", "runs/x")
    assert code == 0, err
    run = here / "runs" / "x"
    before = history(run)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    (run / "checkpoints" / "epoch-099.safetensors").write_bytes(
        next((run / "checkpoints").glob("*.safetensors")).read_bytes()
    )
    code, _, err = mmcli("train-head", "--resume", run)
    assert code == 0, err
    assert "from the start" in err
    assert "note:" not in err
    assert history(run) == before
    assert len(list((run / "checkpoints").glob("*.safetensors"))) == 3


def test_shuffled_magnitudes_of_a_replica_are_those_of_its_seed(mmcli, here) -> None:
    words = (*TINY, "--magnitude", "shuffled")
    assert mmcli("train-head", *words, "--seeds", 2, "--seed", 7, "--out", "runs/two")[0] == 0
    assert mmcli("train-head", *words, "--seed", 8, "--out", "runs/one")[0] == 0
    assert same(here / "runs" / "two-seed8", here / "runs" / "one")


def test_every_split_is_shuffled(here) -> None:
    config = load_config(options={"fusion.magnitude": "shuffled", "knn.K": 5})
    prepared = prepare_training(config, next((here / "data" / "cache").iterdir()), Progress())
    for name, split in prepared.run_splits.items():
        assert not torch.equal(split.log_norms(), prepared.splits[name].log_norms()), name


def test_seeds_and_folders_are_checked_before_training(mmcli, here) -> None:
    (here / "runs" / "x-seed43").mkdir()
    (here / "runs" / "x-seed43" / "mine.txt").write_text("mine")
    for words, said in [
        (("--seeds", 2, "--seed", 2**32 - 1), "no such seeds"),
        (("--seeds", 2, "--out", "."), "--out"),
        (("--seeds", 2, "--out", "runs/x"), "x-seed43"),
    ]:
        code, out, err = mmcli("train-head", "--quiet", *TINY, *words)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert said in err
    assert read_info(here / "runs" / "x-seed42").status == "interrupted"
    assert not (here / "runs" / "x-seed42" / "history.jsonl").exists()


def test_checkpoints_are_of_the_averaged_weights(mmcli, here) -> None:
    code, _, err = mmcli("train-head", *TINY, "--ema", 0.9, "--out", "runs/ema")
    assert code == 0, err
    assert mmcli("train-head", *TINY, "--out", "runs/plain")[0] == 0
    ema, plain = (weights(here / "runs" / name) for name in ("ema", "plain"))
    # The same draws: the weights themselves are equal, so what differs is the average.
    assert not np.array_equal(
        ema["epoch-003.safetensors"]["classifier.weight"], plain["epoch-003.safetensors"]["classifier.weight"]
    )


def test_protocols_train_tune_and_test_on_their_own_images(mmcli, here) -> None:
    code, _, err = mmcli("train-head", *TINY, "--protocol", "coco14", "--out", "runs/coco14", "--set", "knn.K=2")
    assert code == 0, err
    store = Store.open(next((here / "data" / "cache").iterdir()))
    folder = {int(row["image_id"]): row["path"].split("/")[-2] for row in store.index.to_pylist()}
    codes = {split: read_codes(here / "runs" / "coco14", split) for split in ("train", "val", "test")}
    for split, wanted in (("train", "train2014"), ("val", "train2014"), ("test", "val2014")):
        assert {folder[int(one)] for one in codes[split].image_id} == {wanted}
        assert codes[split].labels.any(axis=1).all()
    code, _, err = mmcli("knn-eval", "--run", "runs/coco14", "--protocol", "coco14", "--k", 2)
    assert code == 0, err
    code, _, err = mmcli("knn-eval", "--run", "runs/coco14", "--protocol", "karpathy")
    assert (code, "another protocol" in err) == (2, True)


def test_a_database_of_its_own_is_searched(mmcli, here) -> None:
    store = Store.open(next((here / "data" / "cache").iterdir()))
    rows = store.index.to_pylist()
    listed = {"test": rows[:12], "train": rows[12:36], "database": rows[12:]}
    for name, some in listed.items():
        lines = [f"{row['path']} {' '.join('1' if c in row['labels'] else '0' for c in range(80))}\n" for row in some]
        (here / f"{name}.txt").write_text("".join(lines))
    words = ("--protocol", "hashnet", "--protocol-lists", ".", "--out", "runs/hashnet")
    code, _, err = mmcli("train-head", *TINY, *words)
    assert code == 0, err
    database = read_codes(here / "runs" / "hashnet", "database")
    assert sorted(database.image_id) == sorted(row["image_id"] for row in listed["database"])
    assert database.logits is None
    code, out, err = mmcli("knn-eval", "--run", "runs/hashnet", "--json")
    assert code == 0, err
    assert json.loads(out)["n_images"] == 12 if "n_images" in json.loads(out) else True
    # A run that replaces it under a protocol without a database does not search the old one.
    code, _, err = mmcli("train-head", *TINY, "--out", "runs/hashnet", "--force")
    assert code == 0, err
    code, _, err = mmcli("knn-eval", "--run", "runs/hashnet")
    assert code == 0, err


def test_nothing_heavy_is_loaded_before_it_is_needed() -> None:
    probe = (
        "import sys; from mmcli.pipeline.training import train_head;"
        "print([name for name in ('transformers', 'sklearn', 'faiss', 'matplotlib', 'scipy', 'pandas', 'ray')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"
