"""Who does the units of an ablation: this process, or several of this machine, each with its share of threads."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ...errors import InputError
from ..core.config import Config
from ..core.cores import count_cores
from ..core.processes import end_children, end_with_parent
from ..core.progress import Progress
from ..extraction.ray_cluster import cluster, share_out
from .plan import flat_config
from .records import Record, failed, write_record
from .worker import Unit, Worker, Workplace

Stop = Callable[[], bool]
# A worker that was killed most likely took too much memory: once is bad luck, twice is the unit.
ATTEMPTS = 2
# Processes of a pool find these before they load anything that has threads.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

_worker: Worker | None = None


def in_this_process(
    place: Workplace, units: Sequence[Unit], stop: Stop, *, told: Progress | None = None
) -> Iterator[tuple[Unit, Record | None]]:
    """Do units one after another.

    Args:
        place: Where everything is.
        units: In the order in which they are done.
        stop: Asked before a unit is begun; after the first yes none is.
        told: Who is told of epochs.

    Yields:
        Every record as soon as it is kept; and a unit with None when it is done.
    """
    worker = Worker(place, told=told)
    for unit in units:
        if stop():
            return
        for record in worker.do(unit):
            yield unit, record
        yield unit, None


def in_processes(
    place: Workplace, units: Sequence[Unit], stop: Stop, *, workers: int, devices: Sequence[str] = ()
) -> Iterator[tuple[Unit, Record | None]]:
    """The same in several processes; a unit whose process is killed is tried once more, then fails.

    Args:
        place: As of :func:`in_this_process`.
        units: Likewise.
        stop: Likewise.
        workers: Processes.
        devices: Taken by the processes in turn; that of the configuration where there are none.
    """
    waiting, attempts = list(units), dict.fromkeys(range(len(units)), 0)
    number = {id(unit): at for at, unit in enumerate(units)}
    while waiting and not stop():
        broken = False
        for unit, records in _pooled(place, waiting, stop, workers, devices):
            if records is None:
                broken = True
                attempts[number[id(unit)]] += 1
                if attempts[number[id(unit)]] < ATTEMPTS:
                    continue
            waiting = [other for other in waiting if other is not unit]
            for record in killed(place, unit) if records is None else records:
                yield unit, record
            yield unit, None
        if not broken:
            return
        workers = 1 if max(attempts.values()) else workers  # alone, a unit has all of the memory


def _pooled(
    place: Workplace, units: Sequence[Unit], stop: Stop, workers: int, devices: Sequence[str]
) -> Iterator[tuple[Unit, list[Record] | None]]:
    """What each unit gave, as they end; None where the processes died under it."""
    threads = max(1, count_cores() // workers)
    context = multiprocessing.get_context("spawn")
    turn = context.Value("i", 0)
    left, running = list(units), {}  # type: ignore[var-annotated]
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, str(threads)))
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin, initargs=(place, threads, devices, turn)
    )
    try:
        while True:
            while left and len(running) < workers and not stop():
                running[pool.submit(_do, left[0])] = left[0]  # a pool that broke says so here
                left.pop(0)
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), _result(future)
    except BrokenProcessPool:
        for unit in [*running.values()] or left[:1]:
            yield unit, None
    finally:
        end_children(others)
        pool.shutdown(wait=True, cancel_futures=True)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _result(future: "Future[list[Record]]") -> list[Record] | None:
    try:
        return future.result()
    except BrokenProcessPool:
        return None


def _begin(place: Workplace, threads: int, devices: Sequence[str], turn: Any) -> None:  # noqa: ANN401
    """What each process does first."""
    global _worker  # noqa: PLW0603 - a process of a pool has no other place to keep what it read
    end_with_parent()
    import torch

    torch.set_num_threads(threads)
    with turn.get_lock():
        at, turn.value = turn.value, turn.value + 1
    _worker = Worker(place, device=devices[at % len(devices)] if devices else None)


def _do(unit: Unit) -> list[Record]:
    assert _worker is not None
    return list(_worker.do(unit))


def killed(place: Workplace, unit: Unit) -> list[Record]:
    """Keep a unit as failed because its process was killed, most likely for the memory that it took."""
    error = InputError(
        "a worker was killed",
        got="most likely too little memory",
        wanted="room for the store in each",
        do="give fewer --workers; what was finished is kept",
    )
    records = [failed(one.key, one.training, error, flat_config(one.config)) for one in unit.evaluations]
    for record in records:
        write_record(place.out, record)
    return records


RESTARTS = 3


class UnitActor:
    """A worker in a process of Ray.

    Args:
        place: Where everything is.
        threads: Of torch.
        device: ``cuda``, which is the GPU that Ray gave the actor, or ``cpu``.
    """

    def __init__(self, place: Workplace, threads: int, device: str) -> None:
        import torch

        torch.set_num_threads(threads)
        self._worker, self._device = Worker(place, device=device), device

    def do(self, unit: Unit) -> list[Record]:
        """Every record of a unit; they are kept already."""
        return list(self._worker.do(unit))


def on_ray(
    place: Workplace,
    units: Sequence[Unit],
    stop: Callable[[], bool],
    config: Config,
    *,
    workers: int,
    address: str | None,
) -> Iterator[tuple[Unit, Record | None]]:
    """Do units in actors; one whose actor dies is tried once more, then fails.

    Args:
        place: Where everything is, by paths that are the same on every machine.
        units: In the order in which they are begun.
        stop: Asked before a unit is begun.
        config: Its device: ``auto`` takes the GPUs where the cluster has any.
        workers: Actors; with 1, one a GPU, and one a machine on a cluster without.
        address: Of the cluster; see :func:`~mmcli.pipeline.extraction.ray_cluster.cluster`.

    Raises:
        InputError: There is no Ray, no such cluster or no such device in it.
    """
    with cluster(address) as ray:
        shares = share_out(ray, config, workers if workers > 1 else None)
        remote = ray.remote(UnitActor).options(**shares.actor, max_restarts=RESTARTS)
        n = min(shares.actors, len(units))
        free = [remote.remote(place, shares.threads, shares.device) for _ in range(n)]
        waiting, attempts, running = list(units), dict.fromkeys(map(id, units), 0), dict[Any, tuple[Any, Unit]]()
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
                records = killed(place, unit)
            for record in records:
                yield unit, record
            yield unit, None
