"""Where to compute and in which precision: CPU and GPU alike, the GPU never assumed and never ignored."""

import ctypes
import errno
import os
import random
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch

from ...errors import InputError
from .cores import count_cores

# What is larger is mapped by itself and given back when freed; glibc takes no higher limit.
_LARGEST_MAPPED = 32 << 20
# With a workspace of its own for every stream cuBLAS adds up in one order.
DETERMINISTIC_WORKSPACE = ":4096:8"


def pick_device(name: str = "auto") -> torch.device:
    """Resolve ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.

    Raises:
        InputError: An unknown name, or a device that this machine does not have.
    """
    if name == "auto":
        return _prepared(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(
            "unknown device",
            where="--device",
            got=name,
            wanted="auto, cpu, cuda, cuda:N or mps",
            do="use --device auto",
        ) from None
    here = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not here.get(device.type, False):
        wanted = f"one of {', '.join(kind for kind, present in here.items() if present)}"
        raise InputError("no such device here", where="--device", got=name, wanted=wanted, do="use --device auto")
    return _prepared(device)


def _prepared(device: torch.device) -> torch.device:
    if device.type == "cuda":
        # torch looks at it once, before the first product of a process, which may be long before a training asks for
        # the deterministic mode: an encoder has run by then.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", DETERMINISTIC_WORKSPACE)
    return device


@dataclass
class autocast:  # noqa: N801
    """Mixed precision where it pays: bfloat16 or float16 on a GPU, float32 on a CPU.

    A context manager; ``name`` says which precision it gives (``float32``, ``bfloat16``, ``float16``).

    Attributes:
        device: Where to compute.
        enabled: float32 everywhere if not.
        on_cpu: Whether a CPU may take bfloat16 too. It does where it has AMX; with AVX-512 alone bfloat16 products were
            measured at half the speed of float32 (docs/lab-notes.md).
    """

    device: torch.device
    enabled: bool = True
    on_cpu: bool = False

    def __post_init__(self) -> None:
        self.dtype = torch.float32
        if self.enabled and self.device.type == "cuda":
            self.dtype = torch.bfloat16 if _computes_bfloat16(self.device) else torch.float16
        elif self.enabled and self.on_cpu and self.device.type == "cpu" and has_amx():
            self.dtype = torch.bfloat16
        self._context = torch.autocast(
            self.device.type,
            dtype=self.dtype if self.dtype != torch.float32 else torch.bfloat16,
            enabled=self.dtype != torch.float32,
        )

    @property
    def name(self) -> str:
        """Name of the precision, such as ``bfloat16``."""
        return str(self.dtype).removeprefix("torch.")

    def __enter__(self) -> None:
        self._context.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._context.__exit__(kind, value, traceback)


def device_line(device: torch.device, precision: str) -> str:
    """A device and what it computes in, for a person: ``cpu, float32`` or ``cuda:0 NVIDIA H200, bfloat16``."""
    if device.type != "cuda":
        return f"{device}, {precision}"
    index = torch.cuda.current_device() if device.index is None else device.index
    return f"cuda:{index} {torch.cuda.get_device_name(index)}, {precision}"


def _computes_bfloat16(device: torch.device) -> bool:
    """Whether this GPU has arithmetic of bfloat16; older ones convert every number there and back, and are slower."""
    with torch.cuda.device(device):  # the question below is about the current device
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def has_amx() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 in hardware of its own (Intel AMX)."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


# What libraries say in an error that has no class of its own: allocators of a CPU, cuBLAS, cuDNN and NCCL on a GPU.
_SHORTAGES = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "cannot allocate memory",
    "_status_alloc_failed",
    "cudaerrormemoryallocation",
    "cublas_status_not_initialized",  # of a handle that found no room for its workspace
)


def is_memory_shortage(error: BaseException) -> bool:
    """Whether an error says that a device, or this machine, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SHORTAGES)


def to_device(tensor: torch.Tensor, device: torch.device, *, pin: bool) -> torch.Tensor:
    """Copy a tensor of the CPU to a device; from page-locked memory (``pin``) a GPU copies while the host goes on."""
    if pin and device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch; with ``deterministic`` also forbid operations whose result may vary."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", DETERMINISTIC_WORKSPACE)
    # Where nothing changes it is not asked for: asking imports torch's compiler, a second of a process that needs none.
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def keep_freed_memory(keep: bool = True) -> None:
    """Let this process keep memory that it has freed, where the C library is glibc.

    A training frees and asks for the same tens of megabytes in every step; handed back to the system, every page of
    them is cleared and mapped again, 7 % of a step of 1,024 images (docs/lab-notes.md).

    Args:
        keep: Not to keep it goes back to the thresholds that glibc comes to by itself.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return
    trim_threshold, mmap_threshold = -1, -3
    set_option(trim_threshold, 1 << 30 if keep else 2 * _LARGEST_MAPPED)
    set_option(mmap_threshold, _LARGEST_MAPPED)


def reader_count(wanted: int | None, device: torch.device) -> int:
    """Processes that read images, if not as many as wanted: on a CPU few, because the model computes on its cores."""
    if wanted is not None:
        return wanted
    cores = count_cores()
    return max(1, cores // 8) if device.type == "cpu" else cores
