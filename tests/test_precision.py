"""Two processors may compute one training in two precisions: the run says which, and no table mixes them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mmcli import InputError
from mmcli.pipeline.ablation.tables import experiment_table
from mmcli.pipeline.core.console import make_console
from mmcli.pipeline.core.metrics_file import by_precision
from mmcli.pipeline.core.run import mark, open_run, write_info
from mmcli.pipeline.evaluation.compare import Arm, Sample, arm_pair, compare
from mmcli.pipeline.report.collect import collect
from mmcli.pipeline.report.report import ReportPlan, report
from mmcli.pipeline.training.train_head import resume_training

WORDS = ("--epochs", 1, "--set", "fusion.mlp_dims=[16, 8]", "--set", "knn.K=5", "--device", "cpu")
FLOAT32 = ("--set", "training.mixed_precision=false")


@pytest.mark.parametrize(
    ("amx", "options", "wanted"), [(True, (), "bfloat16"), (True, FLOAT32, "float32"), (False, (), "float32")]
)
def test_a_run_says_the_precision_that_it_computed_in(monkeypatch, mmcli, here, amx, options, wanted) -> None:
    monkeypatch.setattr("mmcli.pipeline.core.device.has_amx", lambda: amx)
    code, out, err = mmcli("train-head", *WORDS, *options, "--out", "run", "--json")
    assert code == 0, err
    assert f" on cpu, {wanted}" in err
    assert json.loads(out)["precision"] == wanted
    assert open_run(Path("run")).info.precision == wanted
    assert mmcli("knn-eval", "--run", "run")[0] == 0
    flat = json.loads(Path("run/metrics.json").read_text())
    assert (flat["method"], flat["precision"], flat["others"][0]["precision"]) == ("knn", wanted, wanted)


def test_a_run_is_not_resumed_in_another_precision(monkeypatch, mmcli, here) -> None:
    """Also where no epoch was kept, so that it would begin again."""
    monkeypatch.setattr("mmcli.pipeline.core.device.has_amx", lambda: False)
    assert mmcli("train-head", *WORDS, "--out", "run")[0] == 0
    mark(open_run(Path("run")), "interrupted")
    monkeypatch.setattr("mmcli.pipeline.core.device.has_amx", lambda: True)
    with pytest.raises(InputError, match="got a training in float32, wanted one in bfloat16"):
        resume_training(Path("run"))


def row(seed: int, mAP: float, precision: str | None) -> dict:
    return {
        "experiment": "A1",
        "order": 0,
        "value": "concat",
        "seed": seed,
        "status": "finished",
        "mAP": mAP,
        "key": f"{seed}",
        "precision": precision,
    }


def shown(renderable, tmp_path: Path) -> str:
    with (tmp_path / "shown").open("w+", encoding="utf-8") as file:
        make_console(file).print(renderable)
        file.seek(0)
        return file.read()


def test_two_precisions_are_two_lines_of_a_table(tmp_path: Path) -> None:
    rows = [row(1, 0.5, "float32"), row(2, 0.6, "float32"), row(3, 0.9, "bfloat16")]
    text = shown(experiment_table(rows, "A1"), tmp_path)
    assert "concat, float32 (2 of 3 seeds)" in text
    assert "0.550" in text
    assert "concat, bfloat16 (1 of 3 seeds)" in text
    assert "0.900" in text
    assert "0.667" not in text
    assert "not seeds of one method" in text
    alike = shown(experiment_table([row(1, 0.5, "float32"), row(2, 0.6, None)], "A1"), tmp_path)
    assert "0.550" in alike
    assert "float32" not in alike


def test_rows_without_a_precision_stand_with_the_only_one() -> None:
    assert list(by_precision([row(1, 0.5, None), row(2, 0.5, "float32")])) == [""]
    mixed = by_precision([row(1, 0.5, None), row(2, 0.5, "float32"), row(3, 0.5, "bfloat16")])
    assert list(mixed) == ["precision unknown", "float32", "bfloat16"]
    assert by_precision([]) == {}


def arm(value: str, *precisions: str | None, name: str = "") -> Arm:
    samples = tuple(Sample(seed=at, row=row(at, 0.5, one), scores=None) for at, one in enumerate(precisions))
    return Arm(value=value, samples=samples, precision=name)


def test_answers_compare_values_of_one_precision() -> None:
    single, half = arm("a", "float32", name="float32"), arm("a", "bfloat16", name="bfloat16")
    other = arm("b", "bfloat16")
    assert arm_pair([single, half, other], "a", "b") == (half, other)
    assert arm_pair([single, other], "a", "b") is None
    unknown = arm("b", None)
    assert arm_pair([single, unknown], "a", "b") == (single, unknown)


def test_a_report_has_a_line_for_each_precision(tmp_path: Path) -> None:
    from kit.reports import make_kit
    from mmcli.pipeline.ablation.records import read_rows, write_rows

    kit = make_kit(tmp_path)
    rows = read_rows(kit.ablations)
    for one in rows:
        one["precision"] = "bfloat16" if one["seed"] == rows[0]["seed"] else "float32"
    write_rows(kit.ablations, rows)
    names = [one.name for one in collect(kit.runs, kit.ablations, kit.data).arms("A3")]
    assert names == ["knn, bfloat16", "knn, float32", "classifier, bfloat16", "classifier, float32"]
    report(ReportPlan(runs=kit.runs, markdown_only=tmp_path / "report.md"))
    text = (tmp_path / "report.md").read_text().replace("*", "")
    assert "| knn, bfloat16 | 1 |" in text
    assert "not seeds of one method" in text


def test_compare_says_where_precisions_differ(mmcli, here) -> None:
    for name, precision in (("a", "float32"), ("b", "bfloat16")):
        assert mmcli("train-head", *WORDS, *FLOAT32, "--out", name)[0] == 0
        run = open_run(Path(name))
        write_info(replace(run, info=replace(run.info, precision=precision)))
    found = compare(Path("a"), Path("b")).to_json()
    assert (found["precision_a"], found["precision_b"]) == ("float32", "bfloat16")
    assert "computed in different precisions" in mmcli("compare", "a", "b")[1]
    assert "different precisions" not in mmcli("compare", "a", "a")[1]
