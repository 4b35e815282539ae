"""The whole of ``mmcli demo``, once, as a newcomer runs it; slow on purpose (a minute or two)."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmcli.pipeline.manifest import read_manifest


def demo(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmcli", "demo", "--out", str(out), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    out = tmp_path_factory.mktemp("demo") / "demo"
    done = demo(out, "--json")
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout), done.stderr


def test_zero_shot_means_something(made) -> None:
    """At least three times the mean class prevalence of the test split."""
    out, result, _ = made
    listing = read_manifest(out / "data" / "manifest.parquet")
    prevalence = listing.labels_matrix()[listing.rows("test")].mean(0)
    by_method = {row["method"]: row["mAP"] for row in result["rows"]}
    assert by_method["zero-shot"] >= 3 * prevalence[prevalence > 0].mean()
    assert set(by_method) == {"zero-shot", "classifier", "knn"}
    # What trains on the labels has to beat what never saw one.
    assert min(by_method["classifier"], by_method["knn"]) > by_method["zero-shot"]


def test_the_last_table_is_whole_and_the_files_are_there(made) -> None:
    out, result, _ = made
    for row in result["rows"]:
        for key in ("mAP", "F1_micro", "F1_macro", "P@5", "R@5", "query_latency_ms"):
            assert np.isfinite(row[key])
    for name in (
        "report/report.html",
        "report/report.md",
        "legend.png",
        "data/manifest.parquet",
        "store/manifest.json",
        "runs/head-64/metrics.json",
        "runs/zero-shot/metrics.json",
    ):
        assert (out / name).is_file(), name
    report = (out / "report" / "report.md").read_text().replace("**", "")  # the best figure is bold, where one is best
    assert all(f"| {row['mAP']:.3f} \\[{row['ci']['mAP'][0]:.3f}, " in report for row in result["rows"])


def test_every_step_names_its_command_and_the_commands_do_the_same(made, tmp_path: Path) -> None:
    _, result, said = made
    commands = [
        line.strip().removeprefix("$ mmcli ").split()
        for line in said.splitlines()
        if line.strip().startswith("$ mmcli ")
    ]
    assert [words[0] for words in commands] == [
        "prepare", "extract", "zero-shot", "train-head", "knn-eval", "predict", "report",
    ]  # fmt: skip
    training = next(words for words in commands if words[0] == "train-head")
    run = tmp_path / "again"
    for words in ([*training, "--out", str(run)], ["knn-eval", "--run", str(run)]):
        subprocess.run([sys.executable, "-m", "mmcli", *words, "--quiet"], check=True, capture_output=True)
    again = json.loads((run / "metrics.json").read_text())
    knn = next(row for row in result["rows"] if row["method"] == "knn")
    assert again["mAP"] == pytest.approx(knn["mAP"], abs=0.02)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("years of work")
    for words in ((), ("--force",)):
        done = demo(tmp_path, "--quiet", *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "give another --out" in done.stderr
    assert (tmp_path / "data" / "thesis.tex").read_text() == "years of work"
