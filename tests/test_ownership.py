"""Nothing that mmcli did not write is deleted or written over, by any command, with --force or without."""

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import save_file

from kit.reports import make_kit
from mmcli import InputError
from mmcli.cache import StoreError
from mmcli.pipeline import demo
from mmcli.pipeline.core.config import Config, load_config
from mmcli.pipeline.core.files import remove_leftovers, remove_leftovers_of, write_folder, write_text, write_whole
from mmcli.pipeline.core.progress import Progress
from mmcli.pipeline.core.run import RunInfo, begun_config, now, open_run, read_info, start_run
from mmcli.pipeline.data.prepare import prepare
from mmcli.pipeline.report import report as stage
from mmcli.pipeline.report.report import ReportPlan, report

Files = dict[str, bytes | str]


def snapshot(folder: Path) -> Files:
    """Every file and link below a folder, with its content or target."""
    found: Files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file() and path.name != ".lock":
            found[name] = path.read_bytes()
    return found


def write_files(folder: Path, *names: str, text: str = "somebody's own") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def refused(code: int, err: str, option: str = "") -> bool:
    return code == 2 and err.count("\n") == 1 and err.startswith("mmcli: ") and option in err


# Runs


def make_info(**changes: object) -> RunInfo:
    given = {
        "kind": "train-head",
        "status": "running",
        "created": now(),
        "config_digest": "0" * 8,
        "preset": "plan",
        "seed": 1,
        "store": "s",
        "store_digest": "d",
        "model": "m",
        "patches": 64,
        "manifest_sha256": "f",
        "category_names": ("a", "b"),
    }
    return RunInfo(**{**given, **changes})


def begin(out: Path, *, force: bool = False) -> Path:
    return start_run(make_info(), Config(), label="x", out=out, runs=out.parent, device="cpu", force=force).folder


@pytest.mark.parametrize("mark", ['{"name": "robot"}', "[]", "not json", "", "{" * 100_000])
def test_a_foreign_run_json_marks_no_run(tmp_path: Path, mark: str) -> None:
    out = tmp_path / "mine"
    write_files(out, "checkpoints/best.pt", "codes/main.py", "codes/test.safetensors", "config.yaml")
    write_files(out, "run.json", text=mark)
    before = snapshot(out)
    for force in (False, True):
        with pytest.raises(InputError, match=r"in use|no run"):
            begin(out, force=force)
    assert snapshot(out) == before


def test_the_commands_refuse_a_folder_with_a_foreign_run_json(mmcli, here: Path) -> None:
    out = here / "mine"
    write_files(out, "run.json", "checkpoints/best.pt", "codes/main.py", "config.yaml")
    before = snapshot(out)
    code, _, err = mmcli("train-head", "--preset", "small", "--epochs", 1, "--out", out, "--force", "-q")
    assert refused(code, err, "--out")
    assert snapshot(out) == before


def test_foreign_files_in_a_run_stay_when_it_is_replaced(mmcli, here: Path) -> None:
    run = next((here / "runs").iterdir())
    names = (
        "thesis.tex",
        "checkpoints/mine.pt",
        "codes/notes.txt",
        "codes/extra.safetensors",
        "model/adapter.safetensors",
        "scores/mine-test.safetensors",
        "towers/notes.md",
        "tensorboard/notes.txt",
        "wandb/notes.txt",
        "figures/a.png",
        ".config.yaml.original",
        ".model.original/weights.bin",
    )
    write_files(run, *names)
    code, _, err = mmcli("train-head", "--preset", "small", "--epochs", 1, "--out", run, "--force", "-q")
    assert code == 0, err
    after = snapshot(run)
    assert {after[name] for name in names} == {b"somebody's own"}
    assert open_run(run).info.preset == "small"
    assert [path.name for path in (run / "checkpoints").glob("epoch-*")] == ["epoch-001.safetensors"]


@pytest.mark.parametrize("name", ["codes", "run.json", "checkpoints", "config.yaml"])
def test_a_link_in_a_run_is_neither_followed_nor_replaced(tmp_path: Path, name: str) -> None:
    out, theirs = begin(tmp_path / "run"), tmp_path / "theirs"
    write_files(theirs, "test.safetensors", "epoch-001.safetensors")
    (theirs / "file").write_bytes((out / name).read_bytes() if (out / name).is_file() else b"")
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(theirs / "file" if "." in name else theirs)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=f"will not replace what mmcli did not write: .*{name}"):
        begin(out, force=True)
    assert snapshot(tmp_path) == before


def test_leftovers_of_a_killed_training_go_and_others_stay(tmp_path: Path) -> None:
    from mmcli.pipeline.core.run_folders import clean_up

    out = begin(tmp_path / "run")
    (out / "checkpoints").mkdir()
    ours = [
        ".history.jsonl.0a1b2c3d.host-1.tmp",
        "checkpoints/.epoch-001.safetensors.0a1b2c3d.host-1.tmp",
        ".model.0a1b2c3d.host-1.tmp/new/x",
    ]
    theirs = [
        ".notes.txt.0a1b2c3d.host-1.tmp",
        "checkpoints/.mine.pt.abcd_123.tmp",
        ".model.original/x",
        ".run.json.tmp",
    ]
    write_files(out, *ours, *theirs)
    clean_up(out)
    after = snapshot(out)
    assert not {*ours} & {*after}
    assert {*theirs} <= {*after}


# A report


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> ReportPlan:
    kit = make_kit(tmp_path_factory.mktemp("kit"), rows=False)
    return ReportPlan(runs=kit.runs, data=kit.data, out=kit.root / "report")


@pytest.fixture(scope="module")
def written(plan: ReportPlan) -> Path:
    report(at(plan, plan.out, latex=True))
    return plan.out


def at(plan: ReportPlan, out: Path, **changes: object) -> ReportPlan:
    return ReportPlan(**{**vars(plan), "out": out, **changes})


def test_a_report_replaces_its_own_files_alone(plan: ReportPlan, tmp_path: Path) -> None:
    out = tmp_path / "report"
    out.write_text("a file")
    for force in (False, True):
        with pytest.raises(InputError, match="will not replace what mmcli did not write"):
            report(at(plan, out, force=force))
    assert out.read_text() == "a file"
    out.unlink()
    write_files(out, "figures/mine.png", "report.md", "run.json")
    before = snapshot(out)
    with pytest.raises(InputError, match=r"in use: .*figures/mine\.png"):
        report(at(plan, out, force=True))
    assert snapshot(out) == before


def test_a_report_with_foreign_files_is_not_replaced(plan: ReportPlan, written: Path, tmp_path: Path) -> None:
    out = shutil.copytree(written, tmp_path / "report")
    for name in ("figures/mine.png", "tables/mine.tex", "notes.txt"):
        write_files(out, name)
        before = snapshot(out)
        with pytest.raises(InputError, match=f"a folder with {name}"):
            report(at(plan, out, force=True))
        assert snapshot(out) == before
        (out / name).unlink()
    write_files(out, ".DS_Store")
    report(at(plan, out, force=True))
    wanted = {name for name in snapshot(written) if not name.startswith("tables/")}
    assert {*snapshot(out)} == wanted | {".DS_Store"}
    assert (out / ".DS_Store").read_text() == "somebody's own"


def test_a_page_of_markdown_replaces_a_page_alone(plan: ReportPlan, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# thesis")
    for force in (False, True):
        with pytest.raises(InputError, match="--markdown-only"):
            report(at(plan, tmp_path / "no", markdown_only=page, force=force))
    assert page.read_text() == "# thesis"
    page.unlink()
    report(at(plan, tmp_path / "no", markdown_only=page))
    report(at(plan, tmp_path / "no", markdown_only=page, force=True))


# Killed at any moment


class Killed(BaseException):
    """The process is gone: nothing that it would do afterwards is done."""


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, call: int) -> Iterator[list[int]]:
    """The process ends before its so manieth change to the file system by name: a rename, a link, a removal."""
    made = [0]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _handle: None)  # which only takes time here
        for name in ("replace", "rename", "unlink", "rmdir", "link"):
            real = getattr(os, name)

            def one(*args: object, real: Callable[..., object] = real, **options: object) -> object:
                made[0] += 1
                if made[0] >= call:
                    raise Killed
                return real(*args, **options)

            patch.setattr(os, name, one)
        yield made


def kills(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object], check: Callable[[], None], step: int) -> int:
    """Kill some work at every so manieth change, check what is left, and do the work to its end."""
    call = 1
    while True:
        with killed_at(monkeypatch, call):
            try:
                work()
            except Killed:
                ended = False
            else:
                ended = True
        check()
        if ended:
            return call
        call += step


def test_a_killed_report_leaves_pages_that_are_whole(
    plan: ReportPlan, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(written, tmp_path / "report")
    old = snapshot(out)
    fewer = {name for name in old if not name.startswith("tables/") and name != ".report.json"}
    files = {name: old[name] + b"<!-- new -->" for name in fewer}
    # What takes time is done once: reading, comparing, drawing.
    monkeypatch.setattr(stage, "_files", lambda *_: files)

    def check() -> None:
        now = {name: (out / name).read_bytes() for name in fewer}
        assert all(data in {old[name], files[name]} for name, data in now.items())
        if now["report.html"] != old["report.html"]:  # the page is the last
            assert now == files

    assert kills(monkeypatch, lambda: stage._write(at(plan, out, force=True), None), check, 3) > 60
    assert {*snapshot(out)} == {*fewer, ".report.json"}  # and nothing is left of those that were killed


def test_a_killed_replacement_of_a_run_is_no_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"

    def fill() -> None:
        folder = begin(out, force=True)
        write_files(
            folder, "codes/test.safetensors", "checkpoints/epoch-001.safetensors", "history.jsonl", "metrics.json"
        )
        (folder / "run.json").write_text(json.dumps({**vars(make_info()), "status": "finished"}))

    fill()
    names = {*snapshot(out)}
    write_files(out, "thesis.tex")

    def check() -> None:
        assert (out / "thesis.tex").read_text() == "somebody's own"
        if (out / "run.json").is_file() and read_info(out).status == "finished":
            assert names <= {*snapshot(out)}
        fill()

    assert kills(monkeypatch, lambda: begin(out, force=True), check, 1) > 8


def test_a_run_killed_at_its_very_start_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first moment a run says how it was configured; before it there is nothing in the way."""
    config = load_config(options={"hash.bits": 24})
    calls, resumed = 0, 0
    while True:
        calls += 1
        out = tmp_path / str(calls)
        with killed_at(monkeypatch, calls) as made, suppress(Killed):
            start_run(make_info(), config, label="x", out=out, runs=tmp_path, device="cpu")
        if (out / "run.json").is_file():
            assert load_config(begun_config(out)).hash.bits == 24
            assert read_info(out).status == "running"
            resumed += 1
        begin(out, force=True)
        if made[0] < calls:
            break
    assert resumed > 2
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "run.json").touch()  # as earlier versions began
    with pytest.raises(InputError, match="interrupted as it began; give the command that began it again, with --force"):
        begun_config(tmp_path / "empty")
    begin(tmp_path / "empty", force=True)


# Single files


def picture(path: Path) -> bytes:
    Image.new("RGB", (4, 4)).save(path)
    return path.read_bytes()


def test_a_panel_replaces_a_panel_alone_and_only_by_force(mmcli, here: Path, miniature) -> None:
    run, photo = next((here / "runs").iterdir()), next((miniature.data / "val2014").iterdir())
    words = ("predict", photo, "--caption", "a dog", "--run", run, "--data", miniature.data, "--panel", "why.png", "-q")
    theirs = picture(here / "why.png")
    for more in ((), ("--force",)):
        code, _, err = mmcli(*words, *more)
        assert refused(code, err, "--panel")
        assert (here / "why.png").read_bytes() == theirs
    (here / "why.png").unlink()
    assert mmcli(*words)[0] == 0
    code, _, err = mmcli(*words)
    assert refused(code, err, "--force")
    assert mmcli(*words, "--force")[0] == 0


def test_a_sheet_of_samples_replaces_one_of_ours_alone(mmcli, here: Path, miniature) -> None:
    words = ("samples", "--data", miniature.data, "--n", 2, "--out", "s.png", "-q")
    theirs = picture(here / "s.png")
    code, _, err = mmcli(*words, "--force")
    assert refused(code, err, "--out")
    assert (here / "s.png").read_bytes() == theirs
    (here / "s.png").unlink()
    assert [mmcli(*words)[0], mmcli(*words)[0], mmcli(*words, "--force")[0]] == [0, 2, 0]


def test_an_index_replaces_an_index_alone(mmcli, here: Path) -> None:
    out = here / "model.safetensors"
    save_file({"weight": np.zeros(3, np.float32)}, out)
    theirs = out.read_bytes()
    for name in ("model.safetensors", "notes.txt"):
        write_files(here, "notes.txt")
        code, _, err = mmcli("index", "build", "--out", name, "--force", "-q")
        assert refused(code, err, "--out")
    assert out.read_bytes() == theirs
    assert (here / "notes.txt").read_text() == "somebody's own"
    words = ("index", "build", "--out", "i.safetensors", "-q")
    assert [mmcli(*words)[0], mmcli(*words)[0], mmcli(*words, "--force")[0]] == [0, 2, 0]


def test_a_manifest_replaces_one_of_ours_alone(miniature, tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    pq.write_table(pa.table({"cargo": [1, 2]}), path)
    theirs = path.read_bytes()
    with pytest.raises(InputError, match="will not replace what mmcli did not write"):
        prepare(miniature.data, tmp_path)
    assert path.read_bytes() == theirs
    path.unlink()
    prepare(miniature.data, tmp_path)
    path.write_bytes(path.read_bytes()[:100])  # what a broken disk may leave: prepare is the way to mend it
    assert prepare(miniature.data, tmp_path).path == path


def test_a_table_of_experiments_replaces_one_of_ours_alone(mmcli, here: Path) -> None:
    out = here / "ablations"
    out.mkdir()
    pq.write_table(pa.table({"cargo": [1, 2]}), out / "rows.parquet")
    before = snapshot(out)
    code, _, err = mmcli("ablate", "A3", "--out", out, "--preset", "small", "-q")
    assert refused(code, err, "--out")
    assert snapshot(out) == before


# Stores, exports, demos


def test_force_removes_no_file_that_only_has_a_shards_name(mmcli, here: Path, miniature) -> None:
    store = next((here / "data" / "cache").iterdir())
    write_files(store, "image-99999.h5", "notes.txt")
    before = snapshot(store)
    words = ("extract", "--model", miniature.model, "--patches", 64, "--data", miniature.data, "--out", store, "-q")
    code, _, err = mmcli(*words, "--force", "--workers", 0)
    assert refused(code, err, "--out")
    assert snapshot(store) == before


def test_an_export_is_known_by_its_list_and_not_by_names(here: Path) -> None:
    from mmcli.cache import Store, export_store

    store, out = Store.open(next((here / "data" / "cache").iterdir())), here / "export"
    write_files(out, "img_emb/img_emb_00000.npy", "metadata/metadata_00000.parquet")  # as clip-retrieval writes them
    before = snapshot(out)
    with pytest.raises(StoreError, match=r"no export: .*img_emb_00000\.npy"):
        export_store(store, out, "npy", force=True)
    write_files(out, "_export.json")
    with pytest.raises(StoreError, match="no export"):
        export_store(store, out, "npy", force=True)
    assert snapshot(out) == {**before, "_export.json": b"somebody's own"}
    ours = here / "ours"
    export_store(store, ours, "npy")
    write_files(ours, "img_emb/img_emb_00077.npy")
    before = snapshot(ours)
    with pytest.raises(StoreError, match="img_emb_00077"):
        export_store(store, ours, "npy", force=True)
    assert snapshot(ours) == before


def test_two_exports_do_not_mix(here: Path) -> None:
    from mmcli.cache import Store, export_store

    store, out = Store.open(next((here / "data" / "cache").iterdir())), here / "export"
    met = []

    def tick(_rows: int) -> None:
        if not met:
            with pytest.raises(StoreError, match="another process exports into this folder") as error:
                export_store(store, out, "npy", force=True)
            met.append(error)

    export_store(store, out, "parquet", tick=tick)
    assert met
    assert not any(name.endswith(".npy") for name in snapshot(out))
    assert ".lock" not in {path.name for path in out.iterdir()}


def test_an_export_that_was_killed_can_be_replaced(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmcli.cache import Store, export_store

    store, out = Store.open(next((here / "data" / "cache").iterdir())), here / "export"
    export_store(store, out, "npy")
    whole = snapshot(out)

    def check() -> None:
        if "_export.json" in snapshot(out) and "_export_unfinished.json" not in snapshot(out):
            assert {name: data for name, data in snapshot(out).items() if not name.endswith(".tmp")} == whole

    kills(monkeypatch, lambda: export_store(store, out, "npy", force=True), check, 2)
    export_store(store, out, "npy", force=True)
    assert snapshot(out) == whole


IMAGE = "data/val2014/COCO_val2014_000000000009.jpg"


@pytest.fixture
def make_miniature(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The demo's first step with three small files in place of pictures and towers; a seed has an image of its own."""

    def dataset(folder: Path, *, seed: int, **_: object) -> None:
        write_files(folder, f"val2014/COCO_val2014_{seed:012d}.jpg", text=f"picture {seed}")

    monkeypatch.setattr(demo, "draw_legend", lambda path: path.write_text("legend"))
    monkeypatch.setattr(demo, "make_dataset", dataset)
    monkeypatch.setattr(demo, "make_checkpoint", lambda _, out, *, seed, **__: write_files(out, "x", text=f"{seed}"))

    def make(out: Path, seed: int, *, force: bool = False) -> None:
        config = load_config(options={"hardware.device": "cpu", "hardware.seed": seed})
        demo._make_miniature(config, out, force=force, progress=Progress())

    return make


def test_a_demo_refuses_a_folder_without_its_record(tmp_path: Path) -> None:
    write_files(tmp_path, "data/dataset_coco.json", "notes.txt")
    for text in ("", "somebody's own", '{"version": 1}'):
        (tmp_path / demo.RECORD).write_text(text)
        before = snapshot(tmp_path)
        with pytest.raises(InputError, match="files that are not a demo's"):
            demo.run_demo(Config(), out=tmp_path, force=True)
        assert snapshot(tmp_path) == before


def test_a_new_demo_replaces_its_own_files_alone(tmp_path: Path, make_miniature) -> None:
    make_miniature(tmp_path, 9)
    theirs = ("data/val2014/COCO_val2014_000000000001.jpg", "data/mine/a.jpg", "model/adapter.bin", "store/notes.txt")
    write_files(tmp_path, *theirs)
    make_miniature(tmp_path, 10)
    names = {"legend.png", "data/val2014/COCO_val2014_000000000010.jpg", "model/x", demo.RECORD}
    assert {*snapshot(tmp_path)} == {*theirs, *names}
    assert (tmp_path / "model" / "x").read_text() == "10"
    make_miniature(tmp_path, 10, force=True)
    assert {*snapshot(tmp_path)} == {*theirs, *names}


def test_a_demo_refuses_to_replace_a_changed_file(tmp_path: Path, make_miniature) -> None:
    make_miniature(tmp_path, 9)
    write_files(tmp_path, IMAGE, "data/val2014/COCO_val2014_000000000010.jpg")
    before = snapshot(tmp_path)
    for seed, force in ((9, True), (10, False)):
        with pytest.raises(InputError, match="will not replace what mmcli did not write"):
            make_miniature(tmp_path, seed, force=force)
        assert {name: data for name, data in snapshot(tmp_path).items() if name != demo.RECORD} == {
            name: data for name, data in before.items() if name != demo.RECORD
        }
    make_miniature(tmp_path, 11)
    assert (tmp_path / IMAGE).read_text() == "somebody's own"  # no longer what the miniature wrote


@pytest.mark.parametrize("name", ["data", "data/val2014", "store", "model", "runs", demo.RECORD])
def test_a_demo_follows_no_link(tmp_path: Path, make_miniature, name: str) -> None:
    out, elsewhere = tmp_path / "demo", tmp_path / "elsewhere"
    out.mkdir()
    make_miniature(out, 9)
    (out / "store").mkdir()
    (out / "runs").mkdir()
    (out / name).rename(elsewhere)
    (out / name).symlink_to(elsewhere)
    before = snapshot(tmp_path)
    for seed in (9, 10):
        with pytest.raises(InputError, match=r"the folder is in use: .* a link"):
            make_miniature(out, seed, force=True)
    assert snapshot(tmp_path) == before


def test_a_killed_demo_is_made_again(tmp_path: Path, make_miniature, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = "data/val2014/COCO_val2014_000000000001.jpg"
    make_miniature(tmp_path, 9)
    write_files(tmp_path, theirs)

    def check() -> None:
        assert (tmp_path / theirs).read_text() == "somebody's own"

    assert kills(monkeypatch, lambda: make_miniature(tmp_path, 10, force=True), check, 1) > 5
    make_miniature(tmp_path, 11)
    assert {*snapshot(tmp_path)} == {
        theirs,
        "legend.png",
        "data/val2014/COCO_val2014_000000000011.jpg",
        "model/x",
        demo.RECORD,
    }


@pytest.mark.parametrize("name", [demo.RECORD, ".report.json", "report.html"])
def test_a_fifo_is_foreign_and_not_waited_for(mmcli, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    os.mkfifo(out / name)
    make_kit(tmp_path / "kit", rows=False)
    words = ("demo",) if name == demo.RECORD else ("report", "--runs", tmp_path / "kit" / "runs")
    code, _, err = mmcli(*words, "--out", out, "--force", "-q")
    assert refused(code, err, "--out")
    assert stat.S_ISFIFO((out / name).stat().st_mode)


def test_notes_about_a_report_are_not_a_report(mmcli, tmp_path: Path) -> None:
    kit, notes = make_kit(tmp_path / "kit", rows=False), tmp_path / "notes.md"
    words = ("report", "--runs", kit.runs, "--markdown-only", notes, "--force", "-q")
    text = "# Notes\n\nThe page beside this says: Written by `mmcli report --runs runs`, never by hand.\n"
    notes.write_text(text)
    code, _, err = mmcli(*words)
    assert refused(code, err, "--markdown-only")
    assert notes.read_text() == text
    notes.unlink()
    for _ in range(2):
        code, _, err = mmcli(*words)
        assert code == 0, err


@pytest.mark.parametrize("option", ["--out", "--markdown-only"])
def test_a_name_that_is_not_utf8_is_refused_in_one_line(mmcli, tmp_path: Path, option: str) -> None:
    kit, name = make_kit(tmp_path / "kit", rows=False), os.fsdecode(b"caf\xe9")
    code, _, err = mmcli("report", "--runs", kit.runs, option, tmp_path / name, "-q")
    assert refused(code, err, option)
    assert "not UTF-8" in err
    assert [path.name for path in tmp_path.iterdir()] == ["kit"]


# Permissions, names, leftovers


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], indirect=True)
def test_every_file_of_a_run_has_the_permissions_of_a_new_file(mmcli, here: Path, umask: int) -> None:
    words = ("train-head", "--preset", "small", "--epochs", 1, "--out", "r", "-q")
    assert mmcli(*words)[0] == 0
    assert mmcli("index", "build", "--run", "r", "-q")[0] == 0
    assert mmcli("report", "--out", "p", "-q")[0] == 0
    for folder in ("r", "p"):
        for path in (here / folder, *(here / folder).rglob("*")):
            wanted = (0o777 if path.is_dir() else 0o666) & ~umask
            assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_a_written_file_is_readable_by_colleagues(tmp_path: Path) -> None:
    def private(path: Path) -> None:
        path.unlink(missing_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))

    write_text(tmp_path / "plain", "")
    write_whole(tmp_path / "a", private)
    write_folder(tmp_path / "b", lambda folder: private(folder / "c"))
    write_folder(tmp_path / "b", lambda folder: private(folder / "d"))
    modes = {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "plain").stat().st_mode}
    assert {*snapshot(tmp_path)} == {"plain", "a", "b/c", "b/d"}


@pytest.mark.parametrize("name", ["x" * 250 + ".png", "é" * 120 + ".png"])
def test_the_longest_name_that_a_file_may_have_is_written(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "text")
    assert (tmp_path / name).read_text() == "text"


def test_leftovers_of_live_processes_stay(tmp_path: Path) -> None:
    from mmcli.cache.layout import this_host

    alive, elsewhere = f".a.0a1b2c3d.{this_host()}-{os.getpid()}.tmp", ".a.0a1b2c3d.other-1.tmp"
    gone = f".a.0a1b2c3d.{this_host()}-{2**22 + 1}.tmp"
    write_files(tmp_path, alive, elsewhere, gone)
    remove_leftovers(tmp_path, lambda name: name == "a")
    assert {*snapshot(tmp_path)} == {alive, elsewhere}
    remove_leftovers(tmp_path, lambda name: name == "b", alone=True)
    assert {*snapshot(tmp_path)} == {alive, elsewhere}
    remove_leftovers(tmp_path, lambda name: name == "a", alone=True)
    assert not snapshot(tmp_path)


def test_what_may_not_be_looked_at_stays_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A neighbour's folder that looks like a temporary one, and that this user may not read."""
    closed = tmp_path / ".x.backup01"
    closed.mkdir()
    look = Path.iterdir

    def refuse(path: Path) -> Iterator[Path]:
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    for alone in (False, True):
        write_folder(tmp_path / "x", lambda scratch: (scratch / "a").write_text("a"), alone=alone)
    assert (tmp_path / "x" / "a").read_text() == "a"
    assert closed.is_dir()


def test_long_names_that_begin_alike_are_two_files(tmp_path: Path) -> None:
    first, second = (tmp_path / ("a" * 120 + end) for end in ("1", "2"))

    def write(scratch: Path) -> None:
        scratch.write_text("first")
        remove_leftovers_of(second)  # another process writes the other file now

    write_whole(first, write)
    assert first.read_text() == "first"
