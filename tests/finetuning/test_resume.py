"""A finetuning that is killed goes on to the same weights, and several processes give what one gives."""

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
from safetensors import safe_open
from safetensors.numpy import load_file

from mmcli.pipeline.core.results import read_codes
from mmcli.pipeline.core.run import read_info

WORDS = (
    "--patches",
    64,
    "--device",
    "cpu",
    "--set",
    "fusion.mlp_dims=[64, 32]",
    "--set",
    "knn.K=5",
    "--workers",
    0,
    "--lr-towers",
    1e-4,
    "--patience",
    0,
)
# No classifier reads hard codes in training: rounding may turn a bit there, and then two runs part by more than rounding.
SMOOTH = ("--set", "hash.nested=[]", "--set", "hash.code_classifier=false")
# The command line with training kept after every step.
EAGER = (
    "from mmcli.pipeline.finetuning import finetune\nfrom mmcli.pipeline.training import loop\nloop.KEEP_EVERY_S = finetune.KEEP_WITHIN_S = 0\n"
    "from mmcli.cli import main; main()"
)


def history(run: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name[-2:] != "_s"} for record in records]


def near(one: Path, other: Path) -> bool:
    """Whether two runs have the same records, but for rounding; a bit that it turns shows in what is made of bits."""
    of_bits = ("val_mAP", "bit_balance", "dead_bits")
    pairs = [
        [{name: value for name, value in record.items() if name not in of_bits} for record in history(run)]
        for run in (one, other)
    ]
    return len(pairs[0]) == len(pairs[1]) and all(
        mine == pytest.approx(theirs, rel=2e-3, abs=2e-4) for mine, theirs in zip(*pairs, strict=True)
    )


def kept_batches(run: Path) -> int:
    """How many batches of its epoch the kept state has done; 0 where none is kept."""
    try:
        with safe_open(run / "training.safetensors", framework="np") as file:
            return int(file.metadata()["batches"])
    except OSError:
        return 0


ALL = pytest.param(("--unfreeze", "all", "--augment", "--accumulation", 2), marks=pytest.mark.slow)
NONE = pytest.param(("--unfreeze", "none"), marks=pytest.mark.slow)
SHARDED = ("--unfreeze", "all", "--set", "finetune.fsdp=true", "--accumulation", 2, "--gradient-checkpointing")


def run_command(command: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.parametrize("options", [("--unfreeze", "last-1"), ALL])
def test_killed_in_an_epoch_and_resumed_it_is_the_same_run(mmcli, miniature, tmp_path, options) -> None:
    words = ["finetune", "--data", miniature.data, "--model", miniature.model, *WORDS, "--epochs", 4, *options]
    words += ["--batch-size", 4]
    assert mmcli(*words, "--out", "whole")[0] == 0
    run = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", EAGER, *map(str, words), "--out", "killed"], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while not (run / "history.jsonl").exists() or not history(run) or not 1 <= kept_batches(run) <= 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < kept_batches(run) < 10
    assert read_info(run).status == "running"
    code, _, err = mmcli("knn-eval", "--run", run)
    assert (code, "mmcli finetune --resume" in err) == (2, True)
    code, _, err = mmcli("finetune", "--resume", run)
    assert code == 0, err
    assert "batches" in err
    assert history(run) == history(tmp_path / "whole")
    towers = [load_file(tmp_path / name / "towers" / "model.safetensors") for name in ("whole", "killed")]
    assert all(np.array_equal(towers[0][name], towers[1][name]) for name in towers[0])
    for split in ("train", "val", "test"):
        soft = [read_codes(tmp_path / name, split).soft for name in ("whole", "killed")]
        assert np.array_equal(*soft)
    assert not list((run / "checkpoints").glob("towers-*"))
    code, _, err = mmcli("finetune", "--resume", run)
    assert (code, "finished already" in err) == (0, True)


def test_a_run_resumes_with_less_memory_and_the_same_batch(mmcli, miniature, tmp_path, monkeypatch) -> None:
    """A shortage is one line that says what helps; the run goes on with it, from what was kept."""
    words = ["finetune", "--data", miniature.data, "--model", miniature.model, *WORDS, "--epochs", 3]
    words += ["--unfreeze", "last-1", "--batch-size", 8, *SMOOTH]
    assert mmcli(*words, "--out", "whole")[0] == 0
    from mmcli.pipeline.finetuning.batches import TowerBatches
    from mmcli.pipeline.training import loop as trainer

    backward, calls = TowerBatches.backward, []

    def short(batches: TowerBatches) -> None:
        calls.append(batches)
        if len(calls) == 8:  # the third of five batches of the second epoch
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
        backward(batches)

    monkeypatch.setattr(TowerBatches, "backward", short)
    monkeypatch.setattr(trainer, "KEEP_EVERY_S", 0)
    code, out, err = mmcli(*words, "--quiet", "--out", "short")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    for option in ("--gradient-checkpointing", "--batch-size 4 --accumulation 2", "--patches", "--resume"):
        assert option in err
    assert read_info(tmp_path / "short").status == "interrupted"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    for more in (("--batch-size", 4), ("--accumulation", 2), ("--lr-towers", 1)):
        code, _, err = mmcli("finetune", "--quiet", "--resume", "short", *more)
        assert (code, err.count("\n")) == (2, 1), err
    less = ("--batch-size", 4, "--accumulation", 2, "--gradient-checkpointing")
    code, _, err = mmcli("finetune", "--resume", "short", *less)
    assert code == 0, err
    assert "resuming after epoch 1" in err
    assert near(tmp_path / "short", tmp_path / "whole")


@pytest.mark.parametrize(
    "options", [("--unfreeze", "last-2", "--augment"), NONE, pytest.param(SHARDED, marks=pytest.mark.slow)]
)
def test_two_processes_give_what_one_gives(mmcli, miniature, tmp_path, options) -> None:
    """Batch norm, balance, covariance and mixtures are those of the whole batch, in whose parts the processes share."""
    words = ["finetune", "--data", miniature.data, "--model", miniature.model, *WORDS, "--epochs", 2, *options]
    words += ["--batch-size", 13, "--preset", "recommended", *SMOOTH]
    assert mmcli(*words, "--out", "one")[0] == 0
    command = [sys.executable, "-m", "mmcli", *map(str, words), "--out", "two", "--num-processes", "2", "--json"]
    done = run_command(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == "two"
    assert near(tmp_path / "two", tmp_path / "one")
    for split in ("train", "test"):
        one, two = (read_codes(tmp_path / name, split) for name in ("one", "two"))
        assert np.array_equal(one.image_id, two.image_id)
        np.testing.assert_allclose(one.soft, two.soft, atol=5e-3)


@pytest.mark.slow
def test_sharded_towers_resume_on_any_number_of_processes(mmcli, miniature, tmp_path) -> None:
    """Both processes are killed after an epoch; two of them, or one that has all shards, end as if nothing had been."""
    words = ["finetune", "--data", miniature.data, "--model", miniature.model, *WORDS, *SMOOTH, *SHARDED, "--epochs", 4]
    command = [sys.executable, "-m", "mmcli", *map(str, words), "--batch-size", "4", "--num-processes", "2", "--out"]
    assert run_command([*command, "whole"], tmp_path).returncode == 0
    process = subprocess.Popen([*command, "killed"], cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True)
    run = tmp_path / "killed"
    while not (run / "training.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shutil.copytree(run, tmp_path / "alone")
    again = run_command(
        [sys.executable, "-m", "mmcli", "finetune", "--resume", "killed", "--num-processes=2"], tmp_path
    )
    assert again.returncode == 0, again.stderr
    code, _, err = mmcli("finetune", "--resume", "alone")
    assert code == 0, err
    assert "resuming after epoch" in err
    for name in ("killed", "alone"):
        assert near(tmp_path / name, tmp_path / "whole"), name
        towers = [load_file(tmp_path / one / "towers" / "model.safetensors") for one in ("whole", name)]
        assert towers[0].keys() == towers[1].keys()
        for key, value in towers[0].items():
            np.testing.assert_allclose(towers[1][key], value, atol=4e-4, err_msg=key)


@pytest.mark.slow
def test_an_error_of_several_processes_is_one_line(miniature, tmp_path) -> None:
    """Of all of them, or of the second alone, which reads every other image of a batch."""

    def fail(data: Path) -> str:
        words = ["finetune", "--data", data, "--model", miniature.model, *WORDS, "--quiet", "--num-processes=2"]
        done = run_command([sys.executable, "-m", "mmcli", *map(str, words), "--out", "no"], tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        return done.stderr

    assert "no manifest" in fail(tmp_path)
    shutil.copytree(miniature.data, tmp_path / "data")
    broken = next((tmp_path / "data" / "val2014").iterdir())
    broken.write_bytes(broken.read_bytes()[:300])
    assert broken.name in fail(tmp_path / "data")
