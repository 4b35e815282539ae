"""The generated data set is COCO's form to the letter, the same for a seed; its checkpoint is one like any other."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask
from pycocotools.coco import COCO
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from mmcli.pipeline.data.coco import CATEGORIES
from mmcli.pipeline.data.miniature import (
    VOCABULARY,
    draw_legend,
    draw_pictogram,
    draw_scene,
    make_dataset,
    read_pictograms,
    write_captions,
)
from mmcli.pipeline.extraction.miniature_model import make_checkpoint, siglip_loss


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def split_file(miniature) -> list[dict]:
    return json.loads((miniature.data / "dataset_coco.json").read_text())["images"]


@pytest.fixture(scope="module")
def instances(miniature) -> dict[str, dict]:
    folder = miniature.data / "annotations"
    return {part: json.loads((folder / f"instances_{part}2014.json").read_text()) for part in ("train", "val")}


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    sizes = {"n_train": 12, "n_val": 3, "n_test": 3}
    folders = [make_dataset(tmp_path / name, seed=seed, **sizes) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    a, b, c = map(digest, folders)
    assert a == b
    assert a != c
    assert len(a) == 18 + 3


def test_categories_are_cocos(instances: dict[str, dict], realdata: Path) -> None:
    real = json.loads((realdata / "coco_slice" / "annotations" / "instances_train2014.json").read_text())["categories"]
    for content in instances.values():
        assert [(c["id"], c["name"]) for c in content["categories"]] == [(c["id"], c["name"]) for c in real]
        assert all(c["supercategory"] for c in content["categories"])


def test_form_is_that_of_real_coco(split_file, instances, realdata: Path) -> None:
    """Every key that the real files have, with the same type, is there."""
    real = realdata / "coco_slice"
    karpathy = json.loads((real / "dataset_coco.json").read_text())["images"][0]
    assert {key: type(value) for key, value in karpathy.items()} == {
        key: type(value) for key, value in split_file[0].items()
    }
    assert karpathy["sentences"][0].keys() == split_file[0]["sentences"][0].keys()
    theirs = json.loads((real / "annotations" / "instances_val2014.json").read_text())
    for part in ("images", "annotations"):
        assert theirs[part][0].keys() <= instances["val"][part][0].keys()


def test_splits_ids_and_captions(miniature, split_file) -> None:
    counts = Counter(image["split"] for image in split_file)
    assert counts == {"train": 28, "restval": 12, "val": 10, "test": 10}
    assert len({image["cocoid"] for image in split_file}) == 60
    assert [image["imgid"] for image in split_file] == list(range(60))
    sentids = [sentid for image in split_file for sentid in image["sentids"]]
    assert sentids == list(range(len(sentids)))
    for image in split_file:
        assert image["filepath"] == ("train2014" if image["split"] == "train" else "val2014")
        assert image["filename"] == f"COCO_{image['filepath']}_{image['cocoid']:012d}.jpg"
        assert (miniature.data / image["filepath"] / image["filename"]).is_file()
        assert len(image["sentences"]) in {5, 6}
        assert all(sentence["raw"].strip() and sentence["tokens"] for sentence in image["sentences"])


def test_pycocotools_reads_it_and_boxes_lie_inside(miniature) -> None:
    for part in ("train", "val"):
        coco = COCO(miniature.data / "annotations" / f"instances_{part}2014.json")
        for image in coco.loadImgs(coco.getImgIds()):
            with Image.open(miniature.data / f"{part}2014" / image["file_name"]) as opened:
                assert opened.size == (image["width"], image["height"])
            for annotation in coco.loadAnns(coco.getAnnIds(imgIds=image["id"])):
                x, y, w, h = annotation["bbox"]
                assert 0 <= x <= x + w <= image["width"]
                assert 0 <= y <= y + h <= image["height"]
                assert annotation["area"] == w * h
                assert int(mask.area(coco.annToRLE(annotation))) == w * h


def test_sizes_and_aspects_vary(instances) -> None:
    sizes = {(image["width"], image["height"]) for part in instances.values() for image in part["images"]}
    assert len(sizes) >= 5
    assert {np.sign(w - h) for w, h in sizes} == {-1, 0, 1}


def test_scenes_hold_none_to_six_objects_with_a_long_tail() -> None:
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng) for _ in range(3000)]
    lengths = Counter(len(scene.things) for scene in scenes)
    assert set(lengths) == set(range(7))
    assert 0.02 < lengths[0] / 3000 < 0.06
    classes = Counter(name for scene in scenes for name in {thing.name for thing in scene.things})
    assert len(classes) == 80
    counts = sorted(classes.values(), reverse=True)
    assert classes["person"] == counts[0] > 20 * counts[-1]
    assert 2.0 < sum(counts) / (3000 - lengths[0]) < 3.2


def test_image_and_text_each_know_what_the_other_does_not() -> None:
    rng = np.random.default_rng(0)
    things = [thing for _ in range(2000) for thing in draw_scene(rng).things]
    hidden = [thing for thing in things if thing.faint and thing.named]
    unsaid = [thing for thing in things if not thing.faint and not thing.named]
    assert len(hidden) > 0.15 * len(things)
    assert len(unsaid) > 0.2 * len(things)


def test_captions_name_only_what_may_be_named() -> None:
    rng = np.random.default_rng(0)
    wordings = set()
    for _ in range(300):
        scene = draw_scene(rng)
        captions = write_captions(scene, rng)
        named = {thing.name for thing in scene.things if thing.named}
        words = {word for name in named for word in VOCABULARY.synonyms.get(name, [name])}
        for caption in captions:
            text = f" {caption.lower().rstrip('.').replace(',', '')} "
            for category in ("zebra", "laptop", "pizza", "kite"):
                assert f" {category} " not in text or category in words
        wordings |= {tuple(caption.split()[:2]) for caption in captions}
    assert len(wordings) > 40


def test_themes_are_made_of_real_categories() -> None:
    names = {category.name for category in CATEGORIES}
    assert len(names) == 80
    themes = VOCABULARY.themes.values()
    assert abs(sum(theme.share for theme in themes) - 1) < 1e-9
    in_themes = {name for theme in themes for name in theme.objects}
    assert in_themes | {"person"} == names
    assert set(VOCABULARY.synonyms) <= names


def test_every_category_has_a_pictogram_of_its_own(tmp_path: Path) -> None:
    parsed = read_pictograms()
    assert set(parsed) == {category.name for category in CATEGORIES}
    tiles = {name: np.asarray(draw_pictogram(parts).resize((24, 24))).astype(float) for name, parts in parsed.items()}
    names = list(tiles)
    stack = np.stack([tiles[name].ravel() for name in names])
    distance = np.linalg.norm(stack[:, None] - stack[None], axis=-1) + 1e9 * np.eye(80)
    assert distance.min() > 1000, names[int(distance.min(1).argmin())]
    draw_legend(tmp_path / "legend.png")
    with Image.open(tmp_path / "legend.png") as sheet:
        assert sheet.size[0] > 900


def test_the_checkpoint_loads_like_any_other(miniature) -> None:
    model = AutoModel.from_pretrained(miniature.model)
    processor = AutoImageProcessor.from_pretrained(miniature.model)
    tokenizer = AutoTokenizer.from_pretrained(miniature.model)
    assert model.config.model_type == "siglip2"
    assert type(tokenizer).__name__.startswith("Siglip2Tokenizer")
    names = {path.name for path in miniature.model.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    inputs = processor(images=[Image.new("RGB", (90, 40), "red")], max_num_patches=32, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 32, 768)
    with torch.inference_mode():
        assert model.get_image_features(**inputs).pooler_output.shape == (1, model.config.text_config.projection_size)


def test_the_tokenizer_behaves_as_siglip2s_does(miniature, realdata: Path) -> None:
    """Side by side with a tokenizer of the real size: the same treatment of case, bos, eos and padding."""
    for folder in (miniature.model, realdata / "siglip2_tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        options = {"padding": "max_length", "max_length": 64, "truncation": True}
        upper, lower = (
            tokenizer(text, **options).input_ids for text in ("A Dog \u00e9\U0001f600 zq", "a dog \u00e9\U0001f600 zq")
        )
        assert upper == lower
        real = [token for token in lower if token != tokenizer.pad_token_id]
        assert lower[: len(real)] == real, "padding is on the right"
        assert real[-1] == tokenizer.eos_token_id
        assert real[0] != tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in real, "bytes stand for what is unknown"
        assert "dog" in tokenizer.decode(real)
        assert len(tokenizer("dog " * 200, **options).input_ids) == 64


def test_the_loss_is_siglips() -> None:
    """Against a slow loop over pairs."""
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(5, 8), dim=-1) for _ in range(2))
    scale, bias = torch.tensor(2.0), torch.tensor(-3.0)
    slow = 0.0
    for i in range(5):
        for j in range(5):
            z = 1.0 if i == j else -1.0
            slow -= float(torch.log(torch.sigmoid(z * (scale.exp() * image[i] @ text[j] + bias))))
    assert float(siglip_loss(image, text, scale, bias)) == pytest.approx(slow / 5, rel=1e-5)


def test_training_lowers_the_loss_and_follows_the_seed(miniature, tmp_path: Path) -> None:
    losses: list[float] = []
    for name in ("a", "b"):
        losses.clear()
        make_checkpoint(
            miniature.data, tmp_path / name, seed=3, steps=25, progress=lambda done, total, loss: losses.append(loss)
        )
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert a == b
