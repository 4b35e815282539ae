"""Options of train-head: each sets its key and nothing else, and what is no key reaches the stage."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmcli.pipeline.core.config import KeyOption, dump_config, load_config

OPTIONS = {
    "--preset": ("preset", "direction-only"),
    "--head": ("head", "mlp"),
    "--bits": ("hash.bits", 32),
    "--fusion": ("fusion.type", "concat"),
    "--magnitude": ("fusion.magnitude", "shuffled"),
    "--block-norm": ("fusion.block_norm", "none"),
    "--inputs": ("fusion.inputs", "text"),
    "--adapter": ("fusion.adapter", "linear"),
    "--alpha": ("loss.cosine_weight", 0.5),
    "--gamma": ("loss.hash_weight", 0.25),
    "--focal": ("loss.focal_loss", True),
    "--class-weights": ("loss.class_weights", "balanced"),
    "--epochs": ("training.num_epochs", 3),
    "--batch-size": ("training.batch_size", 5),
    "--patience": ("training.early_stopping_patience", 0),
    "--monitor": ("training.monitor", "classifier"),
    "--ema": ("training.ema_decay", 0.75),
    "--model": ("model.siglip2_variant", "some"),
    "--protocol": ("data.split_type", "coco14"),
    "--protocol-lists": ("data.protocol_lists", "lists"),
    "--device": ("hardware.device", "cpu"),
    "--seed": ("hardware.seed", 3),
    "--deterministic": ("hardware.deterministic", True),
}
# What an option settles beside its own key.
FOLLOWS = {"--head": {"hash.bits", "training.monitor", "knn.distance_metric"}, "--preset": {"fusion.type"}}


def flat(tree: dict, path: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in tree.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return found


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_sets_its_key(mmcli, option: str) -> None:
    key, value = OPTIONS[option]
    words = [option] if value is True else [option, value]
    code, out, err = mmcli("train-head", *words, "--print-config", "--json")
    assert code == 0, err
    got, plain = flat(json.loads(out)), flat(load_config().model_dump(mode="json"))
    assert {k for k in got if got[k] != plain[k]} == {key} | FOLLOWS.get(option, set())
    assert got[key] == value
    assert KeyOption(key).flag == option


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stage that writes down which of its functions was called, and how."""
    from mmcli.pipeline.extraction import stores
    from mmcli.pipeline.training import train_head

    monkeypatch.setattr(stores, "find_store", lambda folder: folder)
    monkeypatch.setattr(stores, "Reading", lambda folder, config: ("read ahead", folder))
    recorded = SimpleNamespace(name=None, given=None, words={})

    def take(name: str):
        def call(given: object, **words: object) -> SimpleNamespace:
            recorded.name, recorded.given = name, given
            recorded.words = {key: value for key, value in words.items() if key != "progress"}
            return SimpleNamespace(to_json=lambda: {"run": "x"}, summary=lambda: ["done"])

        return call

    for name in ("train_head", "train_replicas", "resume_training"):
        monkeypatch.setattr(train_head, name, take(name))
    return recorded


def test_what_is_no_key_reaches_the_stage(mmcli, stage: SimpleNamespace) -> None:
    others = ("--tensorboard", "--wandb", "--out", "o", "--force", "--store", "s", "--json")
    code, out, err = mmcli("train-head", "--seeds", 3, *others)
    assert code == 0, err
    assert json.loads(out) == {"run": "x"}
    words = {"tensorboard": True, "wandb": True, "out": Path("o"), "force": True, "store": Path("s")}
    assert (stage.name, stage.words) == ("train_replicas", {"seeds": 3, **words})
    assert mmcli("train-head", *others)[0] == 0
    assert (stage.name, stage.words) == ("train_head", {**words, "store": ("read ahead", Path("s"))})
    assert mmcli("train-head")[0] == 0
    plain = {"tensorboard": False, "wandb": False, "out": None, "force": False, "store": ("read ahead", None)}
    assert (stage.name, stage.words) == ("train_head", plain)


def test_resume_takes_a_run_and_its_own_configuration(mmcli, stage: SimpleNamespace, tmp_path: Path) -> None:
    assert mmcli("train-head", "--resume", "runs/x", "--store", "s", "--wandb")[0] == 0
    assert (stage.name, stage.given) == ("resume_training", Path("runs/x"))
    assert stage.words == {"store": Path("s"), "tensorboard": False, "wandb": True}
    (tmp_path / "runs" / "x").mkdir(parents=True)
    config = load_config(options={"hash.bits": 128, "preset": "plan"})
    (tmp_path / "runs" / "x" / "config.yaml").write_text(dump_config(config))
    code, out, err = mmcli("train-head", "--resume", "runs/x", "--print-config")
    assert code == 0, err
    assert out == dump_config(config)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_interrupted_run_is_configured_by_nothing_else(mmcli, stage: SimpleNamespace, option: str) -> None:
    value = OPTIONS[option][1]
    code, out, err = mmcli("train-head", "--resume", "runs/x", option, *([] if value is True else [value]))
    assert (code, out) == (2, "")
    assert f"--resume: got {option}" in err
    assert stage.name is None
