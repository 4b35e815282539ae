"""Verdicts that are earned, paired over images and averaged over seeds, and corrections against slow ones."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from scipy import stats

from kit.reports import SEEDS, Kit, make_kit
from mmcli.heads.bootstrap import difference, resample
from mmcli.heads.metrics import evaluate
from mmcli.pipeline.evaluation.compare import EQUAL, Arm, Pairs, Sample, best_of, verdict
from mmcli.pipeline.report.answers import answers, holm, speed_ratio
from mmcli.pipeline.report.collect import Inputs, collect


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return make_kit(tmp_path_factory.mktemp("kit"))


@pytest.fixture(scope="module")
def inputs(kit: Kit) -> Inputs:
    return collect(kit.runs, kit.ablations, kit.data)


def arms(inputs: Inputs, experiment: str) -> dict[str, Arm]:
    return {arm.name: arm for arm in inputs.arms(experiment)}


def test_each_question_has_its_verdict(inputs: Inputs) -> None:
    found = {one.name: one for one in answers(inputs, None, Pairs())}
    magnitude, hadamard, neighbours, bits, speed, classes = (
        found[name] for name in ("magnitude", "hadamard", "neighbours", "bits", "speed", "classes")
    )
    assert magnitude.answer.startswith("Yes: +")
    assert magnitude.comparisons[0].verdict == "better"
    assert hadamard.answer.startswith("Not distinguishable at this size")
    assert neighbours.answer.startswith("They cost 0.")
    assert [one.verdict for one in bits.comparisons] == ["worse", EQUAL]
    assert "32 bits cost 0." in bits.answer
    assert "64 bits cannot be told" in bits.answer
    assert speed.comparisons[0].verdict == "better"
    assert speed.answer.startswith("Yes: 3.00 times as fast [3.00, 3.00].")
    assert classes.gaps[0].command == "mmcli train-head && mmcli knn-eval"
    assert "128 bits" in bits.gaps[0].text
    assert "ablate A2 --seeds 3" in bits.gaps[0].command
    assert "ablate A1 M2 --seeds 3" in magnitude.gaps[0].command


def test_a_difference_is_that_of_means_over_shared_resamples(inputs: Inputs, kit: Kit) -> None:
    both = arms(inputs, "A3")
    found = Pairs().difference(both["knn"], both["classifier"])
    figures, drawn = [], []
    for name in ("knn", "classifier"):
        files = [load_file(sample.scores) for sample in both[name].samples]
        assert len(files) == len(SEEDS)
        figures.append([evaluate(one["scores"], one["labels"])["mAP"] for one in files])
        drawn.append(np.mean([resample(one["scores"], one["labels"])["mAP"] for one in files], axis=0))
    A, B = map(np.mean, figures)
    wanted = difference(drawn[0], drawn[1], figure=A - B)
    assert (found.A, found.B, found.low, found.high, found.p) == pytest.approx((A, B, *wanted))
    assert found.spread == pytest.approx(np.std(np.subtract(*figures), ddof=1))
    back = Pairs().difference(both["classifier"], both["knn"])
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))


def test_scores_of_other_images_or_labels_are_not_compared(inputs: Inputs, tmp_path: Path) -> None:
    both = arms(inputs, "A3")
    for change in ("image_id", "labels"):
        sample = both["knn"].samples[0]
        arrays = load_file(sample.scores)
        arrays[change] = arrays[change] + 1 if change == "image_id" else 1 - arrays[change]
        save_file(arrays, tmp_path / f"{change}.safetensors")
        other = replace(both["knn"], samples=(replace(sample, scores=tmp_path / f"{change}.safetensors"),))
        assert Pairs().difference(other, both["classifier"]) is None


def test_the_order_of_images_in_a_file_changes_nothing(inputs: Inputs, tmp_path: Path) -> None:
    both = arms(inputs, "A3")
    sample = both["knn"].samples[0]
    one = replace(both["knn"], samples=(sample,))
    order = np.random.default_rng(0).permutation(len(load_file(sample.scores)["image_id"]))
    save_file({key: value[order] for key, value in load_file(sample.scores).items()}, tmp_path / "x.safetensors")
    other = replace(one, samples=(replace(sample, scores=tmp_path / "x.safetensors"),))
    assert Pairs().difference(other, both["classifier"]) == Pairs().difference(one, both["classifier"])


def test_the_best_is_bold_where_every_interval_says_so(inputs: Inputs) -> None:
    found = arms(inputs, "A1")
    assert best_of(list(found.values()), "mAP", Pairs()).name == "hadamard_magnitude / rms"
    even = [found["hadamard / rms"], found["concat / rms"]]
    assert best_of(even, "mAP", Pairs()) is None  # the same scores
    assert best_of([found["concat / rms"]], "mAP", Pairs()) is None
    nothing = replace(
        found["concat / rms"], samples=tuple(replace(one, scores=None) for one in found["concat / rms"].samples)
    )
    assert best_of([found["hadamard_magnitude / rms"], nothing], "mAP", Pairs()) is None  # no scores, no interval


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_the_slow_one(p: list[float]) -> None:
    order = np.argsort(p, kind="stable")
    wanted = np.zeros(len(p))
    for rank, at in enumerate(order):
        wanted[at] = max(min(1, (len(p) - r) * p[order[r]]) for r in range(rank + 1))
    assert holm(p) == pytest.approx(wanted)


def test_the_ratio_has_a_t_interval_over_seeds() -> None:
    times = {"hamming": (1.0, 1.1, 0.9, 1.2), "cosine": (2.0, 2.4, 1.7, 2.9)}

    def arm(name: str, n: int) -> Arm:
        rows = [{"query_latency_ms_p50": value} for value in times[name][:n]]
        return Arm(value=name, samples=tuple(Sample(seed=at, row=row, scores=None) for at, row in enumerate(rows)))

    found = speed_ratio(arm("hamming", 4), arm("cosine", 4))
    logs = np.log(np.divide(times["cosine"], times["hamming"]))
    low, high = stats.t.interval(0.95, 3, loc=logs.mean(), scale=stats.sem(logs))
    assert (found.difference, found.low, found.high) == pytest.approx(
        (np.exp(logs.mean()), np.exp(low), np.exp(high)), rel=1e-9
    )
    assert found.verdict == "better"
    once = speed_ratio(arm("hamming", 1), arm("cosine", 1))
    assert (once.low, once.high, once.verdict) == (None, None, "measured once")


def test_a_verdict_comes_from_the_interval_alone() -> None:
    assert [verdict(*ends) for ends in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.2), (0.0, 0.1))] == [
        "better",
        "worse",
        EQUAL,
        EQUAL,
    ]


def test_rows_that_failed_have_no_figures_and_say_why(inputs: Inputs) -> None:
    (arm,) = inputs.arms("B3")
    assert (arm.samples, arm.mean("mAP")) == ((), None)
    assert arm.note.startswith("no store")


def test_shared_evaluations_and_runs_count_once(inputs: Inputs) -> None:
    rows = [row for row in inputs.rows if row["experiment"] == "base"]
    first = next(row for row in rows if row["value"] == "zero-shot")
    rows = [first | {"seed": seed} for seed in SEEDS] + [row for row in rows if row["value"] == "full"]
    shared = {"hadamard_magnitude / rms": "true m", "hadamard / rms": "no m"}
    again = [row | {"experiment": "M2", "value": shared[row["value"]]} for row in inputs.rows if row["value"] in shared]
    changed = replace(inputs, rows=(*rows, *again, *(row for row in inputs.rows if row["experiment"] == "A1")))
    assert [len(arm.samples) for arm in changed.arms("base")] == [1, len(SEEDS)]
    magnitude = answers(changed, None, Pairs())[0]
    assert [one.what for one in magnitude.comparisons] == ["with magnitude against without, blocks of equal scale"]


def test_the_command_of_an_experiment_is_of_the_same_base(inputs: Inputs, kit: Kit, monkeypatch) -> None:
    monkeypatch.chdir(kit.root)
    assert inputs.ablate("A2", "C1", seeds=5) == "mmcli ablate A2 C1 --seeds 5 --store gone --out runs/ablations"
    known = inputs.runs["head"]
    ran = [
        "bin/mmcli",
        "ablate",
        "A1",
        "--seeds",
        "3",
        "--set",
        "training.num_epochs=7",
        "--workers",
        "2",
        "--set",
        "knn.K=9",
    ]
    made = replace(
        inputs, runs={"a": known, "b": replace(known, environment={"command": ran})}, ablations=Path("runs/ablations")
    )
    wanted = "mmcli ablate A2 --seeds 3 --store gone --set training.num_epochs=7 --set knn.K=9"
    assert made.ablate("A2") == wanted
    small = replace(known, info=replace(known.info, preset="small"))
    rows = ({"experiment": "B3", "value": "36"},)
    assert replace(made, runs={"a": small}, rows=rows).ablate("B3").endswith("--preset small --experiments miniature")
    assert "miniature" not in replace(made, rows=rows).ablate("A1")
