"""Seeds and the deterministic mode."""

import errno
import os
import random
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from mmcli.pipeline.device import autocast, is_memory_shortage, seed_everything


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

    monkeypatch.setattr("mmcli.pipeline.splits.Split.place", never)
    code, _, err = mmcli("train-head", "--epochs", 1, "--set", "knn.K=5")
    assert code == 1
    assert err.splitlines()[-1].startswith("mmcli: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB; give")
    assert "Traceback" not in err
