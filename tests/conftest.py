"""Fixtures that several test modules share."""

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


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
