"""Files that were damaged at random: every reader gives what was written, or one line, within seconds.

``pytest --mutations 10000 tests/test_mutations.py`` tries that many; each is drawn from its number alone, so
that a failure can be repeated.
"""

import json
import re
import shutil
import signal
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from kit import reports
from mmcli import InputError, load_head
from mmcli.cache import Store, verify
from mmcli.pipeline.ablation.experiments import read_experiments, read_grid
from mmcli.pipeline.ablation.records import read_rows
from mmcli.pipeline.core.checkpoint import best_checkpoint
from mmcli.pipeline.core.config import load_config
from mmcli.pipeline.core.metrics_file import read_history, read_metrics
from mmcli.pipeline.core.run import open_run, read_info
from mmcli.pipeline.data.coco import read_instances, read_karpathy
from mmcli.pipeline.data.manifest import read_manifest
from mmcli.pipeline.data.sources.recognise import read_source, recognise
from mmcli.pipeline.data.sources.samples import SplitRule, to_manifest
from mmcli.pipeline.data.sources.tables import Columns
from mmcli.pipeline.evaluation.compare import compare
from mmcli.pipeline.evaluation.metrics import read_scores
from mmcli.pipeline.evaluation.prompts import read_prompts
from mmcli.pipeline.evaluation.search import Evaluated
from mmcli.pipeline.extraction.images import load_image
from mmcli.pipeline.extraction.import_store import ImportPlan, import_store
from mmcli.pipeline.report.collect import read_finished_run
from mmcli.pipeline.tagging.index import build
from mmcli.pipeline.tagging.index_file import read_index
from mmcli.pipeline.tagging.requests import read_requests
from mmcli.pipeline.training.state import TrainingState, read_state, write_state

SECONDS = 10
LONGEST_LINE = 1500


@dataclass(frozen=True)
class Reader:
    """A file, how it is read, and whether it carries a checksum: what is read is then what was written.

    Attributes:
        file: The file that is damaged, below the folder of all.
        read: Reads it, given that folder; what it gives is compared.
        is_exact: Whether damage can never pass.
        is_text: Whether values are exchanged for others as well.
        scratch: A folder that reading makes and that is removed after it.
        refuses: Whether damage is refused, rather than listed or passed over.
    """

    file: str
    read: Callable[[Path], Any]
    is_exact: bool = False
    is_text: bool = False
    scratch: str = ""
    refuses: bool = True


def _whole(store: Path) -> list[Any]:
    opened = Store.open(store)
    loaded = opened.load()
    return [opened.digest, opened.ids, opened.index, *vars(loaded).values()]


def _import(folder: Path, *, images: str, texts: str) -> Any:
    plan = ImportPlan(
        images=folder / images, texts=folder / texts, manifest=folder / "m.parquet", name="x", out=folder / "imported"
    )
    return import_store(plan).n_images


def _head(place: Path) -> list[Any]:
    head = load_head(place)
    return [json.dumps(head.build), *(value.numpy() for value in head.state_dict().values())]


def _codes(run: Path) -> list[Any]:
    found = Evaluated.of(open_run(run), "test")
    return [value for codes in (found.base, found.query, found.val) for value in vars(codes).values()]


def _index(path: Path) -> list[Any]:
    index, _ = read_index(path)
    return [index.image_id, index.soft, index.packed, index.labels, index.category_names, index.paths, index.captions]


def _source(path: Path) -> Any:
    samples = read_source(recognise(str(path)), Columns())
    return to_manifest(samples, name="x", rule=SplitRule(), where=path)[0].sha256


READERS = {
    "store manifest": Reader("store/manifest.json", lambda f: _whole(f / "store"), is_exact=True, is_text=True),
    "store index": Reader("store/index.parquet", lambda f: _whole(f / "store"), is_exact=True),
    "store images": Reader("store/image-00000.h5", lambda f: _whole(f / "store"), is_exact=True),
    "store texts": Reader("store/text-00001.h5", lambda f: _whole(f / "store"), is_exact=True),
    "shard alone": Reader("bare/image-00000.h5", lambda f: verify(f / "bare").problems, refuses=False),
    "key alone": Reader("bare/key.json", lambda f: verify(f / "bare").problems, is_text=True, refuses=False),
    "train codes": Reader("run/codes/train.safetensors", lambda f: _codes(f / "run"), is_exact=True),
    "test codes": Reader("run/codes/test.safetensors", lambda f: _codes(f / "run"), is_exact=True),
    "scores": Reader(
        "run/scores/classifier-test.safetensors",
        lambda f: list(read_scores(f / "run", "classifier", "test").values()),
        is_exact=True,
    ),
    "index build": Reader(
        "run/codes/train.safetensors",
        lambda f: build(open_run(f / "run"), f / "built.safetensors", force=True).n,
        is_exact=True,
    ),
    "checkpoint": Reader("run/checkpoints/BEST", lambda f: _head(f / "run"), is_exact=True),
    "list of checkpoints": Reader("run/checkpoints/checkpoints.json", lambda f: _head(f / "run"), is_text=True),
    "hub weights": Reader("run/model/model.safetensors", lambda f: _head(f / "run/model"), is_exact=True),
    "hub configuration": Reader("run/model/config.json", lambda f: _head(f / "run/model"), is_text=True),
    "training state": Reader(
        "training.safetensors",
        lambda f: [*vars(read_state(f / "training.safetensors"))["tensors"].values()],
        is_exact=True,
    ),
    "index file": Reader("index.safetensors", lambda f: _index(f / "index.safetensors"), is_exact=True),
    "run": Reader("run/run.json", lambda f: (read_info(f / "run"), read_finished_run(f / "run")), is_text=True),
    "metrics": Reader(
        "run/metrics.json", lambda f: (read_metrics(f / "run"), read_finished_run(f / "run")), is_text=True
    ),
    "history": Reader("run/history.jsonl", lambda f: read_history(f / "run"), is_text=True),
    "run configuration": Reader("run/config.yaml", lambda f: load_config(f / "run/config.yaml"), is_text=True),
    "compared runs": Reader(
        "kit/runs/head/metrics.json",
        lambda f: compare(f / "kit/runs/head", f / "kit/runs/head", method_a="knn"),
        is_text=True,
    ),
    "rows of experiments": Reader("kit/runs/ablations/rows.parquet", lambda f: read_rows(f / "kit/runs/ablations")),
    "experiments": Reader("e.yaml", lambda f: read_experiments(str(f / "e.yaml")), is_text=True),
    "grid": Reader("g.yaml", lambda f: read_grid(str(f / "g.yaml")), is_text=True),
    "manifest": Reader("m.parquet", lambda f: read_manifest(f / "m.parquet").sha256),
    "image vectors": Reader("i.npy", lambda f: _import(f, images="i.npy", texts="i.npy"), scratch="imported"),
    "table of vectors": Reader(
        "v.parquet", lambda f: _import(f, images="v.parquet", texts="i.npy"), scratch="imported"
    ),
    "instances": Reader("instances.json", lambda f: read_instances(f / "instances.json"), is_text=True),
    "Karpathy split": Reader("dataset_coco.json", lambda f: read_karpathy(f / "dataset_coco.json"), is_text=True),
    "captions in JSON": Reader("c.jsonl", lambda f: read_requests([], None, f / "c.jsonl"), is_text=True),
    "captions in CSV": Reader("c.csv", lambda f: read_requests([], None, f / "c.csv")),
    "prompts": Reader("prompts.txt", lambda f: read_prompts(f / "prompts.txt")),
    "data set in CSV": Reader("set/t.csv", lambda f: _source(f / "set" / "t.csv")),
    "data set in JSON lines": Reader("set/t.jsonl", lambda f: _source(f / "set" / "t.jsonl"), is_text=True),
    "data set in parquet": Reader("set/t.parquet", lambda f: _source(f / "set" / "t.parquet")),
    "images in a zip file": Reader("set/z.zip", lambda f: _source(f / "set" / "z.zip")),
    "images in a tar file": Reader("set/z.tar", lambda f: _source(f / "set" / "z.tar")),
    "image in a zip file": Reader("set/z.zip", lambda f: load_image(f / "set" / "z.zip" / "a.png") is None),
    "image in a tar file": Reader("set/z.tar", lambda f: load_image(f / "set" / "z.tar" / "a.png") is None),
    "instances of any COCO": Reader(
        "coco/instances_val.json", lambda f: _source(f / "coco" / "instances_val.json"), is_text=True
    ),
    "objects of Visual Genome": Reader("genome/objects.json", lambda f: _source(f / "genome"), is_text=True),
    "labels of Open Images": Reader("open/val-annotations-bbox.csv", lambda f: _source(f / "open")),
    "JPEG": Reader("a.jpg", lambda f: load_image(f / "a.jpg") is None),
    "PNG": Reader("a.png", lambda f: load_image(f / "a.png") is None),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The mutations of each reader as one test."""
    if "mutations_each" in metafunc.fixturenames:
        each = -(-metafunc.config.getoption("--mutations") // len(READERS))
        metafunc.parametrize("mutations_each", [each], ids=[str(each)])


@pytest.fixture(scope="module")
def folder(made: Path, miniature, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every file that is read, small and whole."""
    folder = tmp_path_factory.mktemp("mutations")
    store = next((made / "data" / "cache").iterdir())
    shutil.copytree(store, folder / "store")
    shutil.copytree(store, folder / "bare")
    (folder / "bare" / "manifest.json").unlink()
    run = shutil.copytree(next((made / "runs").iterdir()), folder / "run")
    best = best_checkpoint(run)
    best.with_name("BEST").symlink_to(best.name)
    build(open_run(run), folder / "index.safetensors")
    state = TrainingState(
        epoch=2, history=[{"epoch": 1.0}], tensors={"a": torch.ones(5)}, precision="float32", scaler={}
    )
    write_state(folder / "training.safetensors", state)
    reports.make_kit(folder / "kit")
    grids = Path(reports.__file__).parents[2] / "pipeline" / "ablation" / "grids"
    shutil.copy(grids / "miniature.yaml", folder / "e.yaml")
    shutil.copy(grids / "plan.yaml", folder / "g.yaml")
    shutil.copy(miniature.data / "manifest.parquet", folder / "m.parquet")
    listing = read_manifest(folder / "m.parquet")
    vectors = np.random.default_rng(0).standard_normal((len(listing), 4)).astype(np.float32)
    np.save(folder / "i.npy", vectors)
    columns = {"image_id": listing.image_ids, "v_img": pa.array(vectors.tolist(), pa.list_(pa.float32()))}
    pq.write_table(pa.table(columns), folder / "v.parquet")
    shutil.copy(miniature.data / "dataset_coco.json", folder)
    shutil.copy(next((miniature.data / "annotations").glob("instances_val*.json")), folder / "instances.json")
    lines = [{"path": f"{at}.jpg", "caption": f"a {at}"} for at in range(5)]
    (folder / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "c.csv").write_text('path,caption\na.jpg,"a, b"\nb.jpg,c\n')
    (folder / "prompts.txt").write_text("a photo of a {}.\na {}\n")
    picture = Image.open(next((miniature.data / "val2014").glob("*.jpg")))
    picture.save(folder / "a.jpg")
    picture.resize((40, 30)).save(folder / "a.png")
    _make_sources(folder)
    return folder


def _make_sources(folder: Path) -> None:
    """Small data sets of other forms."""
    for name in ("set", "coco", "genome/VG_100K", "open/val"):
        (folder / name).mkdir(parents=True)
    picture = (folder / "a.png").read_bytes()
    for name in ("set/a.png", "coco/a.png", "genome/VG_100K/1.jpg", "open/val/a.jpg"):
        (folder / name).write_bytes(picture)
    (folder / "set" / "t.csv").write_text('path,caption,tags\na.png,"a, b",x|y\na.png,c,x\n')
    record = {"path": "a.png", "caption": "c", "tags": ["x"], "split": "train", "id": 7}
    (folder / "set" / "t.jsonl").write_text(json.dumps(record) + "\n")
    pq.write_table(pa.table({key: [value] for key, value in record.items()}), folder / "set" / "t.parquet")
    with zipfile.ZipFile(folder / "set" / "z.zip", "w") as archive:
        archive.writestr("a.png", picture)
        archive.writestr("a.json", json.dumps({"caption": "c", "tags": ["x"]}))
    with tarfile.open(folder / "set" / "z.tar", "w") as archive_of_tar:
        archive_of_tar.add(folder / "a.png", "a.png")
        archive_of_tar.add(folder / "c.csv", "c.csv")
        archive_of_tar.add(folder / "set" / "t.jsonl", "a.json")
    instances = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 2}],
        "categories": [{"id": 2, "name": "x"}],
    }
    (folder / "coco" / "instances_val.json").write_text(json.dumps(instances))
    (folder / "genome" / "objects.json").write_text('[{"image_id": 1, "objects": [{"names": ["x"]}]}]')
    (folder / "open" / "class-descriptions.csv").write_text("LabelName,DisplayName\n/m/1,X\n")
    (folder / "open" / "val-annotations-bbox.csv").write_text("ImageID,LabelName,Confidence\na,/m/1,1\n")


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Damage as disks, transfers and programs do it."""
    damaged = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        size = max(1, len(damaged))
        at, length = int(rng.integers(size)), int(rng.integers(1, max(2, min(size, 200))))
        kind = rng.choice(["bit", "byte", "cut", "double", "zero", "insert", "swap", "drop", "number"])
        if kind == "bit" and damaged:
            damaged[at] ^= 1 << int(rng.integers(8))
        elif kind == "byte" and damaged:
            damaged[at] = int(rng.choice([0, 1, 127, 128, 255, int(rng.integers(256))]))
        elif kind == "cut":
            del damaged[at:]
        elif kind == "double":
            damaged[at:at] = damaged[at : at + length]
        elif kind == "zero":
            damaged[at : at + length] = bytes(len(damaged[at : at + length]))
        elif kind == "insert":
            damaged[at:at] = rng.bytes(length)
        elif kind == "swap":
            other = int(rng.integers(size))
            damaged[at : at + length], damaged[other : other + length] = (
                damaged[other : other + length],
                damaged[at : at + length],
            )
        elif kind == "drop":
            del damaged[at : at + length]
        else:  # a number of a header: lengths and counts mostly stand in front
            place = int(rng.integers(min(size, 300)))
            value = (0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, 10**12)[int(rng.integers(7))]
            damaged[place : place + 8] = value.to_bytes(8, "little")
    return bytes(damaged)


VALUES = [
    "null",
    "true",
    "-1",
    "0",
    "1e999",
    "NaN",
    "9" * 5000,
    "1.5",
    '""',
    '"a"',
    "[]",
    "{}",
    "[" * 3000,
    '{"a": ' * 3000,
    "[[1]]",
    '"\\ud800"',
    '"' + "x" * 100_000 + '"',
    "2024-13-45",
    "-9223372036854775809",
    "*a",
    "!!python/name:x",
]


def exchange(data: bytes, rng: np.random.Generator) -> bytes:
    """A text with one of its values, keys or lines exchanged for another."""
    text = data.decode()
    tokens = [(at, at + len(token)) for at, token in _tokens(text)]
    start, stop = tokens[int(rng.integers(len(tokens)))]
    return (text[:start] + VALUES[int(rng.integers(len(VALUES)))] + text[stop:]).encode()


def _tokens(text: str) -> list[tuple[int, str]]:
    return [(found.start(), found[0]) for found in re.finditer(r'"[^"\n]*"|[-+.\w]+', text)] or [(0, text)]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool(one == other) if not isinstance(one, pa.Array | pa.Table) else one.equals(other)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"a reader that takes more than {SECONDS} seconds")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", READERS)
def test_damage_is_one_line_or_what_was_written(folder: Path, name: str, mutations_each: int) -> None:
    reader = READERS[name]
    path = (folder / reader.file).resolve()
    data, wanted = path.read_bytes(), reader.read(folder)
    refused = 0
    before = signal.signal(signal.SIGALRM, _too_long)
    try:
        for number in range(mutations_each):
            rng = np.random.default_rng([number, sum(name.encode())])
            damaged = exchange(data, rng) if reader.is_text and number % 2 else mutate(data, rng)
            shutil.rmtree(folder / reader.scratch, ignore_errors=True) if reader.scratch else None
            path.write_bytes(damaged)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                found, line = reader.read(folder), ""
            except InputError as error:
                line = str(error)
            except BaseException as error:
                raise AssertionError(f"mutation {number} of {name}: {type(error).__name__}: {error}"[:400]) from error
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            refused += bool(line)
            assert "\n" not in line
            assert len(line) < LONGEST_LINE
            same = bool(line) or not reader.is_exact or _same(found, wanted)
            assert same, f"mutation {number} of {name} changed what is read"
    finally:
        signal.signal(signal.SIGALRM, before)
        path.write_bytes(data)
        shutil.rmtree(folder / reader.scratch, ignore_errors=True) if reader.scratch else None
    assert refused or not reader.refuses or mutations_each < 10
    assert not reader.is_exact or _same(reader.read(folder), wanted)
    shutil.rmtree(folder / reader.scratch, ignore_errors=True) if reader.scratch else None
