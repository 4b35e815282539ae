"""What is exported is what is stored, row by row; files are whole or absent; nothing else is touched."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcli.cache import Store, StoreError, export_store
from mmcli.cache import export_files as files_module


def make(kit, folder: Path, *, n=10, c=5, shard_rows=4, skipped=(), dtype="float16", seed=0) -> Store:
    """A store with splits, labels and as many captions as are embedded."""
    data = kit.Data(n, 6, c, seed)
    captions = [
        [f"caption {slot} of {i}" for slot in range(count)] for i, count in zip(data.ids, data.counts, strict=True)
    ]
    rng = np.random.default_rng(seed)
    data.index = pa.table(
        {
            "image_id": data.ids,
            "path": [f"{i}.jpg" for i in data.ids],
            "split": rng.choice(["train", "test"], n),
            "captions": pa.array(captions, pa.list_(pa.string())),
            "labels": pa.array([[0] * (i % 2) for i in range(n)], pa.list_(pa.int32())),
        }
    ).replace_schema_metadata({"category_names": '["cat"]'})
    with data.writer(folder, kit.key(dtype=dtype), shard_rows=shard_rows) as writer:
        data.fill(writer, skipped)
        writer.finish(lambda row: f"reason {row}")
    return Store.open(folder)


def parts(folder: Path, name: str) -> list[Path]:
    return sorted((folder / name).iterdir())


def read_npy(folder: Path):
    """As embedding-reader does: files in the order of their names, rows of one number together."""
    image, text, rows = [], [], []
    for at, paths in enumerate(
        zip(*(parts(folder, name) for name in ("img_emb", "text_emb", "metadata")), strict=True)
    ):
        assert [path.name for path in paths] == [
            f"img_emb_{at:05d}.npy",
            f"text_emb_{at:05d}.npy",
            f"metadata_{at:05d}.parquet",
        ]
        # embedding-reader parses the header's first line itself: a plain dtype and two sizes.
        head = paths[0].read_bytes()[:300].split(b"\n")[0]
        assert re.search(rb"'descr': '<f[24]'.*'fortran_order': False.*'shape': \([0-9]+, [0-9]+\)", head)
        image.append(np.load(paths[0], allow_pickle=False))
        text.append(np.load(paths[1], allow_pickle=False))
        table = pq.read_table(paths[2])
        assert len(image[-1]) == len(text[-1]) == table.num_rows > 0
        rows += table.to_pylist()
    return np.concatenate(image), np.concatenate(text), rows


def content(folder: Path):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


sizes = {
    "seed": st.integers(0, 1000),
    "n": st.integers(1, 12),
    "shard_rows": st.integers(1, 5),
    "dtype": st.sampled_from(["float16", "float32"]),
    "bad": st.lists(st.integers(0, 11), max_size=6),
}


@settings(max_examples=15, deadline=None)
@given(**sizes, captions=st.sampled_from(["first", "all"]))
def test_npy_holds_the_stored_rows(kit, tmp_path_factory, seed, n, shard_rows, dtype, bad, captions):
    folder = tmp_path_factory.mktemp("e")
    skipped = sorted({row for row in bad if row < n})
    store = make(kit, folder / "s", n=n, shard_rows=shard_rows, dtype=dtype, seed=seed, skipped=skipped)
    arrays, index = store.load(), store.index.to_pylist()
    wanted = [
        (row, slot)
        for row in range(n)
        if row not in skipped
        for slot in range(int(arrays.n_captions[row]) if captions == "all" else min(1, arrays.n_captions[row]))
    ]
    if not wanted:
        with pytest.raises(StoreError, match="nothing to export"):
            export_store(store, folder / "out", "npy", captions=captions)
        return
    ticks: list[int] = []
    report = export_store(store, folder / "out", "npy", captions=captions, tick=ticks.append)
    assert sum(ticks) == n
    image, text, rows = read_npy(folder / "out")
    assert image.dtype == text.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(image, arrays.v_img[[row for row, _ in wanted]])
    np.testing.assert_array_equal(text, np.stack([arrays.v_txt[row, slot] for row, slot in wanted]))
    for got, (row, slot) in zip(rows, wanted, strict=True):
        source = index[row]
        assert got == {
            "image_id": source["image_id"],
            "path": source["path"],
            "split": source["split"],
            "labels": source["labels"],
            "caption": source["captions"][slot],
            "caption_number": slot,
            "norm_img": arrays.norm_img[row],
            "norm_txt": arrays.norm_txt[row, slot],
        }
    assert (report.n_rows, report.n_skipped) == (len(wanted), len(skipped))
    assert report.n_images == len({row for row, _ in wanted})
    assert report.n_images + report.n_skipped + report.n_without_caption == n
    assert report.n_bytes == sum((folder / "out" / name).stat().st_size for name in report.files)


@settings(max_examples=10, deadline=None)
@given(**sizes)
def test_parquet_holds_the_stored_rows(kit, tmp_path_factory, seed, n, shard_rows, dtype, bad):
    folder = tmp_path_factory.mktemp("e")
    skipped = sorted({row for row in bad if row < n - 1})
    store = make(kit, folder / "s", n=n, shard_rows=shard_rows, dtype=dtype, seed=seed, skipped=skipped)
    arrays, index = store.load(), store.index.drop_columns(["shard", "row"]).to_pylist()
    report = export_store(store, folder / "out", "parquet")
    table = pq.read_table(folder / "out")  # the mark's name is one that readers of folders pass over
    assert table.schema.field("v_img").type == pa.list_(pa.float32(), 6)
    assert table.schema.metadata[b"category_names"] == b'["cat"]'
    kept = [row for row in range(n) if row not in skipped]
    assert (report.n_rows, report.n_images, report.n_skipped) == (len(kept), len(kept), len(skipped))
    for got, row in zip(table.to_pylist(), kept, strict=True):
        count = int(arrays.n_captions[row])
        assert got == index[row] | {
            "v_img": arrays.v_img[row].astype(np.float32).tolist(),
            "v_txt": arrays.v_txt[row, :count].astype(np.float32).tolist(),
            "norm_img": arrays.norm_img[row],
            "norm_txt": arrays.norm_txt[row, :count].tolist(),
        }


def test_the_mark_says_where_it_is_from(kit, tmp_path):
    store = make(kit, tmp_path / "s", skipped=[3])
    report = export_store(store, tmp_path / "out", "npy", captions="all")
    mark = json.loads((tmp_path / "out" / "_export.json").read_text())
    assert (mark["store_digest"], mark["key"]["model"], mark["n_skipped"]) == (store.digest, store.key.model, 1)
    assert mark["files"] == list(report.files)
    assert json.loads(json.dumps(report.to_json()))["n_rows"] == mark["n_rows"]


def test_a_shard_of_skipped_images_leaves_no_empty_part(kit, tmp_path):
    store = make(kit, tmp_path / "s", n=6, shard_rows=2, skipped=[2, 3])
    for format_ in ("npy", "parquet"):
        report = export_store(store, tmp_path / format_, format_)
        assert [name for name in report.files if "00002" in name] == []
    read_npy(tmp_path / "npy")


def test_a_folder_in_use_is_refused_and_an_export_is_replaced(kit, tmp_path):
    store, out = make(kit, tmp_path / "s"), tmp_path / "out"
    export_store(store, out, "npy")
    (out / "img_emb" / ".img_emb_00000.npy.host-7.tmp").touch()  # a killed export left it
    before = content(out)
    with pytest.raises(StoreError, match=r"in use: .*out: got .*wanted a new or empty folder; .*--force"):
        export_store(store, out, "parquet")
    assert content(out) == before
    export_store(store, out, "parquet", force=True)
    assert sorted(content(out)) == ["_export.json", "part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == []


@pytest.mark.parametrize("name", ["notes.txt", "img_emb/mine.npy", "sub/part-00000.parquet", "img_emb_00000.npy"])
def test_force_touches_nothing_but_an_export(kit, tmp_path, name):
    store, out = make(kit, tmp_path / "s"), tmp_path / "out"
    export_store(store, out, "npy")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    before = content(out)
    with pytest.raises(
        StoreError, match=f"no export: .*got {name}" if "/" not in name or "mine" in name else "no export"
    ):
        export_store(store, out, "npy", force=True)
    assert content(out) == before
    with pytest.raises(StoreError, match="the store itself"):
        export_store(store, store.folder, "npy", force=True)
    assert Store.open(store.folder).load().v_img.any()


@pytest.mark.parametrize("name", ["_export.json", "_export_unfinished.json"])
@pytest.mark.parametrize("mark", [b'{"store_digest": "x", "files": 5, "n_rows": 0}', b"[" * 100_000, b"{}", None])
def test_a_mark_of_the_wrong_kind_makes_no_export(kit, tmp_path, name, mark):
    store, out = make(kit, tmp_path / "s"), tmp_path / "out"
    out.mkdir()
    if mark is None:
        os.mkfifo(out / name)
    else:
        (out / name).write_bytes(mark)
    with pytest.raises(StoreError):
        export_store(store, out, "npy", force=True)
    assert [path.name for path in out.iterdir()] == [name]


def test_a_full_disk_leaves_no_mark_and_no_part_of_a_file(kit, tmp_path, monkeypatch):
    store, out = make(kit, tmp_path / "s"), tmp_path / "out"

    def fails(path, data):
        if path.name == "text_emb_00001.npy":
            raise StoreError("cannot write", got="No space left on device", do="run `mmcli extract` again")
        path.write_bytes(data)

    monkeypatch.setattr(files_module, "write_whole", fails)
    with pytest.raises(StoreError, match=r"text_emb_00001\.npy: got No space left.*export again with --force"):
        export_store(store, out, "npy")
    monkeypatch.undo()
    assert not (out / "_export.json").exists()
    with pytest.raises(StoreError, match="in use"):
        export_store(store, out, "npy")
    export_store(store, out, "npy", force=True)
    read_npy(out)


def test_unknown_choices_and_a_damaged_store(kit, tmp_path):
    store = make(kit, tmp_path / "s")
    with pytest.raises(StoreError, match="unknown format: got 'csv', wanted npy or parquet"):
        export_store(store, tmp_path / "out", "csv")
    with pytest.raises(StoreError, match="unknown captions: got 'two', wanted first or all"):
        export_store(store, tmp_path / "out", "npy", captions="two")
    assert not (tmp_path / "out").exists()
    path = store.folder / "text-00002.h5"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"damaged shard: .*text-00002\.h5"):
        export_store(store, tmp_path / "out", "npy")
    assert not (tmp_path / "out" / "_export.json").exists()


def test_no_more_than_a_few_shards_are_read_ahead(kit, tmp_path, monkeypatch):
    """Of sixty shards, few were read when the first part is written."""
    from mmcli.cache import reader

    store = make(kit, tmp_path / "s", n=60, shard_rows=1)
    read: list[str] = []
    original = reader.read_checked
    monkeypatch.setattr(
        reader, "read_checked", lambda folder, entry: read.append(entry.file) or original(folder, entry)
    )
    seen: list[int] = []
    export_store(store, tmp_path / "out", "parquet", tick=lambda _: seen.append(len(read)))
    assert seen[0] <= 10
    assert seen[-1] == 120
