"""The root is the package: what a wheel holds, and that the two ways in are the same."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import mmcli


@pytest.fixture(scope="module")
def project(repo: Path) -> dict:
    return tomllib.loads((repo / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the files that git knows, so that leftovers of a working tree cannot hide a mistake."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    known = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=repo,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    for name in filter(None, known):
        if (repo / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((repo / name).read_bytes())
    # Without isolation: the build needs no network, and setuptools is a part of the environment.
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (built,) = out.glob("*.whl")
    return built


def rooms(repo: Path) -> list[Path]:
    """Every folder of source below the root."""
    found = (path.parent for room in ("pipeline", "cache", "heads") for path in (repo / room).rglob("__init__.py"))
    return sorted(found)


def test_packages_are_the_folders(repo: Path, project: dict) -> None:
    folders = {"mmcli." + ".".join(folder.relative_to(repo).parts) for folder in rooms(repo)}
    assert set(project["tool"]["setuptools"]["packages"]) == {"mmcli"} | folders


def test_version_is_stated_once_more_and_equal(project: dict) -> None:
    assert project["project"]["version"] == mmcli.__version__


def test_no_stray_modules_in_the_root(repo: Path) -> None:
    assert {path.name for path in repo.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py", "errors.py"}


def test_wheel_owns_one_name_and_holds_every_module(repo: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"mmcli"}
    modules = {f"mmcli/{path.relative_to(repo)}" for folder in (repo, *rooms(repo)) for path in folder.glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert "mmcli/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    for data in (
        *(repo / "pipeline" / "report" / "templates").iterdir(),
        *(repo / "pipeline" / "ablation" / "grids").iterdir(),
    ):
        assert f"mmcli/{data.relative_to(repo).as_posix()}" in names


def test_wheel_gives_mmcli_and_python_m_mmcli(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    scripts = next(site.glob("*.dist-info/entry_points.txt")).read_text()
    assert "mmcli = mmcli.__main__:main" in scripts
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", "import mmcli, sys; print(mmcli.__file__)"]
    where = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert where.startswith(str(site))
    said = subprocess.run(
        [sys.executable, "-m", "mmcli", "--version"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == mmcli.__version__


def test_constraints_pin_torch_and_every_direct_dependency(repo: Path, project: dict) -> None:
    pinned = {
        line.split("==")[0].lower() for line in (repo / "constraints.txt").read_text().splitlines() if "==" in line
    }
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *extras["cpu"], *extras["ray"], *extras["remote"], *extras["dev"]]
    assert {name.split(">=")[0].split("[")[0].lower() for name in wanted} <= pinned


def test_every_install_command_uses_the_constraints(repo: Path) -> None:
    for name in ("README.md", "CONTRIBUTING.md", "Makefile", ".ci/run", ".github/workflows/ci.yml"):
        for line in (repo / name).read_text().splitlines():
            # An install command names what it installs; prose about `pip install` does not.
            if "pip install" in line and ("-e" in line or "mmcli" in line):
                assert "-c constraints.txt" in line, f"{name}: {line}"
