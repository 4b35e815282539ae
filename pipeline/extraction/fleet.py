"""Several processes of this machine fill one store, a stripe each: one a GPU, or a few on the cores of a CPU."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import torch

from ... import InputError
from ...cache import Stripe
from ..core.config import Config
from ..core.cores import count_cores
from ..core.device import pick_device, reader_count
from ..core.interrupts import interruptible
from ..core.progress import ConsoleProgress, Progress
from .extract import ExtractPlan, ExtractResult, clear, extract
from .model_source import pin_revision
from .reader import end_children, end_with_parent
from .shards import Clock


def extract_here(
    config: Config, plan: ExtractPlan, *, processes: int | None = None, progress: Progress | None = None
) -> ExtractResult:
    """Run an extraction on every GPU of this machine, or in so many processes.

    Args:
        config: As for :func:`~mmcli.pipeline.extraction.extract.extract`; with the device ``auto`` or ``cuda`` all GPUs are used.
        plan: Likewise.
        processes: Processes; one a GPU when not given, and one without a GPU.
        progress: Who to tell.

    Raises:
        InputError: As for ``extract``, from whichever process meets it first.
    """
    devices = _devices(config, processes)
    if len(devices) == 1:
        return extract(config, plan, progress)
    config = config.model_copy(update={"model": pin_revision(config.model)})
    progress = progress or Progress()
    if plan.force:
        plan = clear(config, plan)
        torch.cuda.empty_cache()  # it has loaded an encoder, whose room the first process wants
    progress.say(f"{len(devices)} processes, one stripe each: {', '.join(devices)}")
    quiet = not isinstance(progress, ConsoleProgress)
    parts = [_part(plan, at, len(devices)) for at in range(len(devices))]
    with interruptible(without=["--force"]):
        return _joined(_run(config, parts, devices, quiet=quiet))


def _run(config: Config, parts: list[ExtractPlan], devices: list[str], *, quiet: bool) -> list[ExtractResult]:
    """One process a part; the first error ends the others, and what they finished is kept."""
    context = multiprocessing.get_context("spawn")
    before = multiprocessing.active_children()
    with ProcessPoolExecutor(len(devices), mp_context=context, initializer=end_with_parent) as pool:
        futures = [
            pool.submit(_stripe, config, part, device, len(devices), quiet)
            for part, device in zip(parts, devices, strict=True)
        ]
        try:
            return [future.result() for future in as_completed(futures)]
        except BrokenProcessPool:
            raise InputError(
                "a process was killed", got="most likely too little memory", wanted=f"room for {len(devices)} of them",
                do="give fewer --processes; what was finished is kept",
            ) from None  # fmt: skip
        except BaseException:
            end_children(before)
            raise


def _devices(config: Config, processes: int | None) -> list[str]:
    """The device of each process."""
    device = pick_device(config.hardware.device)
    every = [f"cuda:{at}" for at in range(torch.cuda.device_count())]
    names = every if device == torch.device("cuda") and every else [str(device)]
    return [names[at % len(names)] for at in range(processes or len(names))]


def _part(plan: ExtractPlan, at: int, n: int) -> ExtractPlan:
    """The plan of one process: a stripe of the stripe that the plan is for."""
    whole = plan.stripe or Stripe(0, 1)
    return replace(plan, stripe=Stripe(whole.at + at * whole.n, whole.n * n))


def _stripe(config: Config, plan: ExtractPlan, device: str, n: int, quiet: bool) -> ExtractResult:
    """What runs in each process."""
    if device == "cpu":
        torch.set_num_threads(max(1, count_cores() // n))
    wanted = config.data.num_workers
    readers = max(1, reader_count(None, torch.device(device)) // n) if wanted is None else None
    data = config.data if readers is None else config.data.model_copy(update={"num_workers": readers})
    hardware = config.hardware.model_copy(update={"device": device})
    config = config.model_copy(update={"hardware": hardware, "data": data})
    assert plan.stripe is not None
    return extract(config, plan, Progress() if quiet else _Labelled(f"{plan.stripe.at + 1}/{plan.stripe.n}"))


class _Labelled(ConsoleProgress):
    """Lines that say which stripe they are of; bars of several processes would draw over each other."""

    def __init__(self, label: str) -> None:
        super().__init__(bars=False)
        self._label = label

    def say(self, line: str) -> None:
        super().say(f"[{self._label}] {line.strip()}")


def _joined(results: list[ExtractResult]) -> ExtractResult:
    clock = Clock()
    for result in results:
        for name in ("read_s", "compute_s", "write_s"):
            setattr(clock, name, getattr(clock, name) + getattr(result.clock, name))
    return replace(
        results[0], finished=any(one.finished for one in results), clock=clock,
        was_finished=all(one.was_finished for one in results), n_encoded=sum(one.n_encoded for one in results),
        damaged=tuple(line for one in results for line in one.damaged),
        skipped={row: why for one in results for row, why in one.skipped.items()},
        reused_text_shards=sum(one.reused_text_shards for one in results), seconds=max(one.seconds for one in results),
    )  # fmt: skip
