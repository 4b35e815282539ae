"""One training gives one result, whatever machine, terminal and settings it runs on.

``pytest --fake-machine amx`` (or ``no-amx``, ``cores=64``) runs all tests on another machine; here a training and its
evaluation go through every setting at least once.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

TRAIN = ("train-head", "--epochs", 1, "--set", "fusion.mlp_dims=[16, 8]", "--set", "knn.K=5", "--device", "cpu")
TIMES = ("_ms", "_qps", "_s", "_ms_p50", "_ms_p95")


def figures(run: Path) -> dict:
    """What a run found, without what was measured of time."""
    flat = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    rows = [flat, *flat.pop("others")]
    return {f"{row['method']} {key}": value for row in rows for key, value in row.items() if not key.endswith(TIMES)}


@pytest.fixture(scope="module")
def wanted(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The figures of this machine as it is, but for its precision."""
    from mmcli.pipeline.core.config import load_config
    from mmcli.pipeline.evaluation.knn_eval import knn_eval
    from mmcli.pipeline.training.train_head import train_head

    options = {
        "training.num_epochs": 1,
        "fusion.mlp_dims": [16, 8],
        "knn.K": 5,
        "hardware.device": "cpu",
        "training.mixed_precision": False,
    }
    config = load_config(options=options)
    store = next((made / "data" / "cache").iterdir())
    result = train_head(config, store=store, out=tmp_path_factory.mktemp("wanted") / "run")
    knn_eval(config, run=result.run)
    return figures(result.run.folder)


@pytest.fixture
def time_zone(monkeypatch: pytest.MonkeyPatch):
    yield lambda name: (monkeypatch.setenv("TZ", name), time.tzset())
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(
    "setting",
    ["AMX, float32 asked for", "1 core", "64 cores", "Kolkata", "St John's", "40 columns", "300 columns", "umask"],
)
def test_the_figures_are_the_same(monkeypatch, mmcli, here, wanted, time_zone, umask, setting: str) -> None:
    words: tuple[object, ...] = TRAIN
    match setting.split():
        case ["AMX,", *_]:
            monkeypatch.setattr("mmcli.pipeline.core.device.has_amx", lambda: True)
            words = (*TRAIN, "--set", "training.mixed_precision=false")
        case [n, "core" | "cores"]:
            monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(int(n))), raising=False)
        case ["Kolkata"]:
            time_zone("Asia/Kolkata")
        case ["St", _]:
            time_zone("America/St_Johns")
        case [n, "columns"]:
            monkeypatch.setenv("COLUMNS", n)
        case ["umask"]:
            umask(0o077)
    if setting[:3] != "AMX":
        monkeypatch.setattr("mmcli.pipeline.core.device.has_amx", lambda: False)
    assert mmcli(*words, "--out", "run")[0] == 0
    code, out, err = mmcli("knn-eval", "--run", "run")
    assert code == 0, err
    assert figures(Path("run")) == wanted
    assert f"{wanted['knn mAP']:.3f}" in out
    assert Path("run").stat().st_mode & 0o777 == (0o700 if setting == "umask" else 0o755)
    made_at = json.loads(Path("run/run.json").read_text())["created"]
    assert made_at.endswith("+00:00")


def test_a_locale_of_ascii_alone_is_enough(made: Path, wanted: dict, tmp_path: Path) -> None:
    """Also where Python is kept from taking UTF-8 instead, and where folders have other letters."""
    here = tmp_path / "Läufe 日本"
    shutil.copytree(made, here)
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "LANG": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "TZ": "Asia/Kolkata",
    }
    environment.pop("PYTHONIOENCODING", None)
    script = (
        "import json, sys\nfrom mmcli.cli import main\nfor words in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['mmcli', *words]\n    try: main()\n    except SystemExit as end: assert not end.code, end.code\n"
    )
    out = os.fsencode(here / "größer").decode("ascii", "surrogateescape")  # as Python reads an argument there
    train = [*map(str, TRAIN), "--set", "training.mixed_precision=false", "--out", out]
    command = [sys.executable, "-c", script, json.dumps([train, ["knn-eval", "--run", out]])]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert figures(here / "größer") == wanted
    assert f"{wanted['knn mAP']:.3f}" in done.stdout.decode("ascii")
