"""Who does the units of an ablation: this process, several of this machine, or the actors of a Ray cluster."""

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ...errors import InputError
from ..core.config import Config
from ..core.cores import count_cores
from ..core.progress import Progress
from ..extraction.ray_cluster import cluster, share_out
from ..extraction.reader import end_children, end_with_parent
from .records import Record
from .worker import Unit, Worker, Workplace

Stop = Callable[[], bool]
# Every record as soon as it is kept; and a unit with None when it is done.
Results = Generator[tuple[Unit, Record | None], None, None]
# A worker that was killed most likely took too much memory: once is bad luck, twice is the unit.
ATTEMPTS = 2
RESTARTS = 3
# Processes of a pool find these before they load anything that has threads.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

_worker: Worker | None = None


def in_this_process(
    place: Workplace, units: Sequence[Unit], stop: Stop, *, progress: Progress | None = None
) -> Results:
    """Do units one after another.

    Args:
        place: Where everything is.
        units: In the order in which they are done.
        stop: Asked before a unit is begun; after the first yes none is.
        progress: Shows the epochs of a training.

    Yields:
        Every record as soon as it is kept; and a unit with None when it is done.
    """
    worker = Worker(place, progress=progress)
    for unit in units:
        if stop():
            return
        for record in worker.do(unit):
            yield unit, record
        yield unit, None


def in_processes(
    place: Workplace, units: Sequence[Unit], stop: Stop, *, workers: int, devices: Sequence[str] = ()
) -> Results:
    """Do units in several processes; a unit whose process is killed is tried once more, then fails.

    Args:
        place: Where everything is.
        units: In the order in which they are begun.
        stop: Asked before a unit is begun; after the first yes none is.
        workers: How many processes.
        devices: Taken by the processes in turn; by default each takes that of the configuration.

    Yields:
        The records of a unit when it is done, and then the unit with None.
    """
    waiting, attempts = list(units), Counter[int]()
    while waiting and not stop():
        broken = False
        for unit, records in _pooled(place, waiting, stop, workers, devices):
            if records is None:
                broken = True
                attempts[id(unit)] += 1
                if attempts[id(unit)] < ATTEMPTS:
                    continue
            waiting = [other for other in waiting if other is not unit]
            for record in fail_killed(place, unit) if records is None else records:
                yield unit, record
            yield unit, None
        if not broken:
            return
        workers = 1 if attempts else workers  # alone, a unit has all of the memory


def _pooled(
    place: Workplace, units: Sequence[Unit], stop: Stop, workers: int, devices: Sequence[str]
) -> Iterator[tuple[Unit, list[Record] | None]]:
    """The records of each unit, as they end; None where the processes died under it."""
    threads = max(1, count_cores() // workers)
    context = multiprocessing.get_context("spawn")
    waiting, running = list(units), dict[Future[list[Record]], Unit]()
    environment = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, str(threads)))
    siblings = multiprocessing.active_children()
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin, initargs=(place, threads, devices, context.Value("i", 0))
    )
    try:
        while True:
            while waiting and len(running) < workers and not stop():
                running[pool.submit(_do, waiting[0])] = waiting[0]  # a pool that broke says so here
                waiting.pop(0)
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                unit = running.pop(future)
                died = isinstance(future.exception(), BrokenProcessPool)
                yield unit, None if died else future.result()
    except BrokenProcessPool:
        for unit in [*running.values()] or waiting[:1]:
            yield unit, None
    finally:
        end_children(siblings)
        pool.shutdown(wait=True, cancel_futures=True)
        for name, value in environment.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


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


def on_ray(
    place: Workplace, units: Sequence[Unit], stop: Stop, config: Config, *, workers: int, address: str | None
) -> Results:
    """Do units in actors; one whose actor dies is tried once more, then fails.

    Args:
        place: Where everything is, by paths that are the same on every machine.
        units: In the order in which they are begun.
        stop: Asked before a unit is begun; after the first yes none is.
        config: Its device: ``auto`` takes the GPUs where the cluster has any.
        workers: How many actors; with 1, one a GPU, and one a machine on a cluster without.
        address: Address of the cluster; see :func:`~mmcli.pipeline.extraction.ray_cluster.cluster`.

    Yields:
        The records of a unit when it is done, and then the unit with None.

    Raises:
        InputError: There is no Ray, no such cluster or no such device in it.
    """
    with cluster(address) as ray:
        shares = share_out(ray, config, workers if workers > 1 else None)
        remote = ray.remote(UnitActor).options(**shares.actor, max_restarts=RESTARTS)
        n = min(shares.actors, len(units))
        free = [remote.remote(place, shares.threads, shares.device) for _ in range(n)]
        waiting, attempts, running = list(units), Counter[int](), dict[Any, tuple[Any, Unit]]()
        while True:
            while waiting and free and not stop():
                actor, unit = free.pop(), waiting.pop(0)
                running[actor.do.remote(unit)] = actor, unit
            if not running:
                return
            (done,), _ = ray.wait(list(running), num_returns=1)
            actor, unit = running.pop(done)
            free.append(actor)
            try:
                records = ray.get(done)
            except ray.exceptions.RayActorError:
                attempts[id(unit)] += 1
                if attempts[id(unit)] < ATTEMPTS:
                    waiting.insert(0, unit)
                    continue
                records = fail_killed(place, unit)
            yield from ((unit, record) for record in records)
            yield unit, None
