"""Run folders: found again, refused when they are not what is needed, never half-finished as whole."""

import errno
import json
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from safetensors import SafetensorError

from kit.runs import make_info
from mmcli import InputError
from mmcli.pipeline.core import run_folders
from mmcli.pipeline.core.config import Config, load_config
from mmcli.pipeline.core.files import write_text, write_whole
from mmcli.pipeline.core.results import Codes, read_codes, write_codes
from mmcli.pipeline.core.run import environment, finish_run, newest_run, open_run, read_info, start_run
from mmcli.pipeline.core.run_folders import RunPaths


def start(runs: Path, kind: str = "train-head", **options):
    return start_run(make_info("ab", kind), Config(), label="x", out=None, runs=runs, device="cpu", **options)


def test_newest_finished_run_of_the_kind(tmp_path: Path) -> None:
    first, second = start(tmp_path), start(tmp_path)
    other, unfinished = start(tmp_path, kind="zero-shot"), start(tmp_path)
    assert len({run.folder for run in (first, second, other, unfinished)}) == 4
    for run in (second, first, other):
        finish_run(run, [{"method": "m", "mAP": 0.5}])
    assert newest_run(tmp_path).folder == second.folder
    assert newest_run(tmp_path, kind="zero-shot").folder == other.folder
    with pytest.raises(InputError, match="running"):
        open_run(unfinished.folder)
    with pytest.raises(InputError, match="zero-shot"):
        open_run(other.folder)


@pytest.mark.parametrize("damage", ["truncated", "fifo", "denied", "EIO"])
def test_a_newest_run_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch, damage: str) -> None:
    """Nobody who asks for the newest run is to get an older one without a word."""
    older, newer = (finish_run(start(tmp_path), [{"method": "m", "mAP": 0.5}]) for _ in range(2))
    mark = newer.folder / "run.json"
    if damage == "truncated":
        mark.write_text(mark.read_text()[:-20])
    elif damage == "fifo":
        mark.unlink()
        os.mkfifo(mark)
    else:
        number, read = (errno.EACCES if damage == "denied" else errno.EIO), Path.read_bytes

        def refuse(path: Path) -> bytes:
            if path == mark:
                raise OSError(number, os.strerror(number), str(path))
            return read(path)

        monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=f"cannot read a run that may be the newest: {mark}: .*--run") as caught:
        newest_run(tmp_path)
    assert "\n" not in str(caught.value)
    os.utime(mark, (0, 0))  # one that was written before the older run began is no newest run
    assert newest_run(tmp_path).folder == older.folder
    mark.unlink()
    mark.touch()
    assert newest_run(tmp_path).folder == older.folder


def test_a_users_lock_file_in_a_folder_stays(tmp_path: Path) -> None:
    """Whoever holds a folder, as the demo does, removes its own lock file and no other."""
    with run_folders.hold(tmp_path, keep=False):
        assert (tmp_path / ".lock").is_file()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".lock").write_text("mine")
    with pytest.raises(InputError, match=r"/\.lock: got a file that mmcli did not write, .*; move it away"):
        run_folders.hold(tmp_path, keep=False).__enter__()
    assert (tmp_path / ".lock").read_text() == "mine"


def test_a_name_that_is_not_utf8_is_refused_before_the_work(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    options = {"label": "x", "runs": tmp_path, "device": "cpu"}
    with pytest.raises(InputError, match=r"a name that is not UTF-8: .*caf\\xe9"):
        start_run(make_info("ab", "train-head"), Config(), out=tmp_path / name, **options)
    with pytest.raises(InputError, match="a name that is not UTF-8"):
        start_run(replace(make_info("ab", "train-head"), store=f"data/{name}"), Config(), out=None, **options)
    assert list(tmp_path.iterdir()) == []


def test_the_state_of_git_never_decides_whether_a_run_starts(tmp_path: Path, monkeypatch) -> None:
    """Git gives the names of files as bytes of any encoding."""
    git = tmp_path / "bin" / "git"
    git.parent.mkdir()
    git.write_text("#!/bin/sh\nprintf '?? caf\\351\\n'\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(git.parent), prepend=os.pathsep)
    state = environment("cpu", 1)["git"]
    assert state["dirty"] is True
    git.write_text("#!/bin/sh\nexit 1\n")
    assert environment("cpu", 1)["git"] is None


def test_a_run_describes_itself(tmp_path: Path) -> None:
    run = finish_run(start(tmp_path), [{"method": "knn", "mAP": 0.5}, {"method": "classifier", "mAP": 0.4}])
    assert open_run(run.folder).info == replace(run.info, status="finished")
    assert load_config(run.folder / "config.yaml") == Config()
    metrics = json.loads((run.folder / "metrics.json").read_text())
    assert metrics["method"] == "knn"
    assert metrics["others"] == [{"method": "classifier", "mAP": 0.4}]
    environment = json.loads((run.folder / "environment.json").read_text())
    assert {"mmcli", "python", "device", "seed", "packages", "git"} <= environment.keys()


def test_force_replaces_a_folder_only_if_it_is_a_run(tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    options = {"label": "x", "runs": tmp_path, "device": "cpu"}
    for force in (False, True):
        with pytest.raises(InputError, match=str(out)):
            start_run(make_info("ab", "train-head"), Config(), out=out, force=force, **options)
    assert (out / "thesis.tex").read_text() == "years of work"
    with pytest.raises(InputError, match=r"cannot write: .*thesis\.tex.*File exists; move away"):
        start_run(make_info("ab", "train-head"), Config(), out=out / "thesis.tex", **options)
    mine = tmp_path / "run"
    start_run(make_info("ab", "train-head"), Config(), out=mine, **options)
    with pytest.raises(InputError, match="--force"):
        start_run(make_info("ab", "train-head"), Config(), out=mine, **options)
    start_run(make_info("ab", "train-head"), Config(), out=mine, force=True, **options)


def started_together(start: Callable[[], object], n: int = 8) -> list[object]:
    """What n calls that begin at one moment return; an ``InputError`` for those that were refused."""
    barrier = Barrier(n)

    def one(_: int) -> object:
        barrier.wait()
        try:
            return start()
        except InputError as error:
            return error

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(one, range(n)))


def test_runs_started_together_never_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmcli.pipeline.core.run.environment", lambda device, seed: {})
    for number in range(10):
        runs = started_together(lambda number=number: start(tmp_path / str(number)))
        assert len({run.folder for run in runs}) == len(runs)


@pytest.mark.parametrize("there", ["absent", "empty"])
def test_a_folder_that_many_ask_for_goes_to_one_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    monkeypatch.setattr("mmcli.pipeline.core.run.environment", lambda device, seed: {})
    options = {"label": "x", "runs": tmp_path, "device": "cpu"}
    for number in range(10):
        out = tmp_path / str(number)
        if there == "empty":
            out.mkdir()
        results = started_together(
            lambda out=out: start_run(make_info("ab", "train-head"), Config(), out=out, **options)
        )
        refused = [result for result in results if isinstance(result, InputError)]
        assert len(refused) == len(results) - 1
        assert all("the folder is in use" in str(error) and "\n" not in str(error) for error in refused)


def test_nobody_takes_a_folder_while_it_is_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, original = tmp_path / "run", run_folders._empty
    options = {"label": "x", "runs": tmp_path, "device": "cpu", "out": out}
    first = start_run(make_info("ab", "train-head"), Config(), **options)
    refused: list[str] = []

    def slow(folder: Path) -> None:
        for force in (False, True):
            with pytest.raises(InputError) as error:
                start_run(make_info("ab", "train-head"), Config(), force=force, **options)
            refused.append(error.value.what)
        original(folder)

    monkeypatch.setattr(run_folders, "_empty", slow)
    second = start_run(make_info("ab", "train-head"), Config(), force=True, **options)
    assert refused == ["the folder is in use", "the run is under way"]
    assert read_info(out) == second.info != first.info


def test_force_empties_a_run_behind_a_link_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, link, store = tmp_path / "real", tmp_path / "link", tmp_path / "store"
    options = {"label": "x", "runs": tmp_path, "device": "cpu", "force": True}
    store.mkdir()
    (store / "precious.h5").write_text("days of work")
    link.symlink_to(real, target_is_directory=True)
    real.mkdir()
    monkeypatch.chdir(real)
    for out in (real, link, Path(), Path("../link/.")):
        old = start_run(make_info("ab", "train-head"), Config(), out=real, **options)
        (old.folder / "codes").mkdir()
        (old.folder / "codes" / "test.safetensors").write_text("old")
        (old.folder / ".metrics.json.0a1b2c3d.host-1.tmp").write_text("half")
        if not (old.folder / "store").exists():
            (old.folder / "store").symlink_to(store, target_is_directory=True)
            (old.folder / "thesis.tex").write_text("years of work")
        finish_run(start_run(make_info("ab", "train-head"), Config(), out=out, **options), [{"mAP": 0.5}])
        kept = {"run.json", "config.yaml", "environment.json", "metrics.json", "store", "thesis.tex"}
        assert {path.name for path in real.iterdir()} == kept
        assert open_run(out).info.status == "finished"
    assert link.is_symlink()
    assert (store / "precious.h5").read_text() == "days of work"
    assert (real / "thesis.tex").read_text() == "years of work"


def test_a_run_that_cannot_be_removed_stays_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(tmp_path)
    (run.folder / "codes").mkdir()
    (run.folder / "codes" / "test.safetensors").touch()
    unlink = Path.unlink

    def refuse(path: Path, *, missing_ok: bool = False) -> None:
        if path.name != "test.safetensors":
            unlink(path, missing_ok=missing_ok)
            return
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(InputError, match=r"cannot write: .*test.safetensors: got Permission denied"):
        start_run(
            make_info("ab", "train-head"), Config(), label="x", runs=tmp_path, device="cpu", out=run.folder, force=True
        )
    assert (run.folder / "run.json").is_file()


def test_a_run_is_marked_finished_after_its_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two, the run must not pass for a finished one."""

    def killed(folder: Path, rows: object) -> None:
        raise KeyboardInterrupt

    run = start(tmp_path)
    monkeypatch.setattr("mmcli.pipeline.core.run.write_metrics", killed)
    with pytest.raises(KeyboardInterrupt):
        finish_run(run, [{"mAP": 0.5}])
    with pytest.raises(InputError, match="running"):
        open_run(run.folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": 3}', ""])
def test_a_broken_run_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"run\.json"):
        open_run(tmp_path)


def make_codes(n: int = 6, bits: int = 16) -> Codes:
    rng = np.random.default_rng(0)
    return Codes(
        image_id=np.arange(n),
        soft=rng.normal(size=(n, bits)).astype(np.float32),
        packed=rng.integers(0, 256, (n, bits // 8)).astype(np.uint8),
        labels=rng.integers(0, 2, (n, 3)).astype(np.uint8),
        logits=rng.normal(size=(n, 3)).astype(np.float32) * 100,
        norm_img=rng.random(n).astype(np.float32),
        norm_txt=rng.random(n).astype(np.float32),
    )


def test_codes_read_back_equal_with_and_without_hash(tmp_path: Path) -> None:
    for codes in (
        make_codes(),
        replace(make_codes(), packed=None, logits=None),
        replace(make_codes(), norm_img=None, norm_txt=None),
    ):
        write_codes(tmp_path, "test", codes)
        again = read_codes(tmp_path, "test")
        for name, value in vars(codes).items():
            if value is None:
                assert getattr(again, name) is None
            else:
                np.testing.assert_array_equal(getattr(again, name), value)


def test_probabilities_are_the_sigmoid_without_a_warning() -> None:
    codes = make_codes()
    slow = [[1 / (1 + np.exp(-np.longdouble(x))) for x in row] for row in codes.logits]
    np.testing.assert_allclose(codes.probabilities, np.array(slow, np.float64), rtol=1e-12)


def test_damaged_codes_are_one_line(tmp_path: Path) -> None:
    codes = make_codes()
    with pytest.raises(InputError, match="no codes"):
        read_codes(tmp_path, "test")
    soft = codes.soft.copy()
    soft[4, 2] = np.nan
    write_codes(tmp_path, "test", replace(codes, soft=soft))
    with pytest.raises(InputError, match=r"row 4.*NaN"):
        read_codes(tmp_path, "test")
    write_codes(tmp_path, "test", replace(codes, labels=codes.labels[:-1]))
    with pytest.raises(InputError, match="lengths"):
        read_codes(tmp_path, "test")
    path = RunPaths(tmp_path).codes("test")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="damaged codes"):
        read_codes(tmp_path, "test")


def test_a_file_is_whole_or_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")

    def half(temporary: Path) -> None:
        temporary.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, half)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: full")]
)
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")

    def full(temporary: Path) -> None:
        temporary.write_text("ha")
        raise error

    with pytest.raises(InputError, match=r"cannot write: .*a\.json: got (No space|I/O error)"):
        write_whole(path, full)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_environment_names_the_commit_of_this_code(tmp_path, monkeypatch, repo) -> None:
    monkeypatch.chdir(tmp_path)
    if not (repo / ".git").exists():
        pytest.skip("this copy is no clone")
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=repo, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert environment("cpu", 1)["git"]["commit"] == head
