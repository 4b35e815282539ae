"""Extraction that loses nothing: bad images, other writers, full disks, signals, memory that runs out."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from mmcli import InputError
from mmcli.cache import Store, StoreBusy, StoreUnfinished, Stripe, verify
from mmcli.pipeline.core.config import load_config
from mmcli.pipeline.data.manifest import Manifest, read_manifest, write_manifest
from mmcli.pipeline.extraction.encoder import Encoder
from mmcli.pipeline.extraction.extract import ExtractPlan, extract, extract_here, parse_stripe
from mmcli.pipeline.extraction.stores import read_store
from mmcli.pipeline.extraction.towers import ImageTower

NAMES = ("v_img", "v_txt", "norm_img", "norm_txt", "n_captions")


def config_of(model: Path, **options):
    defaults = {
        "model.siglip2_variant": str(model),
        "model.max_num_patches": 64,
        "hardware.device": "cpu",
        "data.num_workers": 0,
    }
    return load_config(options=defaults | options)


def run(miniature, out: Path, **options):
    plan = ExtractPlan(**{"data": miniature.data, "out": out, "shard_rows": 16, "batch_tokens": 256} | options)
    return extract(config_of(miniature.model), plan)


def same(a: Path, b: Path) -> bool:
    item, other = Store.open(a).load(), Store.open(b).load()
    return all(np.array_equal(getattr(item, name), getattr(other, name)) for name in NAMES)


@pytest.fixture(scope="module")
def whole(miniature, tmp_path_factory) -> Path:
    return run(miniature, tmp_path_factory.mktemp("whole") / "store").store


# --- images that cannot be read, and images that only look so


@pytest.fixture
def odd(miniature, tmp_path: Path) -> tuple[Path, list[str], list[str]]:
    """A data folder of odd images: which can be read, and which cannot."""
    data = tmp_path / "odd"
    data.mkdir()
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    photo.save(data / "exif.jpg", exif=turned)
    photo.convert("CMYK").save(data / "cmyk.jpg")
    Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40).save(data / "16bit.png")
    photo.save(data / "animated.gif", save_all=True, append_images=[photo.rotate(90)])
    photo.resize((300, 1)).save(data / "flat.png")
    photo.resize((9000, 20)).save(data / "long.png")
    photo.convert("L").save(data / "grey.jpg")
    good = sorted(path.name for path in data.iterdir())
    (data / "zero.jpg").write_bytes(b"")
    (data / "text.jpg").write_text("no image at all")
    photo.save(data / "cut.jpg")
    (data / "cut.jpg").write_bytes((data / "cut.jpg").read_bytes()[:1500])
    header = PngImagePlugin._MAGIC + b"\0\0\0\x0dIHDR" + (30000).to_bytes(4) * 2 + b"\x08\x02\0\0\0"
    import zlib

    (data / "bomb.png").write_bytes(header + zlib.crc32(header[12:]).to_bytes(4) + b"\0\0\0\0IDAT\x35\xaf\x06\x1e")
    bad = ["bomb.png", "cut.jpg", "gone.jpg", "text.jpg", "zero.jpg"]
    names = [name for pair in zip(good, bad, strict=False) for name in pair] + good[len(bad) :]
    listing = Manifest.from_columns(
        image_ids=np.arange(len(names)),
        paths=names,
        splits=(["train", "val", "test"] * len(names))[: len(names)],
        captions=[["a dog"]] * len(names),
        labels=[[0]] * len(names),
        category_names=["dog"],
    )
    write_manifest(data / "manifest.parquet", listing)
    return data, good, bad


def test_bad_images_are_recorded_left_out_and_tried_again(miniature, odd, tmp_path: Path) -> None:
    data, good, bad = odd
    paths = read_manifest(data / "manifest.parquet").paths
    result = run(miniature, tmp_path / "s", data=data, on_error="skip", shard_rows=5)
    assert sorted(paths[row] for row in result.skipped) == bad
    assert result.n_encoded == len(good)
    assert any("5 images could not be read" in str(line) for line in result.summary())
    store = Store.open(tmp_path / "s")
    assert {paths[row]: reason for row, reason in store.skipped.items()}.keys() == set(bad)
    for name, said in {
        "zero.jpg": "an empty file",
        "text.jpg": "not an image",
        "cut.jpg": "damaged",
        "gone.jpg": "no file",
        "bomb.png": "exceeds limit",
    }.items():
        assert said in store.skipped[paths.index(name)]
    assert verify(tmp_path / "s").ok
    labelled = read_store(tmp_path / "s", load_config())
    assert sorted(labelled.listing.paths) == good
    assert len(labelled.embeddings.v_img) == len(good)
    assert (labelled.embeddings.norm_img > 0).all()
    # Nothing has changed: nothing is done, and the store stays as it is.
    again = run(miniature, tmp_path / "s", data=data, on_error="skip", shard_rows=5)
    assert (again.n_encoded, sorted(paths[row] for row in again.skipped)) == (0, bad)
    # The file is back: its shard is made again, the others are not, and the rest of it stays as it was.
    before = store.load()
    Image.new("RGB", (64, 64), "red").save(data / "cut.jpg")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("image-*.h5")}
    run(miniature, tmp_path / "s", data=data, on_error="skip", shard_rows=5)
    row = paths.index("cut.jpg")
    changed = {path.name for path in (tmp_path / "s").glob("image-*.h5") if path.stat().st_mtime_ns != times[path.name]}
    assert changed == {f"image-{row // 5:05d}.h5"}
    after = Store.open(tmp_path / "s")
    assert row not in after.skipped
    assert len(after.skipped) == 4
    others = np.arange(len(paths)) != row
    np.testing.assert_allclose(before.norm_img[others], after.load().norm_img[others], rtol=1e-5)


def test_by_default_a_bad_image_stops_and_says_how_to_go_on(miniature, odd, tmp_path: Path) -> None:
    data, _, _ = odd
    with pytest.raises(InputError, match=r"cannot read an image: .*--on-error skip"):
        run(miniature, tmp_path / "s", data=data)
    run(miniature, tmp_path / "s", data=data, on_error="skip")
    with pytest.raises(InputError, match="--on-error skip"):
        run(miniature, tmp_path / "s", data=data)
    assert len(Store.open(tmp_path / "s").skipped) == 5


def test_a_refusal_leaves_a_finished_store_finished(miniature, odd, tmp_path: Path) -> None:
    """One image is mended, another is not, and this run stops at it: the store is still the one it was."""
    data, _, _ = odd
    run(miniature, tmp_path / "s", data=data, on_error="skip", shard_rows=3)
    Image.new("RGB", (64, 64), "red").save(data / "bomb.png")
    with pytest.raises(InputError, match="--on-error skip"):
        run(miniature, tmp_path / "s", data=data, shard_rows=3)
    assert len(Store.open(tmp_path / "s").skipped) == 5


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE, errno.EACCES], ids=errno.errorcode.get)
def test_trouble_of_the_file_system_is_no_hole_in_a_store(miniature, whole, tmp_path, monkeypatch, number: int) -> None:
    opened = Image.open
    calls = iter(range(1000))

    def fail_once(*words: object) -> Image.Image:
        if next(calls) == 70:  # headers of all images, and pixels of the first ones, could be read
            raise OSError(number, os.strerror(number))
        return opened(*words)

    monkeypatch.setattr(Image, "open", fail_once)
    with pytest.raises(InputError, match="cannot read an image") as caught:
        run(miniature, tmp_path / "s", on_error="skip")
    assert "damaged" not in str(caught.value)
    with pytest.raises(StoreUnfinished):
        Store.open(tmp_path / "s")
    assert run(miniature, tmp_path / "s", on_error="skip").skipped == {}
    assert same(tmp_path / "s", whole)


# --- several writers


def test_stripes_fill_one_store_and_the_last_one_finishes_it(miniature, whole: Path, tmp_path: Path) -> None:
    for place in (2, 0):
        result = run(miniature, tmp_path / "s", stripe=Stripe(place, 3))
        assert not result.finished
        assert "the last stripe to end finishes the store" in str(result.summary()[-1])
        with pytest.raises(StoreUnfinished):
            Store.open(tmp_path / "s")
    result = run(miniature, tmp_path / "s", stripe=Stripe(1, 3))
    assert result.finished
    assert same(tmp_path / "s", whole)
    assert verify(tmp_path / "s").ok
    assert run(miniature, tmp_path / "s").was_finished
    assert run(miniature, tmp_path / "s", stripe=Stripe(1, 3)).was_finished


def test_stripes_account_for_what_others_skipped(miniature, odd, tmp_path: Path) -> None:
    data, _, bad = odd
    for place in (0, 1):
        run(miniature, tmp_path / "s", data=data, on_error="skip", shard_rows=3, stripe=Stripe(place, 2))
    assert len(Store.open(tmp_path / "s").skipped) == len(bad)
    assert verify(tmp_path / "s").ok


def test_a_stripe_and_a_whole_extraction_exclude_each_other(miniature, tmp_path: Path, monkeypatch) -> None:
    tried: list[str] = []

    def meanwhile(stripe: Stripe | None) -> str:
        try:
            run(miniature, tmp_path / "s", stripe=stripe)
        except StoreBusy as error:
            return str(error)
        return "went on"

    original = Encoder.image_features

    def slow(self, patches, grid):
        if not tried:
            tried.append("")
            tried[:] = [meanwhile(None), meanwhile(Stripe(0, 2)), meanwhile(Stripe(1, 2))]
        return original(self, patches, grid)

    monkeypatch.setattr(Encoder, "image_features", slow)
    run(miniature, tmp_path / "s", stripe=Stripe(0, 2))
    assert ["another process writes this store" in line for line in tried] == [True, True, False]
    assert verify(tmp_path / "s").ok


def test_processes_share_the_work(miniature, whole: Path, tmp_path: Path) -> None:
    plan = ExtractPlan(data=miniature.data, out=tmp_path / "s", shard_rows=16, batch_tokens=256)
    result = extract_here(config_of(miniature.model), plan, processes=2)
    assert (result.finished, result.n_encoded) == (True, 60)
    for name in NAMES:  # each with its own number of threads, so only up to rounding
        item, other = (getattr(Store.open(folder).load(), name) for folder in (tmp_path / "s", whole))
        np.testing.assert_allclose(item.astype(np.float32), other.astype(np.float32), rtol=2e-3, atol=2e-3)
    again = extract_here(config_of(miniature.model), ExtractPlan(**vars(plan) | {"force": True}), processes=2)
    assert again.n_encoded == 60


def test_the_first_process_that_fails_ends_the_others(miniature, odd, tmp_path: Path) -> None:
    data, _, _ = odd
    plan = ExtractPlan(data=data, out=tmp_path / "s", shard_rows=3)
    with pytest.raises(InputError, match="cannot read an image"):
        extract_here(config_of(miniature.model), plan, processes=2)
    with pytest.raises(StoreUnfinished):
        Store.open(tmp_path / "s")
    assert run(miniature, tmp_path / "s", data=data, on_error="skip").finished


@pytest.mark.parametrize("text", ["0/4", "5/4", "a/b", "3", "1/0", "1/-2", "/"])
def test_an_impossible_stripe_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="no such stripe"):
        parse_stripe(text)
    assert parse_stripe("3/8") == Stripe(2, 8)


# --- what a machine does


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
    ids=["allocator", "cublas", "cpu"],
)
def test_when_memory_runs_out_passes_are_halved(miniature, whole: Path, tmp_path: Path, monkeypatch, error) -> None:
    original, sizes = ImageTower.__call__, []

    def short(self, patches, grid):
        sizes.append(patches.shape[0] * grid.tokens)
        if sizes[-1] > 100:
            raise error
        return original(self, patches, grid)

    monkeypatch.setattr(ImageTower, "__call__", short)
    result = run(miniature, tmp_path / "s")
    assert result.n_encoded == 60
    assert max(sizes) > 100
    assert sum(size > 100 for size in sizes) <= 3  # it does not try again what did not fit
    item, other = Store.open(tmp_path / "s").load(), Store.open(whole).load()
    np.testing.assert_allclose(item.norm_img, other.norm_img, rtol=1e-5)


def test_no_memory_for_one_image_is_one_line(miniature, tmp_path: Path, monkeypatch) -> None:
    def never(self, patches, grid):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ImageTower, "__call__", never)
    with pytest.raises(InputError, match=r"out of memory: cpu: .*lower the patch budget"):
        run(miniature, tmp_path / "s")


def test_other_errors_are_not_taken_for_a_memory_shortage(miniature, tmp_path: Path, monkeypatch) -> None:
    def broken(self, patches, grid):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(ImageTower, "__call__", broken)
    with pytest.raises(RuntimeError, match="multiplied"):
        run(miniature, tmp_path / "s")


CHILD = """
import os, resource, sys
from pathlib import Path
if sys.argv[4] != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)
    import signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
print("ready", flush=True)
sys.argv[1:] = ["extract", "--model", sys.argv[1], "--data", sys.argv[2], "--out", sys.argv[3], "--patches", "64",
                "--device", "cpu", "--batch-tokens", "256", "--workers", "0" if sys.argv[4] != "0" else "1"]
import mmcli.pipeline.extraction.extract as stage
stage.SHARD_ROWS = {"cpu": 4}
from mmcli.cli import main
main()
"""


def start(miniature, out: Path, limit: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(miniature.model), str(miniature.data), str(out), str(limit)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code, and what was said on stderr."""
    _, said = process.communicate(timeout=120)
    return process.returncode, said


def test_a_full_disk_is_one_line_and_what_was_written_stays(miniature, tmp_path: Path) -> None:
    run(miniature, tmp_path / "once", shard_rows=4)
    sizes = {
        part: max(path.stat().st_size for path in (tmp_path / "once").glob(f"{part}-*.h5"))
        for part in ("image", "text")
    }
    assert sizes["image"] < sizes["text"]
    code, said = end(start(miniature, tmp_path / "s", limit=sizes["text"] - 1))
    assert code == 2, said
    lines = [line for line in said.splitlines() if line.startswith("mmcli: ")]
    assert len(lines) == 1
    assert "cannot write" in lines[0]
    assert "Traceback" not in said
    assert list((tmp_path / "s").glob("image-*.h5"))
    assert not [path for path in (tmp_path / "s").iterdir() if path.name.endswith(".tmp")]
    assert end(start(miniature, tmp_path / "s"))[0] == 0
    assert verify(tmp_path / "s").ok


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_polite_signal_ends_with_130_and_one_line(miniature, tmp_path: Path, number: int) -> None:
    process = start(miniature, tmp_path / "s")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "s").glob("image-*.h5")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    code, said = end(process)
    assert code in (130, 0)  # 0 where it was done first
    assert "Traceback" not in said
    if code:
        assert said.count("interrupted; what was finished is kept") == 1


@pytest.mark.slow
def test_killed_fifty_times_and_resumed_the_store_is_the_same(miniature, tmp_path: Path) -> None:
    """By SIGKILL, SIGTERM and SIGINT in turn, anywhere between start and end."""
    process = start(miniature, tmp_path / "once")
    started = time.monotonic()
    assert end(process)[0] == 0
    took = time.monotonic() - started
    seed = int.from_bytes(os.urandom(4))
    rng = np.random.default_rng(seed)
    kills, round_ = 0, 0
    while kills < 50:
        out, round_ = tmp_path / f"s{round_}", round_ + 1
        while not (out / "manifest.json").is_file() and kills < 50:
            process = start(miniature, out)
            time.sleep(float(rng.uniform(0.3, 1.0)) * took)
            process.send_signal([signal.SIGKILL, signal.SIGTERM, signal.SIGINT][kills % 3])
            kills += end(process)[0] != 0
        assert end(start(miniature, out))[0] == 0
        assert same(out, tmp_path / "once"), seed
        assert verify(out).ok, seed


@pytest.mark.parametrize("most", [30, pytest.param(2055, marks=pytest.mark.slow)])  # 2,055 times 60 are COCO's 123,287
def test_memory_does_not_grow_with_the_data(miniature, tmp_path: Path, most: int) -> None:
    """Peak of the process for few images and for many times as many; both within the model and 1.5 GiB."""
    peaks = []
    for times in (1, most):
        listing = read_manifest(miniature.data / "manifest.parquet")
        n = len(listing) * times
        many = Manifest.from_columns(
            image_ids=np.arange(n),
            paths=list(listing.paths) * times,
            splits=["train"] * n,
            captions=[["a dog", "a cat"]] * n,
            labels=[[0]] * n,
            category_names=["dog"],
        )
        write_manifest(tmp_path / f"{times}.parquet", many)
        code = (
            "import json, re, resource, sys\nfrom pathlib import Path\nfrom mmcli.cli import main\n"
            "try:\n    main()\nfinally:\n"
            # ru_maxrss of a process begins with the size of the one that started it, here that of the tests.
            "    own = int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
            "    print(json.dumps((own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024))\n"
        )
        words = [
            "extract",
            "--model",
            miniature.model,
            "--data",
            miniature.data,
            "--manifest",
            tmp_path / f"{times}.parquet",
            "--out",
            tmp_path / f"s{times}",
            "--patches",
            64,
            "--device",
            "cpu",
            "--quiet",
            "--workers",
            1,
        ]
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=True
        )
        peaks.append(json.loads(done.stdout.splitlines()[-1]))
    assert max(peaks) < 1.5 * 2**30
    assert peaks[1] < peaks[0] + 150 * 2**20
    assert resource.RUSAGE_SELF == 0
