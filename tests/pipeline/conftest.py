"""The command line in this process, and a folder with a store and a run for it to work in."""

import hashlib
import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
import typer

from mmcli import cli
from mmcli.pipeline.core.config import DEFAULT_MODEL, load_config

# Test folders are no packages: what several modules of tests import is loaded by path.
_spec = importlib.util.spec_from_file_location("report_kit", Path(__file__).with_name("report_kit.py"))
sys.modules["report_kit"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["report_kit"])


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
        "model.siglip2_variant": str(miniature.model), "model.max_num_patches": 64, "hardware.device": "cpu",
        "fusion.mlp_dims": [64, 32], "training.num_epochs": 3, "knn.K": 5,
    }  # fmt: skip
    config = load_config(options=options)
    extract(config, ExtractPlan(data=miniature.data, cache=folder / "data" / "cache", shard_rows=16))
    train_head(load_config(options={k: v for k, v in options.items() if "model" not in k}),
               store=next((folder / "data" / "cache").iterdir()), runs=folder / "runs")  # fmt: skip
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    """A copy of that folder that a test may spoil; the working folder of ``mmcli``."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


class HubCache:
    """A cache of the Hugging Face hub as its client lays it out: blobs, links to them by commit, names of commits."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, model: Path, commit: str, *refs: str, name: str = DEFAULT_MODEL) -> Path:
        """Put the files of a checkpoint there; the folder of the snapshot."""
        repo = self.root / f"models--{name.replace('/', '--')}"
        snapshot = repo / "snapshots" / commit
        for folder in (repo / "blobs", repo / "refs", snapshot):
            folder.mkdir(parents=True, exist_ok=True)
        for file in model.iterdir():
            blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copyfile(file, blob)
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
        for ref in refs:
            (repo / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
            (repo / "refs" / ref).write_text(commit)
        return snapshot


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
