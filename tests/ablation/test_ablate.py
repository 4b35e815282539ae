"""``mmcli ablate`` on a very small store: rows, what is shared, what is found, what fails, and what a stop leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from mmcli.heads.metrics import evaluate
from mmcli.pipeline.ablation.records import merge, read_rows, write_rows
from mmcli.pipeline.core.metrics_file import read_metrics
from mmcli.pipeline.core.results import read_codes

SET = ("--set", "fusion.mlp_dims=[64,32]", "--set", "training.num_epochs=3", "--set", "knn.K=5", "--device", "cpu")
# What differs between two makings of one table.
TIMES = ("_s", "_ms", "_ms_p50", "_ms_p95", "_qps", "finished_at")


def rows_of(out: Path = Path("runs/ablations")) -> list[dict]:
    return read_rows(out)


def timeless(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if not key.endswith(TIMES)} for row in rows]


def values(rows: list[dict], experiment: str) -> list[tuple]:
    return [(row["value"], row["seed"], row["status"]) for row in rows if row["experiment"] == experiment]


def test_rows_and_what_is_shared(here: Path, mmcli) -> None:
    code, out, err = mmcli(
        "ablate", "A1", "A3", "C1", "C2", "C3", "C4", "--set-values", "C1=5,10,50", "--seeds", 2, "--json", *SET
    )
    assert code == 1, err  # some rows failed
    result = json.loads(out)
    # 6 fusions for 2 seeds, of which `made`'s run is one; C and A3 train nothing.
    assert (result["trained"], result["n_rows"], result["open"]) == (11, 2 * (6 + 3 + 3 + 4 + 4 + 3), 0)
    assert result["failed"] == 2  # K 50 of 40 train images, once a seed
    rows = rows_of()
    assert len(rows) == result["n_rows"]
    assert values(rows, "C1")[4:] == [("50", 42, "failed"), ("50", 43, "failed")]
    assert "K is larger than the index" in next(row["note"] for row in rows if row["status"] == "failed")
    full = [
        row
        for row in rows
        if row["value"] in {"hadamard_magnitude / rms", "knn", "5", "hamming", "softmax", "0.07"} and row["seed"] == 42
    ]
    assert len(full) == 6
    assert len({row["key"] for row in full}) == len({row["mAP"] for row in full}) == 1
    by_hand = next(path for path in Path("runs").iterdir() if path.name != "ablations")
    assert {Path("runs/ablations", row["run"]).resolve() for row in full} == {by_hand.resolve()}
    assert [row["method"] for row in rows if row["experiment"] == "A3"][::2] == ["knn", "classifier", "hybrid"]

    code, out, _ = mmcli("ablate", "A1", "C4", "--seeds", 2, "--json", *SET)
    again = json.loads(out)
    assert (again["trained"], again["evaluated"], again["failed"]) == (0, 0, 0)
    assert timeless(rows_of()) == timeless(rows)


def test_a_row_is_what_knn_eval_says(here: Path, mmcli) -> None:
    (run,) = Path("runs").iterdir()
    assert mmcli("ablate", "C2", "--only", "C2=hamming", *SET)[0] == 0
    assert mmcli("knn-eval", "--run", run, "--metric", "hamming")[0] == 0
    (row,) = rows_of()
    wanted = next(row for row in read_metrics(run) if row["method"] == "knn")
    same = [
        key
        for key in wanted
        if not key.endswith(TIMES) and key not in {"ci", "retrieval_ci", "note", "float_code_bytes"}
    ]
    assert len(same) > 60
    for key in same:
        if key in row:
            assert row[key] == wanted[key], key
    assert {key for key in same if key not in row} <= {
        "binary_code_bytes",
        "float_over_binary_bytes",
        "throughput_qps",
        "ci_undefined",
    }
    assert row["ci"]["mAP"] == wanted["ci"]["mAP"]
    assert row["ci"]["retrieval_mAP@5000"] == wanted["retrieval_ci"]["retrieval_mAP@5000"]
    assert row["tau_times_bits"] == wanted["tau_bits"]
    assert (row["float_bytes"], row["epochs"]) == (wanted["float_code_bytes"], 3)
    config = json.loads(row["config"])
    assert (
        (config["knn.K"], config["hash.bits"], config["towers"])
        == (row["knn.K"], row["hash.bits"], "frozen")
        == (5, 64, "frozen")
    )


def test_scores_give_the_figures_again(here: Path, mmcli) -> None:
    assert mmcli("ablate", "A3", "base", "--only", "base=prior,mlp,full", *SET)[0] == 0
    rows = rows_of()
    assert [row["method"] for row in rows] == ["knn", "classifier", "hybrid", "prior", "mlp", "knn"]
    (run,) = (path for path in Path("runs").iterdir() if path.name != "ablations")
    test = read_codes(run, "test")
    for row in rows:
        arrays = load_file(Path("runs/ablations") / row["scores"])
        assert arrays["scores"].dtype == np.float32
        np.testing.assert_array_equal(arrays["image_id"], test.image_id)
        np.testing.assert_array_equal(arrays["labels"], test.labels)
        figures = evaluate(arrays["scores"], arrays["labels"], threshold=0.5)
        for key in ("mAP", "P@5", "F1_micro"):
            assert figures[key] == pytest.approx(row[key], abs=1e-6), (row["method"], key)
    prior = next(row for row in rows if row["method"] == "prior")
    share = read_codes(run, "train").labels.mean(axis=0)
    np.testing.assert_allclose(
        load_file(Path("runs/ablations") / prior["scores"])["scores"], np.tile(share, (10, 1)), rtol=1e-6
    )


def test_a_shell_loop_is_not_trained_again(here: Path, mmcli) -> None:
    shutil.rmtree("runs")
    for bits in (0, 32):
        assert (
            mmcli(
                "train-head", "--bits", bits, "--seed", 3, "--device", "cpu", *SET[:-2], "--set", "data.num_workers=3"
            )[0]
            == 0
        )
    code, out, _ = mmcli("ablate", "A2", "--only", "A2=0,32", "--seed", 3, "--json", "--dry-run", *SET)
    result = json.loads(out)
    assert (code, result["n_trainings"], result["n_trainings_missing"], result["n_evaluations_missing"]) == (0, 2, 0, 2)
    assert {training["state"] for training in result["trainings"]} == {"found"}
    assert not Path("runs/ablations").exists()
    code, out, _ = mmcli("ablate", "A2", "--only", "A2=0,32", "--seed", 3, "--json", *SET)
    assert (code, json.loads(out)["trained"]) == (0, 0)
    code, out, _ = mmcli("ablate", "A2", "--only", "A2=0,32", "--seed", 4, "--json", "--dry-run", *SET)
    assert json.loads(out)["n_trainings_missing"] == 2
    code, out, _ = mmcli("ablate", "A2", "--only", "A2=0,32", "--seed", 3, "--json", "--force", *SET)
    assert json.loads(out)["trained"] == 2


def test_patches_extract_images_alone(here: Path, mmcli, miniature) -> None:
    code, out, err = mmcli("ablate", "B3", "--set-values", "B3=36,64", "--data", miniature.data, "--json", *SET)
    assert code == 0, err
    rows = rows_of()
    assert [(row["value"], row["status"], row["model.max_num_patches"]) for row in rows] == [
        ("36", "finished", 36),
        ("64", "finished", 64),
    ]
    assert rows[0]["mAP"] != rows[1]["mAP"]
    assert "60 images encoded, 4 shards of captions reused" in err
    code, out, _ = mmcli("ablate", "B3", "--set-values", "B3=36,64", "--data", "nowhere", "--json", *SET)
    assert (code, json.loads(out)["trained"], json.loads(out)["failed"]) == (0, 0, 0)


def test_what_cannot_be_made_is_a_row_that_says_so(here: Path, mmcli) -> None:
    code, out, _ = mmcli("ablate", "B3", "C4", "--set-values", "B3=36,64", "--data", "nowhere", "--json", *SET)
    assert code == 1
    assert json.loads(out)["failed"] == 1
    rows = rows_of()
    assert values(rows, "B3") == [("36", 42, "failed"), ("64", 42, "finished")]
    assert rows[0]["note"].startswith("no store of 36 patches: ")
    assert "nowhere/manifest.parquet" in rows[0]["note"]
    assert [status for *_, status in values(rows, "C4")] == ["finished"] * 3


def test_no_time_begins_nothing_and_the_next_call_goes_on(here: Path, mmcli) -> None:
    code, out, _ = mmcli("ablate", "A2", "--max-time", "0.000001s", "--json", *SET)
    result = json.loads(out)
    assert (code, result["trained"], result["open"]) == (0, 0, 4)
    assert rows_of() == []
    code, out, _ = mmcli("ablate", "A2", "--max-time", "2h", "--only", "hash.bits=32,64", "--json", *SET)
    assert (json.loads(out)["trained"], json.loads(out)["open"]) == (1, 0)


def test_a_dry_run_says_which_values_are_refused(here: Path, mmcli) -> None:
    code, out, _ = mmcli("ablate", "C1", "--seeds", 2, "--set-values", "C1=5,foo", "--dry-run", *SET)
    assert code == 0
    assert "4 rows, 2 refused" in out
    assert " ".join(out.split()).count("knn.K: got 'foo', wanted a valid integer") == 1


def test_a_dry_run_loads_no_torch(here: Path) -> None:
    program = "import sys; from mmcli import cli\ntry: cli.main()\nfinally: assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", program, "ablate", "--dry-run", "--grid", "plan", *SET]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    assert "648 rows, 324 of 972 collapsed" in done.stdout
    assert "72 searches, 648 votes" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["A9"], "wanted one of A1, A2"),
        (["A1", "--set-values", "B3"], "as in --set-values B3=36,64,100"),
        (["A1", "--set-values", "X9=1"], "no such experiment"),
        (["A1", "--only", "A1"], "--only hash.bits=64"),
        (["A1", "--only", "A1=magic"], "no row is left"),
        (["A1", "--only", "hash.bit=64"], "no such key"),
        (["A1", "--max-time", "soon"], "as in 90m"),
        (["A1", "--experiments", "nowhere.yaml"], "cannot read experiments"),
        (["--grid", "nowhere.yaml"], "cannot read experiments"),
        (["A1", "--set", "model.max_num_patches=512"], "experiment B3 varies it"),
        (["A1", "--seed", str(2**32 - 1), "--seeds", "2"], "no such seeds"),
        (["B1", "--seeds", "4000000000", "--dry-run"], "too many rows"),
        (["A1", "--ray-address", "x"], "give both or neither"),
    ],
)
def test_a_wrong_word_is_one_line(here: Path, mmcli, words: list[str], message: str) -> None:
    code, out, err = mmcli("ablate", *words, *SET)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not Path("runs/ablations").exists()


def test_one_process_at_a_time(here: Path, mmcli) -> None:
    from mmcli.pipeline.core.run_folders import hold

    Path("runs/ablations").mkdir(parents=True)
    with hold(Path("runs/ablations")):
        code, _, err = mmcli("ablate", "C1", *SET)
    assert code == 2
    assert "under way" in err


def test_other_rows_stay_and_those_of_another_base_leave(here: Path, mmcli) -> None:
    mmcli("ablate", "C3", "C4", *SET)
    first = rows_of()
    mmcli("ablate", "C4", "--seed", 43, *SET)
    assert len(rows_of()) == len(first) + 3  # another seed of the same base stands beside the first
    _, out, _ = mmcli("ablate", "C4", *SET, "--set", "knn.K=7")
    assert "6 rows of another base configuration left the table" in out
    rows = rows_of()
    assert [row["experiment"] for row in rows] == ["C3"] * 4 + ["C4"] * 3
    assert {row["knn.K"] for row in rows if row["experiment"] == "C4"} == {7}
    _, out, _ = mmcli("ablate", "C4", "--json", *SET)
    assert json.loads(out)["evaluated"] == 0
    assert timeless(rows_of()) == timeless(first)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    text = dict.fromkeys(
        ("varies", "note", "key", "training_key", "base", "run", "scores", "method", "split", "preset", "config"), "x"
    )
    rows = [
        {
            "experiment": "A",
            "value": "1",
            "order": 0,
            "seed": 1,
            "status": "finished",
            **text,
            "mAP": 0.5,
            "ci": {"mAP": [0.1, 0.9]},
            "knn.K": 5,
            "head": "mlp",
            "loss.focal_loss": True,
            "radius_recall": [0.1, 1.0],
        },
        {"experiment": "A", "value": "2", "order": 1, "seed": 1, "status": "failed", **text},
    ]
    write_rows(tmp_path, rows)
    first, second = read_rows(tmp_path)
    assert first == rows[0]
    assert {key for key, value in second.items() if value is not None} == set(rows[1])
    schema = pq.read_schema(tmp_path / "rows.parquet")
    assert [str(schema.field(name).type) for name in ("knn.K", "mAP", "head", "loss.focal_loss")] == [
        "int64",
        "double",
        "string",
        "bool",
    ]
    merged, left = merge(read_rows(tmp_path), [{**rows[0], "base": "y", "value": "3"}])
    assert (left, [row["value"] for row in merged]) == (2, ["3"])


def test_a_grid_file_brings_its_own_sections(here: Path, mmcli) -> None:
    Path("grid.yaml").write_text(
        "fusion: {mlp_dims: [64, 32]}\ntraining: {num_epochs: 1}\nknn: {K: 5, voting_strategy: uniform}\n"
        "grid_search: {hash_bits: [32, 64], K_neighbors: [3, 5], tau: [0.03, 0.15], freeze_towers: [true, last-2]}\n"
    )
    words = ("ablate", "--grid", "grid.yaml", "--device", "cpu", "--json")
    result = json.loads(mmcli(*words, "--dry-run")[1])
    # Uniform votes have no tau: 2 bits x 2 K x 2 towers.
    assert (result["n_asked"], result["n_rows"], result["n_trainings"], result["n_evaluations"]) == (16, 8, 4, 8)
    assert "2 trainings of towers are not estimated" in result["estimate_basis"]
    code, out, _ = mmcli(*words, "--only", "towers=frozen")
    assert (code, json.loads(out)["trained"], json.loads(out)["n_rows"]) == (0, 2, 4)
    rows = rows_of()
    assert rows[0]["value"] == "bits 32, K 3, tau 0.03/0.15, towers frozen"
    assert {row["status"] for row in rows} == {"collapsed"}
    assert rows[0]["note"] == "tau matters to softmax votes alone"
    assert {(row["hash.bits"], row["knn.K"], row["training.num_epochs"]) for row in rows} == {
        (32, 3, 1),
        (32, 5, 1),
        (64, 3, 1),
        (64, 5, 1),
    }
    Path("other.yaml").write_text("knn: {K: 4}\n")
    code, _, err = mmcli(*words, "--config", "other.yaml")
    assert code == 2
    assert "two configurations" in err


def killed_at(command: list[str], cwd: Path, sign: int) -> int:
    """The exit code of a call that is stopped as soon as it has kept an evaluation; 0 where it was done before that."""

    def n_kept() -> int:
        return len(list((cwd / "runs/ablations/evaluations").glob("*.json")))

    before = n_kept()
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and n_kept() == before:
        time.sleep(0.002)
    process.send_signal(sign)
    process.communicate()
    return process.returncode


def test_killed_and_resumed_the_table_is_the_same(here: Path, tmp_path_factory: pytest.TempPathFactory, mmcli) -> None:
    names = ("A2", "C4")
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(here, other, dirs_exist_ok=True)
    assert mmcli("ablate", *names, *SET)[0] == 0
    command = [sys.executable, "-m", "mmcli", "ablate", *names, *SET, "--quiet"]
    assert killed_at(command, other, signal.SIGKILL) == -signal.SIGKILL
    assert killed_at(command, other, signal.SIGTERM) in {130, 0}
    assert rows_of(other / "runs/ablations")  # told to end, it leaves a table
    assert killed_at(command, other, signal.SIGKILL) in {-signal.SIGKILL, 0}
    subprocess.run(command, cwd=other, check=True, capture_output=True)
    mine, theirs = (timeless(rows_of(folder / "runs/ablations")) for folder in (here, other))
    assert len(mine) == 4 + 3
    assert mine == theirs


@pytest.mark.slow
def test_two_workers_make_the_same_table(
    here: Path, tmp_path_factory: pytest.TempPathFactory, mmcli, monkeypatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(here, other, dirs_exist_ok=True)
    assert mmcli("ablate", "A2", "C1", "--set-values", "C1=5,20", *SET)[0] == 0
    alone = timeless(rows_of())
    os.chdir(other)
    code, _, err = mmcli(
        "ablate", "A2", "C1", "--set-values", "C1=5,20", "--workers", 2, "--out", other / "runs/ablations", *SET
    )
    assert code == 0, err
    parallel = timeless(rows_of(other / "runs/ablations"))
    assert [(row["experiment"], row["value"], row["status"], row["mAP"]) for row in alone] == [
        (row["experiment"], row["value"], row["status"], row["mAP"]) for row in parallel
    ]


def blocks_of_loops(repo: Path, *, whole: bool) -> list[str]:
    """The shell of docs/ablations.md, for a very small store and one seed: all of it, or A1 to A3 and C1 to C4."""
    import re

    text = (repo / "docs" / "ablations.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 6
    if not whole:
        blocks = [*blocks[:3], blocks[-1].replace("A1 A2 A3 B2 B4 C1 C2 C3 C4 M1 M2 base", "A1 A2 A3 C1 C2 C3 C4")]
    small = " ".join(SET)
    first = f'OPTIONS="--preset small {small}"\nSEEDS="42"\n'
    last = blocks[-1].replace(
        "--store demo/store --preset small --set training.num_epochs=100 --seeds 3",
        f"--preset small {small} --set-values C1=5,10,20 --json",
    )
    assert last != blocks[-1]
    return [first, *(block.replace("5,10,20,50", "5,10,20") for block in blocks[1:-1]), last]


@pytest.mark.parametrize(
    ("whole", "heads"), [(False, 6 + 3), pytest.param(True, 6 + 3 + 7 + 4 + 4, marks=pytest.mark.slow)]
)
def test_the_loops_of_the_docs_make_every_run(whole, heads, here: Path, mmcli, repo: Path, tmp_path_factory) -> None:
    """The shell runs a stand-in that writes the words down; the words run here, where torch is loaded once."""
    shutil.rmtree("runs")
    stand_in = tmp_path_factory.mktemp("bin") / "mmcli"
    stand_in.write_text('#!/bin/sh\n{ for word in "$@"; do printf "%s\\037" "$word"; done; echo; } >> "$CALLS"\n')
    stand_in.chmod(0o755)
    script = "set -eu\n" + "".join(blocks_of_loops(repo, whole=whole))
    environment = {**os.environ, "PATH": f"{stand_in.parent}:{os.environ['PATH']}", "CALLS": str(here / "calls")}
    subprocess.run(["bash", "-c", script], env=environment, check=True)
    calls = [line.split("\x1f")[:-1] for line in (here / "calls").read_text().splitlines()]
    assert [calls[0][0], calls[-1][0]] == ["train-head", "ablate"]
    for words in calls:
        code, out, err = mmcli(*words)
        assert code == 0, (words, err)
    result = json.loads(out)
    assert sum(words[0] == "train-head" for words in calls) == heads
    failed = {(row["experiment"], row["value"]) for row in result["rows"] if row["status"] == "failed"}
    assert failed <= {("base", "zero-shot")}  # its checkpoint is not beside this copy of the store
    assert result["open"] == 0
    trained = (
        {path.name for path in Path("runs/ablations/runs").iterdir()} if Path("runs/ablations/runs").is_dir() else set()
    )
    assert not [name for name in trained if "zero-shot" not in name]
