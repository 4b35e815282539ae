"""The run that is looked into: its votes are those of its evaluation, and what is shown of them is what they say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from kit.reports import NAMES, Kit, make_kit
from mmcli import InputError
from mmcli.pipeline.core.metrics_file import read_metrics
from mmcli.pipeline.evaluation.metrics import read_scores
from mmcli.pipeline.report import analysis as analysis_module
from mmcli.pipeline.report.analysis import RunAnalysis, analyse, class_table, confusion_table, failures, queries
from mmcli.pipeline.report.collect import FinishedRun, choose_run, collect, read_codes_of, read_finished_run


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return make_kit(tmp_path_factory.mktemp("kit"))


def analyse_run(folder: Path) -> RunAnalysis:
    return analyse(read_codes_of(read_finished_run(folder), ""))


@pytest.fixture(scope="module")
def analysis(kit: Kit) -> RunAnalysis:
    return analyse_run(kit.run)


def test_votes_and_threshold_are_those_that_knn_eval_wrote(mmcli, here: Path) -> None:
    run = next((here / "runs").iterdir())
    for words in ((), ("--k", 7, "--vote", "rank"), ("--ties", "average"), ("--metric", "cosine", "--ties", "index")):
        code, _, err = mmcli("knn-eval", "--run", run, *words, "--quiet")
        assert code == 0, err
        found = analyse_run(run)
        np.testing.assert_array_equal(found.scores, read_scores(run, "knn", "test")["scores"])
        assert found.threshold == read_metrics(run)[0]["threshold_tuned"]


def test_a_run_is_chosen_by_val_among_those_with_hash_codes(kit: Kit, tmp_path: Path) -> None:
    inputs = collect(kit.runs, kit.ablations, None)
    chosen = choose_run(inputs, None)
    run = chosen.finished
    assert run.folder == kit.run
    assert "val mAP" in chosen.reason
    better = replace(run, history=({"epoch": 1, "val_mAP": 0.9},))
    control = replace(better, config="fusion:\n  magnitude: shuffled\n")
    runs = {"head": run, "variant": better, "shuffled": control}

    def choice(**changes: object) -> FinishedRun:
        return choose_run(replace(inputs, **changes), None).finished

    assert choice(runs=runs) is run  # only the first lies below runs itself
    assert choice(runs=runs, n_by_hand=2) is better
    assert choice(runs={"head": run, "shuffled": control}, n_by_hand=2) is run
    full = {**inputs.rows[0], "experiment": "base", "value": "full", "run": "runs/variant"}
    assert choice(runs=runs, rows=(full,)) is better
    chosen = choose_run(replace(inputs, runs={"shuffled": control}, n_by_hand=0), None)
    assert (chosen.finished, chosen.reason.endswith("of any experiment")) == (control, True)
    with pytest.raises(InputError, match="no run"):
        choose_run(inputs, tmp_path)


def test_queries_go_evenly_from_the_best_to_the_worst(analysis: RunAnalysis) -> None:
    found = queries(analysis)
    assert len(found) == 12
    ranked = [one.AP for one in found]
    assert ranked == sorted(ranked, reverse=True)
    assert (ranked[0], ranked[-1]) == (np.nanmax(analysis.image_AP), np.nanmin(analysis.image_AP))
    rows = {int(image): row for row, image in enumerate(analysis.query.image_id)}
    voters = {int(image): row for row, image in enumerate(analysis.base.image_id)}
    for one in found:
        row = rows[one.image.image_id]
        y = analysis.query.labels[row]
        assert pytest.approx(average_precision_score(y, analysis.scores[row])) == one.AP
        assert len(one.neighbours) == 9
        distance = [
            (analysis.base.packed[voters[near.image_id]] ^ analysis.query.packed[row]) for near in one.neighbours
        ]
        assert [f"{int(np.unpackbits(d).sum())} bit" for d in distance] == [
            near.distance.removesuffix("s") for near in one.neighbours
        ]
        states = {tag.name: tag.state for tag in one.image.tags}
        for c, name in enumerate(NAMES):
            wanted = {(True, True): "right", (True, False): "wrong", (False, True): "missed"}.get(
                (bool(analysis.scores[row, c] >= analysis.decision_threshold), bool(y[c]))
            )
            assert states.get(name) == wanted


def test_failures_are_the_surest_wrong_and_the_least_sure_missed(analysis: RunAnalysis) -> None:
    found = failures(analysis)
    assert len(found) == len(NAMES)
    assert [one.AP for one in found] == sorted(one.AP for one in found)
    for one in found:
        c = NAMES.index(one.category)
        rows = range(len(analysis.query))
        wrong = [
            r for r in rows if analysis.scores[r, c] >= analysis.decision_threshold and not analysis.query.labels[r, c]
        ]
        missed = [
            r for r in rows if analysis.scores[r, c] < analysis.decision_threshold and analysis.query.labels[r, c]
        ]
        assert (one.n_false_positive, one.n_false_negative) == (len(wrong), len(missed))
        assert [image.score for image in one.false_positives] == pytest.approx(
            sorted((analysis.scores[r, c] for r in wrong), reverse=True)[:4]
        )
        assert [image.score for image in one.false_negatives] == pytest.approx(
            sorted(analysis.scores[r, c] for r in missed)[:4]
        )


def test_confusions_count_images(analysis: RunAnalysis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis_module, "N_CONFUSIONS", 1000)
    table = confusion_table(analysis)
    counted = {(row[0].text, row[1].text): row[2].sort for row in table.rows}
    y, predicted = analysis.query.labels.astype(bool), analysis.scores >= analysis.decision_threshold
    for c, missed in enumerate(NAMES):
        for d, said in enumerate(NAMES):
            wanted = sum(y[r, c] and not predicted[r, c] and predicted[r, d] and not y[r, d] for r in range(len(y)))
            assert counted.get((missed, said), 0) == wanted


def test_the_table_of_classes_is_sorted_and_sortable(analysis: RunAnalysis) -> None:
    table = class_table(analysis)
    APs = [row[3].sort for row in table.rows]
    assert APs == sorted(APs)
    assert {row[0].text for row in table.rows} == set(NAMES)
    wanted = average_precision_score(analysis.query.labels, analysis.scores, average=None)
    assert sorted(APs) == pytest.approx(sorted(wanted))


def test_a_test_split_without_labels_fails_nothing(tmp_path: Path) -> None:
    from mmcli.pipeline.core.results import read_codes, write_codes
    from mmcli.pipeline.report.report import ReportPlan, report

    kit = make_kit(tmp_path, rows=False)
    codes = read_codes(kit.run, "test")
    write_codes(kit.run, "test", replace(codes, labels=np.zeros_like(codes.labels)))
    (kit.run / "metrics.json").unlink()
    result = report(ReportPlan(runs=kit.runs, data=kit.data, out=tmp_path / "report"))
    assert "Cannot be told: no test image has a label" in (tmp_path / "report" / "report.md").read_text()
    assert result.run == kit.run
