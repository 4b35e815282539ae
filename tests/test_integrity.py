"""Files of a run that were damaged, exchanged or brought from another run are refused in one line where they are read."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mmcli import InputError, load_head
from mmcli.heads.tensor_files import load_arrays, read_about, write_tensors
from mmcli.pipeline.core.results import read_codes
from mmcli.pipeline.core.run_folders import RunPaths
from mmcli.pipeline.evaluation.compare import compare
from mmcli.pipeline.evaluation.metrics import read_scores


def run_of(here: Path) -> Path:
    return next((here / "runs").iterdir())


def flip(path: Path, name: str | None = None, *, seed: int = 0) -> None:
    """Flip one bit of the data of a safetensors file, of one of its arrays where it is named."""
    data, rng = bytearray(path.read_bytes()), np.random.default_rng(seed)
    start, stop = 8 + int.from_bytes(data[:8], "little"), len(data)
    if name is not None:
        content = load_file(path)[name].tobytes()
        start = bytes(data).index(content, start)
        stop = start + len(content)
    data[int(rng.integers(start, stop))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


@pytest.fixture
def evaluated(mmcli, here: Path) -> Path:
    """A run with scores of neighbours."""
    assert mmcli("knn-eval", "-q")[0] == 0
    return run_of(here)


@pytest.mark.parametrize("name", ["labels", "soft", "packed", "logits", "image_id"])
def test_one_flipped_bit_of_codes_is_refused(mmcli, evaluated: Path, name: str) -> None:
    flip(RunPaths(evaluated).codes("test"), name)
    before = (evaluated / "metrics.json").read_bytes()
    for words in (("knn-eval",), ("compare", evaluated, evaluated), ("report", "--runs", evaluated.parent)):
        code, _, err = mmcli(*words, "-q")
        assert code == 2, words
        assert "damaged codes" in err
        assert len(err.splitlines()) == 1
    assert (evaluated / "metrics.json").read_bytes() == before


def test_an_index_is_never_built_from_damaged_codes(mmcli, evaluated: Path) -> None:
    flip(RunPaths(evaluated).codes("train"), "soft")
    code, _, err = mmcli("index", "build", "-q")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "damaged codes" in err
    assert not (evaluated / "index.safetensors").exists()


@pytest.mark.parametrize("seed", range(5))
def test_a_flipped_bit_of_a_checkpoint_is_refused(made: Path, tmp_path: Path, seed: int) -> None:
    run = shutil.copytree(run_of(made), tmp_path / "run")
    best = run / "checkpoints" / "checkpoints.json"
    for path in (run / "checkpoints").glob("*.safetensors"):
        flip(path, seed=seed)
    flip(run / "model" / "model.safetensors", seed=seed)
    assert best.is_file()
    for place in (run, run / "model", path):
        with pytest.raises(InputError, match="checksum"):
            load_head(place)


def test_one_flipped_bit_of_scores_is_refused(evaluated: Path) -> None:
    flip(RunPaths(evaluated).scores("knn", "test"), "scores")
    with pytest.raises(InputError, match=r"damaged scores.*knn-eval --run"):
        compare(evaluated, evaluated, method_a="classifier", method_b="knn")


def test_predict_and_report_refuse_damage_in_one_line(mmcli, evaluated: Path, miniature) -> None:
    flip(next((evaluated / "checkpoints").glob("*.safetensors")))
    picture = next((miniature.data / "val2014").glob("*.jpg"))
    for path in (evaluated / "checkpoints").glob("*.safetensors"):
        flip(path, seed=1)
    code, _, err = mmcli("predict", picture, "--caption", "a dog", "-q")
    assert (code, len(err.splitlines())) == (2, 1), err
    assert "damaged checkpoint" in err


def test_codes_and_scores_under_another_name_are_refused(evaluated: Path) -> None:
    shutil.copy(RunPaths(evaluated).codes("train"), RunPaths(evaluated).codes("test"))
    with pytest.raises(InputError, match=r"codes of another split.*got train, wanted test"):
        read_codes(evaluated, "test")
    shutil.copy(RunPaths(evaluated).scores("classifier", "test"), RunPaths(evaluated).scores("knn", "test"))
    with pytest.raises(InputError, match=r"scores of another method.*got classifier, wanted knn"):
        read_scores(evaluated, "knn", "test")


def test_codes_and_checkpoints_of_another_run_are_refused(mmcli, here: Path) -> None:
    mine, other = run_of(here), here / "runs" / "other"
    words = ("--set", "fusion.mlp_dims=[64, 32]", "--set", "knn.K=5", "--epochs", 1, "--device", "cpu", "--seed", 7)
    assert mmcli("train-head", *words, "--out", other, "-q")[0] == 0
    shutil.copy(RunPaths(other).codes("train"), RunPaths(mine).codes("train"))
    with pytest.raises(InputError, match="codes of another run"):
        read_codes(mine, "train")
    for path in (mine / "checkpoints").glob("*.safetensors"):
        shutil.copy(other / "checkpoints" / "epoch-001.safetensors", path)
    with pytest.raises(InputError, match="a checkpoint of another run"):
        load_head(mine)


def test_a_run_that_was_copied_or_moved_is_the_same_run(evaluated: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(evaluated, tmp_path / "elsewhere")
    assert len(read_codes(copy, "test")) == len(read_codes(evaluated, "test"))
    assert load_head(copy) is not None


def test_files_from_before_there_were_checksums_are_read(evaluated: Path) -> None:
    for path in (RunPaths(evaluated).codes("test"), RunPaths(evaluated).scores("knn", "test")):
        save_file(load_file(path), path)
    assert len(read_codes(evaluated, "test")) == len(read_scores(evaluated, "knn", "test")["scores"])


def test_a_checksum_covers_every_bit_of_the_file(tmp_path: Path) -> None:
    path, arrays = tmp_path / "a.safetensors", {"a": np.arange(5, dtype=np.int16), "b": np.zeros((0, 3), np.float32)}
    write_tensors(path, save_file, arrays, {"x": "é\n", "b": "2"})
    whole = path.read_bytes()
    for _ in range(4):
        write_tensors(path, save_file, arrays, {"x": "é\n", "b": "2"})
        assert path.read_bytes() == whole
    assert read_about(path) == {"x": "é\n", "b": "2"}
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            read, _ = load_arrays(path)
        except ValueError:
            continue
        # The one name that says that there is a checksum: without it the file is as of before.
        assert b"mmcli_sha256" not in damaged
        assert {name: values.tolist() for name, values in read.items()} == {"a": [0, 1, 2, 3, 4], "b": []}
