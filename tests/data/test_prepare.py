"""The stage ``prepare``: from COCO's folder to a manifest, on a tiny folder, a real slice and the full-size lists."""

import gzip
import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mmcli import InputError
from mmcli.pipeline.data.manifest import read_manifest, resolve_image
from mmcli.pipeline.data.prepare import prepare, statistics_tables

CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
# Image id: Karpathy's split, image folder, category ids of its annotations, number of captions.
IMAGES: dict[int, tuple[str, str, list[int], int]] = {
    500: ("val", "val2014", [1, 1, 18], 5),
    7: ("train", "train2014", [3], 6),
    300: ("restval", "val2014", [18, 1], 5),
    12: ("test", "val2014", [], 7),
    8: ("train", "train2014", [], 1),
    9: ("test", "val2014", [1], 5),
}
SPLIT_FILE = "dataset_coco.json"
TRAIN, VAL = "annotations/instances_train2014.json", "annotations/instances_val2014.json"


def make_coco(data: Path, images: str = "") -> Path:
    """COCO's folder with six empty images and an annotated one that is in no split."""
    listed = [
        {
            "filepath": folder,
            "filename": f"{i}.jpg",
            "split": split,
            "cocoid": i,
            "sentences": [{"raw": f"caption {n} of {i}"} for n in range(count)],
        }
        for i, (split, folder, _, count) in IMAGES.items()
    ]
    (data / "annotations").mkdir(parents=True)
    for name in ("train2014", "val2014"):
        (data / images / name).mkdir(parents=True)
        ids = [i for i, row in IMAGES.items() if row[1] == name]
        annotations = [(i, c) for i in ids for c in IMAGES[i][2]]
        instances = {
            "images": [{"id": i, "file_name": f"{i}.jpg"} for i in ids],
            "categories": CATEGORIES,
            "annotations": [{"id": n, "image_id": i, "category_id": c} for n, (i, c) in enumerate(annotations)],
        }
        if name == "val2014":
            instances["images"].append({"id": 999})
            instances["annotations"].append({"id": 99, "image_id": 999, "category_id": 3})
        (data / "annotations" / f"instances_{name}.json").write_text(json.dumps(instances))
        for i in ids:
            (data / images / name / f"{i}.jpg").touch()
    (data / SPLIT_FILE).write_text(json.dumps({"images": listed}))
    return data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_coco(tmp_path / "coco")


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_the_manifest(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = prepare(data)
    assert capfd.readouterr() == ("", "")
    assert result.path == data / "manifest.parquet"
    listing = read_manifest(result.path)
    assert (listing.name, listing.sha256) == ("coco", result.sha256)
    assert listing.category_names == ("person", "car", "dog")
    assert listing.image_ids.tolist() == list(IMAGES)
    assert list(listing.paths) == [f"{folder}/{i}.jpg" for i, (_, folder, _, _) in IMAGES.items()]
    assert listing.splits.tolist() == ["val", "train", "train", "test", "train", "test"]
    wanted = [[f"caption {n} of {i}" for n in range(min(row[3], 5))] for i, row in IMAGES.items()]
    assert [list(texts) for texts in listing.captions] == wanted
    order = (1, 3, 18)
    assert listing.labels_matrix().tolist() == [[int(c in row[2]) for c in order] for row in IMAGES.values()]
    assert all(resolve_image(data, path).is_file() for path in listing.paths)


def test_statistics(data: Path) -> None:
    outcome = prepare(data).statistics
    assert outcome.images == {"train": 3, "val": 1, "test": 2}
    assert outcome.restval == 1
    assert outcome.captions == {"train": 5 + 5 + 1, "val": 5, "test": 5 + 5}
    assert (outcome.captions_left_out, outcome.images_left_out) == (1 + 2, 1)
    assert outcome.unlabelled == {"train": 1, "val": 0, "test": 1}
    assert outcome.positives == {"train": 3, "val": 2, "test": 1}
    assert outcome.tags_per_image == {"train": 1.0, "val": 2.0, "test": 0.5, "all": 1.0}
    assert [(row.name, row.images, row.annotations) for row in outcome.classes] == [
        ("person", {"train": 1, "val": 1, "test": 1}, 4),
        ("car", {"train": 1, "val": 0, "test": 0}, 1),
        ("dog", {"train": 1, "val": 1, "test": 0}, 2),
    ]


def test_result_as_json_and_as_tables(data: Path) -> None:
    result = prepare(data)
    outcome = json.loads(json.dumps(result.to_json()))
    assert (outcome["manifest"], outcome["sha256"]) == (str(result.path), result.sha256)
    assert outcome["images"] == {"train": 3, "val": 1, "test": 2}
    assert outcome["classes"][1] == {"name": "car", "images": {"train": 1, "val": 0, "test": 0}, "annotations": 1}
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    with console.file:
        console.print(*statistics_tables(result.statistics))
        text = console.export_text()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    for row in (["train", "3", "11", "1", "1.00"], ["all", "6", "26", "2", "1.00"], ["2", "dog", "1", "1", "0", "2"]):
        assert row in cells, text
    assert "1 images of restval" in text
    assert "3 captions beyond five" in " ".join(text.split())


def test_out_elsewhere_leaves_the_data_folder_alone(data: Path, tmp_path: Path) -> None:
    before = sorted(data.rglob("*"))
    result = prepare(data, tmp_path / "new" / "out")
    assert result.path == tmp_path / "new" / "out" / "manifest.parquet"
    assert sorted(data.rglob("*")) == before
    assert prepare(data).sha256 == result.sha256
    assert prepare(data).path.read_bytes() == result.path.read_bytes()


def test_images_below_images(tmp_path: Path) -> None:
    data = make_coco(tmp_path / "coco", images="images")
    paths = read_manifest(prepare(data).path).paths
    assert paths[0] == "images/val2014/500.jpg"
    # An empty folder in the first place, as an unfinished copy leaves it, hides nothing.
    (data / "val2014").mkdir()
    assert read_manifest(prepare(data).path).paths == paths
    assert prepare(data, check_images=False).sha256 == prepare(data).sha256


def test_missing_images_are_counted_and_three_named(data: Path) -> None:
    for i in (500, 300, 12, 9):
        (data / "val2014" / f"{i}.jpg").unlink()
    with pytest.raises(InputError) as caught:
        prepare(data)
    line = str(caught.value)
    for part in ("4 of 6 missing", "val2014/500.jpg, val2014/300.jpg, val2014/12.jpg, ...", "--no-check-images"):
        assert part in line, line
    assert "9.jpg" not in line
    assert not (data / "manifest.parquet").exists()
    assert prepare(data, check_images=False).statistics.images["test"] == 2


@pytest.mark.parametrize("kind", ["folder", "dangling", "directory"])
def test_what_is_no_image_file_is_missing(data: Path, kind: str) -> None:
    if kind == "folder":
        shutil.rmtree(data / "train2014")
    else:
        path = data / "train2014" / "7.jpg"
        path.unlink()
        path.mkdir() if kind == "directory" else path.symlink_to("nowhere.jpg")
    with pytest.raises(InputError, match=r"of 6 missing: train2014/7\.jpg"):
        prepare(data)


@pytest.mark.parametrize("in_list", ["NFC", "NFD"])
def test_names_may_be_in_another_unicode_form_than_the_files(data: Path, in_list: str) -> None:
    on_disk = unicodedata.normalize("NFD" if in_list == "NFC" else "NFC", "café.jpg")
    split = json.loads((data / SPLIT_FILE).read_text())
    image = split["images"][0]
    (data / image["filepath"] / image["filename"]).rename(data / image["filepath"] / on_disk)
    image["filename"] = unicodedata.normalize(in_list, on_disk)
    (data / SPLIT_FILE).write_text(json.dumps(split))
    assert read_manifest(prepare(data).path).paths[0] == f"{image['filepath']}/{on_disk}"
    (data / image["filepath"] / unicodedata.normalize(in_list, on_disk)).touch()
    assert read_manifest(prepare(data).path).paths[0] == f"{image['filepath']}/{image['filename']}"


def test_links(data: Path, tmp_path: Path) -> None:
    """Image folders that are links are usual; an image that is a link out is refused now, not hours into extraction."""
    wanted = prepare(data).sha256
    shutil.move(data / "train2014", tmp_path / "shared")
    (data / "train2014").symlink_to(tmp_path / "shared")
    (tmp_path / "other").symlink_to(data)
    assert prepare(tmp_path / "other").sha256 == wanted
    (tmp_path / "shared" / "8.jpg").unlink()
    (tmp_path / "shared" / "8.jpg").symlink_to(data / SPLIT_FILE)
    assert prepare(data).sha256 == wanted
    (tmp_path / "secret").touch()
    (data / "val2014" / "9.jpg").unlink()
    (data / "val2014" / "9.jpg").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"an image is a link out of the data folder: .*9\.jpg: got .*secret"):
        prepare(data)


def test_no_data_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no data folder: .*nowhere.*cocodataset.org.*caption_datasets.zip.*--data"):
        prepare(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="got a file"):
        prepare(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("gone", "parts", "absent"),
    [
        ((SPLIT_FILE,), ("caption_datasets.zip",), "annotations_trainval2014.zip"),
        ((TRAIN,), ("annotations_trainval2014.zip",), "caption_datasets.zip"),
        ((TRAIN, VAL, SPLIT_FILE), ("annotations_trainval2014.zip", "caption_datasets.zip"), "train2014.zip and"),
    ],
)
def test_missing_files_are_all_named_with_where_to_get_them(
    data: Path, gone: tuple[str, ...], parts: tuple[str, ...], absent: str
) -> None:
    for name in gone:
        (data / name).unlink()
    with pytest.raises(InputError) as caught:
        prepare(data)
    line = str(caught.value)
    for part in (str(data), *(f"no {name}" for name in gone), *parts):
        assert part in line, line
    assert absent not in line


MISTAKES: list[tuple[str, Callable[[dict[str, Any]], object], tuple[str, ...]]] = [
    (SPLIT_FILE, lambda c: c["images"][2].update(cocoid=301), ("no instances file lists", "images[2]", "cocoid 301")),
    (VAL, lambda c: c["images"].append({"id": 7}), ("in both instances files", "image 7")),
    (TRAIN, lambda c: c["categories"].pop(0), ("different categories", "category 18 'dog'", "wanted not listed")),
    (
        VAL,
        lambda c: c["categories"].append({"id": 4, "name": "x"}),
        ("different categories", "category 4 'x'", "wanted not listed"),
    ),
    (TRAIN, lambda c: c["categories"].append({"id": 4, "name": "x"}), ("category 4 not listed", "wanted 'x'")),
    (VAL, lambda c: c["categories"][1].update(name="man"), ("different categories", "category 1 'man'", "'person'")),
    (TRAIN, lambda c: c["annotations"][0].update(image_id=500), ("unknown image", "image_id 500")),
    (SPLIT_FILE, lambda c: c["images"][0].update(split="train"), ("no image in split val",)),
]


@pytest.mark.parametrize(("name", "change", "parts"), MISTAKES)
def test_a_mistake_between_the_files_keeps_the_old_manifest(
    data: Path, name: str, change: Callable[[dict[str, Any]], object], parts: tuple[str, ...]
) -> None:
    path = prepare(data).path
    old = path.read_bytes()
    edit(data / name, change)
    with pytest.raises(InputError) as caught:
        prepare(data)
    for part in (str(data), *parts):
        assert part in str(caught.value)
    assert path.read_bytes() == old


def test_killed_before_the_rename_an_older_manifest_stays(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = prepare(data).path
    old = path.read_bytes()
    edit(data / SPLIT_FILE, lambda content: content["images"].pop())
    real = os.replace

    def killed(source: Path, target: Path) -> None:
        assert Path(source).stat().st_size > 0
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(data)
    assert path.read_bytes() == old
    assert [outcome.name for outcome in data.iterdir() if outcome.is_file()] in (
        [SPLIT_FILE, "manifest.parquet"],
        ["manifest.parquet", SPLIT_FILE],
    )
    monkeypatch.setattr(os, "replace", real)
    assert prepare(data).path.read_bytes() != old


def test_a_place_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write: .*file: got File exists"):
        prepare(data, tmp_path / "file")
    (tmp_path / "out" / "manifest.parquet").mkdir(parents=True)
    with pytest.raises(InputError, match=r"will not replace what mmcli did not write: .*got a folder"):
        prepare(data, tmp_path / "out")


@pytest.mark.realdata
def test_a_real_slice(realdata: Path, tmp_path: Path) -> None:
    data = realdata / "coco_slice"
    result = prepare(data, tmp_path)
    outcome = result.statistics
    assert outcome.images == {"train": 60 + 277, "val": 43, "test": 48}
    assert (outcome.restval, outcome.captions_left_out) == (277, 1)
    assert outcome.captions == {"train": 5 * 337, "val": 5 * 43, "test": 5 * 48}
    listing = read_manifest(result.path)
    raw = json.loads((data / SPLIT_FILE).read_text())["images"]
    instances = [json.loads((data / name).read_text()) for name in (TRAIN, VAL)]
    pairs = {(a["image_id"], a["category_id"]) for part in instances for a in part["annotations"]}
    order = sorted(category["id"] for category in instances[0]["categories"])
    matrix = listing.labels_matrix()
    assert matrix.shape == (428, 80)
    for row, image in enumerate(raw):
        assert listing.image_ids[row] == image["cocoid"]
        assert (data / listing.paths[row]).name == image["filename"]
        assert list(listing.captions[row]) == [sentence["raw"] for sentence in image["sentences"]][:5]
        assert matrix[row].tolist() == [int((image["cocoid"], category) in pairs) for category in order]


def write_full(realdata: Path, out: Path) -> Path:
    """The whole of COCO 2014's labels and splits in COCO's own files, without tokens, boxes and images."""
    packed = np.load(realdata / "full" / "labels.npz")
    labels = np.unpackbits(packed["labels"], axis=1)[:, :80]
    row = dict(zip(packed["image_id"].tolist(), range(len(labels)), strict=True))
    with gzip.open(realdata / "full" / "karpathy_ids.json.gz") as stream:
        splits = json.load(stream)
    with gzip.open(realdata / "full" / "captions.jsonl.gz", "rt") as stream:
        defaults = {record["id"]: record["captions"] for record in map(json.loads, stream)}
    restval = set(splits["restval"])
    order = [(i, "train") for i in splits["train"] if i not in restval]
    order += [(i, split) for split in ("restval", "val", "test") for i in splits[split]]
    images, parts = [], {name: {"images": [], "annotations": []} for name in ("train2014", "val2014")}
    categories = packed["category_id"].tolist()
    for i, split in order:
        folder = "train2014" if split == "train" else "val2014"
        captions = defaults.get(i, [])
        captions = captions + ["a photo"] * (5 - len(captions))
        images.append(
            {
                "filepath": folder,
                "filename": f"COCO_{folder}_{i:012d}.jpg",
                "split": split,
                "cocoid": i,
                "sentences": [{"raw": text} for text in captions],
            }
        )
        parts[folder]["images"].append({"id": i})
        tags = np.flatnonzero(labels[row[i]]).tolist()
        parts[folder]["annotations"] += [{"id": i * 100 + t, "image_id": i, "category_id": categories[t]} for t in tags]
    names = [{"id": c, "name": str(name)} for c, name in zip(categories, packed["category_name"], strict=True)]
    (out / "annotations").mkdir(parents=True)
    for folder, part in parts.items():
        (out / "annotations" / f"instances_{folder}.json").write_text(json.dumps({**part, "categories": names}))
    (out / SPLIT_FILE).write_text(json.dumps({"images": images}))
    return out


@pytest.mark.realdata
def test_the_full_size_real_labels_and_splits(realdata: Path, tmp_path: Path) -> None:
    if not (realdata / "full").is_dir():
        pytest.skip(f"the full-size lists are not in {realdata}")
    result = prepare(write_full(realdata, tmp_path), check_images=False)
    outcome = result.statistics
    assert outcome.images == {"train": 113_287, "val": 5_000, "test": 5_000}
    assert outcome.restval == 30_504
    assert sum(outcome.captions.values()) == 5 * 123_287
    assert outcome.captions_left_out == 31
    assert sum(outcome.positives.values()) == 350_191
    assert sum(row.annotations for row in outcome.classes) == 350_191
    assert sum(outcome.unlabelled.values()) == 1_069
    train = {row.name: row.images["train"] for row in outcome.classes}
    wanted = {"person": 61_377, "car": 11_753, "chair": 12_235, "toaster": 203, "hair drier": 178}
    assert {name: train[name] for name in wanted} == wanted
    listing = read_manifest(result.path)
    assert (listing.sha256, len(listing), len(listing.category_names)) == (result.sha256, 123_287, 80)
    assert listing.labels_matrix().sum() == 350_191
    shutil.rmtree(tmp_path)
