"""Configurations: precedence, presets, round trips, and what a wrong key is told."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from mmcli import InputError
from mmcli.pipeline.core.config import Config, dump_config, load_config, parse_settings
from mmcli.pipeline.core.presets import PRESETS

PLAN_FILE = """
model: {siglip2_variant: google/siglip2-base-patch16-naflex, max_num_patches: 512, text_max_length: 64, freeze_towers: true}
fusion: {type: hadamard, mlp_dims: [1024, 512], dropout: 0.1, activation: relu}
hash: {bits: 32, activation: tanh, use_hash_reg: true}
classifier: {num_classes: 80, use_bias: true}
loss:
  bce_weight: 1.0
  cosine_weight: 1.0
  hash_weight: 0.1
  hash_reg: {lambda_balance: 0.1, lambda_decorr: 0.01}
  focal_loss: false
  focal_alpha: 0.25
  focal_gamma: 2.0
optimizer: {type: adamw, lr_fusion: 3e-4, lr_hash: 3e-4, lr_classifier: 3e-4, lr_towers: 1e-5, weight_decay: 0.01, betas: [0.9, 0.999]}
scheduler: {type: cosine, warmup_epochs: 2, total_epochs: 30, min_lr: 1e-6}
training: {batch_size: 64, num_epochs: 30, gradient_clip_norm: 1.0, mixed_precision: true, accumulation_steps: 1,
           early_stopping_patience: 5, save_top_k: 3}
knn: {K: 20, distance_metric: hamming, voting_strategy: softmax, tau: 0.07, top_n_tags: 5}
data: {dataset: coco, split_type: karpathy, num_workers: 4, prefetch_factor: 2, pin_memory: true}
hardware: {device: cuda, seed: 42, deterministic: false}
grid_search:
  hash_bits: [32, 64, 128]
  K_neighbors: [10, 20, 50]
  cosine_weight: [0.5, 1, 2]
  hash_weight: [0.05, 0.1, 0.2]
  tau: [0.03, 0.07, 0.15]
  max_num_patches: [256, 512]
  freeze_towers: [true, last-2]
"""


def numbers() -> list[tuple[str, dict]]:
    """Every number of the schema by its dotted key, with its limits."""
    schema, found = Config.model_json_schema(), []

    def walk(node: dict, path: str) -> None:
        for name, field in node["properties"].items():
            inner = field.get("$ref")
            if inner:
                walk(schema["$defs"][inner.rpartition("/")[2]], f"{path}{name}.")
                continue
            kinds = [one for one in field.get("anyOf", [field]) if one.get("type") in {"integer", "number"}]
            found.extend((path + name, kind) for kind in kinds)

    walk(schema, "")
    return found


NUMBERS = numbers()


def test_the_plans_file_loads(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(PLAN_FILE)
    config = load_config(file)
    assert config.hash.bits == 32
    # YAML 1.1 reads 3e-4 as a string; it is a number all the same.
    assert config.optimizer.lr_fusion == 3e-4
    assert config.scheduler.min_lr == 1e-6
    assert config.grid_search.freeze_towers == (True, "last-2")


def test_choices_in_any_case_and_none_as_null(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(
        "preset: Plan\noptimizer: {type: AdamW}\nfusion: {activation: ReLU, adapter: null}\nloss: {class_weights: null}\n"
    )
    config = load_config(file)
    assert (config.preset, config.optimizer.type, config.fusion.activation) == ("plan", "adamw", "relu")
    assert (config.loss.class_weights, config.fusion.adapter) == ("none", "none")
    for setting in ("optimizer.type=SGD", "optimizer.type=null", "data.dataset=null"):
        with pytest.raises(InputError):
            load_config(options=parse_settings([setting]))


def test_options_over_file_over_preset_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("preset: plan\nhash: {bits: 32}\nknn: {K: 7}\n")
    config = load_config(file, options={"knn.K": 9})
    assert (config.preset, config.hash.bits, config.knn.K, config.knn.tau) == ("plan", 32, 9, 0.07)
    assert config.fusion.block_norm == "none"
    assert load_config(file, options={"preset": "recommended"}).fusion.block_norm == "rms"


def test_plan_preset_is_the_plan_to_the_letter() -> None:
    plan = load_config(options={"preset": "plan"})
    assert (plan.fusion.block_norm, plan.hash.activation, plan.hash.batch_norm) == ("none", "tanh", False)
    rates = plan.optimizer
    assert (rates.lr_fusion, rates.lr_hash, rates.lr_classifier, rates.weight_decay) == (3e-4, 3e-4, 3e-4, 0.01)
    assert (plan.loss.cosine_weight, plan.loss.hash_weight) == (1.0, 0.1)
    assert (plan.training.batch_size, plan.training.num_epochs, plan.hardware.seed) == (64, 30, 42)


def test_presets_differ_in_stated_settings_only(repo: Path) -> None:
    trees = {name: load_config(options={"preset": name}).model_dump() for name in PRESETS}

    def differing(one: dict, other: dict) -> set[str]:
        return {f"{s}.{k}" for s in one if isinstance(one[s], dict) for k in one[s] if one[s][k] != other[s][k]}

    stated = {name: {f"{s}.{k}" for s in preset for k in preset[s]} for name, preset in PRESETS.items()}
    assert differing(trees["plan"], trees["recommended"]) == stated["plan"] == stated["recommended"]
    assert differing(trees["direction-only"], trees["recommended"]) == {"fusion.type"}
    assert trees["direction-only"]["fusion"]["type"] == "hadamard"
    text = (repo / "docs" / "method.md").read_text()
    assert all(key in text for keys in stated.values() for key in keys)
    assert all(f"`{name}`" in text for name in PRESETS)


def test_saved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(options={"hash.bits": 128, "preset": "plan", "hardware.seed": 7})
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config
    assert load_config(file).digest == config.digest != Config().digest


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hash: {bitz: 64}", ("unknown key", "hash.bitz", "did you mean bits?")),
        ("hashing: {bits: 64}", ("unknown key", "hashing", "did you mean hash?")),
        ("loss: {hash_reg: {lambda_balans: 1}}", ("loss.hash_reg.lambda_balans", "did you mean lambda_balance?")),
        ("loss: {gamma: 1}", ("loss.gamma", "did you mean hash_weight?")),
        ("optimizer: {betas: [0.9, 1.0]}", ("optimizer.betas", "less than 1")),
        ("hash: {bits: 12}", ("hash.bits", "got 12", "multiple of 8")),
        ("hash: {bits: many}", ("hash.bits", "'many'", "integer")),
        ("fusion: {dropout: 1.0}", ("fusion.dropout", "less than 1")),
        ("fusion: {mlp_dims: []}", ("fusion.mlp_dims",)),
        ("hash: 3", ("hash", "got 3")),
        ("preset: best", ("preset", "'best'", "recommended, small, plan or direction-only")),
        ("preset: [plan]", ("preset", "['plan']", "recommended, small, plan or direction-only")),
        ("preset: {plan: 1}", ("preset", "{'plan': 1}", "recommended, small, plan or direction-only")),
        ("preset: null", ("preset", "got None", "recommended, small, plan or direction-only")),
        ("preset: 3", ("preset", "got 3", "recommended, small, plan or direction-only")),
        ("scheduler: {warmup_epochs: .inf}", ("scheduler.warmup_epochs", "got inf", "finite")),
        ("scheduler: {warmup_epochs: 1.0e+300}", ("scheduler.warmup_epochs", "got 1e+300", "less than or equal")),
        ("scheduler: {min_lr: .nan}", ("scheduler.min_lr", "got nan", "finite")),
        ("scheduler: {total_epochs: 10000000}", ("scheduler.total_epochs", "less than or equal")),
        ("optimizer: {lr_hash: .inf}", ("optimizer.lr_hash", "got inf")),
        ("optimizer: {lr_hash: 1.0e+38}", ("optimizer.lr_hash", "got 1e+38", "less than or equal")),
        ("optimizer: {betas: [.nan, 0.9]}", ("optimizer.betas.0", "got nan", "finite")),
        ("optimizer: {weight_decay: .inf}", ("optimizer.weight_decay", "got inf")),
        ("training: {gradient_clip_norm: .nan}", ("training.gradient_clip_norm", "got nan", "finite")),
        ("training: {num_epochs: 1.0e+300}", ("training.num_epochs",)),
        ("loss: {cosine_weight: .inf}", ("loss.cosine_weight", "got inf", "finite")),
        ("loss: {hash_reg: {lambda_decorr: .nan}}", ("loss.hash_reg.lambda_decorr", "got nan", "finite")),
        ("loss: {focal_gamma: '.inf'}", ("loss.focal_gamma",)),
        ("loss: {focal_gamma: inf}", ("loss.focal_gamma", "finite")),
        ("knn: {tau: .inf}", ("knn.tau", "got inf", "finite")),
        ("knn: {theta: .nan}", ("knn.theta", "got nan")),
        ("fusion: {dropout: .nan}", ("fusion.dropout", "got nan")),
        ("fusion: {mlp_dims: [1024, 1000000000]}", ("fusion.mlp_dims.1", "got 1000000000", "65536")),
        ("fusion: {mlp_dims: [8, 0]}", ("fusion.mlp_dims.1", "got 0")),
        (f"fusion: {{mlp_dims: {[8] * 33}}}", ("fusion.mlp_dims", "at most 32")),
        ("grid_search: {tau: [0.1, .inf]}", ("grid_search.tau.1", "got inf")),
        ("- a\n- b", ("got list", "sections")),
        ("hash: {bits: 64", ("line 1", "YAML")),
        ("finetune: {unfreeze: last-0}", ("finetune.unfreeze", "got 'last-0'")),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(file)
    line = str(caught.value)
    assert "\n" not in line
    assert ("wrong.yaml" in line) or "preset" in line
    for part in parts:
        assert part in line


def test_not_text_and_not_there(tmp_path: Path) -> None:
    file = tmp_path / "binary.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    for path in (file, tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(InputError, match="configuration"):
            load_config(path)


def test_settings_are_yaml_values() -> None:
    assert parse_settings(["hash.bits=32", "fusion.mlp_dims=[64, 32]", "fusion.type=concat"]) == {
        "hash.bits": 32,
        "fusion.mlp_dims": [64, 32],
        "fusion.type": "concat",
    }
    assert load_config(options=parse_settings(["optimizer.lr_hash=1e-3"])).optimizer.lr_hash == 1e-3
    for word in ("hash.bits", "=3", "a=[", "a=", "a= "):
        with pytest.raises(InputError, match="--set"):
            parse_settings([word])


@pytest.mark.parametrize("null", ["null", "~", "Null"])
def test_null_is_a_value_where_it_is_one(tmp_path: Path, null: str) -> None:
    """No clipping is asked for in a file and on the command line alike; elsewhere null is refused by the key's name."""
    settings = parse_settings([f"training.gradient_clip_norm={null}", "scheduler.total_epochs=null"])
    config = load_config(options=settings)
    assert (config.training.gradient_clip_norm, config.scheduler.total_epochs) == (None, None)
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config
    assert load_config(file, options={"training.gradient_clip_norm": 0.5}).training.gradient_clip_norm == 0.5
    for setting in ("hash.bits", "hash", "preset", "loss.bce_weight"):
        with pytest.raises(InputError, match=rf"{setting}.*got None"):
            load_config(options=parse_settings([f"{setting}={null}"]))


def leaves(tree: dict, path: str = "") -> dict[str, object]:
    """Dotted keys of a configuration to their values."""
    found = {}
    for key, value in tree.items():
        found |= leaves(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return found


def test_no_key_takes_infinity_or_nan() -> None:
    """Every number of every section, those added later too."""
    numbers = [k for k, v in leaves(Config().model_dump()).items() if type(v) in (int, float)]
    assert len(numbers) > 25
    for key in [*numbers, "training.ema_decay"]:
        for word in (".inf", "-.inf", ".nan", "1e999"):
            with pytest.raises(InputError, match=key):
                load_config(options=parse_settings([f"{key}={word}"]))


def test_every_key_of_every_section_is_checked() -> None:
    """A slip in the key is answered with that key; a value of another kind with the key, the value and what is taken."""
    keys = leaves(Config().model_dump())
    assert len(keys) > 55
    for key in keys:
        last = key.rpartition(".")[2]
        slip = f"{key}_"
        with pytest.raises(InputError, match=rf"unknown key: {re.escape(slip)}.*did you mean {last}\?"):
            load_config(options=parse_settings([f"{slip}=1"]))
        # A mapping is a value of no key.
        with pytest.raises(InputError, match=rf"{re.escape(key)}: got .*'a': 1.*, wanted "):
            load_config(options=parse_settings([f"{key}={{a: 1}}"]))


@given(st.data())
def test_a_number_out_of_its_range_is_refused(data: st.DataObject) -> None:
    """Limits are read from the schema, so they are tested for keys that come later too."""
    key, schema = data.draw(st.sampled_from(NUMBERS))
    low, high = (
        schema.get("minimum", schema.get("exclusiveMinimum")),
        schema.get("maximum", schema.get("exclusiveMaximum")),
    )
    outside = [low - 1] if low is not None else []
    outside += [schema["exclusiveMinimum"]] if "exclusiveMinimum" in schema else []
    outside += [high + 1] if high is not None else []
    outside += [schema["exclusiveMaximum"]] if "exclusiveMaximum" in schema else []
    assert outside, f"{key} takes every number"
    value = data.draw(st.sampled_from(outside))
    with pytest.raises(InputError, match=re.escape(key)) as caught:
        load_config(options={key: value})
    assert repr(value) in str(caught.value)
    least = low + 1 if "exclusiveMinimum" in schema else low
    if schema["type"] == "integer":
        inside = data.draw(st.integers(least, high))
    else:
        inside = data.draw(st.floats(least, high, allow_infinity=False))
    inside = 8 * (inside // 8) if key == "hash.bits" else inside
    assume("exclusiveMaximum" not in schema or inside < schema["exclusiveMaximum"])
    section, _, name = key.rpartition(".")
    config: Any = load_config(options={key: inside})
    for part in section.split("."):
        config = getattr(config, part)
    assert getattr(config, name) == inside


def test_choices_that_are_nearly_right_are_named() -> None:
    for setting, meant in {
        "fusion.type=hadamrd": "hadamard",
        "knn.voting_strategy=soft-max": "softmax",
        "head=MPL": "mlp",
    }.items():
        with pytest.raises(InputError, match=f"did you mean {meant}"):
            load_config(options=parse_settings([setting]))


def test_shuffled_magnitudes_need_magnitudes() -> None:
    assert load_config(options={"fusion.magnitude": "Shuffled"}).fusion.magnitude == "shuffled"
    for kind in ("concat", "hadamard"):
        assert load_config(options={"fusion.type": kind, "fusion.magnitude": "own"}).fusion.type == kind
        with pytest.raises(InputError, match=rf"--magnitude: got 'shuffled', wanted own with fusion type {kind}"):
            load_config(
                options={"fusion.magnitude": "shuffled", "fusion.type": kind}, flags={"fusion.magnitude": "--magnitude"}
            )
    with pytest.raises(InputError, match=r"fusion\.type.*did you mean hadamard_magnitude"):
        load_config(options={"fusion.magnitude": "shuffled", "fusion.type": "hadamard_magnitud"})


def test_no_object_of_python_comes_out_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "evil.yaml"
    file.write_text("hash: !!python/object/apply:os.system ['true']")
    with pytest.raises(InputError, match="broken configuration"):
        load_config(file)
    assert yaml.safe_load(dump_config(Config()))


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("training: {num_epochs: yes}", "training.num_epochs"),
        ("optimizer: {lr_hash: on}", "optimizer.lr_hash"),
        ("optimizer: {betas: [true, 0.9]}", "optimizer.betas"),
        ("loss: {hash_reg: {lambda_quant: off}}", "loss.hash_reg.lambda_quant"),
        ("training: {ema_decay: false}", "training.ema_decay"),
    ],
)
def test_a_truth_value_is_no_number(tmp_path: Path, file: str, key: str) -> None:
    """YAML reads yes and on as true, and Python takes true for 1."""
    path = tmp_path / "c.yaml"
    path.write_text(file)
    with pytest.raises(InputError, match=rf"refused value: .*c\.yaml, key {key}: got (true|false) .*wanted a number"):
        load_config(path)
    _, _, value = file.rpartition(": ")
    option = {key: yaml.safe_load(value.rstrip("}"))}
    with pytest.raises(InputError, match=r"refused value: --x: got"):
        load_config(options=option, flags={key: "--x"})


def test_truth_values_stay_where_they_belong(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("training: {mixup: yes}\nloss: {focal_loss: on}\ngrid_search: {freeze_towers: [true, last-2]}")
    config = load_config(path)
    assert (config.training.mixup, config.loss.focal_loss) == (True, True)
