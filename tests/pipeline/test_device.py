"""Seeds and the deterministic mode."""

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from mmcli.pipeline.device import autocast, device_line, seed_everything


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]


def test_every_source_of_chance_is_seeded() -> None:
    drawn = []
    for seed in (1, 1, 2):
        seed_everything(seed)
        drawn.append((random.random(), float(np.random.random()), float(torch.rand(()))))  # noqa: NPY002
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_deterministic_mode_reaches_torch(deterministic: bool) -> None:
    torch.use_deterministic_algorithms(not deterministic)
    seed_everything(1, deterministic=deterministic)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.backends.cudnn.benchmark != deterministic
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == deterministic


def test_the_deterministic_mode_is_that_of_the_option(mmcli, here) -> None:
    for option, wanted in (("--deterministic", True), ("--no-deterministic", False)):
        torch.use_deterministic_algorithms(not wanted)
        code, _, err = mmcli(
            "train-head", "--epochs", 1, "--set", "fusion.mlp_dims=[16, 8]", "--set", "knn.K=5", option
        )
        assert code == 0, err
        assert torch.are_deterministic_algorithms_enabled() == wanted


@pytest.mark.parametrize(
    ("amx", "options", "wanted"),
    [
        (True, {"on_cpu": True}, "bfloat16"),
        (True, {}, "float32"),
        (True, {"on_cpu": True, "enabled": False}, "float32"),
        (False, {"on_cpu": True}, "float32"),
    ],
)
def test_a_cpu_takes_bfloat16_where_it_has_amx_and_is_asked(monkeypatch, amx: bool, options, wanted: str) -> None:
    monkeypatch.setattr("mmcli.pipeline.device.has_amx", lambda: amx)
    precision = autocast(torch.device("cpu"), **options)
    assert precision.name == wanted
    with precision:
        assert str((torch.ones(2, 2) @ torch.ones(2, 2)).dtype) == f"torch.{wanted}"


def test_the_line_of_a_device_names_it_and_its_precision(monkeypatch) -> None:
    assert device_line(torch.device("cpu"), "float32") == "cpu, float32"
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: f"Card {index}")
    assert device_line(torch.device("cuda"), "bfloat16") == "cuda:1 Card 1, bfloat16"
    assert device_line(torch.device("cuda:0"), "float16") == "cuda:0 Card 0, float16"
