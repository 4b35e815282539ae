"""What a finetuning must refuse, or see to before it has cost an hour."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mmcli import InputError
from mmcli.pipeline.codes import codes_path
from mmcli.pipeline.config import DataConfig
from mmcli.pipeline.finetune_data import refuse_unreadable
from mmcli.pipeline.finetune_start import refuse_seen
from mmcli.pipeline.runs import read_info

WORDS = ("--patches", 64, "--device", "cpu", "--set", "fusion.mlp_dims=[64, 32]", "--set", "knn.K=5", "--workers", 0)


def ids_of(run: Path) -> dict[str, np.ndarray]:
    return {split: load_file(codes_path(run, split))["image_id"] for split in ("train", "val", "test")}


def test_a_head_is_not_tested_on_images_that_it_was_trained_on(mmcli, miniature, here) -> None:
    """A protocol or a manifest that moves train images of the run to test or val is refused, and so without codes."""
    run = next((here / "runs").iterdir())
    words = ("finetune", "--quiet", "--from", run, "--device", "cpu", "--epochs", 1, "--workers", 0, "--out", "runs/no")
    code, out, err = mmcli(*words, "--data", miniature.data, "--protocol", "coco14")
    assert (code, out, err.count("\n"), "trained on" in err) == (2, "", 1, True), err
    moved = shutil.copytree(miniature.data, here / "moved")
    listing = json.loads((moved / "dataset_coco.json").read_text())
    chosen = next(image for image in listing["images"] if image["split"] == "train")
    chosen["split"] = "test"
    (moved / "dataset_coco.json").write_text(json.dumps(listing))
    assert mmcli("prepare", "--data", moved)[0] == 0
    code, _, err = mmcli(*words, "--data", moved)
    assert (code, err.count("\n"), "test images that the run was trained on" in err) == (2, 1, True), err
    codes_path(run, "train").unlink()
    code, _, err = mmcli(*words, "--data", miniature.data, "--protocol", "coco14")
    assert (code, err.count("\n"), "another protocol" in err) == (2, 1, True), err
    assert not (here / "runs" / "no").exists()


def test_what_the_run_itself_began_with_has_seen_images_too(here) -> None:
    run = next((here / "runs").iterdir())
    sha, ids = read_info(run).manifest_sha256, ids_of(run)
    karpathy = DataConfig()
    refuse_seen(run, karpathy, sha, ids)
    refuse_seen(run, karpathy, "another manifest", ids)
    later = shutil.copytree(run, here / "runs" / "later")
    arrays = load_file(codes_path(later, "train"))
    save_file({name: value[1:] for name, value in arrays.items()}, codes_path(later, "train"))
    free = {"val": ids["val"], "test": ids["train"][:1]}
    refuse_seen(later, karpathy, sha, free)
    text = (later / "config.yaml").read_text()
    assert "start: null" in text
    (later / "config.yaml").write_text(text.replace("start: null", f"start: {run}"))
    with pytest.raises(InputError, match="test images that the run was trained on"):
        refuse_seen(later, karpathy, sha, free)
    with pytest.raises(InputError, match="val images"):
        refuse_seen(later, karpathy, sha, {"val": ids["train"][:1], "test": ids["test"]})
    shutil.rmtree(run)
    refuse_seen(later, karpathy, sha, ids)
    with pytest.raises(InputError, match="another manifest"):
        refuse_seen(later, karpathy, "another manifest", ids)


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_image_that_is_none_is_met_before_anything_is_trained(mmcli, miniature, tmp_path: Path, split: str) -> None:
    data = shutil.copytree(miniature.data, tmp_path / "data")
    image = next(one for one in json.loads((data / "dataset_coco.json").read_text())["images"] if one["split"] == split)
    file = data / image["filepath"] / image["filename"]
    file.write_bytes(b"no image")
    words = ("finetune", "--quiet", "--data", data, "--model", miniature.model, *WORDS, "--unfreeze", "last-1")
    code, out, err = mmcli(*words, "--epochs", 1000, "--out", "run")
    assert (code, out, err.count("\n"), file.name in err) == (2, "", 1, True), err
    assert "replace the file" in err
    assert "manifest" not in err
    assert not (tmp_path / "run").exists()


def test_how_many_images_are_like_it_is_said() -> None:
    with pytest.raises(InputError, match=r"replace the file \(2 more like it\)$"):
        refuse_unreadable({3: "cannot read an image; replace the file", 4: "", 5: ""})
