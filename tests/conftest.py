"""Fixtures that several test modules share."""

import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

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
