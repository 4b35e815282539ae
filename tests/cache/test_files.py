"""Order of writes: synced before renamed, the manifest last; a failure in between leaves nothing to read as whole."""

import errno
import os
import stat
from pathlib import Path

import pytest

from mmcli.cache import Store, StoreError, StoreMissing, StoreUnfinished, Stripe, layout, verify
from mmcli.cache import files as cache_files
from mmcli.cache.layout import temporary_name


def test_synced_checked_then_renamed_and_the_manifest_last(kit, tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(handle):
        events.append(("fsync", Path(f"/proc/self/fd/{handle}").readlink().name))
        fsync(handle)

    def logged_replace(source, target):
        events.append(("rename", Path(source).name, Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    kit.Data().write(tmp_path / "store", kit.key())
    renames = [at for at, event in enumerate(events) if event[0] == "rename"]
    for at in renames:
        _, source, target = events[at]
        assert source == temporary_name(target)
        assert events[at - 1] == ("fsync", source)
        assert events[at + 1] == ("fsync", "store")
    order = [events[at][2] for at in renames]
    assert (order[0], order[-2:]) == ("key.json", ["index.parquet", "manifest.json"])
    assert len(order) == 9


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_anywhere_leaves_nothing_that_reads_as_whole(kit, tmp_path, monkeypatch, call):
    real, data = getattr(os, call), kit.Data()
    for fail_at in range(1, 40):
        folder, left = tmp_path / str(fail_at), [fail_at]

        def failing(*args, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(28, "No space left on device")
            return real(*args)

        message = ""
        monkeypatch.setattr(os, call, failing)
        try:
            data.write(folder, kit.key())
        except StoreError as error:
            message = str(error)
        finally:
            monkeypatch.setattr(os, call, real)
        if not message:
            break
        assert "No space left on device" in message
        assert "\n" not in message
        if (folder / "manifest.json").exists():
            assert call == "fsync"  # of the folder, after the rename
            assert verify(folder).ok
        else:
            with pytest.raises((StoreUnfinished, StoreMissing)):
                Store.open(folder)
        data.write(folder, kit.key())
        assert verify(folder).ok
    assert fail_at > {"fsync": 18, "replace": 9}[call]


def test_what_the_disk_gives_back_is_compared(kit, tmp_path, monkeypatch):
    data = kit.Data()

    def spoil(stream, content):
        stream.write(content.replace(data.v_img[:4].astype("f2").tobytes(), data.v_img[4:8].astype("f2").tobytes()))

    with data.writer(tmp_path / "s", kit.key()) as writer:
        monkeypatch.setattr(cache_files, "_fill", spoil)
        with pytest.raises(StoreError, match=r"cannot read what was written: .*v_img.*; check the disk"):
            data.fill(writer)
        assert len(writer.missing("image")) == 3
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [".lock", "key.json"]


def test_a_shard_with_other_numbers_is_not_what_was_written(kit, tmp_path, monkeypatch):
    other = (kit.Data(seed=1).write(tmp_path / "other", kit.key()) / "image-00000.h5").read_bytes()
    with kit.Data().writer(tmp_path / "s", kit.key()) as writer:
        monkeypatch.setattr(cache_files, "_fill", lambda stream, _: stream.write(other))
        with pytest.raises(StoreError, match="the disk gave back something else"):
            kit.Data().fill(writer)
        assert len(writer.missing("image")) == 3


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.ENOSYS, errno.EIO, errno.ENOSPC])
def test_a_missing_fsync_is_passed_over_and_a_fault_is_not(kit, tmp_path, monkeypatch, number):
    fsync = os.fsync

    def refuse(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.delattr(os, "O_DIRECTORY")
    if number in {errno.EIO, errno.ENOSPC}:
        with pytest.raises(StoreError, match=os.strerror(number)):
            kit.Data().write(tmp_path / "s", kit.key())
    else:
        assert verify(kit.Data().write(tmp_path / "s", kit.key())).ok


def test_a_live_writer_of_another_container_keeps_its_file(kit, tmp_path, monkeypatch):
    """Its process number means nothing here, and may be that of nobody."""
    data, gone = kit.Data(), 2**22 + 1
    with data.writer(tmp_path / "s", kit.key(), stripe=Stripe(0, 2)):
        pass
    mine = temporary_name("image-00001.h5").replace(f"-{os.getpid()}.", f"-{gone}.")
    theirs = mine.replace(layout.this_host(), layout.this_host()[:-8] + "01234567")
    for name in (mine, theirs):
        (tmp_path / "s" / name).touch()
    with data.writer(tmp_path / "s", kit.key(), stripe=Stripe(1, 2)):
        pass
    assert {path.name for path in (tmp_path / "s").glob("*.tmp")} | {mine} == {mine, theirs}
    assert not (tmp_path / "s" / mine).exists()


def test_another_pid_namespace_has_another_host_name(monkeypatch):
    here, stat_of = layout.this_host.__wrapped__(), Path.stat

    def elsewhere(path, **options):
        return stat_of(Path("/proc/self/ns/mnt" if path.name == "pid" else path), **options)

    monkeypatch.setattr(Path, "stat", elsewhere)
    assert layout.this_host.__wrapped__() != here


def test_a_temporary_name_that_is_a_link_is_never_written_to(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.write_bytes(b"theirs")
    os.link(theirs, tmp_path / temporary_name("text-00000.h5"))
    cache_files.write_whole(tmp_path / "text-00000.h5", b"ours")
    assert theirs.read_bytes() == b"theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text-00000.h5", "theirs"]
