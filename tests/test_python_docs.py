"""The examples of docs/python.md run as they stand, one after another, as in a notebook."""

import re
import shutil
from pathlib import Path

import pytest


def test_the_examples_of_the_python_page_run(
    repo: Path, miniature, hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(miniature.data, tmp_path / "data" / "coco")
    (tmp_path / "data" / "coco" / "manifest.parquet").unlink()
    shutil.copy(next((miniature.data / "val2014").iterdir()), tmp_path / "data" / "coco" / "photo.jpg")
    hub.add(miniature.model, "a" * 40, "main")
    blocks = re.findall(r"```python\n(.*?)```", (repo / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) > 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert 0 <= names["result"].metrics["mAP"] <= 1
    assert names["tagging"].tags
