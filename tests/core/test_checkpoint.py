"""What a run leaves of its head: checkpoints and a folder for the hub, loaded by their path alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmcli import InputError, load_head
from mmcli.cache import Store
from mmcli.heads.decompose import log_norms
from mmcli.heads.model import BaseHead, MlpBaseline, make_head
from mmcli.pipeline.core.checkpoint import CheckpointKeeper, best_checkpoint, write_model_folder
from mmcli.pipeline.core.config import Config, load_config, resolve
from mmcli.pipeline.core.results import read_codes
from mmcli.pipeline.core.run import Run, RunInfo, now, start_run

D = 8
NAMES = ("ant", "bee", "cow")
METRICS = {"method": "classifier", "split": "test", "mAP": 0.51234, "P@5": float("nan"), "seconds": 3.0}


def make_config(head: str) -> Config:
    return resolve(load_config(options={"head": head, "fusion.mlp_dims": [8, 6], "classifier.num_classes": 3}))


def make(config: Config, seed: int = 0) -> BaseHead:
    torch.manual_seed(seed)
    head = make_head(config.head, config.fusion, config.hash, config.classifier, width=D)
    head.fit_log_norms(log_norms(torch.randn(50, D), torch.randn(50, D)))
    return head.eval()


def make_run(folder: Path, config: Config) -> Run:
    info = RunInfo(
        kind="train-head",
        status="running",
        created=now(),
        config_digest=config.digest,
        preset=config.preset,
        seed=42,
        store="s",
        store_digest="d",
        model="google/encoder",
        patches=64,
        manifest_sha256="f" * 64,
        category_names=NAMES,
    )
    return start_run(info, config, label="x", out=folder, runs=folder.parent, device="cpu")


def same(one: BaseHead, other: BaseHead) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", ["fusion", "mlp"])
def test_two_lines_load_the_best_of_a_run(kind: str, tmp_path: Path) -> None:
    config = make_config(kind)
    run = make_run(tmp_path / "run", config)
    keeper = CheckpointKeeper(run.folder / "checkpoints", config, width=D)
    heads = [make(config, seed) for seed in range(3)]
    for epoch, (head, value) in enumerate(zip(heads, (0.2, 0.6, 0.4), strict=True), 1):
        keeper.offer(head, epoch=epoch, val_mAP=value)
    head = load_head(str(run.folder))
    assert same(head, heads[1])
    assert not head.training
    assert head.about["category_names"] == list(NAMES)
    assert head.about["encoder"] == "google/encoder"
    assert same(load_head(run.folder / "checkpoints" / "epoch-003.safetensors"), heads[2])
    assert isinstance(head, MlpBaseline) == (kind == "mlp")
    for device in (torch.device("cpu"), "auto"):
        assert load_head(run.folder, device).build == head.build
    with pytest.raises(InputError, match=r"no such device|unknown device"):
        load_head(run.folder, "cuda:99")
    # What was loaded from a run says the same of itself for the hub.
    head.save_pretrained(tmp_path / "hub")
    assert load_head(tmp_path / "hub").about == head.about


def test_a_checkpoint_without_a_kind_is_a_fusion_head(tmp_path: Path) -> None:
    config = make_config("fusion")
    CheckpointKeeper(tmp_path, config, width=D).offer(make(config), epoch=1, val_mAP=0.5)
    path = tmp_path / "epoch-001.safetensors"
    with safe_open(path, framework="pt") as file:
        note = file.metadata()
    build = json.loads(note["build"])
    del build["head"], build["fusion"]["magnitude"]
    about = {"build": json.dumps(build), "epoch": note["epoch"], "val_mAP": note["val_mAP"]}  # and no checksum
    save_file(load_file(path), path, metadata=about)
    assert same(load_head(path), make(config))


@pytest.mark.parametrize("kind", ["fusion", "mlp"])
def test_a_finished_run_has_a_folder_for_the_hub(kind: str, tmp_path: Path) -> None:
    config = make_config(kind)
    run, head = make_run(tmp_path / "run", config), make(config)
    folder = write_model_folder(run.folder, head, config, METRICS)
    assert folder == run.folder / "model"
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    again = load_head(folder)
    assert same(head, again)
    assert again.about["category_names"] == list(NAMES)
    assert again.about["metrics"] == {"method": "classifier", "split": "test", "mAP": 0.51234, "P@5": None}
    assert json.loads((folder / "config.json").read_text(), parse_constant=pytest.fail)
    card = (folder / "README.md").read_text()
    for part in (
        "| preset | recommended |",
        "| mAP |",
        "| 0.5123 |",
        "google/encoder",
        "ant, bee, cow",
        "classifier on the test split",
    ):
        assert part in card
    assert "nan" not in card.lower().replace("nonsense", "")
    assert str(tmp_path) not in card + (folder / "config.json").read_text()
    # Written once more, it is the new one.
    other = make(config, seed=1)
    write_model_folder(run.folder, other, config)
    assert same(load_head(folder), other)
    assert "None were measured" in (folder / "README.md").read_text()
    assert {path.name for path in run.folder.iterdir() if path.name.startswith(".")} == set()


def test_what_cannot_be_written_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("fusion")
    run = make_run(tmp_path / "run", config)
    write_model_folder(run.folder, make(config), config)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmcli.heads.hub.save", full)
    with pytest.raises(InputError, match=r"cannot write: .*model: got No space left"):
        write_model_folder(run.folder, make(config, seed=1), config)
    assert same(load_head(run.folder / "model"), make(config))
    assert {path.name for path in run.folder.iterdir()} == {"run.json", "config.yaml", "environment.json", "model"}


def test_no_checkpoint_and_a_damaged_one_are_one_line(tmp_path: Path) -> None:
    config = make_config("fusion")
    run = make_run(tmp_path / "run", config)
    with pytest.raises(InputError, match=r"no checkpoint: .*no such file"):
        load_head(run.folder)
    keeper = CheckpointKeeper(run.folder / "checkpoints", config, width=D)
    keeper.offer(make(config), epoch=1, val_mAP=0.5)
    path = best_checkpoint(run.folder)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for size in [0, 7, 8, 100, *rng.integers(1, len(whole), 20)]:
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="damaged checkpoint"):
            load_head(run.folder)
    state = load_file(path) if path.write_bytes(whole) else {}
    about = {"build": json.dumps(make(config).build)}  # as of a version whose files had no checksum
    save_file({**state, "classifier.bias": torch.zeros(4)}, path, metadata=about)
    with pytest.raises(InputError, match=r"classifier\.bias is float32 \(4,\), not float32 \(3,\)"):
        load_head(run.folder)
    for missing in (tmp_path / "nowhere", tmp_path / "nowhere.safetensors"):
        with pytest.raises(InputError, match="no checkpoint"):
            load_head(missing)
    with pytest.raises(InputError, match=r"config\.json"):
        load_head(tmp_path)


@pytest.mark.parametrize("words", [("--head", "mlp"), ("--preset", "direction-only", "--bits", "16")], ids=" ".join)
def test_a_head_trained_on_the_command_line_is_two_lines_away(mmcli, here: Path, words: tuple[str, ...]) -> None:
    run = here / "runs" / "mine"
    tiny = ("--set", "fusion.mlp_dims=[64, 32]", "--set", "knn.K=5", "--epochs", 2, "--device", "cpu", "--tensorboard")
    code, out, err = mmcli("train-head", *words, *tiny, "--out", run, "--json")
    assert code == 0, err
    best, hub = load_head(run), load_head(run / "model")
    assert same(best, hub)
    assert best.kind == ("mlp" if "mlp" in words else "fusion")
    assert json.loads(out)["monitor"] == ("classifier" if "mlp" in words else "knn")
    assert list((run / "tensorboard").iterdir())
    assert (
        hub.about["preset"]
        == json.loads(out)["preset"]
        == ("direction-only" if "direction-only" in words else "recommended")
    )
    # Codes of the run are those of the loaded head on the stored embeddings.
    store = Store.open(next(path for path in (here / "data" / "cache").iterdir() if path.is_dir()))
    arrays, codes = store.load(), read_codes(run, "test")
    rows = np.flatnonzero(np.isin(store.index["image_id"].to_numpy(), codes.image_id))
    v_img, v_txt = (torch.from_numpy(v[rows].astype(np.float32)) for v in (arrays.v_img, arrays.v_txt[:, 0]))
    with torch.inference_mode():
        output = hub(v_img, v_txt)
    np.testing.assert_allclose(output.features.numpy(), codes.soft, atol=1e-5)
    np.testing.assert_allclose(output.logits.numpy(), codes.logits, atol=1e-4)
