"""The units of an ablation on a Ray cluster: actors, each with the store that it read; Ray places and restarts them.

Stores, data and the folder of the table have to be under the same paths on every machine. Ray is an extra; it is
imported inside functions only.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..core.config import Config
from ..extraction.ray_cluster import cluster, share_out
from .ablate_records import Record
from .engines import ATTEMPTS, killed
from .worker import Unit, Worker, Workplace

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
    place: Workplace, units: Sequence[Unit], stop: Callable[[], bool], config: Config, *, workers: int,
    address: str | None,
) -> Iterator[tuple[Unit, Record | None]]:  # fmt: skip
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
