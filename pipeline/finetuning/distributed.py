"""Several processes that finetune together: how they are started, which one this is, and sums over all of them.

``mmcli finetune --num-processes`` starts them on this machine; ``torchrun`` and ``accelerate launch`` do so on several.
They meet as a process group of ``torch.distributed``: over NCCL between GPUs, over gloo between CPUs.
"""

import logging
import os
import re
import runpy
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ...errors import InputError
from ..core.cores import PROCESSES, count_cores
from ..core.device import pick_device
from ..core.interrupts import INTERRUPTED, Interrupted
from ..extraction.towers import TextTower
from .towers import Towers

# The exit code of a process whose others have gone: they have said why.
LOST = 75
# How long the others may take to end by themselves when one has failed: the same error may be on its way in all.
GRACE_S = 5.0


def launch(n: int) -> int:
    """Run this command line in n processes of this machine and wait for all of them.

    The first one has the terminal; of the others only the error of one that fails by itself is shown.

    Args:
        n: Number of processes.

    Returns:
        The exit code: that of the first process with an error of its own, 0 where there is none.
    """
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it warns of every process that it ends
    # Set before they start: OpenMP reads its variable when a process imports torch.
    os.environ |= {
        PROCESSES: str(n),
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": threads_of(n),
    }
    with tempfile.TemporaryDirectory() as logs:
        context: Any = mp.spawn(_run_rank, (logs,), nprocs=n, join=False)  # type: ignore[attr-defined, no-untyped-call]
        try:
            while not context.join(grace_period=GRACE_S):
                pass
        except mp.ProcessExitedException:  # type: ignore[attr-defined]
            return _report([process.exitcode for process in context.processes], Path(logs))
        except KeyboardInterrupt:
            for process in context.processes:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGINT)
            for process in context.processes:
                process.join(GRACE_S)
                process.kill()
            raise Interrupted(silent=context.processes[0].exitcode == INTERRUPTED) from None
    return 0


def threads_of(n: int) -> str:
    """Threads of each of n processes: as the user says, but not as many in each as one alone would take."""
    given = os.environ.get("OMP_NUM_THREADS")
    return str(max(1, count_cores() // n)) if given in {None, "", str(count_cores())} else str(given)


def _run_rank(rank: int, logs: str) -> None:
    """One of the processes: the command line, as the process ``rank``."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    signal.signal(signal.SIGTERM, _end_quietly)
    if rank:
        _redirect(1, os.devnull)
        _redirect(2, Path(logs) / str(rank))
    try:
        runpy.run_module(__package__.partition(".")[0], run_name="__main__", alter_sys=True)
    except Exception:  # noqa: BLE001 - a defect: its traceback is the error of this process
        traceback.print_exc()
        sys.exit(1)


def _redirect(descriptor: int, path: Path | str) -> None:
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)


def _end_quietly(*_: object) -> None:
    """What a process does that is ended because another one has failed, which says why."""
    _redirect(2, os.devnull)
    raise KeyboardInterrupt


def _report(codes: Sequence[int | None], logs: Path) -> int:
    """Show the error of the process that failed by itself; its exit code."""
    failed = [rank for rank, code in enumerate(codes) if code not in {0, LOST, INTERRUPTED, -signal.SIGTERM}]
    # One that hung in a sum with the one that failed had to be killed: an error of its own comes first.
    rank = min(failed, key=lambda rank: (codes[rank] or -1) < 0, default=0)
    code = codes[rank] or -1
    if code < 0:
        name = signal.Signals(-code).name
        sys.stderr.write(f"mmcli: process {rank} of {len(codes)} was ended by {name}; what was kept stays\n")
        return 1
    if rank:  # the first has shown its error
        sys.stderr.write((logs / str(rank)).read_text(encoding="utf-8", errors="replace"))
    return code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Which of the launched processes this is.

    Attributes:
        rank: Its number among all of them.
        size: How many there are.
        local_rank: Its number among those of this machine.
        local_size: How many of them are on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


# By name the least that a number of a launcher may be.
_NUMBERS = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 1}
_LARGEST_PORT = 65_535


def read_launch() -> Launch:
    """What a launcher (``torchrun``, ``accelerate launch``, ``mmcli finetune --num-processes``) says of this process.

    A variable that is empty counts as unset, and leaves the environment, where torch would read it as a number.
    Variables of SLURM and MPI are not read.

    Raises:
        InputError: A variable that is no such number, or some of them without the others.
    """
    for name in (*_NUMBERS, "MASTER_ADDR"):
        if not os.environ.get(name, "unset").strip():
            del os.environ[name]
    numbers = {name: _read_number(name, least) for name, least in _NUMBERS.items()}
    size, rank = numbers["WORLD_SIZE"] or 1, numbers["RANK"] or 0
    local_rank = numbers["LOCAL_RANK"] or 0
    local_size = numbers["LOCAL_WORLD_SIZE"]
    if rank >= size:
        without = "" if numbers["WORLD_SIZE"] else " without WORLD_SIZE"
        raise _bad_variable("RANK", f"{rank}{without}", f"less than WORLD_SIZE, here {size}")
    if size == 1:
        return Launch()
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise _bad_variable("WORLD_SIZE", f"{size} without {name}", "all that a launcher sets")
    if local_size is not None and local_rank >= local_size:
        raise _bad_variable("LOCAL_RANK", local_rank, f"less than LOCAL_WORLD_SIZE, here {local_size}")
    return Launch(rank=rank, size=size, local_rank=local_rank, local_size=local_size or 1)


def _read_number(name: str, least: int) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    # More digits than any of these numbers has: Python refuses to read thousands of them.
    number = int(text) if re.fullmatch(r"\s*[+-]?[0-9]{1,9}\s*", text) else None
    is_port = name == "MASTER_PORT"
    if number is None or number < least or (is_port and number > _LARGEST_PORT):
        most = f" to {_LARGEST_PORT}" if is_port else ""
        raise _bad_variable(name, repr(text), f"a whole number from {least} on{most}")
    return number


def _bad_variable(name: str, got: object, wanted: str) -> InputError:
    return InputError(
        "a launcher's variable that cannot be used",
        where=name,
        got=got,
        wanted=wanted,
        do="unset it to finetune in one process; --num-processes N starts several",
    )


def device_here(name: str) -> str:
    """A configured device where this machine has it, else ``auto``; of several processes each takes its own."""
    name = name.partition(":")[0] if read_launch().size > 1 else name
    try:
        pick_device(name)
    except InputError:
        return "auto"
    return name


def is_first() -> bool:
    """Whether this process is the one of its launcher that writes and reports."""
    return read_launch().rank == 0


class ProcessGroup:
    """The processes of a finetuning, as one of them sees them; all go through the methods together.

    Args:
        device: Where this process computes.
        launch: Which of the processes it is; the only one when not given.

    Attributes:
        device: As given.
        rank: Which process this is.
        size: How many there are.
    """

    def __init__(self, device: torch.device, launch: Launch | None = None) -> None:
        launch = launch or Launch()
        self.device, self.rank, self.size = device, launch.rank, launch.size

    @property
    def is_first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """Which of n things this process takes."""
        return slice(self.rank, n, self.size)

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all processes, in place."""
        if self.size > 1:
            # Waiting for each before the next is sent would cost the network's latency as often as there are tensors.
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def maximum(self, n: int) -> int:
        """The largest of all processes' numbers."""
        if self.size == 1:
            return n
        largest = torch.tensor(n, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Give all processes the first one's tensors, in place."""
        if self.size > 1:
            for work in [dist.broadcast(tensor.detach(), 0, async_op=True) for tensor in tensors]:
                work.wait()

    def broadcast_text(self, text: str) -> str:
        """The first process's text, in all of them."""
        texts = [text]
        if self.size > 1:
            dist.broadcast_object_list(texts, 0, device=self.device)
        return texts[0]

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()


# What gloo, NCCL and the store where processes meet say of one that has gone.
_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "ncclRemoteError",
    "NCCL communicator was aborted",
)


@contextmanager
def open_group(device: str) -> Iterator[ProcessGroup]:
    """The processes of this run, as their launcher says in the environment.

    Args:
        device: As configured; with several processes ``auto``, ``cpu`` or ``cuda``, of which each takes its own.

    Raises:
        InputError: A device that several processes cannot share, or fewer GPUs than processes.
        SystemExit: Another process has gone; it has said why.
    """
    launch = read_launch()
    if launch.size == 1:
        yield ProcessGroup(pick_device(device))
        return
    own_device = _pick_own_device(device, launch)
    on_gpu = own_device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(own_device)
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=own_device if on_gpu else None)
        yield ProcessGroup(own_device, launch)
    except RuntimeError as error:
        if any(sign in str(error) for sign in _GONE):
            sys.exit(LOST)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _pick_own_device(device: str, launch: Launch) -> torch.device:
    if ":" in device:
        raise InputError(
            "one device for several processes",
            where="--device",
            got=device,
            wanted="auto, cpu or cuda",
            do="leave it out: every process takes its own",
        )
    picked, n_gpus = pick_device(device), torch.cuda.device_count()
    if picked.type != "cuda":
        return torch.device("cpu")
    if launch.local_size > n_gpus:
        raise InputError(
            "more processes than GPUs on this machine",
            where="--num-processes",
            got=f"{launch.local_size} processes, {n_gpus} GPUs",
            wanted="a GPU for each",
            do=f"give --num-processes {max(1, n_gpus)}, or --device cpu",
        )
    return torch.device("cuda", launch.local_rank)


class Shards:
    """What this process has of the trained parameters; all of each where nothing is sharded.

    Blocks and token embeddings are sharded by ``fully_shard`` (FSDP 2); what is not in them, every process has whole.

    Args:
        towers: What is trained; its blocks are sharded here.
        group: The processes.
        sharded: Whether blocks are sharded.

    Attributes:
        local: By name, what the optimiser of this process steps on.
        sharded: As given.
    """

    def __init__(self, towers: Towers, group: ProcessGroup, *, sharded: bool = False) -> None:
        self._towers, self._group, self.sharded = towers, group, sharded
        self._units: list[Any] = _shard(towers, group) if sharded else []
        self.local: dict[str, Tensor] = {
            name: parameter.to_local().detach() if isinstance(parameter, DTensor) else parameter
            for name, parameter in towers.trained.items()
        }

    def is_part(self, name: str) -> bool:
        """Whether this process has a part of a parameter only."""
        return isinstance(self._towers.trained[name], DTensor)

    def take_gradients(self) -> None:
        """Give what the optimiser steps on its gradients."""
        for name, parameter in self._towers.trained.items():
            if isinstance(parameter, DTensor):
                grad: Any = parameter.grad
                self.local[name].grad = None if grad is None else grad.to_local()
                parameter.grad = None

    def whole(self, name: str, part: Tensor) -> Tensor:
        """All of what is shaped like a parameter, from everybody's part of it; all processes ask together."""
        like = self._towers.trained[name]
        if not isinstance(like, DTensor) or part.dim() == 0:
            return part
        return DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        ).full_tensor()

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of what is shaped like a parameter."""
        like = self._towers.trained[name]
        if not isinstance(like, DTensor) or whole.dim() == 0:
            return whole
        return distribute_tensor(whole.to(self._group.device), like.device_mesh, like.placements).to_local()

    def wholes(self) -> dict[str, Tensor]:
        """All trained parameters on the CPU, whole; all processes ask together."""
        return {name: self.whole(name, value.detach()).cpu().contiguous() for name, value in self.local.items()}

    @torch.no_grad()
    def restore(self, whole: Mapping[str, Tensor]) -> None:
        """Put whole values back into the parameters."""
        for name, value in self.local.items():
            value.copy_(self.part(name, whole[name]))

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Every block is whole in every process inside, as an encoder needs it; all processes enter together."""
        for unit in self._units:
            unit.unshard()
        yield
        for unit in self._units:
            unit.reshard()


def wants_shards() -> bool:
    """Whether ``accelerate launch`` was started with ``--use_fsdp``."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in {"1", "true"}


def _shard(towers: Towers, group: ProcessGroup) -> list[Any]:
    """Shard every trained block, and the embeddings of tokens: half of a base checkpoint's parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(group.device.type, (group.size,))
    units: list[Any] = []
    for side in towers.sides.values():
        units += list(side.blocks)
        units += [side.embeddings.token_embedding] if isinstance(side, TextTower) and side.trains_embeddings else []
    for unit in units:
        # Each block is a root of its own, and a root stays whole after its forward pass unless it is told otherwise.
        sharded: Any = fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        # Gradients are sums over the processes, as those that every process has whole; gloo knows no other sum.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    towers.find_trained()
    return units
