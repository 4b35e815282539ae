"""A GPU that is not there: CUDA code runs on any machine, and what a GPU would be asked to do is written down.

Inside :func:`fake_cuda` tensors on ``cuda`` are fake: they have a shape, a dtype and a device, but no memory. Autograd,
autocast, vmap and the dispatcher run as they do on a GPU; values that the program fetches are stand-ins (ones, or
0, 1, 2, ... and zeros for int64). What it cannot show: whether a real kernel exists, what it computes, how long it takes
and how much memory is free.

The library built of ``no_cuda.cpp`` has to be loaded before torch is imported, and so before this module.
"""

import gc
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmcli
from mmcli.pipeline.training.step import Step

# Operations that launch nothing: a view, or memory without content.
VIEWS = (
    "alias",
    "as_strided",
    "chunk",
    "detach",
    "diagonal",
    "empty",
    "expand",
    "lift",
    "permute",
    "prim::",
    "reshape",
    "_reshape_alias",
    "select.",
    "slice.",
    "split",
    "squeeze",
    "sym_",
    "t.",
    "transpose",
    "unbind",
    "unsafe_split",
    "unsqueeze",
    "view",
    "_unsafe_view",
)
# Operations whose size is only known on the device.
SIZED_BY_VALUE = ("nonzero", "masked_select", "_unique", "unique", "bincount", "repeat_interleave.Tensor")
# What the deterministic mode refuses on CUDA, of all that a training might use (torch.use_deterministic_algorithms).
NOT_DETERMINISTIC = (
    "_upsample_bilinear2d_aa_backward",
    "_upsample_bicubic2d_aa_backward",
    "upsample_bilinear2d_backward",
    "upsample_bicubic2d_backward",
    "upsample_nearest2d_backward",
    "adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool2d_backward",
    "grid_sampler_2d_backward",
    "scatter_reduce",
    "histc",
    "kthvalue",
    "put_",
    "nll_loss2d",
    "reflection_pad2d_backward",
)


def _memory_of(tensors: list[torch.Tensor]) -> list[tuple[Any, torch.Tensor]]:
    return [(weakref.ref(tensor.untyped_storage()), tensor) for tensor in tensors if tensor.device.type == "cuda"]


class Ledger(TorchDispatchMode):
    """What a GPU would be asked to do.

    Attributes:
        launches: Kernels by name; views are none.
        waits: Where the host waits for the device or hands it memory that it can page out, and how often:
            ``"what at file:line"``.
        faults: What would fail or give garbage.
        captured: Graphs that were captured.
        replayed: Replays of any graph.
        on_default_stream: Launches outside any other stream and any capture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.faults: list[str] = []
        self.captured = self.replayed = 0
        self.on_default_stream = 0
        self.streams = 0
        self._graph: Any = None

    @property
    def n_launches(self) -> int:
        return sum(self.launches.values())

    @property
    def n_waits(self) -> int:
        return sum(self.waits.values())

    def wait(self, what: str) -> None:
        self.waits[f"{what} at {_place()}"] += 1
        if self._graph is not None:
            self.faults.append(f"{what} while a graph is captured, at {_place()}")

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_gpu = any(tensor.device.type == "cuda" for tensor in tensors)
        on_gpu = on_gpu or str(kwargs.get("device", "")).startswith("cuda")
        name = f"{func._schema.name.removeprefix('aten::')}.{func._overloadname}"
        if on_gpu:
            for tensor in tensors:
                tensor.constant = None  # fake tensors remember numbers that a device would have to be asked for
            self._check(name, args, kwargs)
        if name.split(".", maxsplit=1)[0] in {"_local_scalar_dense", "item", "is_nonzero"}:
            if on_gpu:
                self.wait("a number is fetched")
            return _number(name, tensors[0])
        if name.startswith("_fused_adamw_"):
            self._check_adamw(args, kwargs)
            self.launches[name] += 1
            return None
        if torch.is_inference_mode_enabled() and func.namespace == "aten":
            # There a composite operation arrives as one, and its parts are what is launched.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        if on_gpu and not name.startswith(VIEWS):
            self.launches[name] += 1
            self.on_default_stream += not self.streams and self._graph is None
        if self._graph is not None and on_gpu:
            self._graph.note(tensors, [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)])
        return result

    def _check(self, name: str, args: tuple, kwargs: dict) -> None:
        if name.startswith(SIZED_BY_VALUE):
            self.wait(name)
        if name.startswith(("index.", "index_put")):
            for index in args[1]:
                if index is not None and index.device.type == "cpu" and index.dim():
                    self.wait("indices of the host")
                if index is not None and index.dtype == torch.bool:
                    self.wait("a mask as index")
        if name.startswith(("_to_copy", "copy_")):
            self._check_copy(name, args, kwargs)
        if torch.are_deterministic_algorithms_enabled() and name.startswith(NOT_DETERMINISTIC):
            self.faults.append(f"{name} is not deterministic, at {_place()}")

    def _check_copy(self, name: str, args: tuple, kwargs: dict) -> None:
        in_place = name.startswith("copy_")
        source = args[1] if in_place else args[0]
        to = args[0].device if in_place else torch.device(kwargs.get("device") or source.device)
        if to.type == source.device.type:
            return
        quick = kwargs.get("non_blocking", False) or (in_place and len(args) > 2 and args[2])
        if to.type == "cpu":
            self.wait("device to host")
        elif not (quick and source.is_pinned()):
            self.wait("host to device" + (", of memory that is not pinned" if quick else ""))

    def _check_adamw(self, args: tuple, kwargs: dict) -> None:
        parameters, gradients, first, second, _, steps = args[:6]
        for four in zip(parameters, gradients, first, second, strict=True):
            if len({(tensor.dtype, tensor.device, tensor.stride(), tensor.shape) for tensor in four}) != 1:
                self.faults.append(
                    f"fused AdamW of {[(tensor.dtype, tensor.device, tensor.stride()) for tensor in four]}"
                )
        if any(tensor.device != parameters[0].device for tensor in (*steps, kwargs["lr"])):
            self.faults.append("fused AdamW: its steps or its rate lie elsewhere")

    @contextmanager
    def capture(self, graph: Any, **options: Any) -> Iterator[None]:
        """Stands in for ``torch.cuda.graph``."""
        if options.get("capture_error_mode") != "thread_local":
            self.faults.append("a capture that fails where another thread calls CUDA")
        self._graph = graph
        try:
            yield
        finally:
            self._graph = None
        self.captured += 1
        if graph.alive():
            gc.collect()  # a cycle of references is no use
        if graph.alive():
            self.faults.append(f"tensors made in a captured graph are still used outside it: {graph.alive()}")


class Graph:
    """Stands in for ``torch.cuda.CUDAGraph``: knows which memory it reads, and which it made itself."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._made: dict[Any, tuple[int, ...]] = {}
        self._read: dict[Any, str] = {}

    def note(self, read: list[torch.Tensor], result: list[torch.Tensor]) -> None:
        """Note what an operation reads and what it gives, by references that keep no memory."""
        for memory, tensor in _memory_of(read):
            if memory not in self._made and memory not in self._read:
                self._read[memory] = f"{tuple(tensor.shape)} at {_place()}"
        for memory, tensor in _memory_of(result):
            if memory not in self._read:
                self._made[memory] = tuple(tensor.shape)

    def alive(self) -> list[tuple[int, ...]]:
        return [shape for memory, shape in self._made.items() if memory() is not None]

    def pool(self) -> tuple[int, int]:
        return (0, 0)

    def replay(self) -> None:
        self._ledger.replayed += 1
        dead = [what for memory, what in self._read.items() if memory() is None]
        if dead:
            self._ledger.faults.append(f"a replayed graph reads memory that was freed: {dead[:3]}")


def _place() -> str:
    """Where in the project the current operation was asked for."""
    root = str(Path(mmcli.__file__).parent)
    frame = sys._getframe(1)
    while frame is not None:
        inside = frame.f_code.co_filename.removeprefix(root)
        if inside.startswith(("/pipeline/", "/heads/")):
            return f"{inside[1:]}:{frame.f_lineno}"
        frame = frame.f_back
    return "a test"


def _number(name: str, tensor: Any) -> Any:
    if name.startswith("is_nonzero") or tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1


def _stand_in(tensor: Any) -> Any:
    """What ``numpy()`` gives of a fake tensor."""
    if tensor.device.type != "cpu":
        raise TypeError(f"can't convert {tensor.device} device type tensor to numpy")
    if tensor.requires_grad:
        raise RuntimeError("Can't call numpy() on Tensor that requires grad")
    kind = np.dtype(str(tensor.dtype).removeprefix("torch."))  # bfloat16: a TypeError, as torch's
    if tensor.dtype == torch.int64:
        values = np.arange(tensor.numel()).reshape(tensor.shape)
        return values % 4 if tensor.dim() == 1 else values
    return np.ones(tensor.shape, kind)


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
    """One kernel, as on a GPU; which one is chosen by asking a real device."""
    aten = torch.ops.aten
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (q, k, v))
    half = q.dtype in {torch.float16, torch.bfloat16}
    if half and all(tensor.stride(-1) == 1 and tensor.shape[-1] % 8 == 0 for tensor in (q, k, v)):
        return aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return aten._scaled_dot_product_efficient_attention(q, k, v, None, q.requires_grad)[0]


def _move_module(module: Any, *words: Any, **named: Any) -> Any:
    """``Module.to``: torch's own swaps parameters in place, which references held by autograd forbid for fake ones."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = torch.nn.Parameter(value.detach().to(*words, **named), value.requires_grad)
        part._buffers.update(
            {name: value.to(*words, **named) for name, value in part._buffers.items() if value is not None}
        )
    return module


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...


_getitem, _deepcopy = torch.Tensor.__getitem__, torch.Tensor.__deepcopy__


def _pin_memory(tensor: Any, *_: Any) -> Any:
    pinned = tensor.clone()
    pinned._pinned = True
    return pinned


def _is_pinned(tensor: Any, *_: Any) -> bool:
    return getattr(tensor, "_pinned", False)


def _part(tensor: Any, index: Any) -> Any:
    part = _getitem(tensor, index)
    if _is_pinned(tensor):
        part._pinned = True
    return part


def _copy(tensor: Any, memo: dict[int, Any]) -> Any:
    """``copy.deepcopy``: torch's own copies the memory, and fake tensors have none."""
    if not isinstance(tensor, FakeTensor):
        return _deepcopy(tensor, memo)
    clone = tensor.detach().clone()
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    memo[id(tensor)] = torch.nn.Parameter(clone, tensor.requires_grad) if is_parameter else clone
    return memo[id(tensor)]


def _list(ledger: Ledger, tensor: Any) -> Any:
    """``tolist``."""
    if tensor.device.type == "cuda":
        ledger.wait("numbers are fetched")
    values = _stand_in(torch.empty(tensor.shape, dtype=tensor.dtype))
    return (0 * values if tensor.dtype == torch.int64 else values).tolist()  # 0 is a place in any list


def _cuda(ledger: Ledger, *, bfloat16: bool) -> dict[str, Any]:
    """What stands in for functions and classes of ``torch.cuda``."""

    @contextmanager
    def on_stream(_: Any) -> Iterator[None]:
        ledger.streams += 1
        try:
            yield
        finally:
            ledger.streams -= 1

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda including_emulation=True: bfloat16 or including_emulation,
        "get_device_name": lambda *_: "a GPU that is not there",
        "mem_get_info": lambda *_: (130 << 30, 140 << 30),
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "device": lambda _: nullcontext(),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "Stream": _Stream,
        "stream": on_stream,
        "current_stream": lambda *_: _Stream(),
        "CUDAGraph": lambda: Graph(ledger),
        "graph": ledger.capture,
    }


@contextmanager
def fake_cuda(*, bfloat16: bool = True) -> Iterator[Ledger]:
    """Inside, one GPU is there; gives the ledger.

    Args:
        bfloat16: Whether it computes in bfloat16; older ones do in float16 alone.
    """
    ledger = Ledger()
    patches = [(torch.cuda, name, value) for name, value in _cuda(ledger, bfloat16=bfloat16).items()]
    patches += [
        (torch.Tensor, "pin_memory", _pin_memory),
        (torch.Tensor, "is_pinned", _is_pinned),
        (torch.Tensor, "__getitem__", _part),
        (torch.Tensor, "__deepcopy__", _copy),
        (FakeTensor, "numpy", _stand_in),
        (FakeTensor, "tolist", lambda tensor: _list(ledger, tensor)),
        (torch.nn.Module, "to", _move_module),
        (F, "scaled_dot_product_attention", _attention),
        # Kernels of many tensors at once are taken for plain tensors alone.
        (clip_grad, "_has_foreach_support", lambda *_: True),
        (fake_tensor, "init_gpu_context", lambda *_: None),
        (FakeTensorMode, "avoid_device_init", True),
    ]
    with ExitStack() as stack:
        for where, name, value in patches:
            stack.enter_context(patch.object(where, name, value))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(ledger)
        yield ledger


@contextmanager
def steps_of(ledger: Any) -> Iterator[list[dict[str, Any]]]:
    """What each optimiser step was: its sizes, how it ran, launches and waits."""
    steps: list[dict[str, Any]] = []

    def watched(run: Callable[..., None]) -> Callable[..., None]:
        def wrapped(self: Any, sizes: tuple[int, ...]) -> None:
            launches, waits, graphs = ledger.n_launches, ledger.waits.copy(), (ledger.captured, ledger.replayed)
            on_default = ledger.on_default_stream
            run(self, sizes)
            how = "captured" if ledger.captured > graphs[0] else "replayed" if ledger.replayed > graphs[1] else "eager"
            steps.append(
                {
                    "sizes": sizes,
                    "how": how,
                    "launches": ledger.n_launches - launches,
                    "on_default_stream": ledger.on_default_stream - on_default,
                    "waits": dict(ledger.waits - waits),
                }
            )

        return wrapped

    with patch.object(Step, "run", watched(Step.run)):
        yield steps


def deterministic(run: Callable[[], Any]) -> Any:
    """As with ``--deterministic``."""
    torch.use_deterministic_algorithms(True)
    try:
        return run()
    finally:
        torch.use_deterministic_algorithms(False)
