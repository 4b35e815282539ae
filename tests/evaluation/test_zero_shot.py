"""Zero-shot: whose embeddings are compared, with which prompts, and stores whose checkpoint nobody can check."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.metrics import average_precision_score
from transformers import AutoModel, AutoTokenizer

from mmcli import InputError
from mmcli.cache import Store
from mmcli.heads.sigmoid import sigmoid
from mmcli.pipeline.evaluation.prompts import TEMPLATES, read_prompts
from mmcli.pipeline.evaluation.zero_shot import _patches


def store_of(folder: Path) -> Path:
    return next(path for path in (folder / "data" / "cache").iterdir() if path.is_dir())


def unit(v: np.ndarray) -> np.ndarray:
    v = v.astype(np.float64)
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def logits_by_hand(here: Path, model_folder: Path, templates, inputs: str) -> np.ndarray:
    """Of the test split, from the checkpoint and the store alone."""
    model, tokenizer = AutoModel.from_pretrained(model_folder).eval(), AutoTokenizer.from_pretrained(model_folder)
    store = Store.open(store_of(here))
    rows = np.flatnonzero(np.array(store.index["split"].to_pylist()) == "test")
    arrays, prototypes = store.load(), []
    for name in json.loads(store.index.schema.metadata[b"category_names"]):
        tokens = tokenizer(
            [t.replace("{}", name) for t in templates],
            padding="max_length",
            padding_side="right",
            max_length=64,
            return_tensors="pt",
        )
        v = model.get_text_features(input_ids=tokens.input_ids).pooler_output.detach().numpy()
        prototypes.append(unit(unit(v).mean(axis=0)))
    scale, bias = float(model.logit_scale.detach().exp()), float(model.logit_bias.detach())
    image, text = (scale * unit(v[rows]) @ np.array(prototypes).T + bias for v in (arrays.v_img, arrays.v_txt[:, 0]))
    return {"image": image, "text": text, "both": (image + text) / 2}[inputs]


@pytest.mark.parametrize("inputs", ["image", "text", "both"])
def test_scores_are_siglips_probabilities_of_what_was_asked_for(mmcli, here: Path, miniature, inputs: str) -> None:
    (here / "p.txt").write_text("a {} here\n\n  the {}\n")
    code, out, err = mmcli("zero-shot", "--inputs", inputs, "--prompts", "p.txt", "--out", "zs", "--json")
    assert code == 0, err
    row, kept = json.loads(out), load_file(here / "zs" / "scores" / "zero-shot-test.safetensors")
    logits = logits_by_hand(here, miniature.model, ["a {} here", "the {}"], inputs)
    np.testing.assert_allclose(kept["scores"], sigmoid(logits), rtol=1e-3, atol=1e-7)
    assert (row["inputs"], row["n_prompts"], row["prompts"]) == (inputs, 2, ["a {} here", "the {}"])
    present = kept["labels"].any(axis=0)
    wanted = average_precision_score(kept["labels"][:, present], kept["scores"][:, present], average="macro")
    assert row["mAP"] == pytest.approx(wanted, abs=1e-9)
    assert row["ci"]["mAP"][0] <= row["mAP"] <= row["ci"]["mAP"][1]
    classes = json.loads((here / "zs" / "per_class" / "zero-shot-test.json").read_text())["classes"]
    assert len(classes) == 80
    assert {line["category"] for line in classes} >= {"person", "dog"}


def test_a_protocol_picks_the_images(mmcli, here: Path) -> None:
    code, out, err = mmcli("zero-shot", "--protocol", "coco14", "--out", "zs", "--json")
    assert code == 0, err
    store = Store.open(store_of(here))
    table = store.columns(["image_id", "path", "labels"])
    rows = zip(*(table.column(name).to_pylist() for name in ("image_id", "path", "labels")), strict=True)
    wanted = sorted(id_ for id_, path, labels in rows if "val2014/" in path and labels)
    kept = load_file(here / "zs" / "scores" / "zero-shot-test.safetensors")
    assert sorted(kept["image_id"].tolist()) == wanted
    assert json.loads(out)["n_images"] == len(wanted)
    code, _, err = mmcli("zero-shot", "--protocol", "hashnet")
    assert (code, "--protocol-lists" in err) == (2, True)


def test_our_prompts_are_the_default_and_are_shown(mmcli, here: Path) -> None:
    code, out, err = mmcli("zero-shot", "--json")
    assert code == 0, err
    assert tuple(json.loads(out)["prompts"]) == TEMPLATES


def test_prompts_are_printed_without_a_store(mmcli, tmp_path: Path) -> None:
    code, out, err = mmcli("zero-shot", "--print-prompts")
    assert (code, out.splitlines(), err) == (0, list(TEMPLATES), "")
    (tmp_path / "p.txt").write_text("my {}\n")
    assert json.loads(mmcli("zero-shot", "--print-prompts", "--prompts", "p.txt", "--json")[1]) == {
        "prompts": ["my {}"]
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a {}\n\na photo\n", r"not a prompt: .*p\.txt, line 3: got 0 times \{\} in 'a photo'"),
        (b"a {} and a {}\n", r"line 1: got 2 times"),
        (b"a {}\nthe {}\na {} \n", r"line 3: got the template of line 1"),
        (b"\n \n", "no prompts: .*p.txt"),
        (b"", "no prompts"),
        (b"a {} \xff", "not UTF-8 .*byte 0xff at 5"),
        (None, "cannot read prompts: .*p.txt: got no such file"),
    ],
)
def test_bad_prompts_are_one_line(mmcli, tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_prompts(tmp_path / "p.txt")
    code, out, err = mmcli("zero-shot", "--prompts", "p.txt")
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffa {}\r\nthe {}\r\n".encode())
    assert read_prompts(tmp_path / "p.txt") == ("a {}", "the {}")


def import_here(mmcli, here: Path, miniature, name: str, width: int | None = None) -> Path:
    """The embeddings of the store as another tool would hand them over."""
    store = Store.open(store_of(here))
    arrays = store.load()
    np.save("i.npy", arrays.v_img[:, :width])
    np.save("t.npy", arrays.v_txt[:, :, :width])
    words = ("--images", "i.npy", "--texts", "t.npy", "--manifest", miniature.data / "manifest.parquet")
    code, _, err = mmcli("cache", "import", *words, "--name", name, "--out", "imported")
    assert code == 0, err
    return here / "imported"


def test_an_imported_store_is_scored_with_the_named_checkpoint(mmcli, here: Path, miniature) -> None:
    imported = import_here(mmcli, here, miniature, "some-siglip")
    code, _, err = mmcli("zero-shot", "--store", imported, "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert "some-siglip" in err
    assert "imported" in err
    assert "--model" in err
    code, _, err = mmcli("zero-shot", "--store", imported, "--model", miniature.model, "--out", "a", "--quiet")
    assert code == 0, err
    assert mmcli("zero-shot", "--store", store_of(here), "--out", "b", "--quiet")[0] == 0
    a, b = (load_file(here / run / "scores" / "zero-shot-test.safetensors")["scores"] for run in "ab")
    np.testing.assert_array_equal(a, b)


def test_an_imported_store_of_another_width_is_refused(mmcli, here: Path, miniature) -> None:
    imported = import_here(mmcli, here, miniature, "some-siglip", width=-2)
    code, _, err = mmcli("zero-shot", "--store", imported, "--model", miniature.model, "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert "wide" in err


def test_an_image_without_a_caption_is_named(mmcli, here: Path, monkeypatch) -> None:
    load, index = Store.load, Store.open(store_of(here)).index
    row = int(np.flatnonzero(np.array(index["split"].to_pylist()) == "test")[-1])

    def without(self):
        arrays = load(self)
        arrays.n_captions[row] = 0
        return arrays

    monkeypatch.setattr(Store, "load", without)
    code, _, err = mmcli("zero-shot", "--inputs", "both", "--out", "zs", "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert f"1 of 10 test images, the first of them image id {index['image_id'][row]}" in err
    assert not (here / "zs").exists()
    assert mmcli("zero-shot", "--out", "zs", "--quiet")[0] == 0


def test_patches_of_a_fixed_checkpoint_are_its_own() -> None:
    class Vision:
        image_size, patch_size = 224, 16

    class Fixed:
        model_type, vision_config = "siglip", Vision

    class Dynamic:
        model_type = "siglip2"

    assert _patches(Fixed) == 196
    assert _patches(Dynamic) == 256
