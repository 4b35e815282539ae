"""Every load compares every shard with its checksum, and gives what h5py reads."""

import json
import os

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcli.cache import Store, StoreDamaged, verify
from mmcli.cache.key import digest_of
from mmcli.cache.layout import CHECKED


@pytest.fixture
def folder(kit, tmp_path):
    return kit.Data().write(tmp_path / "s", kit.key())


def plainly(folder):
    """The arrays of a store as docs/cache-format.md says to read them."""
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    arrays = {}
    for name in ("v_img", "norm_img", "v_txt", "norm_txt", "n_captions"):
        part = "image" if name.endswith("img") else "text"
        files = [h5py.File(folder / shard["file"]) for shard in shards if shard["part"] == part]
        arrays[name] = np.concatenate([file[name][:] for file in files])
    return arrays


def same(loaded, wanted):
    assert vars(loaded).keys() == wanted.keys()
    for name, values in wanted.items():
        got = getattr(loaded, name)
        assert (got.dtype, got.shape) == (values.dtype, values.shape)
        assert got.tobytes() == values.tobytes()


def flip(path, at):
    with path.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 0x10]))


def regions(path):
    """A byte of every kind of place in a shard: headers, each dataset's ends, what lies between, the last byte."""
    with h5py.File(path) as file:
        data = sorted((file[name].id.get_offset(), file[name].nbytes) for name in file)
    at = {0, 8, 100, path.stat().st_size - 1}
    for start, size in data:
        at |= {start - 1, start, start + size // 2, start + size - 1, min(start + size, path.stat().st_size - 1)}
    return sorted(at)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 700),
    c=st.integers(1, 6),
    shard_rows=st.integers(1, 41),
    dtype=st.sampled_from(["float16", "float32"]),
    seed=st.integers(0, 99),
    skipped=st.sets(st.integers(0, 39)),
)
def test_a_load_is_what_h5py_reads(kit, tmp_path_factory, n, d, c, shard_rows, dtype, seed, skipped):
    data, root = kit.Data(n, d, c, seed), tmp_path_factory.mktemp("load")
    with data.writer(root / "s", kit.key(dtype=dtype), shard_rows=shard_rows) as writer:
        data.fill(writer, {row for row in skipped if row < n})
        folder = writer.finish(lambda _: "unreadable")
    wanted, store = plainly(folder), Store.open(folder)
    same(store.load(), wanted)
    assert verify(folder).problems == ()


@pytest.mark.parametrize("name", ["image-00001.h5", "text-00002.h5"])
def test_a_flipped_byte_is_found_wherever_it_is(folder, name):
    path, whole = folder / name, (folder / name).read_bytes()
    Store.open(folder).load()
    for at in regions(path):
        status = path.stat()
        flip(path, at)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(StoreDamaged, match=f"{name}: got the file is not what its checksum says"):
            Store.open(folder).load()
        path.write_bytes(whole)
    Store.open(folder).load()


def test_nan_is_found_where_checksums_are_right(kit, folder):
    with h5py.File(folder / "image-00001.h5", "r+") as file:
        file["v_img"][2, 0] = np.nan
    kit.reseal(folder, lambda _: None)
    store = Store.open(folder)
    with pytest.raises(StoreDamaged, match="NaN or infinity in v_img row 2"):
        store.load()


def test_a_checksum_that_changed_in_the_manifest_counts(folder):
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    document["shards"][0]["sha256"] = "0" * 64
    document.pop("checksum")
    path.write_text(json.dumps(document | {"checksum": digest_of(document)}))
    with pytest.raises(StoreDamaged, match=r"image-00000\.h5: got the file is not what its checksum says"):
        Store.open(folder).load()


def test_ids_of_another_order_are_found(kit, folder, tmp_path):
    data = kit.Data()
    data.index = data.index.set_column(0, "image_id", [data.ids[::-1].copy()])
    other = data.write(tmp_path / "other", kit.key())
    (folder / "index.parquet").write_bytes((other / "index.parquet").read_bytes())
    kit.reseal(folder, lambda _: None)
    with pytest.raises(StoreDamaged, match=r"image-00000\.h5: got its image ids are not those of the index"):
        Store.open(folder).load()


def test_loading_writes_nothing_and_reads_no_old_note(kit, folder):
    names = {path.name for path in folder.iterdir()}
    Store.open(folder).load()
    assert {path.name for path in folder.iterdir()} == names
    (folder / CHECKED).write_text("{}")
    assert verify(folder).problems == ()
    kit.Data(seed=1).write(folder, kit.key(patches=512), overwrite=True)
    assert not (folder / CHECKED).exists()
