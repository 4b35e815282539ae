"""Locks between processes, also where the file system or the system has none."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmcli.cache import Store, StoreBusy, StoreError, Stripe, export_store, verify
from mmcli.cache.layout import LOCK
from mmcli.cache.locks import SOFT, LockHeld, locked, take_lock


def refuse_flock(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A file system without locks."""
    import fcntl

    def flock(handle: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("number", [None, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_one_holder_at_a_time_with_and_without_the_kernel(tmp_path, monkeypatch, number):
    if number is not None:
        refuse_flock(monkeypatch, number)
    path = tmp_path / "x.lock"
    with locked(path), pytest.raises(LockHeld, match="wait until it ends") as held:
        take_lock(path)
    assert (str(os.getpid()) in held.value.do) == (number is not None)
    with locked(path, keep=False):
        pass
    assert not [*tmp_path.iterdir()]


def test_a_users_own_file_at_the_lock_stays(kit, tmp_path):
    """Whatever is no empty file was not made here: it is refused, by every command that locks a folder, and stays."""
    store = Store.open(kit.Data().write(tmp_path / "s", kit.key()))
    out = tmp_path / "out"
    out.mkdir()
    (out / LOCK).write_text("my notes")
    for force in (False, True):
        with pytest.raises(StoreError, match=r"a file is where the lock .*out/\.lock.*; move it away"):
            export_store(store, out, "parquet", force=force)
    with pytest.raises(StoreError, match="a file that mmcli did not write"), locked(out / LOCK, keep=False):
        pass
    assert [path.name for path in out.iterdir()] == [LOCK]
    assert (out / LOCK).read_text() == "my notes"
    (out / "link").symlink_to(out / "nothing")
    with pytest.raises(StoreError, match="move it away"):
        take_lock(out / "link")
    assert (out / "link").is_symlink()


def test_a_lock_is_free_where_its_file_cannot_be_removed(tmp_path, monkeypatch):
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as system, locked(tmp_path / "x.lock", keep=False):
        system.setattr(Path, "unlink", refuse)
    with locked(tmp_path / "x.lock"):
        pass


def test_another_error_than_no_locks_is_not_passed_over(tmp_path, monkeypatch):
    refuse_flock(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        take_lock(tmp_path / "x.lock")


def test_an_empty_file_of_the_kernels_lock_holds_nobody(tmp_path, monkeypatch):
    with locked(tmp_path / "x.lock"):
        pass
    refuse_flock(monkeypatch, errno.ENOSYS)
    with locked(tmp_path / "x.lock"):
        assert (tmp_path / f"x.lock{SOFT}").read_text().startswith(f"{os.getpid()}\n")


def test_the_holder_of_a_killed_process_is_passed_over(tmp_path, monkeypatch):
    refuse_flock(monkeypatch, errno.ENOSYS)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with locked(tmp_path / "x.lock"):
        record = (tmp_path / f"x.lock{SOFT}").read_text()
    path = tmp_path / f"x.lock{SOFT}"
    path.write_text(record.replace(f"{os.getpid()}\n", f"{gone.pid}\n"))
    with locked(tmp_path / "x.lock", wait_s=5):
        pass


def test_writers_exclude_each_other_without_kernel_locks(kit, tmp_path, monkeypatch):
    refuse_flock(monkeypatch, errno.ENOLCK)
    data, folder = kit.Data(), tmp_path / "s"
    with data.writer(folder, kit.key(), stripe=Stripe(0, 2)), data.writer(folder, kit.key(), stripe=Stripe(1, 2)):
        for stripe in (None, Stripe(1, 2)):
            with pytest.raises(StoreBusy), data.writer(folder, kit.key(), stripe=stripe):
                pass
    data.write(folder, kit.key())
    assert verify(folder).ok
    assert [path.name for path in folder.glob(".lock*")] in ([], [LOCK])


def test_a_system_without_fcntl_reads_and_writes_stores(kit, tmp_path):
    folder = kit.Data().write(tmp_path / "s", kit.key())
    code = (
        "import sys; sys.modules['fcntl'] = None\n"
        "from pathlib import Path\n"
        "from mmcli.cache import Store, export_store\n"
        "from mmcli.cache.locks import locked\n"
        f"export_store(Store.open(Path({str(folder)!r})), Path({str(tmp_path / 'out')!r}), 'parquet')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert Store.open(folder)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "_export.json",
        "part-00000.parquet",
        "part-00001.parquet",
        "part-00002.parquet",
    }
