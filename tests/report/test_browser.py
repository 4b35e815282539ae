"""The report's page in headless Chromium: no error, no request, tables sort, pictures load, axe-core finds nothing.

`make browser` installs what it needs; without that it is skipped.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from kit.reports import make_kit
from mmcli.pipeline.report.report import ReportPlan, report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def seen(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What a browser saw, at two widths, light and dark."""
    folder = repo / "tests" / "browser"
    if CHROMIUM is None or shutil.which("node") is None:
        pytest.skip("no Chromium or no node: install both, then `make browser`")
    if not (folder / "node_modules" / "playwright-core").is_dir():
        pytest.skip("no playwright-core and axe-core: `make browser` installs them below tests/browser")
    kit = make_kit(tmp_path_factory.mktemp("kit"))
    page = report(ReportPlan(runs=kit.runs, data=kit.data, out=kit.root / "report")).files[0]
    command = ["node", str(folder / "page.mjs"), CHROMIUM, str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nothing_fails_and_nothing_is_asked_of_the_network(seen) -> None:
    assert len(seen) == 4
    for view in seen:
        assert (view["errors"], view["requests"]) == ([], []), view["name"]
        assert view["pwned"] is False
        assert view["wider"] == 0, f"{view['name']}: the page scrolls sideways"


def test_pictures_load(seen) -> None:
    for view in seen:
        assert view["broken"]["pictures"] > 80
        assert view["broken"]["broken"] == 0


def test_tables_sort_by_mouse_and_by_keyboard(seen) -> None:
    for view in seen:
        falling, rising = view["sorted"]
        assert (falling["order"], rising["order"]) == ("descending", "ascending")
        for found, reverse in ((falling, True), (rising, False)):
            values = [float(value) for value in found["values"] if value is not None]
            assert len(values) > 3
            assert values == sorted(values, reverse=reverse)
            assert found["values"][len(values) :] == [None] * (len(found["values"]) - len(values))
        assert view["keyboard"] == {"first": "skip", "order": "ascending"}


def test_the_theme_can_be_chosen(seen) -> None:
    for view in seen:
        auto, light, dark, again = view["theme"]
        assert light != dark
        assert auto == again == (dark if view["name"].endswith("dark") else light)


def test_axe_finds_nothing(seen) -> None:
    assert {view["name"]: view["violations"] for view in seen} == {view["name"]: [] for view in seen}
