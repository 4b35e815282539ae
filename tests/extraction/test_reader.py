"""What worker processes read is what is read here, in order; what cannot be read has its reason; nobody is left over."""

import errno
import multiprocessing
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmcli import InputError
from mmcli.pipeline.extraction.images import PatchSpec, UnreadableImage, image_size, read_patches
from mmcli.pipeline.extraction.ray_engine import read_shard
from mmcli.pipeline.extraction.reader import ImageReader

SPEC = PatchSpec(side=16, budget=16, fixed=None, resample=2)
SIZES = ((64, 64), (90, 30), (30, 90), (64, 64), (90, 30), (64, 64), (7, 200))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for place, (width, height) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / f"{place}.jpg")
    return tmp_path


def read(data: Path, lists, **options):
    with ImageReader(data, SPEC, **{"tokens": 32, "workers": 2, "prefetch_factor": 2} | options) as reader:
        return list(reader.read(lists))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ahead", [1, 4])
def test_every_image_comes_once_with_its_own_pixels(data: Path, workers: int, ahead: int) -> None:
    lists = [[f"{place}.jpg" for place in (3, 0, 1)], ["6.jpg"], [f"{place}.jpg" for place in (2, 4, 5)]]
    pieces = read(data, lists, workers=workers, prefetch_factor=ahead)
    assert [piece.number for piece in pieces] == sorted(piece.number for piece in pieces)
    for number, paths in enumerate(lists):
        own_pieces = [piece for piece in pieces if piece.number == number]
        assert [piece.last for piece in own_pieces] == [False] * (len(own_pieces) - 1) + [True]
        assert sorted(row for piece in own_pieces for row in piece.batch.rows) == list(range(len(paths)))
        for piece in own_pieces:
            assert not piece.bad
            for row, pixels in zip(piece.batch.rows, piece.pixels, strict=True):
                wanted = np.empty_like(pixels)
                assert SPEC.grid(*image_size(data / paths[row])) == piece.batch.grid
                read_patches(data / paths[row], piece.batch.grid, SPEC, wanted)
                np.testing.assert_array_equal(pixels, wanted)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_changes_no_other_batch(data: Path, workers: int) -> None:
    paths = [f"{place}.jpg" for place in range(7)]
    whole = read(data, [paths], workers=workers)
    raw = (data / "3.jpg").read_bytes()
    (data / "3.jpg").write_bytes(raw[: len(raw) // 2])  # the header is there, the pixels are not
    (data / "6.jpg").write_bytes(b"")
    pieces = read(data, [paths, ["6.jpg"]], workers=workers)
    bad = {(piece.number, row): reason for piece in pieces for row, reason in piece.bad.items()}
    assert bad.keys() == {(0, 3), (0, 6), (1, 0)}
    assert "damaged file" in bad[0, 3]
    assert "an empty file" in bad[0, 6]
    assert pieces[-1].batch is None
    assert pieces[-1].last
    # The truncated image keeps its place, so what is computed for the others does not move by a bit.
    assert [piece.batch for piece in whole if 6 not in piece.batch.rows] == [
        item.batch for item in pieces if item.batch
    ]
    zeroed = next(piece for piece in pieces if piece.batch and 3 in piece.batch.rows)
    assert not zeroed.pixels[zeroed.batch.rows.index(3)].any()


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("path", "line"), [("proc/mem", "got Input/output error"), ("../x.jpg", "leaves the data folder")]
)
def test_what_says_nothing_about_an_image_stops_everything(data: Path, workers: int, path: str, line: str) -> None:
    (data / "proc").symlink_to("/proc/self")
    with pytest.raises(InputError, match=line) as caught:
        read(data, [["0.jpg", path, "1.jpg"]], workers=workers)
    assert not isinstance(caught.value, UnreadableImage)


def test_a_task_that_reads_a_shard_returns_what_stopped_it(data: Path) -> None:
    """Tasks of Ray read shards for others, and an error of a task would come as a traceback."""
    whole, stopped = (read_shard(3, paths, data, SPEC, 32) for paths in (["0.jpg", "1.jpg"], ["0.jpg", "../x.jpg"]))
    assert [(piece.number, piece.bad) for piece in whole] == [(3, {}), (3, {})]
    assert isinstance(stopped, InputError)
    assert "leaves the data folder" in str(stopped)


@pytest.mark.parametrize("workers", [0, 2])
def test_odd_metadata_is_not_told(data: Path, workers: int, capfd: pytest.CaptureFixture[str]) -> None:
    """Pillow warns of it once an image; nobody here reads it."""
    maker_of_4_gigabytes = struct.pack("<HHLL", 0x010F, 2, 0xFFFFFFF0, 8)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + maker_of_4_gigabytes + bytes(4)
    Image.new("RGB", (64, 64)).save(data / "odd.jpg", exif=exif)
    with pytest.warns(UserWarning, match="Tag data|EXIF"), Image.open(data / "odd.jpg") as image:
        image.getexif()
    capfd.readouterr()
    (piece,) = read(data, [["odd.jpg"]], workers=workers)
    assert not piece.bad
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EAGAIN, "Resource temporarily unavailable")])
def test_processes_that_cannot_be_started_are_one_line(data: Path, monkeypatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(multiprocessing.get_context("forkserver").Process, "start", fail)
    with pytest.raises(InputError, match=r"the processes that read images cannot work: .*; give fewer --workers"):
        read(data, [["0.jpg"]])


@pytest.mark.parametrize("what", ["images", "headers"])
def test_a_worker_that_is_killed_is_one_line(data: Path, what: str) -> None:
    def kill_all(reader: ImageReader) -> None:
        paths = [f"{place % 7}.jpg" for place in range(2000)]
        for _ in reader.read([paths]) if what == "images" else reader.headers(paths):
            for process in multiprocessing.active_children():
                process.kill()

    with (
        ImageReader(data, SPEC, tokens=16, workers=1, prefetch_factor=1) as reader,
        pytest.raises(InputError, match="a process that reads images was killed"),
    ):
        kill_all(reader)


CHILD = """
import multiprocessing, sys, time
from pathlib import Path
from mmcli.pipeline.extraction.images import PatchSpec
from mmcli.pipeline.extraction.reader import ImageReader
spec = PatchSpec(side=16, budget=16, fixed=None, resample=2)
with ImageReader(Path(sys.argv[1]), spec, tokens=16, workers=2, prefetch_factor=2) as reader:
    for piece in reader.read([["0.jpg"] * 50]):
        print(*(process.pid for process in multiprocessing.active_children()), flush=True)
        time.sleep(60)
"""


def test_workers_and_memory_go_when_the_parent_is_killed(data: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(data)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = process.stdout.readline().split()
    assert pids
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(map(alive, pids)):
        time.sleep(0.05)
    assert not any(map(alive, pids))
    assert not [path for path in Path("/dev/shm").glob("torch_*") if path.name.split("_")[1] in pids]


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
