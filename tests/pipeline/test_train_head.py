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
from safetensors.numpy import load_file

from mmcli.pipeline.codes import read_codes
from mmcli.pipeline.runs import read_info

TINY = ("--set", "fusion.mlp_dims=[64, 32]", "--epochs", 3, "--device", "cpu", "--set", "knn.K=5")
# The command line with training kept after every epoch, however short.
EAGER = "from mmcli.pipeline import trainer; trainer.KEEP_EVERY_S = 0; from mmcli.cli import main; main()"


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
    deadline = time.monotonic() + 60
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
    assert "going on after epoch" in err
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
    while not (run / "history.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
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


def test_the_mlp_baseline_runs_and_its_codes_are_of_z(mmcli, here) -> None:
    code, out, err = mmcli("train-head", *TINY, "--head", "mlp", "--out", "runs/mlp", "--json")
    assert code == 0, err
    assert json.loads(out)["monitor"] == "classifier"
    codes = read_codes(here / "runs" / "mlp", "test")
    assert codes.packed is None
    assert codes.soft.shape[1] == 32
    assert {"bce", "loss"} <= history(here / "runs" / "mlp")[0].keys()
    assert not {"quant", "cosine"} & history(here / "runs" / "mlp")[0].keys()


def test_shuffled_magnitudes_give_another_head_and_the_same_labels(mmcli, here) -> None:
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


def test_the_plan_says_that_it_collapses(mmcli, here) -> None:
    """Ten epochs of the plan to the letter: the codes stay what they were, and the trainer says so."""
    code, _, err = mmcli("train-head", "--preset", "plan", "--epochs", 10, "--patience", 0, "--device", "cpu")
    assert code == 0, err
    assert "warning: epoch" in err


def test_nothing_heavy_is_loaded_before_it_is_needed() -> None:
    probe = (
        "import sys; from mmcli.pipeline import train_head;"
        "print([name for name in ('transformers', 'sklearn', 'faiss', 'matplotlib', 'scipy', 'pandas', 'ray')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"
