"""Fixtures that several test modules share."""

import os
import re
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from kit.hub import HubCache
from mmcli import cli
from mmcli.pipeline.core.config import load_config

REPO = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--slow`` runs the tests that take minutes, ``--fake-machine`` shows another machine, ``--mutations`` damages files."""
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption(
        "--fake-machine", metavar="WHAT", help="amx, no-amx, cores=N, l2=BYTES, or several joined by commas"
    )
    parser.addoption("--mutations", type=int, default=525, help="damaged files that are read (default: 525)")


def pytest_configure(config: pytest.Config) -> None:
    """Let this process and all that it starts see another machine, where one is asked for."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for a shell's command in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    machine = config.getoption("--fake-machine")
    if machine:
        folder = str(REPO / "tests" / "machines")
        os.environ["FAKE_MACHINE"] = machine
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        runpy.run_path(f"{folder}/sitecustomize.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip slow tests unless asked for; begin with the longest, so that no process waits for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_demo.py")
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes: run with --slow"))


@pytest.fixture
def count_calls():
    """How many Python functions an action calls: unlike its time, the same on any machine, however busy it is."""

    def count(action: Callable[[], object]) -> int:
        calls = 0

        def seen(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += event == "call"

        before = sys.getprofile()
        sys.setprofile(seen)
        try:
            action()
        finally:
            sys.setprofile(before)
        return calls

    return count


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the clone."""
    return REPO


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real COCO images, captions, labels and splits; skips where it is absent."""
    folder = Path(os.environ.get("MMCLI_REALDATA", REPO.parent / "shared" / "realdata"))
    if not (folder / "coco_slice" / "dataset_coco.json").is_file():
        pytest.skip(f"real COCO data not found at {folder} (set MMCLI_REALDATA to its folder)")
    return folder


@dataclass(frozen=True)
class Miniature:
    """A very small generated data set with its manifest, and a checkpoint whose towers were hardly trained."""

    data: Path
    model: Path


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Miniature:
    """Forty-odd pictures in COCO's form, prepared, and a SigLIP2 of two training steps."""
    from mmcli.pipeline.data.miniature import make_dataset
    from mmcli.pipeline.data.prepare import prepare
    from mmcli.pipeline.extraction.miniature_model import make_checkpoint

    folder = tmp_path_factory.mktemp("miniature")
    data = make_dataset(folder / "data", n_train=40, n_val=10, n_test=10)
    prepare(data)
    return Miniature(data=data, model=make_checkpoint(data, folder / "model", steps=2))


@pytest.fixture
def mmcli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run the command line in this process, in an empty folder; exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["mmcli", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        if end.value.code == 2:
            check_advice([str(word) for word in words], err)
        return int(end.value.code or 0), out, err

    return call


def check_advice(words: list[str], err: str) -> None:
    """An error names no option that the command does not have; other commands stand between backticks."""
    command = typer.main.get_command(cli.app)
    for word in words:
        command = getattr(command, "commands", {}).get(word, command)
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    line = re.sub(r"`[^`]*`", "", err.splitlines()[-1]) if err else ""
    if "(see --help)" not in line:  # which quotes what a person typed
        unknown = {*re.findall(r"(?<![\w/-])--[a-z][a-z-]+", line)} - known - {*words}
        assert not unknown, f"{err} names {unknown}, which `mmcli {words[0]}` has not"


@pytest.fixture(scope="session")
def made(miniature, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store and a trained run of the miniature, in the default places."""
    from mmcli.pipeline.extraction.extract import ExtractPlan, extract
    from mmcli.pipeline.training.train_head import train_head

    folder = tmp_path_factory.mktemp("made")
    options = {
        "model.siglip2_variant": str(miniature.model),
        "model.max_num_patches": 64,
        "hardware.device": "cpu",
        "fusion.mlp_dims": [64, 32],
        "training.num_epochs": 3,
        "knn.K": 5,
    }
    config = load_config(options=options)
    extract(config, ExtractPlan(data=miniature.data, cache=folder / "data" / "cache", shard_rows=16))
    train_head(
        load_config(options={k: v for k, v in options.items() if "model" not in k}),
        store=next((folder / "data" / "cache").iterdir()),
        runs=folder / "runs",
    )
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    """A copy of that folder that a test may spoil; the working folder of ``mmcli``."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> HubCache:
    """An empty cache of the hub on a machine without network; for this process and for those that it starts."""
    from huggingface_hub import constants

    root = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(root))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return HubCache(root)
