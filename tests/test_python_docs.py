"""The examples of docs/python.md run as they stand, one after another, as in a notebook."""

import os
import re
import shutil
import subprocess
import sys
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


def test_a_script_without_a_main_guard_runs_once(miniature, tmp_path: Path) -> None:
    """Processes that read images do not begin the user's script again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nimport mmcli\nprint('begun')\n"
        "options = {'model.siglip2_variant': sys.argv[2], 'model.max_num_patches': 64, 'hardware.device': 'cpu',"
        " 'data.num_workers': 2}\n"
        "config = mmcli.load_config(options=options)\n"
        "mmcli.extract(config, data=sys.argv[1], out='store', quiet=True)\n"
    )
    command = [sys.executable, script, miniature.data, miniature.model]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "begun\n"), done.stderr
