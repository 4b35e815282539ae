"""A store that is reached by a URL is the one that a local folder holds, and is resumed, checked and refused alike."""

import importlib.util
import io
from pathlib import Path

import h5py
import numpy as np
import pytest

from mmcli.cache import Store, StoreDamaged, StoreError, StoreMismatch, StoreMissing, StoreUnfinished, place, verify
from mmcli.cache.places import entries, is_remote

needs_upath = pytest.mark.skipif(
    importlib.util.find_spec("upath") is None, reason="universal_pathlib is not installed: pip install -e '.[remote]'"
)


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/a%20store"
    pytest.importorskip("upath", reason="universal_pathlib is not installed: pip install -e '.[remote]'")
    return f"memory://{tmp_path.name}-{id(request)}/store"


def values(folder) -> dict[str, bytes]:
    """Every file but the two that hold times, as bytes."""
    return {path.name: path.read_bytes() for path in entries(folder) if path.name[0] != "." and path.suffix != ".json"}


def test_what_is_written_to_a_url_is_what_a_folder_holds(kit, url: str, tmp_path: Path) -> None:
    data, key = kit.Data(), kit.key()
    local = data.write(tmp_path / "local", key)
    assert data.write(place(url), key) == place(url)
    assert values(place(url)) == values(local)
    one, other = Store.open(place(url)), Store.open(local)
    assert one.index.equals(other.index, check_metadata=True)
    for name, array in vars(other.load()).items():
        np.testing.assert_array_equal(getattr(one.load(), name), array)
    assert verify(place(url)).ok
    with data.writer(place(url), key) as writer:
        assert writer.finished
        writer.finish()
    assert verify(place(url)).ok


def test_a_stopped_writer_goes_on_and_redoes_what_is_damaged(kit, url: str, tmp_path: Path) -> None:
    data, key = kit.Data(), kit.key()
    folder = place(url)
    with data.writer(folder, key) as writer:
        for shard in writer.missing("image"):
            writer.write_image(shard, v_img=data.v_img[shard.start : shard.stop])
    with pytest.raises(StoreUnfinished):
        Store.open(folder)
    (folder / "image-00001.h5").write_bytes((folder / "image-00001.h5").read_bytes()[:-1])
    with data.writer(folder, key) as writer:
        assert [shard.name for shard in writer.missing("image")] == ["image-00001.h5"]
        assert [one.name for one in writer.damaged] == ["image-00001.h5"]
        data.fill(writer)
        writer.finish()
    assert values(folder) == values(data.write(tmp_path / "local", key))
    (folder / "text-00000.h5").unlink()
    with pytest.raises(StoreDamaged):
        Store.open(folder)
    assert not verify(folder).ok


def test_skipped_rows_other_keys_and_replacing(kit, url: str) -> None:
    data, key = kit.Data(), kit.key()
    data.v_img[5] = 0
    folder = place(url)
    with data.writer(folder, key) as writer:
        for shard in writer.missing("image"):
            rows = [row for row in range(shard.n_rows) if shard.start + row == 5]
            writer.write_image(shard, v_img=data.v_img[shard.start : shard.stop], skipped=rows)
        data.fill(writer)
        writer.finish(lambda row: f"row {row} is a bad one")
    assert Store.open(folder).skipped == {5: "row 5 is a bad one"}
    with data.writer(folder, key) as writer:
        assert list(writer.skipped.values()) == [(5,)]
        writer.redo(next(iter(writer.skipped)))
        assert not writer.finished
    other = kit.key(patches=512)
    with pytest.raises(StoreMismatch, match="another key"):
        data.write(folder, other)
    fresh = kit.Data()
    fresh.write(folder, other, overwrite=True)
    assert Store.open(folder).key == other
    with data.writer(folder.parent / "sibling", kit.key(patches=1024)) as writer:
        assert writer.reuse_text(folder) == len(writer.layout.shards("text"))


def test_nothing_and_something_else(kit, url: str) -> None:
    with pytest.raises(StoreMissing):
        Store.open(place(url))
    place(url).mkdir(parents=True, exist_ok=True)
    (place(url) / "thesis.txt").write_bytes(b"years of work")
    with pytest.raises(StoreMismatch, match="not of a store"):
        kit.Data().write(place(url), kit.key(), overwrite=True)
    assert (place(url) / "thesis.txt").read_bytes() == b"years of work"


@needs_upath
def test_an_object_that_comes_back_changed_is_removed(kit, monkeypatch) -> None:
    folder = place("memory://changed/store")
    original = type(folder).write_bytes

    def spoil(self, data: bytes) -> int:
        if not self.name.startswith("text"):
            return original(self, data)
        buffer = io.BytesIO(data)
        with h5py.File(buffer, "r+") as file:
            file["v_txt"][0, 0, 0] = 1e3
        return original(self, buffer.getvalue())

    monkeypatch.setattr(type(folder), "write_bytes", spoil)
    with pytest.raises(StoreError, match=r"changed/store/text-00000.h5"):
        kit.Data().write(folder, kit.key())
    assert not (folder / "text-00000.h5").exists()


def test_a_url_keeps_its_slashes_and_a_path_stays_a_path(tmp_path: Path) -> None:
    assert place(str(tmp_path)) == place(tmp_path) == tmp_path
    assert place(f"file://{tmp_path}") == tmp_path
    assert not is_remote(place("c:/x"))
    with pytest.raises(StoreError, match="not a folder of this machine"):
        place("file://elsewhere/x")
    with pytest.raises(StoreError, match="cannot reach a URL"):
        place("nothing-like-it://bucket/x")


@needs_upath
def test_a_remote_place_is_told_by_its_url() -> None:
    assert is_remote(place("memory://bucket/x"))
    assert str(place("memory://bucket/x") / "y") == "memory://bucket/x/y"
