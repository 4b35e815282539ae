"""A byte that changed is found and named, and only what it spoilt is made again."""

import hashlib
import json
import shutil
import tracemalloc

import h5py
import numpy as np
import pytest

from mmcli.cache import Store, StoreDamaged, StoreMismatch, StoreMissing, StoreUnfinished, verify


@pytest.fixture
def folder(kit, tmp_path):
    return kit.Data().write(tmp_path / "s", kit.key())


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def redo(kit, folder):
    """Open a writer, mend, finish; what it found."""
    data = kit.Data()
    with data.writer(folder, kit.key()) as writer:
        found = (
            [shard.name for part in ("image", "text") for shard in writer.missing(part)],
            [(damaged.name, damaged.reason) for damaged in writer.damaged],
        )
        data.fill(writer)
        writer.finish()
    return found


def spread(size, n):
    """Offsets all over a file: its ends, and ``n`` places in between."""
    return sorted({0, 9, size - 1, *np.linspace(0, size - 1, n).astype(int).tolist()})


@pytest.mark.parametrize("name", ["image-00001.h5", "text-00002.h5"])
def test_any_flipped_byte_is_found_and_redone(kit, folder, name):
    wanted, path = kit.content(folder), folder / name
    for at in spread(path.stat().st_size, 10):
        flip(path, at)
        with pytest.raises(
            StoreDamaged, match=f"a damaged shard: .*{name}: got the file is not what its checksum says;"
        ):
            Store.open(folder).load()
        (problem,) = verify(folder).problems
        assert problem.startswith(f"{name}: ")
        assert redo(kit, folder) == ([name], [(name, "the file is not what its checksum says")])
        assert kit.content(folder) == wanted


def test_flipped_bytes_in_an_unfinished_store(kit, folder):
    """Without the manifest a shard's own checksums have to do: what they miss must be bytes that hold nothing."""
    wanted, path = kit.content(folder), folder / "image-00001.h5"
    whole, found = path.read_bytes(), 0
    for at in range(0, len(whole), 61):
        (folder / "manifest.json").unlink()
        flip(path, at)
        missing, damaged = redo(kit, folder)
        assert missing == [name for name, _ in damaged]
        assert missing in ([], [path.name])
        found += bool(missing)
        assert kit.content(folder)["image-00001.h5/v_img"] == wanted["image-00001.h5/v_img"]
        assert kit.content(folder)["image-00001.h5/norm_img"] == wanted["image-00001.h5/norm_img"]
        Store.open(folder).load()
        path.write_bytes(whole)
    assert found > 5


def test_every_byte_of_the_data_counts_without_a_manifest(kit, folder):
    path = folder / "image-00000.h5"
    with h5py.File(path) as file:
        places = [(file[name].id.get_offset(), file[name].nbytes) for name in file]
    for start, size in places:
        for at in (start, start + size // 2, start + size - 1):
            (folder / "manifest.json").unlink()
            flip(path, at)
            missing, damaged = redo(kit, folder)
            assert missing == [path.name]
            assert "the content of" in damaged[0][1]


@pytest.mark.parametrize("size", [0, 1, 100, -1])
@pytest.mark.parametrize("finished", [True, False])
def test_truncated_shard(kit, folder, size, finished):
    wanted, path = kit.content(folder), folder / "text-00000.h5"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        StoreDamaged, match=r"text-00000.h5: got \d+ bytes, wanted \d+ bytes; run `mmcli extract` again"
    ):
        Store.open(folder)
    if not finished:
        (folder / "manifest.json").unlink()
    missing, damaged = redo(kit, folder)
    assert (missing, [name for name, _ in damaged]) == ([path.name], [path.name])
    assert kit.content(folder) == wanted


def test_shard_that_is_gone(kit, folder):
    wanted = kit.content(folder)
    (folder / "image-00002.h5").unlink()
    with pytest.raises(StoreDamaged, match=r"image-00002.h5: got no file, wanted \d+ bytes"):
        Store.open(folder)
    assert verify(folder).problems == ("image-00002.h5: No such file or directory",)
    assert redo(kit, folder) == (["image-00002.h5"], [])
    assert kit.content(folder) == wanted


def test_while_a_shard_is_redone_the_store_is_unfinished(kit, folder):
    flip(folder / "image-00000.h5", 700)
    with (
        kit.Data().writer(folder, kit.key()),
        pytest.raises(StoreUnfinished, match="run `mmcli extract` again, it resumes"),
    ):
        Store.open(folder)


def test_swapped_shards_are_found(kit, folder):
    wanted = kit.content(folder)
    (folder / "manifest.json").unlink()
    shutil.copy(folder / "image-00000.h5", folder / "image-00001.h5")
    missing, damaged = redo(kit, folder)
    assert missing == ["image-00001.h5"]
    assert "attribute shard" in damaged[0][1]
    assert kit.content(folder) == wanted


def test_a_shard_of_another_key_is_not_taken(kit, folder, tmp_path):
    other = kit.Data(seed=5).write(tmp_path / "other", kit.key(revision="other"))
    wanted = kit.content(folder)
    for name in ("image-00000.h5", "text-00000.h5"):
        shutil.copy(other / name, folder / name)
    missing, _ = redo(kit, folder)
    assert missing == ["image-00000.h5", "text-00000.h5"]
    assert kit.content(folder) == wanted


def test_a_shard_of_other_images_is_not_taken(kit, folder, tmp_path):
    data = kit.Data()
    data.index = data.index.set_column(0, "image_id", [list(range(10))])
    other = data.write(tmp_path / "other", kit.key())
    shutil.copy(other / "image-00000.h5", folder / "image-00000.h5")
    kit.reseal(folder, lambda _: None)
    with pytest.raises(StoreDamaged, match=r"image-00000.h5: got its image ids are not those of the index"):
        Store.open(folder).load()
    assert verify(folder).problems == ("image-00000.h5: its image ids are not those of the index",)
    assert redo(kit, folder)[0] == ["image-00000.h5"]


@pytest.mark.parametrize("name", ["index.parquet", "manifest.json", "key.json"])
def test_damaged_document(kit, folder, name):
    wanted, path = kit.content(folder), folder / name
    for at in spread(path.stat().st_size - 1, 12):
        flip(path, at)
        (problem, *_) = verify(folder).problems
        assert name in problem
        if name != "key.json":
            with pytest.raises(StoreDamaged, match=name):
                Store.open(folder).load()
        missing, damaged = redo(kit, folder)
        assert (missing, [found for found, _ in damaged]) in (([], [name]), ([], []))
        assert verify(folder).problems == ()
        assert kit.content(folder) == wanted
    path.unlink()
    assert any(name in problem for problem in verify(folder).problems)
    redo(kit, folder)
    assert kit.content(folder) == wanted


def test_nan_is_named(kit, folder):
    ids = kit.Data().ids
    for name, dataset, row in (("image-00001.h5", "v_img", 2), ("text-00001.h5", "norm_txt", 3)):
        whole = (folder / name).read_bytes()
        with h5py.File(folder / name, "r+") as file:
            file[dataset][row, -1] = np.nan
        kit.reseal(folder, lambda _: None)
        with pytest.raises(
            StoreDamaged, match=f"{name}: got NaN or infinity in {dataset} row {row}, image id {ids[4 + row]};"
        ):
            Store.open(folder).load()
        shards = dict(Store.open(folder).shards(name.partition("-")[0], check=False))
        assert np.isnan(next(arrays for shard, arrays in shards.items() if shard.name == name)[dataset][row]).any()
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize("options", [{}, {"overwrite": True}])
def test_a_foreign_file_with_a_shards_name_is_left_alone(kit, tmp_path, options):
    path = tmp_path / "image-00000.h5"
    path.write_text("precious")
    with (
        pytest.raises(StoreMismatch, match=r"not of a store: .*got image-00000\.h5"),
        kit.Data().writer(tmp_path, kit.key(), **options),
    ):
        pass
    assert path.read_text() == "precious"
    assert [found.name for found in tmp_path.iterdir() if found.name != ".lock"] == ["image-00000.h5"]


def test_newer_format_is_refused(kit, folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 3', 1))
    with pytest.raises(StoreMismatch, match=r"another format version: .*: got 3, wanted 2; update mmcli"):
        Store.open(folder)
    with pytest.raises(StoreMismatch, match="update mmcli"), kit.Data().writer(folder, kit.key()):
        pass
    assert "another format version" in verify(folder).problems[0]


def test_names_never_lead_out_of_the_folder(kit, folder, tmp_path):
    shutil.copy(folder / "image-00000.h5", tmp_path / "image-00000.h5")
    for name in ("../image-00000.h5", str(tmp_path / "image-00000.h5"), "image-00001.h5"):
        for document in (
            lambda d, name=name: d["shards"][0].update(file=name),
            lambda d, name=name: d["index"].update(file=name),
        ):
            before = (folder / "manifest.json").read_bytes()
            kit.reseal(folder, document)
            with pytest.raises(StoreDamaged, match=r"cannot read: .*manifest.json"):
                Store.open(folder)
            (folder / "manifest.json").write_bytes(before)


@pytest.mark.parametrize("edit", ["pickle", "external", "link", "chunks", "dtype", "shape", "gone", "group"])
def test_only_plain_numbers_in_the_file_are_read(kit, folder, edit, tmp_path):
    path = folder / "image-00000.h5"
    with h5py.File(path, "r+") as file:
        values = file["v_img"][()]
        del file["v_img"]
        if edit == "pickle":
            file.create_dataset("v_img", data=[b"cos\nsystem"] * 4, dtype=h5py.string_dtype())
        elif edit == "external":
            (tmp_path / "raw").write_bytes(values.tobytes())
            file.create_dataset(
                "v_img", values.shape, values.dtype, external=[(str(tmp_path / "raw"), 0, values.nbytes)]
            )
        elif edit == "link":
            shutil.copy(folder / "image-00001.h5", tmp_path / "away.h5")
            file["v_img"] = h5py.ExternalLink(tmp_path / "away.h5", "/v_img")
        elif edit == "group":
            file.create_group("v_img")
        elif edit != "gone":
            values = {"dtype": values.astype("f4"), "shape": values[:, :5]}.get(edit, values)
            file.create_dataset("v_img", data=values, chunks=(2, 2) if edit == "chunks" else None)
    kit.reseal(folder, lambda _: None)
    with pytest.raises(StoreDamaged, match=r"image-00000.h5: got .*v_img"):
        Store.open(folder).load()
    assert len(verify(folder).problems) == 1
    assert redo(kit, folder)[0] == [path.name]


def test_manifest_that_does_not_add_up(kit, folder):
    before = (folder / "manifest.json").read_bytes()
    edits = {
        "digest": lambda d: d.update(digest="0" * 64),
        "cover the rows": lambda d: d["shards"].pop(),
        "cover the rows in order": lambda d: d["shards"].reverse(),
        "captions": lambda d: d["counts"].update(captions=1),
        "created": lambda d: d.pop("created"),
        "width": lambda d: d["counts"].update(width=-1),
        "patches": lambda d: d["key"].update(patches="many"),
    }
    for message, edit in edits.items():
        kit.reseal(folder, edit)
        with pytest.raises(StoreDamaged, match=rf"cannot read: .*manifest.json: got .*{message}"):
            Store.open(folder)
        (folder / "manifest.json").write_bytes(before)
    Store.open(folder)
    text = json.loads(before)
    text["extra"]["bias"] = -16.4
    (folder / "manifest.json").write_text(json.dumps(text))
    with pytest.raises(StoreDamaged, match="its checksum is wrong"):
        Store.open(folder)


def test_missing_store(tmp_path):
    with pytest.raises(StoreMissing, match=r"no such store: .*none; run `mmcli extract` first"):
        Store.open(tmp_path / "none")
    with pytest.raises(StoreMissing, match="not a store"):
        Store.open(tmp_path)
    with pytest.raises(StoreMissing, match="not a store"):
        verify(tmp_path)


def _grow(document, **counts):
    document["counts"].update(counts)


def _seal(folder, edit):
    """Change manifest.json and set its own checksum right, and nothing else."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    edit(document)
    del document["checksum"]
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    path.write_text(json.dumps(document | {"checksum": hashlib.sha256(text.encode()).hexdigest()}))


COUNTS = {
    "a quadrillion images": lambda d: _grow(d, images=10**15),
    "more images than shards": lambda d: _grow(d, images=10**9),
    "fewer images": lambda d: _grow(d, images=9),
    "no image": lambda d: _grow(d, images=0),
    "a negative number of images": lambda d: _grow(d, images=-5),
    "images by halves": lambda d: _grow(d, images=10.0),
    "truth for a number": lambda d: _grow(d, shard_rows=True),
    "a number of 4,000 digits": lambda d: _grow(d, images=10**4000),
    "a wide vector": lambda d: _grow(d, width=10**9),
    "a vector wider than its bytes": lambda d: _grow(d, width=10**6),
    "many captions": lambda d: _grow(d, captions_per_image_max=10**6),
    "captions beyond the bytes": lambda d: _grow(d, captions_per_image_max=255),
    "one row a shard": lambda d: _grow(d, images=10**9, shard_rows=1),
    "a text for rows": lambda d: d["shards"][0].update(rows="4"),
    "negative rows": lambda d: d["shards"][0].update(rows=-4),
    "rows of another shard": lambda d: d["shards"][0].update(first_row=1),
    "no bytes": lambda d: d["shards"][0].update(bytes=0),
    "negative bytes": lambda d: d["shards"][0].update(bytes=-1),
    "a list for a file": lambda d: d["shards"][0].update(file=["image-00000.h5"]),
    "a long name": lambda d: d["shards"][0].update(file="x" * 10**6),
    "a number for a checksum": lambda d: d["shards"][0].update(sha256=1),
    "captions by halves": lambda d: d["counts"].update(captions=float(d["counts"]["captions"])),
    "a text for a skipped row": lambda d: d["skipped"].append({"row": "0", "reason": "x"}),
    "no reason": lambda d: d["skipped"].append({"row": 0, "reason": None}),
    "a list of nothing": lambda d: d.update(shards=None),
    "a mapping for shards": lambda d: d.update(shards={}),
    "a list for counts": lambda d: d.update(counts=[]),
    "rows of the index": lambda d: d["index"].update(rows=10**15),
    "a number for a time": lambda d: d.update(created=5),
    "an impossible time": lambda d: d.update(created="2024-13-45T00:00:00"),
}


@pytest.mark.parametrize("name", COUNTS)
def test_impossible_counts_are_refused_before_memory_is_taken(kit, folder, name):
    _seal(folder, COUNTS[name])
    tracemalloc.start()
    try:
        with pytest.raises(StoreDamaged, match=r"cannot read: .*manifest\.json") as caught:
            Store.open(folder)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 600
    assert not verify(folder).ok
    with kit.Data().writer(folder, kit.key()) as writer:
        assert [one.name for one in writer.damaged] == ["manifest.json"]


BROKEN_JSON = {
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "NaN": b'{"format": NaN}',
    "infinity": b'{"a": -Infinity}',
    "5,000 digits": b'{"format": ' + b"9" * 5000 + b"}",
    "a key twice": b'{"format": 1, "format": 2}',
    "half": b'{"format": ',
    "not UTF-8": b'{"format": "\xff"}',
    "NUL": b"\0" * 50,
    "nothing": b"",
    "a list": b"[]",
    "null": b"null",
    "a text": b'"x"',
    "half a pair": b'{"format": "mmcli-store", "format_version": 2, "a": "\\ud800"}',
    "a number beyond all": b'{"format": "mmcli-store", "format_version": 2, "a": 1e999}',
}


@pytest.mark.parametrize("name", BROKEN_JSON)
def test_a_manifest_that_is_no_json_of_ours_is_one_line(kit, folder, name):
    for file in ("manifest.json", "key.json"):
        (folder / file).write_bytes(BROKEN_JSON[name])
    with pytest.raises(StoreDamaged, match=r"cannot read: .*manifest\.json: got .*") as caught:
        Store.open(folder)
    assert len(str(caught.value)) < 600
    assert len(verify(folder).problems) >= 2


def test_an_attribute_that_claims_gigabytes_is_not_read(kit, folder):
    path = folder / "image-00000.h5"
    with h5py.File(path, "r+") as file:
        del file.attrs["rows"]
        file.attrs["rows"] = np.zeros(8000, np.int64)
        del file["v_img"].attrs["sha256"]
        file["v_img"].attrs.create("sha256", "x" * 64, dtype=h5py.string_dtype())
    (folder / "manifest.json").unlink()
    assert any("attribute rows is None" in problem for problem in verify(folder).problems)


@pytest.mark.parametrize(
    "counts", [{"images": 10**15}, {"images": 10**9, "shard_rows": 1}, {"width": 10**9}, {"images": 1.5}]
)
def test_impossible_counts_of_unfinished_stores_are_refused(kit, folder, counts):
    (folder / "manifest.json").unlink()
    document = json.loads((folder / "key.json").read_text())
    document["counts"].update(counts)
    del document["checksum"]
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    (folder / "key.json").write_text(json.dumps(document | {"checksum": hashlib.sha256(text.encode()).hexdigest()}))
    report = verify(folder)
    assert report.n_shards == 0
    assert any(problem.startswith("key.json: cannot read") for problem in report.problems)
