"""Fixtures that several test modules share."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--slow`` runs the tests that take minutes, ``--mutations`` damages so many files."""
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption("--mutations", type=int, default=525, help="damaged files that are read (default: 525)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip slow tests unless asked for."""
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes: run with --slow"))


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
    from mmcli.pipeline.miniature import make_dataset
    from mmcli.pipeline.miniature_model import make_checkpoint
    from mmcli.pipeline.prepare import prepare

    folder = tmp_path_factory.mktemp("miniature")
    data = make_dataset(folder / "data", n_train=40, n_val=10, n_test=10)
    prepare(data)
    return Miniature(data=data, model=make_checkpoint(data, folder / "model", steps=2))
