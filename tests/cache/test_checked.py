"""A shard that was found whole is read in one pass as long as nothing about it changed; any change is checked in full."""

import json
import os
import time

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcli.cache import Store, StoreDamaged, checked, direct, loading, verify
from mmcli.cache.key import digest_of
from mmcli.cache.layout import CHECKED


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Files count as settled at once; tests that change one wait for the clock of the file system."""
    monkeypatch.setattr(checked, "SETTLED_NS", -(10**12))


@pytest.fixture
def folder(kit, tmp_path):
    folder = kit.Data().write(tmp_path / "s", kit.key())
    Store.open(folder).load()
    assert (folder / CHECKED).is_file()
    time.sleep(0.02)
    return folder


@pytest.fixture
def in_full(monkeypatch):
    """Names of the shards that were read in full."""
    names, read = [], loading.read_entry

    def spy(folder, entry, *, check):
        names.append(entry.file)
        return read(folder, entry, check=check)

    monkeypatch.setattr(loading, "read_entry", spy)
    return names


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


def edit_note(folder, edit):
    document = json.loads((folder / CHECKED).read_text())
    del document["checksum"]
    edit(document)
    (folder / CHECKED).write_text(json.dumps(document | {"checksum": digest_of(document)}))


def make_unseen(folder, name):
    """As if a file had changed without the file system knowing, as when a disk forgets."""
    stamp = vars(checked.stamp_of(folder / name))
    edit_note(folder, lambda document: document["files"][name].update(stamp=dict(stamp)))


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
def test_read_again_is_what_h5py_reads(kit, tmp_path_factory, n, d, c, shard_rows, dtype, seed, skipped):
    data, root = kit.Data(n, d, c, seed), tmp_path_factory.mktemp("again")
    with data.writer(root / "s", kit.key(dtype=dtype), shard_rows=shard_rows) as writer:
        data.fill(writer, {row for row in skipped if row < n})
        folder = writer.finish(lambda _: "unreadable")
    wanted, store = plainly(folder), Store.open(folder)
    same(store.load(), wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "read_entry", None)  # every shard is known
        same(store.load(), wanted)
        same(store.load(check=False), wanted)
    assert verify(folder).problems == ()


@pytest.mark.parametrize("name", ["image-00001.h5", "text-00002.h5"])
@pytest.mark.parametrize("seen", [True, False])
def test_a_flipped_byte_is_found_wherever_it_is(kit, folder, name, seen):
    path, whole = folder / name, (folder / name).read_bytes()
    for at in regions(path):
        flip(path, at)
        if not seen:
            make_unseen(folder, name)
        with pytest.raises(StoreDamaged, match=f"{name}: got the file is not what its checksum says"):
            Store.open(folder).load()
        path.write_bytes(whole)
        Store.open(folder).load()
        time.sleep(0.01)


def test_a_changed_file_with_its_old_size_and_time_is_checked(folder, in_full):
    path = folder / "text-00001.h5"
    before = path.stat()
    flip(path, path.stat().st_size // 2)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(StoreDamaged, match=r"text-00001\.h5"):
        Store.open(folder).load()
    assert in_full == [path.name]


def test_only_what_changed_is_checked_and_noted_again(folder, in_full):
    Store.open(folder).load()
    assert in_full == []
    path = folder / "image-00002.h5"
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").replace(path)
    Store.open(folder).load()
    Store.open(folder).load()
    assert in_full == [path.name]


def test_a_file_that_changed_just_now_is_not_noted(kit, tmp_path, monkeypatch, in_full):
    monkeypatch.setattr(checked, "SETTLED_NS", 10**12)
    folder = kit.Data().write(tmp_path / "s", kit.key())
    Store.open(folder).load()
    assert not (folder / CHECKED).exists()
    in_full.clear()
    Store.open(folder).load()
    assert len(in_full) == 6


def test_a_file_that_changes_while_it_is_read_is_not_noted(kit, tmp_path, monkeypatch):
    folder = kit.Data().write(tmp_path / "s", kit.key())
    read = loading.read_entry

    def read_and_touch(folder, entry, *, check):
        data = read(folder, entry, check=check)
        if entry.file == "image-00001.h5":
            os.utime(folder / entry.file)
        return data

    monkeypatch.setattr(loading, "read_entry", read_and_touch)
    Store.open(folder).load()
    noted = json.loads((folder / CHECKED).read_text())["files"]
    assert len(noted) == 5
    assert "image-00001.h5" not in noted


def test_unchecked_reading_notes_nothing(kit, tmp_path):
    folder = kit.Data().write(tmp_path / "s", kit.key())
    with h5py.File(folder / "image-00001.h5", "r+") as file:
        file["v_img"][2, 0] = np.nan
    kit.reseal(folder, lambda _: None)
    store = Store.open(folder)
    store.load(check=False)
    assert not (folder / CHECKED).exists()
    with pytest.raises(StoreDamaged, match="NaN or infinity in v_img row 2"):
        store.load()
    assert not (folder / CHECKED).exists()


def test_a_note_that_is_not_sound_is_no_note(kit, folder, in_full):
    wanted, note = plainly(folder), (folder / CHECKED).read_text()

    def first(document):
        return document["files"]["image-00000.h5"]

    edits = {
        "starts": lambda d: first(d).update(starts={"image_id": 0, "v_img": 0, "norm_img": 0}),
        "beyond": lambda d: first(d)["starts"].update(v_img=10**9),
        "negative": lambda d: first(d)["starts"].update(v_img=-8),
        "gone": lambda d: first(d)["starts"].pop("v_img"),
        "mark": lambda d: first(d).update(mark=1),
        "sha256": lambda d: first(d).update(sha256="0" * 64),
        "inode": lambda d: first(d)["stamp"].update(inode=1),
        "bytes": lambda d: first(d)["stamp"].update(bytes=1),
        "mtime": lambda d: first(d)["stamp"].update(mtime_ns=1),
        "ctime": lambda d: first(d)["stamp"].update(ctime_ns=1),
    }
    for edit in edits.values():
        edit_note(folder, edit)
        in_full.clear()
        same(Store.open(folder).load(), wanted)
        assert in_full == ["image-00000.h5"]
    (folder / CHECKED).write_text(note)
    in_full.clear()
    edits = [
        lambda d: d["store"].update(digest="0" * 64),
        lambda d: d["store"]["layout"].update(width=3),
        lambda d: d.update(files=[1]),
        lambda d: first(d).pop("stamp"),
        lambda d: first(d)["stamp"].update(bits=1),
    ]
    for edit in edits:
        edit_note(folder, edit)
        in_full.clear()
        same(Store.open(folder).load(), wanted)
        assert len(in_full) == 6
    for text in ("", "{}", "[1]", "{" * 100_000, note[:-9], note.replace('"mark": ', '"mark": 1', 1)):
        (folder / CHECKED).write_text(text)
        in_full.clear()
        same(Store.open(folder).load(), wanted)
        assert len(in_full) == 6


def test_a_checksum_that_changed_in_the_manifest_counts(kit, folder):
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


def test_a_folder_that_cannot_be_written_to_loads(kit, tmp_path, monkeypatch):
    folder = kit.Data().write(tmp_path / "s", kit.key())
    monkeypatch.setattr(checked, "temporary_name", lambda name: f"no-such-folder/{name}")
    same(Store.open(folder).load(), plainly(folder))
    assert not (folder / CHECKED).exists()
    assert verify(folder).ok


def test_verify_takes_no_note_for_granted(folder):
    assert verify(folder).problems == ()
    path = folder / "text-00000.h5"
    with h5py.File(path) as file:
        at = file["v_txt"].id.get_offset()
    flip(path, at)
    make_unseen(folder, path.name)
    record = checked.read_records(folder, Store.open(folder).manifest)[path.name]
    mark = direct.mark_of(
        path.read_bytes(), record.cut(Store.open(folder).manifest.shards[3], Store.open(folder).manifest)
    )
    edit_note(folder, lambda document: document["files"][path.name].update(mark=mark))
    Store.open(folder).load()  # a note forged in every part is believed; nothing but a forger makes one
    (problem,) = verify(folder).problems
    assert problem.startswith("text-00000.h5: ")


def test_a_store_that_is_replaced_leaves_no_note(kit, folder):
    kit.Data(seed=1).write(folder, kit.key(patches=512), overwrite=True)
    assert not (folder / CHECKED).exists()
    for path in folder.iterdir():
        path.unlink()
    (folder / CHECKED).write_text("{}")
    kit.Data().write(folder, kit.key())
    assert verify(folder).problems == ()
    same(Store.open(folder).load(), plainly(folder))


def slow_mark(data, cut):
    """The mark as direct.py's docstring tells it."""
    import zlib

    said = b""
    for span in cut:
        part = data[span.start : span.stop]
        pages = len(part) // 4096
        for page in range(pages):
            words = np.frombuffer(part[4096 * page : 4096 * (page + 1)], "<u8")
            said += (sum(words.tolist()) % 2**64).to_bytes(8, "little")
        said += part[4096 * pages :]
    return zlib.crc32(said)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 1_300_000), cuts=st.lists(st.integers(0, 1_300_000), max_size=4), seed=st.integers(0, 9))
def test_mark_against_a_slow_reading(tmp_path_factory, size, cuts, seed):
    rng = np.random.default_rng(seed)
    data = rng.bytes(size)
    edges = sorted({min(cut, size) for cut in cuts} | {0, size})
    places = {
        str(at): (start, stop - start) for at, (start, stop) in enumerate(zip(edges[:-1:2], edges[1::2], strict=False))
    }
    cut = direct.spans(size, places)
    assert [span.start for span in cut] == [0, *[span.stop for span in cut[:-1]]]
    assert cut[-1].stop == size
    mark = direct.mark_of(data, cut)
    assert mark == slow_mark(data, cut)
    path = tmp_path_factory.mktemp("mark") / "file"
    path.write_bytes(data)
    out = {name: np.empty(length, np.uint8) for name, (_, length) in places.items()}
    with path.open("rb") as stream:
        assert direct.read_spans(stream.fileno(), cut, out) == mark
        for name, (start, length) in places.items():
            assert out[name].tobytes() == data[start : start + length]
    changed = bytearray(data)
    changed[int(rng.integers(size))] ^= 1 << int(rng.integers(8))
    assert direct.mark_of(bytes(changed), cut) != mark
    os.truncate(path, size - 1)
    with path.open("rb") as stream, pytest.raises(OSError, match="ends early"):
        direct.read_spans(stream.fileno(), cut, out)


def test_spans_refuse_what_does_not_fit():
    for places in ({"a": (0, 9)}, {"a": (-1, 3)}, {"a": (0, 5), "b": (4, 2)}, {"a": (3, -1)}):
        with pytest.raises(ValueError, match="does not lie in the file"):
            direct.spans(8, places)
