"""The whole of ``mmcli demo``, once, as a newcomer runs it; slow on purpose (a minute or two)."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmcli import cli
from mmcli.pipeline.data.manifest import read_manifest


def demo(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmcli", "demo", "--out", str(out), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def call(capsys, monkeypatch, *words: object) -> tuple[int, str, str]:
    """The command line in this process."""
    monkeypatch.setattr("sys.argv", ["mmcli", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main()
    return (int(end.value.code or 0), *capsys.readouterr())


def test_the_demo_does_what_it_says(tmp_path: Path, capsys, monkeypatch) -> None:
    """One test, because two processes that share the tests would each make a demo of their own."""
    out = tmp_path / "demo"
    done = demo(out, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    zero_shot_means_something(out, result)
    the_last_table_is_whole(out, result)
    commands_do_the_same(result, done.stderr, tmp_path / "again", capsys, monkeypatch)


def zero_shot_means_something(out: Path, result: dict) -> None:
    """At least three times the mean class prevalence of the test split."""
    listing = read_manifest(out / "data" / "manifest.parquet")
    prevalence = listing.labels_matrix()[listing.rows("test")].mean(0)
    by_method = {row["method"]: row["mAP"] for row in result["rows"]}
    assert by_method["zero-shot"] >= 3 * prevalence[prevalence > 0].mean()
    assert set(by_method) == {"zero-shot", "classifier", "knn"}
    # What trains on the labels has to beat what never saw one.
    assert min(by_method["classifier"], by_method["knn"]) > by_method["zero-shot"]


def the_last_table_is_whole(out: Path, result: dict) -> None:
    """Every figure is a number, every file is there, and the report has the same figures."""
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


def commands_do_the_same(result: dict, said: str, run: Path, capsys, monkeypatch) -> None:
    """Every step names its command, and the commands give what the demo gave."""
    commands = [
        line.strip().removeprefix("$ mmcli ").split()
        for line in said.splitlines()
        if line.strip().startswith("$ mmcli ")
    ]
    assert [words[0] for words in commands] == [
        "prepare",
        "extract",
        "zero-shot",
        "train-head",
        "knn-eval",
        "predict",
        "report",
    ]
    training = next(words for words in commands if words[0] == "train-head")
    for words in ([*training, "--out", run], ["knn-eval", "--run", run]):
        code, _, err = call(capsys, monkeypatch, *words, "--quiet")
        assert code == 0, err
    again = json.loads((run / "metrics.json").read_text())
    knn = next(row for row in result["rows"] if row["method"] == "knn")
    assert again["mAP"] == pytest.approx(knn["mAP"], abs=0.02)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("years of work")
    for words in ((), ("--force",)):
        code, _, err = call(capsys, monkeypatch, "demo", "--out", tmp_path, "--quiet", *words)
        assert (code, err.count("\n")) == (2, 1)
        assert "give another --out" in err
    assert (tmp_path / "data" / "thesis.tex").read_text() == "years of work"
