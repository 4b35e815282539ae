"""Extraction against a straightforward transformers loop; raw norms, no mask, resume after a kill."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from mmcli import InputError
from mmcli.cache import Store
from mmcli.pipeline.core.config import load_config
from mmcli.pipeline.core.device import pick_device
from mmcli.pipeline.data.manifest import Manifest, read_manifest, write_manifest
from mmcli.pipeline.extraction.encoder import Encoder
from mmcli.pipeline.extraction.extract import ExtractPlan, extract

PATCHES = 64


def config_of(model: Path, patches: int = PATCHES):
    return load_config(
        options={"model.siglip2_variant": str(model), "model.max_num_patches": patches, "hardware.device": "cpu"}
    )


def run(miniature, out: Path, **options):
    config = config_of(miniature.model, options.pop("patches", PATCHES))
    return extract(config, ExtractPlan(**{"data": miniature.data, "out": out} | options))


@pytest.fixture(scope="module")
def store(miniature, tmp_path_factory) -> Store:
    out = tmp_path_factory.mktemp("stores") / "whole"
    run(miniature, out, dtype="float32", shard_rows=16, batch_tokens=512)
    return Store.open(out)


@pytest.fixture(scope="module")
def reference(miniature):
    """The plain way: one image and one caption at a time through the Auto classes."""
    model = AutoModel.from_pretrained(miniature.model).eval()
    processor = AutoImageProcessor.from_pretrained(miniature.model)
    tokenizer = AutoTokenizer.from_pretrained(miniature.model)
    listing = read_manifest(miniature.data / "manifest.parquet")
    v_img, v_txt = [], []
    with torch.inference_mode():
        for path, captions in zip(listing.paths, listing.captions, strict=True):
            image = Image.open(miniature.data / path).convert("RGB")
            inputs = processor(images=[image], max_num_patches=PATCHES, return_tensors="pt")
            v_img.append(model.get_image_features(**inputs).pooler_output[0].numpy())
            rows = []
            for caption in captions[:5]:
                ids = tokenizer(
                    caption.lower(),
                    padding="max_length",
                    padding_side="right",
                    max_length=64,
                    truncation=True,
                    return_tensors="pt",
                ).input_ids
                rows.append(model.get_text_features(input_ids=ids).pooler_output[0].numpy())
            v_txt.append(rows)
    return np.array(v_img), np.array(v_txt)


def test_equal_to_a_plain_transformers_loop(store: Store, reference) -> None:
    arrays = store.load()
    for ours, plain in zip((arrays.v_img, arrays.v_txt), reference, strict=True):
        error = np.linalg.norm(ours - plain, axis=-1) / np.linalg.norm(plain, axis=-1)
        assert error.max() < 1e-5


def test_spec10_02_raw_outputs_are_stored_not_normalised_ones(store: Store, reference) -> None:
    """With the model's image_embeds every norm would be one and the magnitude a constant."""
    arrays = store.load()
    for norms, plain in ((arrays.norm_img, reference[0]), (arrays.norm_txt, reference[1])):
        assert norms.std() > 1e-4 * norms.mean()
        assert abs(norms.mean() - 1) > 1e-2
        np.testing.assert_allclose(norms, np.linalg.norm(plain, axis=-1), rtol=1e-5)


def test_spec03_no_attention_mask_reaches_the_text_tower(miniature) -> None:
    """Equal to the reference without a mask, and not to the one with it."""
    encoder = Encoder.load(str(miniature.model), patches=PATCHES, device=pick_device("cpu"))
    model = AutoModel.from_pretrained(miniature.model).eval()
    ours, ids = encoder.encode_texts(["a dog"]), encoder.tokenize(["a dog"])
    with torch.inference_mode():
        plain = model.get_text_features(input_ids=ids).pooler_output.numpy()
        masked = model.get_text_features(input_ids=ids, attention_mask=(ids != 0).long()).pooler_output.numpy()
    assert np.abs(ours - plain).max() < 1e-5 * np.abs(plain).max()
    assert np.abs(ours - masked).max() > 1e-4


def test_of_more_than_five_captions_the_first_five_are_encoded(miniature, store: Store, tmp_path: Path) -> None:
    """And of fewer none is repeated: missing rows are zero, and counted."""
    listing = read_manifest(miniature.data / "manifest.parquet")
    many = (*listing.captions[0], "a zebra", "a toaster on a boat")
    other = Manifest.from_columns(
        image_ids=listing.image_ids[:3],
        paths=listing.paths[:3],
        splits=["train", "val", "test"],
        captions=[many, listing.captions[1][:2], listing.captions[2][:1]],
        labels=[[0], [1], [2]],
        category_names=["a", "b", "c"],
    )
    write_manifest(tmp_path / "manifest.parquet", other)
    run(miniature, tmp_path / "store", manifest=tmp_path / "manifest.parquet", dtype="float32")
    ours, whole = Store.open(tmp_path / "store").load(), store.load()
    assert ours.n_captions.tolist() == [5, 2, 1]
    for row, count in enumerate((5, 2, 1)):
        np.testing.assert_allclose(ours.v_txt[row, :count], whole.v_txt[row, :count], rtol=1e-4, atol=1e-5)
        assert not ours.v_txt[row, count:].any()
        assert not ours.norm_txt[row, count:].any()


def test_order_of_batches_and_shards_changes_nothing(miniature, store: Store, tmp_path: Path) -> None:
    run(miniature, tmp_path / "other", dtype="float32", shard_rows=7, batch_tokens=192)
    a, b = store.load(), Store.open(tmp_path / "other").load()
    np.testing.assert_allclose(a.v_img, b.v_img, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(a.v_txt, b.v_txt, rtol=1e-4, atol=1e-5)


def test_float16_is_the_rounded_float32_with_the_same_norms(miniature, store: Store, tmp_path: Path) -> None:
    run(miniature, tmp_path / "half", shard_rows=16, batch_tokens=512)
    half, whole = Store.open(tmp_path / "half").load(), store.load()
    assert half.v_img.dtype == np.float16
    np.testing.assert_array_equal(half.v_img, whole.v_img.astype(np.float16))
    np.testing.assert_array_equal(half.norm_img, whole.norm_img)
    np.testing.assert_array_equal(half.norm_txt, whole.norm_txt)


def test_another_budget_reuses_the_captions(miniature, tmp_path: Path) -> None:
    first = run(miniature, tmp_path / "p64", shard_rows=16)
    second = run(miniature, tmp_path / "p16", shard_rows=16, patches=16)
    assert (first.reused_text_shards, second.reused_text_shards) == (0, 4)
    a, b = Store.open(first.store).load(), Store.open(second.store).load()
    np.testing.assert_array_equal(a.v_txt, b.v_txt)
    assert np.abs(a.v_img.astype(np.float32) - b.v_img.astype(np.float32)).max() > 1e-3


def test_a_second_call_does_nothing(miniature, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Encoder, "image_features", None)
    result = run(miniature, store.folder, dtype="float32", shard_rows=16, batch_tokens=512)
    assert (result.n_encoded, result.damaged) == (0, ())


# Loads everything once, then forks a process for each extraction that is killed after so many seconds.
KILLED = """
import os, signal, sys, time
from pathlib import Path
from mmcli.pipeline.core.config import load_config
from mmcli.pipeline.extraction.encoder import Encoder
from mmcli.pipeline.extraction.extract import ExtractPlan, extract

model, data, out, *after = sys.argv[1:]
config = load_config(options={"model.siglip2_variant": model, "model.max_num_patches": 64, "hardware.device": "cpu"})
plan = ExtractPlan(data=Path(data), out=Path(out), dtype="float32", shard_rows=16, batch_tokens=512)
kills = 0
for seconds in map(float, after):
    child = os.fork()
    if not child:
        extract(config, plan)
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
print(kills)
"""


def test_killed_at_random_and_resumed_the_store_is_the_same(miniature, store: Store, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    rng = np.random.default_rng(int.from_bytes(os.urandom(4)))
    after = [0.0, *map(str, rng.uniform(0.0, 0.8, 3))]  # the first dies before it has written anything
    command = [sys.executable, "-c", KILLED, miniature.model, miniature.data, out, *after]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) >= 1
    assert not (out / "manifest.json").is_file() or Store.open(out).load() is not None
    run(miniature, out, dtype="float32", shard_rows=16, batch_tokens=512)
    again, whole = Store.open(out).load(), store.load()
    for name in ("v_img", "v_txt", "norm_img", "norm_txt", "n_captions"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))


def test_a_flipped_byte_is_named_and_only_that_shard_redone(miniature, tmp_path: Path) -> None:
    out = tmp_path / "store"
    run(miniature, out, shard_rows=16, batch_tokens=512)
    before = Store.open(out).load()
    shard = out / "image-00001.h5"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    shard.write_bytes(raw)
    with pytest.raises(InputError, match=r"image-00001\.h5"):
        Store.open(out).load()
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.h5")}
    result = run(miniature, out, shard_rows=16, batch_tokens=512)
    assert [line.split(":")[0] for line in result.damaged] == ["image-00001.h5"]
    assert result.n_encoded == 16
    changed = {path.name for path in out.glob("*.h5") if path.stat().st_mtime_ns != times[path.name]}
    assert changed == {"image-00001.h5"}
    after = Store.open(out).load()
    np.testing.assert_array_equal(before.v_img, after.v_img)


def test_a_store_of_another_key_is_refused_and_kept(miniature, tmp_path: Path) -> None:
    out = tmp_path / "store"
    run(miniature, out)
    with pytest.raises(InputError, match="patches"):
        run(miniature, out, patches=16)
    assert Store.open(out).load().v_img.shape[0] == 60
    run(miniature, out, patches=16, force=True)
    assert Store.open(out).key.patches == 16


def test_force_removes_only_what_is_the_stores(miniature, tmp_path: Path) -> None:
    run(miniature, tmp_path)
    (tmp_path / "thesis.tex").write_text("years of work")
    run(miniature, tmp_path, force=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_other_things_is_not_filled(miniature, tmp_path: Path, force: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="files that are not of a store"):
        run(miniature, tmp_path, force=force)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.tex", ".lock"}


@pytest.mark.parametrize("kind", ["missing", "truncated", "text"])
def test_a_bad_image_is_one_line_and_what_was_done_is_kept(miniature, tmp_path: Path, kind: str) -> None:
    import shutil

    data = tmp_path / "data"
    shutil.copytree(miniature.data, data)
    bad = data / read_manifest(data / "manifest.parquet").paths[40]
    raw = bad.read_bytes()
    bad.unlink()
    if kind != "missing":
        bad.write_bytes(raw[:400] if kind == "truncated" else b"no image at all")
    with pytest.raises(InputError, match=bad.name):
        run(miniature, tmp_path / "store", data=data, shard_rows=16, batch_tokens=512)
    assert len(list((tmp_path / "store").glob("image-*.h5"))) == 2
    bad.write_bytes(raw)
    result = run(miniature, tmp_path / "store", data=data, shard_rows=16, batch_tokens=512)
    assert result.n_encoded == 60 - 32


@pytest.mark.parametrize(
    ("name", "part"),
    [("./nowhere", "no such folder"), ("nowhere", "no such folder"), ("/nowhere/at/all", "no such folder")],
)
def test_no_checkpoint_is_one_line(name: str, part: str) -> None:
    with pytest.raises(InputError, match=part):
        Encoder.load(name, device=pick_device("cpu"))


def test_other_models_and_pickled_weights_are_refused(miniature, tmp_path: Path) -> None:
    import json
    import shutil

    other = tmp_path / "other"
    shutil.copytree(miniature.model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(InputError, match="model type bert"):
        Encoder.load(str(other), device=pick_device("cpu"))
    shutil.rmtree(other)
    shutil.copytree(miniature.model, other)
    (other / "model.safetensors").unlink()
    torch.save({}, other / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot load the weights"):
        Encoder.load(str(other), device=pick_device("cpu"))


def test_a_fixed_resolution_checkpoint_admits_only_its_budget(miniature, tmp_path: Path) -> None:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    text = {
        "vocab_size": 5000,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision = {
        "image_size": 64,
        "patch_size": 16,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    folder = tmp_path / "fixed"
    SiglipModel(SiglipConfig(text_config={**text, "projection_size": 16}, vision_config=vision)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    AutoTokenizer.from_pretrained(miniature.model).save_pretrained(folder)
    with pytest.raises(InputError, match=r"--patches 16.*naflex"):
        Encoder.load(str(folder), patches=256, device=pick_device("cpu"))
    encoder = Encoder.load(str(folder), patches=16, device=pick_device("cpu"))
    images = [np.zeros((30, 50, 3), np.uint8), np.full((70, 20, 3), 200, np.uint8)]
    assert encoder.encode_images(images).shape == (2, 16)
    assert encoder.encode_texts(["a dog"]).shape == (1, 16)
