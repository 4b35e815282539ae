"""Configurations of one identity give the same numbers; those of another give others."""

import numpy as np
import pytest

from mmcli import InputError
from mmcli.pipeline.ablation.identity import evaluation_identity, training_identity
from mmcli.pipeline.core.config import load_config, resolve
from mmcli.pipeline.core.results import read_codes
from mmcli.pipeline.training.train_head import train_head

SMALL = {
    "fusion.mlp_dims": [32, 16],
    "training.num_epochs": 2,
    "knn.K": 5,
    "hash.bits": 16,
    "hardware.device": "cpu",
    "training.batch_size": 8,
}
# Keys that play no part, with two values each, where the first words hold.
IDLE = [
    ({}, "loss.cosine_weight", 0.5, 2.0),
    ({"fusion.inputs": "image", "fusion.adapter": "linear"}, "loss.cosine_weight", 0.5, 2.0),
    ({"loss.hash_weight": 0.0}, "loss.hash_reg.lambda_decorr", 0.0, 10.0),
    ({"loss.hash_weight": 0.0}, "hash.use_hash_reg", True, False),
    ({"hash.use_hash_reg": False}, "loss.hash_weight", 0.1, 1.0),
    ({"hash.bits": 0}, "hash.beta", 1.0, 3.0),
    ({"hash.bits": 0}, "optimizer.lr_hash", 1e-3, 1e-2),
    ({}, "loss.focal_gamma", 2.0, 3.0),
    ({"loss.focal_loss": True}, "loss.asymmetric_loss", True, False),
    ({"loss.asymmetric_loss": False}, "loss.asymmetric_gamma_neg", 4.0, 1.0),
    ({"training.monitor": "classifier"}, "knn.K", 3, 7),
    ({}, "knn.theta", 0.1, 0.9),
    ({}, "knn.top_n_tags", 3, 9),
    ({}, "scheduler.total_epochs", None, 2),
    ({}, "training.save_top_k", 1, 3),
    ({}, "optimizer.lr_towers", 1e-5, 1e-3),
    ({}, "finetune.unfreeze", "last-2", "all"),
    ({}, "data.num_workers", 0, 3),
    (
        {"head": "mlp", "hash.bits": 0, "training.monitor": "classifier", "knn.distance_metric": "cosine"},
        "fusion.block_norm",
        "none",
        "rms",
    ),
]
LIVE = [
    ({"fusion.adapter": "linear"}, "loss.cosine_weight", 0.5, 2.0),
    ({}, "loss.hash_reg.lambda_decorr", 0.0, 10.0),
    ({}, "loss.asymmetric_gamma_neg", 4.0, 1.0),
    ({}, "fusion.dropout", 0.0, 0.1),
    ({}, "fusion.magnitude", "own", "shuffled"),
    ({}, "hardware.seed", 42, 43),
    ({}, "training.batch_size", 8, 10),
    ({}, "optimizer.lr_hash", 1e-3, 1e-2),
    ({"scheduler.warmup_epochs": 0.0}, "scheduler.total_epochs", 2, 5),
]


def some_slow(cases, n: int):
    """The first few are trained always, the others with ``--slow``."""
    return [case if place < n else pytest.param(*case, marks=pytest.mark.slow) for place, case in enumerate(cases)]


def pair(others, key, *values):
    return [resolve(load_config(options=SMALL | others | {key: value})) for value in values]


def codes(configs, made, tmp_path):
    (store,) = (made / "data" / "cache").iterdir()
    runs = [
        train_head(config, store=store, out=tmp_path / str(place)).run.folder for place, config in enumerate(configs)
    ]
    return [read_codes(folder, "test") for folder in runs]


@pytest.mark.parametrize(("others", "key", "a", "b"), IDLE)
def test_keys_that_play_no_part_are_left_out(others, key, a, b) -> None:
    first, second = (training_identity(config) for config in pair(others, key, a, b))
    assert first == second


@pytest.mark.parametrize(("others", "key", "a", "b"), LIVE)
def test_keys_that_play_a_part_are_kept(others, key, a, b) -> None:
    first, second = (training_identity(config) for config in pair(others, key, a, b))
    assert first != second


@pytest.mark.parametrize(("others", "key", "a", "b"), some_slow(IDLE, 3))
def test_what_is_left_out_changes_no_number(others, key, a, b, made, tmp_path) -> None:
    configs = pair(others, key, a, b)
    first, second = codes(configs, made, tmp_path)
    np.testing.assert_array_equal(first.soft, second.soft)
    np.testing.assert_array_equal(first.logits, second.logits)


@pytest.mark.parametrize(("others", "key", "a", "b"), some_slow(LIVE, 1))
def test_what_is_kept_changes_numbers(others, key, a, b, made, tmp_path) -> None:
    configs = pair(others, key, a, b)
    first, second = codes(configs, made, tmp_path)
    assert not np.array_equal(first.logits, second.logits)


@pytest.mark.parametrize(
    ("others", "key", "a", "b", "same"),
    [
        ({}, "knn.theta", 0.1, 0.9, True),
        ({"knn.voting_strategy": "threshold"}, "knn.theta", 0.1, 0.9, False),
        ({}, "knn.tau", 0.1, 0.2, False),
        ({"knn.voting_strategy": "rank"}, "knn.tau", 0.1, 0.2, True),
        ({}, "knn.index", "flat", "fastscan", True),
        ({}, "knn.ties", "index", "average", False),
        ({"knn.distance_metric": "cosine"}, "knn.ties", "index", "average", True),
        ({}, "knn.top_n_tags", 3, 9, True),
    ],
)
def test_an_evaluation_depends_on_what_votes(others, key, a, b, same) -> None:
    first, second = (evaluation_identity(config, "knn") for config in pair(others, key, a, b))
    assert (first == second) is same
    classifier = {str(evaluation_identity(config, "classifier")) for config in pair(others, key, a, b)}
    assert len(classifier) == 1


def test_every_key_has_been_thought_of() -> None:
    """A new key of the configuration counts until somebody says otherwise: rows are made again rather than mixed up."""
    config = load_config(options={"loss.focal_loss": True, "knn.voting_strategy": "softmax"})
    counted = training_identity(config)
    for key in (
        "fusion.mlp_dims",
        "hash.bits",
        "training.batch_size",
        "loss.bce_weight",
        "hardware.seed",
        "data.split_type",
    ):
        assert key in counted
    assert not [key for key in counted if key.startswith(("model.", "grid_search.", "finetune."))]
    towers = training_identity(config, "last-2")
    assert "finetune.augment" in towers
    assert "optimizer.lr_towers" in towers


def test_lists_of_a_protocol_count_by_what_they_say(tmp_path) -> None:
    for name, text in (("a", "x.jpg 1 0"), ("b", "x.jpg 1 0"), ("c", "y.jpg 1 0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.txt").write_text(text)
    identities = [
        training_identity(
            load_config(options={"data.split_type": "hashnet", "data.protocol_lists": str(tmp_path / name)})
        )
        for name in "abc"
    ]
    assert identities[0] == identities[1] != identities[2]
    with pytest.raises(InputError):
        resolve(load_config(options={"head": "mlp", "hash.bits": 8}))
