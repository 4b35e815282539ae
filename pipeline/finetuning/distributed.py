"""The processes that finetune together, as one sees them: which one it is, and sums over all.

One process needs nothing. Several are started by ``accelerate launch`` or by ``mmcli finetune --num-processes``, and
Accelerate (extra ``finetune``) finds out how they reach each other: NCCL between GPUs, gloo between CPUs.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ..core.cores import PROCESSES, count_cores
from ..core.device import pick_device
from ..core.interrupts import INTERRUPTED, Interrupted
from ..extraction.towers import TextTower
from .towers import Towers

# The exit code of a process whose others have gone: they have said why.
LOST = 75
OPTION = "--num-processes"
LOOK_EVERY_S = 0.1
# How long the others may take to end by themselves when one has ended.
GRACE_S = 30.0
# How long the first one may take to meet the error that another has met.
SAME_S = 3.0


def launch(n: int, words: Sequence[str] | None = None) -> int:
    """Run this command in n processes and wait for all of them.

    Args:
        n: Processes.
        words: The command's words; those of this process when not given.

    Returns:
        The exit code: that of the first process to fail, 0 where none did.
    """
    words = _without_option(sys.argv[1:] if words is None else words)
    common = {
        PROCESSES: str(n),
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": threads_of(n),
    }
    with tempfile.TemporaryDirectory() as scratch:
        team = [_Process(rank, words, common, Path(scratch) / str(rank)) for rank in range(n)]
        try:
            return _wait(team)
        except KeyboardInterrupt:
            _end(team, signal.SIGINT)
            team[0].hear_out()
            raise Interrupted(silent=team[0].process.returncode == INTERRUPTED) from None


def threads_of(n: int) -> str:
    """Threads of each of n processes: as the user says, but not as many in each as one alone would take."""
    given = os.environ.get("OMP_NUM_THREADS")
    return str(max(1, count_cores() // n)) if given in {None, "", str(count_cores())} else str(given)


class _Process:
    """One of them. What the first says is passed on, what another says only if it is the one that fails."""

    def __init__(self, rank: int, words: Sequence[str], common: Mapping[str, str], told: Path) -> None:
        self._told, self.passes_on = told, rank == 0
        with told.open("wb") as stream:
            self.process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", __package__.partition(".")[0], *words],
                env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=None if rank == 0 else subprocess.DEVNULL,
                stderr=subprocess.PIPE if rank == 0 else stream,
            )
        self._thread = threading.Thread(target=self._pass_on, daemon=True)
        self._thread.start()

    def hear_out(self) -> None:
        """Wait until all that this process said is passed on."""
        self._thread.join(GRACE_S)

    def complain(self) -> None:
        """Say what this process said, if nobody heard it."""
        self._thread.join(GRACE_S)
        sys.stderr.write(self._told.read_text(encoding="utf-8", errors="replace"))

    def _pass_on(self) -> None:
        for line in self.process.stderr or ():
            if self.passes_on:
                sys.stderr.write(line.decode(errors="replace"))
                sys.stderr.flush()


def _wait(team: Sequence[_Process]) -> int:
    while True:
        codes = [one.process.poll() for one in team]
        if None not in codes and not any(codes):
            return 0
        if any(codes):
            # Who waits for one that has gone would wait for ever; but the same error may be on its way in all of them.
            deadline = time.monotonic() + SAME_S
            while None in codes and time.monotonic() < deadline:
                time.sleep(LOOK_EVERY_S)
                codes = [one.process.poll() for one in team]
            ended = [one for one in team if one.process.poll()]
            failed = next((one for one in ended if one.process.returncode != LOST), ended[0])
            team[0].passes_on = failed is team[0]
            _end(team, signal.SIGTERM)
            failed.complain()
            return code if (code := failed.process.returncode) > 0 else 1
        time.sleep(LOOK_EVERY_S)


def _end(team: Sequence[_Process], sign: int) -> None:
    processes = [one.process for one in team]
    for process in processes:
        if process.poll() is None:
            process.send_signal(sign)
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _without_option(words: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word == OPTION:
            skip = True
        elif not word.startswith(f"{OPTION}="):
            kept.append(word)
    return kept


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
            "one device for several processes",
            where="--device",
            got=device,
            wanted="auto, cpu or cuda",
            do="leave it out: every process takes its own",
        )
    on_cpu = pick_device(device).type == "cpu"
    here, n_gpus = launch.local_size, torch.cuda.device_count()
    if not on_cpu and here > n_gpus:
        raise InputError(
            "more processes than GPUs on this machine",
            where="--num-processes",
            got=f"{here} processes, {n_gpus} GPUs",
            wanted="a GPU for each",
            do=f"give --num-processes {max(1, n_gpus)}, or --device cpu",
        )
    try:
        from accelerate import PartialState
    except ImportError:
        raise InputError(
            "Accelerate is not installed",
            where="several processes",
            wanted="the extra finetune",
            do="pip install -c constraints.txt -e '.[finetune]'",
        ) from None
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


class Shards:
    """What of trained parameters a process has; all of each where nothing is sharded.

    Args:
        towers: What is trained; its blocks are sharded here.
        team: The processes.
        sharded: Whether blocks are.

    Attributes:
        local: By name, what the optimiser of this process steps on.
    """

    def __init__(self, towers: Towers, team: Team, *, sharded: bool) -> None:
        self._towers, self._team = towers, team
        self._units: list[Any] = _shard(towers, team) if sharded else []
        self.local: dict[str, Tensor] = {
            name: parameter.detach().to_local() if self.is_part(name) else parameter  # type: ignore[attr-defined]
            for name, parameter in towers.trained.items()
        }

    @property
    def sharded(self) -> bool:
        """Whether anything is."""
        return bool(self._units)

    def is_part(self, name: str) -> bool:
        """Whether this process has a part of a parameter only."""
        return hasattr(self._towers.trained[name], "to_local")

    def take_gradients(self) -> None:
        """Give what the optimiser steps on its gradients."""
        for name, parameter in self._towers.trained.items():
            if self.is_part(name):
                grad: Any = parameter.grad
                self.local[name].grad = None if grad is None else grad.to_local()
                parameter.grad = None

    def whole(self, name: str, part: Tensor) -> Tensor:
        """All of what is shaped like a parameter, from everybody's part of it; all processes ask together."""
        like: Any = self._towers.trained[name]
        if not self.is_part(name) or part.dim() == 0:
            return part
        from torch.distributed.tensor import DTensor

        made = DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        return made.full_tensor()

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of it."""
        like: Any = self._towers.trained[name]
        if not self.is_part(name) or whole.dim() == 0:
            return whole
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole.to(self._team.device), like.device_mesh, like.placements).to_local()

    def wholes(self) -> dict[str, Tensor]:
        """All trained parameters on the CPU, whole; all processes ask together."""
        return {name: self.whole(name, value.detach()).cpu().contiguous() for name, value in self.local.items()}

    @torch.no_grad()
    def restore(self, found: Mapping[str, Tensor]) -> None:
        """Put whole values back."""
        for name, value in self.local.items():
            value.copy_(self.part(name, found[name]))

    def gather(self) -> None:
        """Have every block whole, until :meth:`scatter`."""
        for unit in self._units:
            unit.unshard()

    def scatter(self) -> None:
        """Keep a part of every block again."""
        for unit in self._units:
            unit.reshard()


def _shard(towers: Towers, team: Team) -> list[Any]:
    """Shard every trained block, and the embeddings of tokens: half of a base checkpoint's parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(team.device.type, (team.size,))
    units: list[Any] = []
    for side in towers.sides.values():
        units += list(side.blocks)
        units += [side.embeddings.token_embedding] if isinstance(side, TextTower) and side.trains_embeddings else []
    for unit in units:
        # Each block is a root of its own, and a root stays whole after its forward pass unless it is told otherwise.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    towers.find_trained()
    return units
