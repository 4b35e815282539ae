"""Each import contract holds, and fails on a seeded violation."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LADDER = "imports run down one ladder"
VIOLATIONS = {
    "cache/key.py": ("import torch\n", "the store knows arrays"),
    "heads/voting.py": ("import h5py\n", "heads take tensors"),
    "heads/fusion.py": ("from ..cache import key\n", LADDER),
    "cache/reader.py": ("from ..pipeline.core import run\n", LADDER),
    "pipeline/core/run.py": ("from ..data import coco\n", LADDER),
    "pipeline/training/step.py": ("from ..finetuning import settings\n", LADDER),
    "pipeline/ablation/plan.py": ("from ..report import report\n", LADDER),
    "pipeline/bench/knn.py": ("from ..report import report\n", LADDER),
    "pipeline/report/report.py": ("from ..commands import data\n", LADDER),
}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on a copy of the package that is importable as ``mmcli``."""
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command; lint_imports_command()",
        "--no-cache",
    ]
    environment = {"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(repo: Path, tmp_path: Path) -> Path:
    package = tmp_path / "mmcli"
    for room in ("pipeline", "cache", "heads"):
        shutil.copytree(repo / room, package / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "__main__.py", "cli.py", "errors.py"):
        shutil.copy(repo / name, package / name)
    shutil.copy(repo / "pyproject.toml", tmp_path / "pyproject.toml")
    return tmp_path


def test_contracts_hold(copy: Path) -> None:
    result = lint(copy)
    assert result.returncode == 0, result.stdout
    assert "3 kept, 0 broken" in result.stdout


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_seeded_violation_is_found(copy: Path, name: str) -> None:
    line, contract = VIOLATIONS[name]
    file = copy / "mmcli" / name
    file.write_text(file.read_text() + line)
    result = lint(copy)
    assert result.returncode == 1
    # The report wraps long names; each contract ends with its verdict.
    verdicts = re.split(r"\b(KEPT|BROKEN)\b", " ".join(result.stdout.split()))
    broken = [name for name, verdict in zip(verdicts[::2], verdicts[1::2], strict=False) if verdict == "BROKEN"]
    assert any(contract in name for name in broken), result.stdout
