"""Index files: what goes in comes out, damage is found, a kill leaves a whole file; samples and tags come and go."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mmcli import InputError, Tagger
from mmcli.pipeline.core.results import read_codes
from mmcli.pipeline.core.run import open_run
from mmcli.pipeline.data.manifest import Manifest, read_manifest, write_manifest
from mmcli.pipeline.tagging import index_file
from mmcli.pipeline.tagging.index import AddOptions, add, build, describe, remove
from mmcli.pipeline.tagging.index_file import Origin, TagIndex, read_index, write_index, writing

CPU = AddOptions(device="cpu")


def run_of(folder: Path) -> Path:
    return next(path for path in (folder / "runs").iterdir() if (path / "run.json").is_file())


def make(n: int = 30, *, seed: int = 0, first_id: int = 100, names=("a", "b", "c"), bits: int = 16) -> TagIndex:
    rng = np.random.default_rng(seed)
    soft = rng.normal(size=(n, bits or 12)).astype(np.float32)
    return TagIndex(
        image_id=np.arange(first_id, first_id + n),
        soft=soft,
        packed=np.packbits(soft >= 0, axis=1) if bits else None,
        labels=(rng.random((n, len(names))) < 0.4).astype(np.uint8),
        category_names=tuple(names),
        paths=pa.array([f"p/{i}.jpg" for i in range(n)]),
        captions=pa.array([["", "größer 🐶\n[red]"][i % 2] for i in range(n)]),
        origin=Origin(head="h" * 64, store="s" * 64, model="m", patches=64, encoder="e" * 64),
    )


def same(one: TagIndex, other: TagIndex) -> bool:
    arrays = all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("image_id", "soft", "packed", "labels")
    )
    texts = one.paths.equals(other.paths) and one.captions.equals(other.captions)
    return arrays and texts and (one.category_names, one.origin) == (other.category_names, other.origin)


@pytest.mark.parametrize("bits", [0, 16])
def test_what_is_written_is_read(tmp_path, bits) -> None:
    index = make(bits=bits)
    checksum = write_index(tmp_path / "new" / "i.safetensors", index)
    read, about = read_index(tmp_path / "new" / "i.safetensors")
    assert same(read, index)
    assert about["sha256"] == checksum
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["i.safetensors"]


def rewritten(file: Path, /, **changes) -> None:
    """The file with another header or other arrays, its checksum as it was."""
    with safe_open(file, framework="np") as opened:
        about = json.loads(opened.metadata()["mmcli_index"])
    arrays = load_file(file) | {name: value for name, value in changes.items() if isinstance(value, np.ndarray)}
    about |= {name: value for name, value in changes.items() if not isinstance(value, np.ndarray)}
    save_file(arrays, file, metadata={"mmcli_index": json.dumps(about)})


def test_every_damaged_byte_is_found(tmp_path) -> None:
    path = tmp_path / "i.safetensors"
    write_index(path, make(6))
    whole = path.read_bytes()
    for at in range(0, len(whole), 37):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(InputError, match="index"):
            read_index(path)
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="a damaged index"):
            read_index(path)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"version": 2}, "an index of a newer format: .*got version 2, wanted at most version 1"),
        ({"version": "1"}, "not an index"),
        ({"format": "other"}, "not an index"),
        ({"category_names": ["x", "y", "z"]}, "a damaged index.*checksum"),
        ({"soft": np.zeros((30, 16), np.float32)}, "a damaged index.*checksum"),
    ],
)
def test_other_formats_and_changed_content_are_refused(tmp_path, changes, line) -> None:
    path = tmp_path / "i.safetensors"
    write_index(path, make())
    rewritten(path, **changes)
    with pytest.raises(InputError, match=line):
        read_index(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_id": np.full(30, 7)},
        {"soft": np.full((30, 16), np.nan, np.float32)},
        {"label_ends": np.zeros(31, np.int64)},
        {"packed": np.zeros((29, 2), np.uint8)},
        {"category_names": ["a", "a", "b"]},
        {"category_names": ["a"]},
        {"path": np.full(4, 255, np.uint8), "path_ends": np.array([0] * 30 + [4])},
        {"origin": {"head": "x"}},
        {"label_ends": None},
    ],
    ids=",".join,
)
def test_a_file_whose_checksum_fits_is_looked_at_all_the_same(tmp_path, monkeypatch, changes) -> None:
    path = tmp_path / "i.safetensors"
    write_index(path, make())
    arrays = load_file(path)
    rewritten(path, **changes)
    if "label_ends" in changes and changes["label_ends"] is None:
        save_file(
            {n: a for n, a in arrays.items() if n != "label_ends"},
            path,
            metadata=safe_open(path, framework="np").metadata(),
        )
    monkeypatch.setattr(
        index_file,
        "digest_arrays",
        lambda about, _: json.loads(safe_open(path, framework="np").metadata()["mmcli_index"])["sha256"],
    )
    with pytest.raises(InputError, match="a damaged index"):
        read_index(path)


def test_no_file_a_folder_another_file(tmp_path) -> None:
    with pytest.raises(InputError, match=r"no index.*no such file.*mmcli index build"):
        read_index(tmp_path / "none")
    with pytest.raises(InputError, match="index"):
        read_index(tmp_path)
    save_file({"x": np.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="not an index"):
        read_index(tmp_path / "x.safetensors")


def test_added_and_removed() -> None:
    old, new = make(20), make(10, seed=1, first_id=500, names=("c", "new", "a"))
    both = old.added(new)
    assert both.category_names == ("a", "b", "c", "new")
    assert both.labels[:20, :3].tolist() == old.labels.tolist()
    assert not both.labels[:20, 3].any()
    assert both.labels[20:, [2, 3, 0]].tolist() == new.labels.tolist()
    assert not both.labels[20:, 1].any()
    assert both.paths.to_pylist() == old.paths.to_pylist() + new.paths.to_pylist()
    wider = replace(old, labels=np.pad(old.labels, ((0, 0), (0, 1))), category_names=(*old.category_names, "new"))
    assert same(both.without(new.image_id), wider)
    some = np.array([103, 119])
    left = both.without(some)
    assert not np.isin(some, left.image_id).any()
    assert left.rows_of(np.array([102, 103, 500])).tolist() == [2, -1, 18]
    with pytest.raises(InputError, match=r"already in the index: got 10 image ids: 100, 101, 102, ..., .*--force"):
        old.added(make(10))
    replaced = old.added(make(10, seed=5), replacing=True)
    assert len(replaced) == 20
    assert replaced.image_id.tolist() == [*range(110, 120), *range(100, 110)]
    assert len(old.added(make(20, seed=5), replacing=True)) == 20
    with pytest.raises(InputError, match="not in the index: got 1 image id: 7"):
        old.without(np.array([100, 7]))
    with pytest.raises(InputError, match="an index needs a sample"):
        old.without(old.image_id)


@pytest.mark.parametrize("step", ["fsync", "replace", "write_bytes"])
def test_a_failing_disk_leaves_the_old_file(tmp_path, monkeypatch, step) -> None:
    path = tmp_path / "i.safetensors"
    write_index(path, make())

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path if step == "write_bytes" else os, step, fail)
        with pytest.raises(InputError, match="No space left"):
            write_index(path, make(seed=3))
    assert same(read_index(path)[0], make())
    assert [one.name for one in tmp_path.iterdir()] == ["i.safetensors"]


def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path) -> None:
    path, a, b = (tmp_path / name for name in ("i.safetensors", "a", "b"))
    indexes = make(4000, seed=1), make(4000, seed=2, names=("c", "d"))
    for place, index in zip((a, b), indexes, strict=True):
        write_index(place, index)
    shutil.copy(a, path)
    rng, left = np.random.default_rng(0), 0
    for round_ in range(60):
        if round_ >= 8 and left:
            break
        command = [sys.executable, Path(__file__).with_name("kill_index.py"), path, a, b]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(float(rng.uniform(0.005, 0.06)))
            writer.send_signal(signal.SIGKILL)
        found = read_index(path)[0]
        assert any(same(found, index) for index in indexes)
        left += len(list(tmp_path.glob(".i.safetensors.*.tmp")))
        with writing(path):  # the kernel freed the lock, and what was half-written goes
            assert not list(tmp_path.glob(".i.safetensors.*.tmp"))
    assert left  # some kill fell into a write, or this would prove nothing


def test_a_second_writer_is_refused_in_one_line(tmp_path, made) -> None:
    path = tmp_path / "i.safetensors"
    write_index(path, make())
    with writing(path):
        script = (
            "import sys; from mmcli.cli import main; sys.argv[0] = 'mmcli'\n"
            "try: main()\nfinally: assert 'torch' not in sys.modules"
        )
        command = [sys.executable, "-c", script, "index", "remove", "--ids", "100", "--index", path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "another process writes this index" in done.stderr
        read_index(path)  # readers need no lock
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert len(read_index(path)[0]) == 29


def test_built_from_a_run(made, miniature, tmp_path) -> None:
    run = open_run(run_of(made))
    result = build(run, tmp_path / "i.safetensors")
    assert f"use it with `mmcli predict IMAGE --run {run.folder} --index {result.path}`" in result.summary()
    index, about = read_index(result.path)
    codes, listing = read_codes(run.folder, "train"), read_manifest(miniature.data / "manifest.parquet")
    for name in ("image_id", "soft", "packed", "labels"):
        np.testing.assert_array_equal(getattr(index, name), getattr(codes, name))
    rows = [listing.image_ids.tolist().index(i) for i in index.image_id]
    assert index.paths.to_pylist() == [listing.paths[r] for r in rows]
    assert index.captions.to_pylist() == [listing.captions[r][0] for r in rows]
    assert (result.n, result.n_classes, about["format"]) == (40, 80, "mmcli-index")
    with pytest.raises(InputError, match=r"the file is there.*--force"):
        build(run, tmp_path / "i.safetensors")
    build(run, tmp_path / "i.safetensors", force=True)
    facts = describe(result.path)
    assert (facts["n"], facts["bits"], facts["binary_code_bytes"], facts["checksum"]) == (40, 64, 320, "fits")
    assert facts["classes"]["person"] == codes.labels[:, 0].sum()


def striped(path: Path, seed: int) -> None:
    pixels = np.zeros((90, 120, 3), np.uint8)
    pixels[:, ::8] = pixels[:, 1::8] = (255, 0, 200)
    pixels[0, 0] = seed
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def new_samples(tmp_path) -> Path:
    """Six samples of a tag that no one has seen, in a data folder of their own, and a seventh picture."""
    data = tmp_path / "striped"
    for i in range(7):
        striped(data / f"{i}.png", i)
    names = ("person", "barcode")
    listing = Manifest.from_columns(
        image_ids=range(9001, 9007),
        paths=[f"{i}.png" for i in range(6)],
        splits=["train"] * 6,
        captions=[["a pink barcode"]] * 6,
        labels=[[1]] * 5 + [[0, 1]],
        category_names=names,
    )
    write_manifest(data / "new.parquet", listing)
    return data


def test_a_new_tag_is_found_at_once(made, new_samples, tmp_path) -> None:
    run, path = open_run(run_of(made)), tmp_path / "i.safetensors"
    build(run, path)
    before = Tagger.load(run.folder, index=path, device="cpu")
    query = [new_samples / "6.png"], ["a pink barcode"]
    assert "barcode" not in [tag.name for tag in before.predict(*query)[0].tags]
    result = add(path, run, manifest=new_samples / "new.parquet", data=new_samples, options=CPU)
    assert (result.changed, result.n, result.n_classes, result.new_names) == (6, 46, 81, ("barcode",))
    after = Tagger.load(run.folder, index=path, device="cpu")
    assert after.category_names == (*before.category_names, "barcode")
    (found,) = after.predict(*query)
    assert found.scores.shape == (81,)
    assert found.tags[0].name == "barcode"
    assert found.tags[0].score == pytest.approx(1)
    assert {one.path for one in found.tags[0].voters} <= {f"{i}.png" for i in range(6)}
    assert {one.caption for one in found.tags[0].voters} == {"a pink barcode"}
    with pytest.raises(InputError, match="already in the index: got 6 image ids: 9001"):
        add(path, run, manifest=new_samples / "new.parquet", data=new_samples, options=CPU)
    again = add(
        path, run, manifest=new_samples / "new.parquet", data=new_samples, options=AddOptions(device="cpu", force=True)
    )
    assert (again.changed, again.n, again.new_names) == (6, 46, ())
    assert remove(path, range(9001, 9007)).n == 40
    (gone,) = Tagger.load(run.folder, index=path, device="cpu").predict(*query)
    np.testing.assert_array_equal(gone.scores, np.append(before.predict(*query)[0].scores, 0))


def test_unreadable_images_and_paths_that_leave_the_folder(made, new_samples, tmp_path) -> None:
    run, path = open_run(run_of(made)), tmp_path / "i.safetensors"
    build(run, path)
    (new_samples / "2.png").write_bytes(b"no picture")
    (new_samples / "3.png").unlink()
    (new_samples / "3.png").symlink_to(Path(__file__))
    words = {"manifest": new_samples / "new.parquet", "data": new_samples}
    for on_error in ("stop", "skip"):
        with pytest.raises(InputError, match="link out of the data folder"):
            add(path, run, **words, options=replace(CPU, on_error=on_error))
    (new_samples / "3.png").unlink()
    with pytest.raises(InputError, match=r"2\.png"):
        add(path, run, **words, options=CPU)
    assert len(read_index(path)[0]) == 40
    result = add(path, run, **words, options=replace(CPU, on_error="skip"))
    assert (result.changed, len(result.skipped)) == (4, 2)
    assert "2.png" in result.skipped[0]
    assert "no file" in result.skipped[1]
    assert read_index(path)[0].image_id[40:].tolist() == [9001, 9002, 9005, 9006]


def test_an_index_of_another_head_is_refused(made, tmp_path) -> None:
    run, path = run_of(made), tmp_path / "i.safetensors"
    write_index(path, make(bits=64))
    with pytest.raises(InputError, match="codes of another head"):
        Tagger.load(run, index=path, device="cpu")


def test_the_commands(mmcli, here, new_samples) -> None:
    code, out, err = mmcli("index", "build", "--json")
    assert code == 0, err
    path = Path(json.loads(out)["path"])
    assert path.name == "index.safetensors"
    words = ("--manifest", new_samples / "new.parquet", "--data", new_samples, "--device", "cpu")
    code, out, err = mmcli("index", "add", *words)
    assert code == 0, err
    assert "new tags: barcode" in out
    code, out, err = mmcli("index", "info", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert (facts["n"], facts["n_classes"], facts["classes"]["barcode"]) == (46, 81, 6)
    (here / "ids").write_text("9001\n9002\n")
    code, out, err = mmcli("index", "remove", "--ids", "9003, 9004", "--ids-file", "ids", "--json")
    assert (code, json.loads(out)["n"]) == (0, 42)
    for more in ((), ("--run", path.parent)):
        code, out, err = mmcli("index", "info", *more)
        assert code == 0, err
        assert "42" in out
    for words, line in (
        (("index", "remove", "--ids", "x"), "got 'x'"),
        (("index", "remove", "--ids", "9" * 30), "no image id"),
        (("index", "remove"), "neither --ids nor --ids-file"),
        (("index", "remove", "--ids", "1"), "not in the index"),
        (("index", "info", "--index", "none"), "no index"),
        (("index", "build"), "--force"),
    ):
        code, out, err = mmcli(*words)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert line in err
