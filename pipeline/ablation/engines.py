"""Who does the units of an ablation: this process, several of this machine, or the actors of a Ray cluster."""

import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from ...errors import InputError
from ..core.config import Config
from ..core.cores import count_cores
from ..core.processes import end_children, end_with_parent
from ..core.progress import Progress
from ..extraction.ray_cluster import cluster, share_out
from .records import Record
from .worker import Unit, Worker, Workplace

# Every record as soon as it is kept; and a unit with None when it is done.
Results = Generator[tuple[Unit, Record | None], None, None]
# A worker that was killed most likely took too much memory: once is bad luck, twice is the unit.
ATTEMPTS = 2
RESTARTS = 3
# Processes of a pool find these before they load anything that has threads.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

_worker: Worker | None = None


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What has to be done, by whatever engine.

    Attributes:
        place: Where everything is; for a cluster, by paths that are the same on every machine.
        units: The units in the order in which they are begun.
        stop: Asked before a unit is begun; after the first yes none is.
    """

    place: Workplace
    units: Sequence[Unit]
    stop: Callable[[], bool] = lambda: False


def in_this_process(assignment: Assignment, *, progress: Progress | None = None) -> Results:
    """Do units one after another; ``progress`` shows the epochs of each training."""
    worker = Worker(assignment.place, progress=progress)
    for unit in assignment.units:
        if assignment.stop():
            return
        for record in worker.do(unit):
            yield unit, record
        yield unit, None


def in_processes(assignment: Assignment, *, workers: int, devices: Sequence[str] = ()) -> Results:
    """Do units in several processes; a unit whose process is killed is tried once more, then fails.

    Args:
        assignment: What has to be done.
        workers: How many processes.
        devices: Taken by the processes in turn; by default each takes that of the configuration.
    """
    environment = {name: os.environ.get(name) for name in _THREADS}
    pool = _Pool(assignment.place, workers, devices)
    try:
        yield from _drive(assignment, pool, BrokenProcessPool)
    finally:
        pool.close()
        for name, value in environment.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _drive(assignment: Assignment, workers: "_Pool | _Actors", died: type[BaseException]) -> Results:
    """Keep workers busy; a unit is tried once more where its future raises that its worker died, then fails."""
    waiting, attempts, running = deque(assignment.units), Counter[int](), dict[Future[list[Record]], Unit]()
    while True:
        while waiting and len(running) < workers.size and not assignment.stop():
            unit = waiting.popleft()
            running[workers.submit(unit)] = unit
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            unit = running.pop(future)
            try:
                records = future.result()
            except died:
                attempts[id(unit)] += 1
                if attempts[id(unit)] < ATTEMPTS:
                    waiting.appendleft(unit)
                    continue
                records = fail_killed(assignment.place, unit)
            for record in records:
                yield unit, record
            yield unit, None


class _Pool:
    """Processes of this machine; when one is killed, and with it all, a single new one has all of the memory."""

    def __init__(self, place: Workplace, size: int, devices: Sequence[str]) -> None:
        self._place, self.size, self._devices = place, size, devices
        self._siblings = multiprocessing.active_children()
        self._open()

    def submit(self, unit: Unit) -> "Future[list[Record]]":
        """Give a unit to the pool; to a new one where the pool broke."""
        try:
            return self._executor.submit(_do, unit)
        except BrokenProcessPool:
            self.close()
            self.size = 1
            self._open()
            return self._executor.submit(_do, unit)

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        end_children(self._siblings)
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _open(self) -> None:
        threads, context = max(1, count_cores() // self.size), multiprocessing.get_context("spawn")
        os.environ.update(dict.fromkeys(_THREADS, str(threads)))
        arguments = (self._place, threads, self._devices, context.Value("i", 0))
        self._executor = ProcessPoolExecutor(self.size, mp_context=context, initializer=_begin, initargs=arguments)


def _begin(place: Workplace, threads: int, devices: Sequence[str], turn: Any) -> None:  # noqa: ANN401
    """What each process does first."""
    global _worker  # noqa: PLW0603 - a process of a pool has no other place to keep what it read
    end_with_parent()
    import torch

    torch.set_num_threads(threads)
    with turn.get_lock():
        number, turn.value = turn.value, turn.value + 1
    _worker = Worker(place, device=devices[number % len(devices)] if devices else None)


def _do(unit: Unit) -> list[Record]:
    assert _worker is not None
    return list(_worker.do(unit))


def fail_killed(place: Workplace, unit: Unit) -> list[Record]:
    """Keep a unit as failed because its process was killed, most likely for the memory that it took."""
    error = InputError(
        "a worker was killed",
        got="most likely too little memory",
        wanted="room for the store in each",
        do="give fewer --workers; what was finished is kept",
    )
    return [place.fail(evaluation, error) for evaluation in unit.evaluations]


class UnitActor:
    """A worker in a process of Ray.

    Args:
        place: Where everything is.
        threads: How many threads torch uses.
        device: ``cuda``, which is the GPU that Ray gave the actor, or ``cpu``.
    """

    def __init__(self, place: Workplace, threads: int, device: str) -> None:
        import torch

        torch.set_num_threads(threads)
        self._worker = Worker(place, device=device)

    def do(self, unit: Unit) -> list[Record]:
        """Every record of a unit; they are kept already."""
        return list(self._worker.do(unit))


class _Actors:
    """Actors of a Ray cluster, which Ray starts again when they die."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors, self.size = actors, len(actors)
        self._busy: dict[Any, Future[list[Record]]] = {}

    def submit(self, unit: Unit) -> "Future[list[Record]]":
        """Give a unit to a free actor."""
        actor = next(actor for actor in self._actors if actor not in self._busy or self._busy[actor].done())
        self._busy[actor] = actor.do.remote(unit).future()
        return self._busy[actor]


def on_ray(assignment: Assignment, config: Config, *, workers: int, address: str | None) -> Results:
    """Do units in actors; one whose actor dies is tried once more, then fails.

    Args:
        assignment: What has to be done.
        config: Its device: ``auto`` takes the GPUs where the cluster has any.
        workers: How many actors; with 1, one a GPU, and one a machine on a cluster without.
        address: Address of the cluster; see :func:`~mmcli.pipeline.extraction.ray_cluster.cluster`.

    Raises:
        InputError: There is no Ray, no such cluster or no such device in it.
    """
    with cluster(address) as ray:
        shares = share_out(ray, config, workers if workers > 1 else None)
        remote = ray.remote(UnitActor).options(**shares.actor, max_restarts=RESTARTS)
        n = min(shares.actors, len(assignment.units))
        actors = _Actors([remote.remote(assignment.place, shares.threads, shares.device) for _ in range(n)])
        yield from _drive(assignment, actors, ray.exceptions.RayActorError)
