"""The user's own commands with the default checkpoint of the hub, from its cache and without network."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from mmcli.pipeline.core.config import DEFAULT_MODEL

FIRST, SECOND = "a" * 39 + "1", "b" * 39 + "2"
# Images of each split that are taken of the real slice.
TAKEN = {"train": 20, "restval": 20, "val": 8, "test": 8}


@pytest.fixture(params=["miniature", pytest.param("real", marks=pytest.mark.realdata)])
def data(request: pytest.FixtureRequest, miniature, tmp_path: Path) -> Path:
    """Images in COCO's form in the default place: generated ones, and real ones where they are there."""
    folder = tmp_path / "data" / "coco"
    if request.param == "miniature":
        shutil.copytree(miniature.data, folder, ignore=shutil.ignore_patterns("manifest.parquet"))
        return folder
    source = request.getfixturevalue("realdata") / "coco_slice"
    shutil.copytree(source / "annotations", folder / "annotations")
    listing = json.loads((source / "dataset_coco.json").read_text(encoding="utf-8"))
    by_split = {
        split: [image for image in listing["images"] if image["split"] == split][:n] for split, n in TAKEN.items()
    }
    images = [image for taken in by_split.values() for image in taken]
    for image in images:
        (folder / image["filepath"]).mkdir(exist_ok=True)
        shutil.copy(source / image["filepath"] / image["filename"], folder / image["filepath"])
    (folder / "dataset_coco.json").write_text(json.dumps({**listing, "images": images}), encoding="utf-8")
    return folder


def other_version(model: Path, folder: Path) -> Path:
    """The same checkpoint with another scale of its logits."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["logit_scale"] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def revision_of(run: Path) -> str:
    return yaml.safe_load((run / "config.yaml").read_text())["model"]["revision"]


def test_every_command_works_with_the_default_checkpoint(mmcli, miniature, data: Path, hub, tmp_path: Path) -> None:
    hub.add(miniature.model, FIRST, "main")

    def run(*words: object) -> dict:
        code, out, err = mmcli(*words, "-q", "--json")
        assert code == 0, err
        return json.loads(out)

    run("prepare")
    store = Path(run("extract", "--patches", 256, "--workers", 0)["store"])
    assert json.loads((store / "key.json").read_text())["key"]["revision"] == FIRST
    # From here on main is something else; what was made from the first commit stays with it.
    hub.add(other_version(miniature.model, tmp_path / "moved"), SECOND, "main")
    zero_shot = Path(run("zero-shot")["run"])
    head = Path(run("train-head", "--preset", "small", "--bits", 16, "--epochs", 2)["run"])
    assert run("knn-eval", "--run", head, "--k", 5)
    photo = next(data.glob("*/*.jpg"))
    assert run("predict", photo, "--caption", "a dog", "--run", head, "--k", 5)["notes"] is not None
    live = Path(run("finetune", "--from", head, "--unfreeze", "last-1", "--epochs", 1, "--workers", 0)["run"])
    frozen = Path(
        run(
            "finetune",
            "--preset",
            "small",
            "--bits",
            16,
            "--unfreeze",
            "none",
            "--epochs",
            1,
            "--workers",
            0,
            "--revision",
            FIRST,
        )["run"]
    )
    for each in (live, frozen):
        assert run("predict", photo, "--caption", "a dog", "--run", each, "--k", 5)
    run("index", "build", "--run", head)
    assert run("index", "add", "--run", head, "--manifest", data / "manifest.parquet", "--force")
    assert [revision_of(item) for item in (zero_shot, head, live, frozen)] == [FIRST] * 4
    fresh = Path(
        run("finetune", "--preset", "small", "--bits", 16, "--unfreeze", "none", "--epochs", 1, "--workers", 0)["run"]
    )
    assert revision_of(fresh) == SECOND


def test_a_store_is_resumed_at_its_commit_alone(mmcli, miniature, hub, tmp_path: Path) -> None:
    """The line that refuses another one says which it is, and how to name it."""
    words = ("extract", "--patches", 64, "--data", miniature.data, "--workers", 0)
    hub.add(miniature.model, FIRST, "main", "v1")
    assert mmcli(*words, "--out", tmp_path / "store")[0] == 0
    hub.add(other_version(miniature.model, tmp_path / "moved"), SECOND, "main")
    code, _, err = mmcli(*words, "--out", tmp_path / "store")
    assert (code, err.count("\n")) == (2, 1)
    assert f"revision: {FIRST} against {SECOND}" in err
    assert f"give --revision {FIRST} to resume it" in err
    for revision in (FIRST, "v1", FIRST[:7]):
        code, out, _ = mmcli(*words, "--out", tmp_path / "store", "--revision", revision)
        assert code == 0
        assert "nothing was missing" in out
    for revision, commit in (("main", SECOND), (SECOND, SECOND)):
        code, _, err = mmcli("zero-shot", "--store", tmp_path / "store", "--revision", revision)
        assert (code, err.splitlines()[-1].count(commit)) == (2, 1)
    assert mmcli("zero-shot", "--store", tmp_path / "store", "--revision", "v1")[0] == 0


def test_stores_of_another_commit_are_named(mmcli, miniature, hub, tmp_path: Path) -> None:
    words = ("extract", "--patches", 64, "--data", miniature.data, "--workers", 0)
    hub.add(miniature.model, FIRST, "main")
    assert "note" not in mmcli(*words)[2]
    hub.add(other_version(miniature.model, tmp_path / "moved"), SECOND, "main")
    code, _, err = mmcli(*words)
    assert code == 0
    assert f"commit {FIRST}; give --revision {FIRST} to resume it" in err
    assert len(list((tmp_path / "data" / "cache").iterdir())) == 2


def test_processes_of_an_extraction_load_one_commit(mmcli, miniature, hub) -> None:
    hub.add(miniature.model, FIRST, "main")
    code, out, err = mmcli(
        "extract", "--patches", 64, "--data", miniature.data, "--workers", 0, "--processes", 2, "--json"
    )
    assert code == 0, err
    assert json.loads((Path(json.loads(out)["store"]) / "key.json").read_text())["key"]["revision"] == FIRST


def test_a_fixed_resolution_id_names_the_naflex_one(mmcli, miniature, hub, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, SiglipConfig, SiglipImageProcessor, SiglipModel

    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = AutoTokenizer.from_pretrained(miniature.model)
    config = SiglipConfig(
        text_config={**tower, "vocab_size": len(tokenizer)}, vision_config={**tower, "image_size": 64, "patch_size": 16}
    )
    for part in (SiglipModel(config), SiglipImageProcessor(size={"height": 64, "width": 64}), tokenizer):
        part.save_pretrained(tmp_path / "siglip")
    name = "google/siglip-base-patch16-64"
    hub.add(tmp_path / "siglip", FIRST, "main", name=name)
    words = ("extract", "--model", name, "--data", miniature.data, "--workers", 0, "-q")
    code, _, err = mmcli(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{name} at {FIRST}: got --patches 256, wanted --patches 16; use {DEFAULT_MODEL}" in err
    assert mmcli(*words, "--patches", 16)[0] == 0


@pytest.mark.parametrize(
    "words",
    [
        ("extract", "--n-images", 4, "--n-captions", 4),
        ("finetune", "--n-images", 8, "--batch-size", 2, "--unfreeze", "last-2"),
    ],
)
def test_benches_take_a_checkpoint_of_the_hub(mmcli, miniature, hub, words: tuple[object, ...]) -> None:
    hub.add(miniature.model, FIRST, "main")
    code, out, err = mmcli("bench", *words, "--model", DEFAULT_MODEL, "--patches", 64, "--repeats", 1, "--json")
    assert code == 0, err
    assert json.loads(out)["cases"]


def test_the_command_line_reads_the_users_environment(miniature, hub, tmp_path: Path) -> None:
    """A process of its own: the hub's client reads HF_HOME once, when it is imported."""
    hub.root = tmp_path / "hf" / "hub"
    hub.add(miniature.model, FIRST, "main")
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    code = f"import os\nos.environ.pop('HF_HUB_CACHE', None)\nos.environ.update({environment!r})\nfrom mmcli.__main__ import main\nmain()"
    words = ["extract", "--patches", "64", "--data", str(miniature.data), "--workers", "0", "-q"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert next((tmp_path / "data" / "cache").iterdir()).name.startswith("siglip2-base-patch16-naflex-p64-")
