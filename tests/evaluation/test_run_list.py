"""``mmcli runs``: which runs there are, and which one other commands take."""

import json
import shutil


def test_runs_are_listed_with_their_figures(mmcli, here) -> None:
    run = next((here / "runs").iterdir())
    shutil.copytree(run, here / "runs" / "damaged")
    (here / "runs" / "damaged" / "metrics.json").write_text("{")
    (here / "runs" / "notes").mkdir()
    assert mmcli("knn-eval", "--run", run, "--k", 5)[0] == 0
    code, out, _ = mmcli("runs", "--json")
    result = json.loads(out)
    assert code == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert [(row["name"], row["knn"], row["bits"]) for row in result["runs"]] == [(run.name, metrics["mAP"], 64)]
    assert "damaged" in result["unreadable"][0]
    assert result["runs"][0]["is_default"]
    code, out, _ = mmcli("runs", "--sort", "knn")
    assert code == 0
    assert f"{metrics['mAP']:.3f}" in out


def test_a_wrong_order_and_an_empty_folder_are_one_line(mmcli, here) -> None:
    code, _, err = mmcli("runs", "--sort", "colour")
    assert (code, err.count("\n")) == (2, 1)
    assert "created, name, knn" in err
    code, _, err = mmcli("runs", "--runs", "nowhere")
    assert (code, err.count("\n")) == (2, 1)
