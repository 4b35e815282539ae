"""Seeds and the deterministic mode."""

import errno
import os
import random
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmcli import InputError
from mmcli.pipeline.core.config import load_config
from mmcli.pipeline.core.device import (
    autocast,
    device_line,
    is_memory_shortage,
    pick_device,
    seed_everything,
    to_device,
)
from mmcli.pipeline.extraction import extract as fleet
from mmcli.pipeline.extraction.extract import ExtractPlan, load_encoder
from mmcli.pipeline.extraction.ray_cluster import share_out


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
    monkeypatch.setattr("mmcli.pipeline.core.device.has_amx", lambda: amx)
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


@pytest.mark.parametrize(("computes", "wanted"), [(True, "bfloat16"), (False, "float16")])
def test_a_gpu_takes_bfloat16_where_it_has_it_in_hardware(monkeypatch, computes: bool, wanted: str) -> None:
    """Older ones emulate it, slower than float32; and it is the GPU that computes which is asked, not the first one."""
    current = [torch.device("cuda:0")]

    class Device:
        def __init__(self, device: torch.device) -> None:
            self._device = device

        def __enter__(self) -> None:
            current.append(self._device)

        def __exit__(self, *_: object) -> None:
            current.pop()

    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or (computes and current[-1].index == 1)

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    with pytest.warns(UserWarning, match="CUDA is not available") if not torch.cuda.is_available() else nullcontext():
        assert autocast(torch.device("cuda:1")).name == wanted


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cudaErrorMemoryAllocation: out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_a_shortage_of_memory_is_known_from_other_errors(error: Exception, short: bool) -> None:
    assert is_memory_shortage(error) is short


def test_a_real_allocation_that_fails_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46, dtype=torch.float32)
    assert is_memory_shortage(caught.value)


def test_a_training_without_memory_ends_in_one_line(mmcli, here, monkeypatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore of it")

    monkeypatch.setattr("mmcli.pipeline.training.data.Split.place", never)
    code, _, err = mmcli("train-head", "--epochs", 1, "--set", "knn.K=5")
    assert code == 1
    assert err.splitlines()[-1].startswith("mmcli: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB; give")
    assert "Traceback" not in err


def test_cublas_is_deterministic_from_its_first_product_on(monkeypatch) -> None:
    """An encoder multiplies before a training asks for the mode, and torch looks at the variable once."""
    assert pick_device("cpu").type == "cpu"
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("auto", "cuda:1"):
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        assert pick_device(name).type == "cuda"
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize(
    ("device", "n", "processes", "wanted"),
    [
        ("auto", 2, None, ["cuda:0", "cuda:1"]),
        ("cuda", 2, 3, ["cuda:0", "cuda:1", "cuda:0"]),
        ("cuda:1", 2, 2, ["cuda:1", "cuda:1"]),
        ("cpu", 2, 2, ["cpu", "cpu"]),
        ("auto", 0, 2, ["cpu", "cpu"]),
    ],
)
def test_an_extraction_takes_every_gpu_or_the_one_named(
    monkeypatch, tmp_path, miniature, device, n, processes, wanted
) -> None:
    taken: list[str] = []

    def run(config, parts, devices, *, quiet):
        taken.extend(devices)
        raise InputError("enough")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
    monkeypatch.setattr(fleet, "_run", run)
    config = load_config(options={"hardware.device": device, "model.siglip2_variant": str(miniature.model)})
    with pytest.raises(InputError, match="enough"):
        fleet.extract_here(config, ExtractPlan(data=tmp_path), processes=processes)
    assert taken == wanted


@pytest.mark.parametrize(("processes", "wanted"), [(None, 2), (1, 1), (5, 2)])
def test_ray_gives_no_more_actors_than_there_are_gpus(processes: int | None, wanted: int) -> None:
    """For one more it would wait for ever."""
    ray = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}}])
    assert share_out(ray, load_config(options={"hardware.device": "auto"}), processes).actors == wanted


def test_page_locked_memory_is_the_configurations_choice(monkeypatch, miniature) -> None:
    pinned: list[torch.Size] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.shape) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor)
    gpu = torch.device("cuda")
    for pin in (True, False):
        to_device(torch.zeros(3), gpu, pin=pin)
        to_device(torch.zeros(3), torch.device("cpu"), pin=pin)
    assert pinned == [(3,)]
    monkeypatch.undo()
    for pin in (True, False):
        config = load_config(
            options={"model.siglip2_variant": str(miniature.model), "model.max_num_patches": 64, "data.pin_memory": pin}
        )
        plan = ExtractPlan(data=miniature.data)
        assert load_encoder(config, plan, torch.device("cpu")).pin_memory is pin
