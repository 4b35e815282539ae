"""Launchers: what they say in the environment, and how processes end of which one has failed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmcli import InputError
from mmcli.pipeline.finetuning.distributed import LOST, Launch, _report, is_first, open_group, read_launch

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
WHOLE = {
    "WORLD_SIZE": "4",
    "RANK": "2",
    "LOCAL_WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "1",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)

    def give(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return give


@pytest.mark.parametrize(
    "variables",
    [
        {},
        dict.fromkeys(NAMES, ""),
        {"WORLD_SIZE": " ", "RANK": "\t"},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": ""},
        {"RANK": "0"},
        {"LOCAL_RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "x"},
    ],
)
def test_without_a_launcher_there_is_one_process(environment, variables) -> None:
    environment(variables)
    assert read_launch() == Launch()
    assert is_first()
    with open_group("cpu") as group:
        assert (group.rank, group.size) == (0, 1)
    # torch would read an empty variable as a number.
    assert not any(os.environ.get(name, "1").strip() == "" for name in NAMES)


def test_a_launcher_is_read(environment) -> None:
    environment(WHOLE)
    assert read_launch() == Launch(rank=2, size=4, local_size=2)
    assert not is_first()
    environment({"LOCAL_WORLD_SIZE": ""})
    assert read_launch() == Launch(rank=2, size=4, local_size=1)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: got 2 without RANK"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: got 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: got '0'"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE: got '-1'"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE: got '2.0'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE: got"),
        ({"RANK": "1"}, "RANK: got 1 without WORLD_SIZE"),
        ({"RANK": "x"}, "RANK: got 'x'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK: got '-1'"),
        ({**WHOLE, "RANK": "4"}, "RANK: got 4, wanted less than WORLD_SIZE, here 4"),
        ({**WHOLE, "LOCAL_RANK": "2"}, "LOCAL_RANK: got 2"),
        ({**WHOLE, "MASTER_ADDR": ""}, "WORLD_SIZE: got 4 without MASTER_ADDR"),
        ({**WHOLE, "MASTER_PORT": ""}, "WORLD_SIZE: got 4 without MASTER_PORT"),
        ({**WHOLE, "MASTER_PORT": "70000"}, "MASTER_PORT: got '70000'"),
        ({**WHOLE, "MASTER_PORT": "http"}, "MASTER_PORT: got 'http'"),
        ({**WHOLE, "LOCAL_RANK": ""}, "WORLD_SIZE: got 4 without LOCAL_RANK"),
    ],
)
def test_what_no_launcher_sets_is_one_line(environment, variables, said: str) -> None:
    environment(variables)
    with pytest.raises(InputError) as error, open_group("cpu"):
        pass
    assert said in str(error.value)
    assert "unset it" in str(error.value)


def test_finetune_refuses_it_before_it_loads_anything(environment, mmcli, miniature) -> None:
    environment({"WORLD_SIZE": "2"})
    code, out, err = mmcli("finetune", "--model", miniature.model, "--patches", 64, "--data", miniature.data)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "WORLD_SIZE" in err


@pytest.mark.parametrize(
    ("codes", "code", "shown"),
    [
        ([0, 2], 2, "the error of 1\n"),
        ([LOST, LOST, 2], 2, "the error of 2\n"),
        ([2, LOST], 2, ""),  # the first has the terminal
        ([2, 2], 2, ""),
        ([LOST, -signal.SIGKILL], 1, "mmcli: process 1 of 2 was ended by SIGKILL; what was kept stays\n"),
        ([-signal.SIGKILL, 2], 2, "the error of 1\n"),  # the first hung, and was ended
        ([-signal.SIGTERM, 1], 1, "the error of 1\n"),
    ],
)
def test_the_process_that_failed_by_itself_is_shown(tmp_path: Path, capsys, codes, code: int, shown: str) -> None:
    for rank in range(1, len(codes)):
        (tmp_path / str(rank)).write_text(f"the error of {rank}\n")
    assert _report(codes, tmp_path) == code
    assert capsys.readouterr().err == shown


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="children are listed in /proc")
def test_a_killed_process_ends_all_with_one_line(miniature, tmp_path: Path) -> None:
    words = ["--data", miniature.data, "--model", miniature.model, "--patches", 64, "--device", "cpu", "--workers", 0]
    words += ["--epochs", 10_000, "--patience", 0, "--set", "knn.K=5", "--out", "run", "--quiet", "--num-processes", 2]
    command = [sys.executable, "-m", "mmcli", "finetune", *map(str, words)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 150
    while not (tmp_path / "run" / "history.jsonl").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "mmcli: process 1 of 2 was ended by SIGKILL; what was kept stays\n")
    assert not any(Path(f"/proc/{child}").exists() for child in children[-2:])
