"""The processes that finetune together, as one sees them: which one it is, and sums over all.

One process needs nothing. Several are started by ``accelerate launch`` or by ``mmcli finetune --num-processes``, and
Accelerate (extra ``finetune``) finds out how they reach each other: NCCL between GPUs, gloo between CPUs.
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import InputError
from ..core.device import pick_device
from .fleet import LOST

# Gradients are summed in pieces of so many numbers: a call each would wait on the network again and again.
BUCKET = 1 << 24


def wants_shards() -> bool:
    """Whether ``accelerate launch`` was told to shard (``--use_fsdp``)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in {"1", "true"}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Which of the launched processes this is.

    Attributes:
        rank: Its number among all of them.
        size: How many there are.
        local_size: How many of them are on this machine.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1


def read_launch() -> Launch:
    """What a launcher (``accelerate launch``, ``torchrun``, ``mmcli finetune --num-processes``) says of this process.

    A variable that is empty counts as unset, and so it is for Accelerate: it leaves the environment. Variables of SLURM
    and MPI are not read.

    Raises:
        InputError: A variable that is no such number, or some of them without the others.
    """
    for name in (*_NUMBERS, "MASTER_ADDR"):
        if not os.environ.get(name, "unset").strip():
            del os.environ[name]
    numbers = {name: _number(name, least) for name, least in _NUMBERS.items()}
    size, rank = numbers["WORLD_SIZE"] or 1, numbers["RANK"] or 0
    local_size = numbers["LOCAL_WORLD_SIZE"]
    if rank >= size:
        without = "" if numbers["WORLD_SIZE"] else " without WORLD_SIZE"
        raise _bad_launch("RANK", f"{rank}{without}", f"less than WORLD_SIZE, here {size}")
    if size == 1:
        return Launch()
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise _bad_launch("WORLD_SIZE", f"{size} without {name}", "all that a launcher sets")
    if local_size is not None and (numbers["LOCAL_RANK"] or 0) >= local_size:
        raise _bad_launch("LOCAL_RANK", numbers["LOCAL_RANK"], f"less than LOCAL_WORLD_SIZE, here {local_size}")
    return Launch(rank=rank, size=size, local_size=local_size or 1)


# By name the least that a number of a launcher may be.
_NUMBERS = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 1}
_LARGEST_PORT = 65_535


def _number(name: str, least: int) -> int | None:
    given = os.environ.get(name)
    if given is None:
        return None
    most = _LARGEST_PORT if name == "MASTER_PORT" else None
    # More digits than any of these numbers has: Python refuses to read thousands of them.
    number = int(given) if re.fullmatch(r"\s*[+-]?[0-9]{1,9}\s*", given) else None
    if number is None or number < least or (most is not None and number > most):
        raise _bad_launch(name, repr(given), f"a whole number from {least} on" + (f" to {most}" if most else ""))
    return number


def _bad_launch(name: str, got: object, wanted: str) -> InputError:
    return InputError(
        "a launcher's variable that cannot be used", where=name, got=got, wanted=wanted,
        do="unset it to finetune in one process; --num-processes N starts several",
    )  # fmt: skip


def device_here(name: str) -> str:
    """A configured device where this machine has it, else ``auto``; of several processes each takes its own."""
    name = name.partition(":")[0] if read_launch().size > 1 else name
    try:
        pick_device(name)
    except InputError:
        return "auto"
    return name


def is_first() -> bool:
    """Whether this process is the one of its launcher that writes and tells."""
    return read_launch().rank == 0


class Team:
    """One process by itself; the interface of several.

    Attributes:
        rank: Which process this is.
        size: How many there are.
        device: Where this one computes.
    """

    rank, size = 0, 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def first(self) -> bool:
        """Whether this process writes and tells."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """Which of n things are this process's."""
        return slice(self.rank, n, self.size)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all processes, in place."""

    def most(self, n: int) -> int:
        """The largest of all processes' numbers."""
        return n

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Give all processes the first one's tensors, in place."""

    def wait(self) -> None:
        """Until all processes are here."""

    def tell(self, text: str) -> str:
        """The first process's text, in all of them."""
        return text


# What gloo and NCCL say of it.
_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "ncclRemoteError",
    "NCCL communicator was aborted",
)


@contextmanager
def _together() -> Iterator[None]:
    """Leave without a word where another process has left."""
    try:
        yield
    except RuntimeError as error:
        if any(sign in str(error) for sign in _GONE):
            sys.exit(LOST)
        raise


class _Several(Team):
    def __init__(self, state: Any) -> None:  # noqa: ANN401
        super().__init__(state.device)
        self._state = state
        self.rank, self.size = state.process_index, state.num_processes

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with _together():
                torch.distributed.all_reduce(flat)
            for tensor, part in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def most(self, n: int) -> int:
        largest = torch.tensor(n, device=self.device)
        with _together():
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return int(largest)

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            sent = tensor.detach().contiguous()
            with _together():
                torch.distributed.broadcast(sent, 0)
            tensor.detach().copy_(sent)

    def wait(self) -> None:
        with _together():
            self._state.wait_for_everyone()

    def tell(self, text: str) -> str:
        coded = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        length = torch.tensor(len(coded), device=self.device)
        self.broadcast_([length])
        coded = coded if self.first else torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        self.broadcast_([coded])
        return bytes(coded.tolist()).decode()


@contextmanager
def open_team(device: str) -> Iterator[Team]:
    """The processes of this run, as their launcher says in the environment.

    Args:
        device: As configured; with several processes ``auto``, ``cpu`` or ``cuda``, of which each takes its own.

    Raises:
        InputError: Several processes without Accelerate, a device that several cannot share, or fewer GPUs than
            processes.
    """
    launch = read_launch()
    if launch.size == 1:
        yield Team(pick_device(device))
        return
    if ":" in device:
        raise InputError(
            "one device for several processes", where="--device", got=device, wanted="auto, cpu or cuda",
            do="leave it out: every process takes its own",
        )  # fmt: skip
    on_cpu = pick_device(device).type == "cpu"
    here, n_gpus = launch.local_size, torch.cuda.device_count()
    if not on_cpu and here > n_gpus:
        raise InputError(
            "more processes than GPUs on this machine", where="--num-processes", got=f"{here} processes, {n_gpus} GPUs",
            wanted="a GPU for each", do=f"give --num-processes {max(1, n_gpus)}, or --device cpu",
        )  # fmt: skip
    try:
        from accelerate import PartialState
    except ImportError:
        raise InputError(
            "Accelerate is not installed", where="several processes", wanted="the extra finetune",
            do="pip install -c constraints.txt -e '.[finetune]'",
        ) from None  # fmt: skip
    state = PartialState(cpu=on_cpu)
    try:
        yield _Several(state)
    finally:
        state.destroy_process_group()


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = [[]]
    held = 0
    for tensor in tensors:
        if buckets[-1] and (held + tensor.numel() > BUCKET or tensor.dtype != buckets[-1][-1].dtype):
            buckets.append([])
            held = 0
        buckets[-1].append(tensor)
        held += tensor.numel()
    return [bucket for bucket in buckets if bucket]
