"""All experiments with three seeds on the miniature of `mmcli demo`, killed twice: one table, in a quarter of an hour."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmcli.pipeline.ablation.records import read_rows

pytestmark = pytest.mark.slow

NAMES = ("A1", "A2", "A3", "B1", "B2", "B3", "B4", "C1", "C2", "C3", "C4", "base")
MINUTES = 15
TIMES = ("_s", "_ms", "_ms_p50", "_ms_p95", "_qps", "finished_at")
# Extraction and towers compute in float32 on as many threads as a process has; their last bits depend on them.
BY_THREADS = {"B1", "B3"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature; ``MMCLI_DEMO`` names one that is there, which is only read."""
    if "MMCLI_DEMO" in os.environ:
        return Path(os.environ["MMCLI_DEMO"]).absolute()
    folder = tmp_path_factory.mktemp("demo")
    subprocess.run([sys.executable, "-m", "mmcli", "demo", "--quiet"], cwd=folder, check=True, capture_output=True)
    return folder / "demo"


def command(demo: Path, *words: object) -> list[str]:
    options = [
        "--store",
        demo / "store",
        "--data",
        demo / "data",
        "--model",
        demo / "model",
        "--preset",
        "small",
        "--set",
        "training.num_epochs=100",
        "--experiments",
        "miniature",
        "--device",
        "cpu",
        "--quiet",
    ]
    return [sys.executable, "-m", "mmcli", "ablate", *map(str, (*words, *options))]


def n_kept(folder: Path) -> int:
    return len(list((folder / "runs/ablations/evaluations").glob("*.json")))


def killed_after(words: list[str], folder: Path, n: int) -> None:
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and n_kept(folder) < n:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def rows(folder: Path) -> dict[tuple, dict]:
    table = read_rows(folder / "runs/ablations")
    return {
        (row["experiment"], row["value"], row["seed"]): {k: v for k, v in row.items() if not k.endswith(TIMES)}
        for row in table
    }


def test_killed_twice_it_is_one_table_in_a_quarter_of_an_hour(demo: Path, tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    whole.mkdir()
    words = command(demo, *NAMES, "--seeds", 3, "--workers", 2)
    started = time.monotonic()
    killed_after(words, killed, 20)
    killed_after(words, killed, 70)
    subprocess.run(words, cwd=killed, check=True, capture_output=True)
    minutes = (time.monotonic() - started) / 60
    table = rows(killed)
    assert len(table) == 3 * 51
    assert not [row["note"] for row in table.values() if row["status"] == "failed"]
    # The same without a stop, for one seed and in one process with as many threads as each of two had.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run(command(demo, *NAMES), cwd=whole, check=True, capture_output=True, env=environment)
    for key, row in rows(whole).items():
        other = table[key]
        if key[0] in BY_THREADS:
            assert (row["status"], row["key"]) == (other["status"], other["key"])
        else:
            assert {k: v for k, v in row.items() if k not in {"run"}} == {
                k: v for k, v in other.items() if k not in {"run"}
            }, key
    assert minutes < MINUTES
