"""Ctrl-C and SIGTERM: one line that says what is kept, and the exact command that goes on."""

import os
import re
import shlex
import signal
from pathlib import Path

import pytest

from mmcli.cache import verify
from mmcli.pipeline.ablation import ablate
from mmcli.pipeline.core.run import open_run, read_info
from mmcli.pipeline.evaluation import zero_shot
from mmcli.pipeline.extraction import extract
from mmcli.pipeline.extraction.shards import ShardJobs
from mmcli.pipeline.training import loop as trainer
from mmcli.pipeline.training import run as training_run
from mmcli.pipeline.training import train_head
from mmcli.pipeline.training.state import TrainingState

HEAD = ("--preset", "small", "--epochs", 3, "--patience", 0, "-q")


def press(*_: object, **__: object) -> None:
    """Ctrl-C, as the terminal sends it."""
    os.kill(os.getpid(), signal.SIGINT)


def command_in(err: str) -> list[str]:
    """The words of the command that a line says to resume with."""
    assert err.count("\n") == 1, err
    found = re.fullmatch(r"mmcli: interrupted; .*; resume with `mmcli (.*)`\n", err)
    assert found is not None, err
    return shlex.split(found[1])


def test_training_says_the_epoch_and_goes_on(mmcli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, epochs = here / "a run's folder", []
    write_state = training_run.write_state

    def write(path: Path, state: TrainingState) -> None:
        write_state(path, state)
        epochs.append(state.epoch)
        press()

    monkeypatch.setattr(trainer, "KEEP_EVERY_S", 0.0)
    monkeypatch.setattr(training_run, "write_state", write)
    code, _, err = mmcli("train-head", *HEAD, "--out", out)
    assert code == 130
    assert f"{out} is kept up to epoch {epochs[0]};" in err
    words = command_in(err)
    assert words == ["train-head", "--resume", str(out)]
    assert read_info(out).status == "interrupted"
    monkeypatch.setattr(training_run, "write_state", write_state)
    assert mmcli(*words)[0] == 0
    assert open_run(out)


def test_sigterm_and_several_seeds(mmcli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_head, "fit", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    code, _, err = mmcli("train-head", *HEAD, "--out", "x", "--seeds", 2, "--seed", 1)
    assert code == 130
    assert command_in(err) == shlex.split("train-head --resume x-seed1 && mmcli train-head --resume x-seed2")


def test_a_resumed_training_is_resumed_by_the_same_command(mmcli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = train_head.fit
    monkeypatch.setattr(train_head, "fit", press)
    words = command_in(mmcli("train-head", *HEAD, "--out", "x")[2])
    store = next((here / "data" / "cache").iterdir())
    again = [*words, "--store", str(store), "-q"]
    assert command_in(mmcli(*again)[2]) == again
    monkeypatch.setattr(train_head, "fit", fit)
    assert mmcli(*again)[0] == 0


def test_before_a_run_is_there_the_same_command_goes_on(mmcli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_head, "prepare_training", press)
    words = ["train-head", *map(str, HEAD), "--out", "x y", "--force"]
    assert command_in(mmcli(*words)[2]) == words
    assert not (here / "x y").exists()


def test_extraction_goes_on_without_force(mmcli, here: Path, miniature, monkeypatch: pytest.MonkeyPatch) -> None:
    store = next((here / "data" / "cache").iterdir())
    words = [
        "extract",
        "--model",
        str(miniature.model),
        "--patches",
        "64",
        "--data",
        str(miniature.data),
        "--workers",
        "0",
    ]
    words += ["--out", str(store), "-q"]
    encode = ShardJobs.encode_captions
    monkeypatch.setattr(ShardJobs, "encode_captions", press)
    assert command_in(mmcli(*words, "--force")[2]) == words
    monkeypatch.setattr(ShardJobs, "encode_captions", encode)
    assert mmcli(*words)[0] == 0
    assert verify(store).ok
    monkeypatch.setattr(extract, "load_encoder", press)  # before the store was touched
    assert command_in(mmcli(*words, "--force")[2]) == [*words, "--force"]


def test_the_other_commands_that_go_on(mmcli, here: Path, miniature, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablate._Work, "run", press)
    words = ["ablate", "A3", "--preset", "small", "--out", "my ablations", "-q"]
    assert command_in(mmcli(*words)[2]) == words
    monkeypatch.setattr(zero_shot, "write_scores", press)
    words = ["zero-shot", "--model", str(miniature.model), "--device", "cpu", "-q"]
    assert command_in(mmcli(*words)[2]) == words
    named = [*words, "--out", "z"]
    assert command_in(mmcli(*named)[2]) == [*named, "--force"]


def test_a_training_of_an_experiment_names_the_experiments(mmcli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_head, "fit", press)
    words = ["ablate", "A3", "--preset", "small", "--out", "a", "--device", "cpu", "-q"]
    assert command_in(mmcli(*words)[2]) == words
