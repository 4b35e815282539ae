"""A Ray cluster to work on, a running one or one of this machine, and how its machines are shared out."""

import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...errors import InputError, first_line
from ..core.config import Config
from ..core.cores import count_cores
from .native_output import without_native_output

# Of the cores of a CPU machine: what the model's processes ask for; the rest is for those that read images.
MODEL_SHARE, READER_SHARE = 0.75, 0.2
CONNECT_S = 10.0
# A setting of the user's goes before these. Ray would have its workers stand back for all else (niceness 15).
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
}
# Where Ray supports no clusters its servers listen on loopback, and not on every interface.
NO_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@dataclass(frozen=True, kw_only=True)
class Shares:
    """The shares of a cluster's machines that actors and readers get.

    Attributes:
        device: What the actors compute on: ``cuda`` or ``cpu``.
        actors: Processes that hold the model.
        threads: Threads of torch in each.
        actor: What Ray reserves for one, such as ``{"num_gpus": 1}``.
        reader: What Ray reserves for reading one shard.
    """

    device: str
    actors: int
    threads: int
    actor: dict[str, float]
    reader: dict[str, float]


def import_ray(*, joins: bool = False) -> Any:  # noqa: ANN401 - Ray is an extra
    """The module ``ray``.

    Args:
        joins: Whether a running cluster is joined; otherwise what is started listens on loopback alone.

    Raises:
        InputError: Ray is not installed.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if not joins and "ray" not in sys.modules:
        _protect()
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "Ray is not installed", where="--engine ray", got=error, do="pip install -c constraints.txt -e '.[ray]'"
        ) from None
    return ray


@contextmanager
def cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected; the connection ends with the block, and so does a cluster that was started for it.

    A cluster of this machine listens on loopback alone and asks for a token that only this process and its workers
    have. A process that has started one joins no other: Ray reads such settings once.

    Args:
        address: The address of a running cluster; when not given, or ``local``, one is started on this machine,
            whatever ``RAY_ADDRESS`` says.

    Raises:
        InputError: Ray is not installed, or no cluster answers.
    """
    address = None if address in {"", "local"} else address
    ray = import_ray(joins=address is not None)
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {}
    if address is None:
        address, options = "local", {"include_dashboard": False, "num_cpus": count_cores()}
    _check_address(address)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        try:
            with without_native_output():  # lines of Ray's C++ half; errors are exceptions
                # Actors send the warnings that they have for the user with their results.
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise _no_cluster(address, error) from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray takes it for itself
        yield ray
    finally:
        ray.shutdown()


def ignored_address(address: str | None) -> str | None:
    """A line for the user where ``RAY_ADDRESS`` names a cluster that is not joined, because no option names it."""
    ignored = os.environ.get("RAY_ADDRESS")
    if address is not None or not ignored:
        return None
    return f"note: RAY_ADDRESS is {ignored}, but only --ray-address joins a cluster; Ray is started on this machine"


def _protect() -> None:
    """Keep others out of a cluster that this process starts: loopback, and a token; settings of the user's stay.

    Ray reads them when it is imported; where it was imported before, it asks for the token in the user's home.
    """
    os.environ.setdefault(NO_CLUSTERS, "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token" and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _check_address(address: str) -> None:
    """Refuse a ``host:port`` where nothing listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if "/" in address or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from None


def _no_cluster(address: str, error: Exception) -> InputError:
    return InputError(
        "no Ray cluster",
        where=address,
        got=first_line(error),
        wanted="the address of a running one",
        do="start one with `ray start --head`, and name its RAY_AUTH_MODE; or leave --ray-address out",
    )


def share_out(ray: Any, config: Config, processes: int | None) -> Shares:  # noqa: ANN401
    """Decide how many actors there are and what Ray reserves for each.

    Args:
        ray: A connected Ray.
        config: Its device: ``auto`` takes the GPUs where the cluster has any.
        processes: Actors; one a GPU when not given, and one a machine without GPUs.

    Raises:
        InputError: A device that the cluster does not have, or that Ray cannot give.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    n_gpus, device = int(sum(node.get("GPU", 0) for node in nodes)), config.hardware.device
    if device not in {"auto", "cpu", "cuda"} or (device == "cuda" and not n_gpus) or not nodes:
        raise InputError(
            "no such device in the cluster",
            where="--device",
            got=device,
            wanted="auto, cpu, or cuda where it has GPUs",
            do="use --device auto; Ray places the processes",
        )
    if n_gpus and device != "cpu":
        actors = min(processes or n_gpus, n_gpus)  # for another one no GPU would ever be free
        return Shares(device="cuda", actors=actors, threads=1, actor={"num_gpus": 1}, reader={"num_cpus": 1})
    actors = processes or len(nodes)
    cores, together = max(node["CPU"] for node in nodes), -(-actors // len(nodes))
    share = MODEL_SHARE * cores / together
    return Shares(
        device="cpu",
        actors=actors,
        threads=max(1, int(cores) // together),
        # Ray takes no fractions above one.
        actor={"num_cpus": float(int(share)) if share > 1 else share},
        reader={"num_cpus": min(1.0, READER_SHARE * cores)},
    )
