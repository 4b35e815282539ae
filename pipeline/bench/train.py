"""``mmcli bench train``: training steps a second, beside the plain loop and beside the products alone.

Symbols: N images of train, D embedding width, C classes.
"""

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from ...cache import Store, is_remote
from ...errors import InputError
from ..core.config import Config
from ..core.progress import Progress
from ..training.data import Split
from ..training.monitor import Monitor
from ..training.setup import Prepared, prepare_training
from ..training.step import Step, count_batches
from .data import make_full_store
from .harness import BenchResult, Case, best_of, plainly
from .plain import plain_steps

MARK = "first step done"
# Runs the command line as it is, but for the step: it says when the first one is done, and ends the process.
RUN_TO_FIRST_STEP = f"""
import os, sys
from mmcli.cli import main
from mmcli.pipeline.training.step import Step
whole = Step.run
def run(self, sizes):
    whole(self, sizes)
    if self.device.type == "cuda":
        import torch
        torch.cuda.synchronize(self.device)
    print({MARK!r}, flush=True)
    os._exit(0)
Step.run = run
main()
"""


@dataclass(frozen=True, kw_only=True)
class LoadTimes:
    """Seconds of the best round, and of single ones.

    Attributes:
        n_bytes: Of all shards.
        plain_s: Plain reading, with the files in the system's memory.
        ours_s: ``Store.load``, likewise.
        first_s: The first ``Store.load`` of all: with every checksum, where no note of checked shards was there.
        was_noted: Whether one was there.
        cold_plain_s: Plain reading after the system was asked to forget the files.
        cold_ours_s: ``Store.load`` after that.
    """

    n_bytes: int
    plain_s: float
    ours_s: float
    first_s: float
    was_noted: bool
    cold_plain_s: float
    cold_ours_s: float

    def case(self) -> Case:
        """Both as megabytes a second."""
        size = self.n_bytes / 1e6
        first = "which checked no checksum" if self.was_noted else "with all checksums"
        note = (
            f"plain: read, one file after another; the first time {self.first_s:.2f} s, {first}; from the disk"
            f" {size / self.cold_plain_s:,.0f} and {size / self.cold_ours_s:,.0f} MB/s"
        )
        return Case(
            name="loading a store",
            unit="MB",
            plain=size / self.plain_s,
            ours=size / self.ours_s,
            ceiling=size / self.plain_s,
            note=note,
        )


def time_loading(folder: Path, repeats: int) -> LoadTimes:
    """Time loading a store's embeddings against reading its files.

    Args:
        folder: The store, a folder of this machine.
        repeats: Rounds; the ways take turns, and the best of each counts.

    Raises:
        InputError: No sound store, or one behind a URL.
    """
    if is_remote(folder):
        raise InputError("cannot time a remote store", where=folder, wanted="a folder of this machine")
    store = Store.open(folder)
    paths = [store.folder / entry.file for entry in store.manifest.shards]
    was_noted = store.is_noted

    def read() -> None:
        read_plainly(paths)

    def load() -> None:
        store.load()

    first_s = best_of({"ours": load}, repeats=1)["ours"]
    best = best_of({"plain": read, "ours": load}, repeats=repeats)
    cold: dict[str, float] = {}
    for name, way in (("plain", read), ("ours", load)):
        _forget(paths)
        cold |= best_of({name: way}, repeats=1)
    return LoadTimes(
        n_bytes=sum(path.stat().st_size for path in paths),
        plain_s=best["plain"],
        ours_s=best["ours"],
        first_s=first_s,
        was_noted=was_noted,
        cold_plain_s=cold["plain"],
        cold_ours_s=cold["ours"],
    )


def read_plainly(paths: list[Path]) -> int:
    """Read files one after another into one new buffer; how many bytes came."""
    sizes = [path.stat().st_size for path in paths]
    buffer, at = np.empty(sum(sizes), np.uint8), 0
    for path, size in zip(paths, sizes, strict=True):
        with path.open("rb", buffering=0) as stream:
            end = at + size
            while at < end and (got := stream.readinto(buffer[at:end].data)):
                at += got
    return at


def time_to_first_step(folder: Path, config: Config, *, repeats: int = 2) -> float:
    """Seconds from the start of a process that runs ``mmcli train-head`` to the end of its first step; the best.

    Args:
        folder: The store.
        config: Of the training.
        repeats: Processes.

    Raises:
        InputError: The command ends before its first step; says how.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "config.yaml"
        # What the store knows is left to it; written out, defaults would count as asked for.
        settings = config.model_dump(mode="json", exclude={"model": True, "classifier": {"num_classes"}})
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        best = float("inf")
        for at in range(repeats):
            options = ["--store", str(folder), "--config", str(file), "--out", f"{scratch}/run-{at}", "--quiet"]
            best = min(best, _seconds_to([sys.executable, "-c", RUN_TO_FIRST_STEP, "train-head", *options], MARK))
        return best


def import_torch_seconds(*, repeats: int = 2) -> float:
    """Seconds from the start of a process to the end of ``import torch``; the best."""
    code = f"import torch; print({MARK!r}, flush=True); import os; os._exit(0)"
    return min(_seconds_to([sys.executable, "-c", code], MARK) for _ in range(repeats))


def _seconds_to(command: list[str], wanted: str) -> float:
    started = time.perf_counter()
    with subprocess.Popen(  # noqa: S603 - this interpreter
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        seconds = time.perf_counter() - started
        _, complaint = process.communicate()
    if line != wanted:
        last = complaint.strip().splitlines()[-1:] or [f"exit {process.returncode}"]
        raise InputError("a training that did not begin", got=last[0][:200], wanted=wanted)
    return seconds


def _forget(paths: list[Path]) -> None:
    """Ask the system to drop files from its memory; it need not."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)  # what is not on the disk yet stays
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


PLAIN_WORKERS = 4
PLAIN_BATCH, LARGE_BATCH = 64, 1024
# Most loops a second at batch 64 take as long as a sixteenth as many at batch 1,024.
LARGE_SHARE = 16


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """What all ways have in common."""

    prepared: Prepared
    steps: int

    @property
    def train(self) -> Split:
        return self.prepared.splits["train"]

    @property
    def config(self) -> Config:
        return self.prepared.config

    @property
    def device(self) -> torch.device:
        return self.prepared.device


def bench_train(
    config: Config,
    *,
    store: Path | None,
    n_train: int | None,
    steps: int,
    repeats: int,
    progress: Progress | None = None,
) -> BenchResult:
    """Time training in several ways in one run.

    Args:
        config: Head, loss, optimiser and hardware sections are used; batches are of 64 and of 1,024.
        store: A store; one of COCO's full size with made embeddings when not given.
        n_train: Train images of the made store; COCO's 113,287 when not given.
        steps: Steps of a round at batch 64.
        repeats: Rounds; the best of each way counts.
        progress: Who to tell.

    Returns:
        A case for each size of batch, and loading against plain reading;
        as facts what validation costs of an epoch, and seconds from process start to the first step.

    Raises:
        InputError: As of :func:`~mmcli.pipeline.training.train_head.train_head`.
    """
    progress = progress or Progress()
    with tempfile.TemporaryDirectory() as scratch:
        if store is None:
            progress.say("making a store of COCO's size")
            sizes = {} if n_train is None else {"n_train": n_train}
            store = make_full_store(Path(scratch) / "store", **sizes)
        loading = time_loading(store, repeats)
        prepared = prepare_training(config, store, progress)
        setting = _Setting(prepared=prepared, steps=steps)
        progress.say(f"timing {steps} steps of batch {PLAIN_BATCH}, {repeats} rounds of every way")
        cases = [_steps(setting, PLAIN_BATCH, steps, repeats)]
        cases += [_steps(setting, LARGE_BATCH, max(2, steps // LARGE_SHARE), repeats)]
        cases += [loading.case()]
        facts = _facts(setting, cases[0]) | {
            "import_torch_s": import_torch_seconds(),
            "first_step_s": time_to_first_step(store, config),
        }
    lines = (
        f"an epoch of {facts['n_train']:,} images at batch {PLAIN_BATCH}: {facts['epoch_s']:.2f} s, and validation"
        f" {facts['validation_s']:.2f} s ({100 * facts['validation_share']:.0f} %)",
        f"30 epochs with validation: {30 * (facts['epoch_s'] + facts['validation_s']):.0f} s",
        f"from process start to the first step: {facts['first_step_s']:.2f} s, {facts['import_torch_s']:.2f} s of it"
        " importing torch",
    )
    title = f"training at {config.hash.bits} bits on {setting.device.type} ({facts['precision']})"
    return BenchResult(title=title, cases=tuple(cases), facts=facts, lines=lines)


def _steps(setting: _Setting, batch: int, steps: int, repeats: int) -> Case:
    ours, head = _ours(setting, batch), _head(setting).train()
    plain = plain_steps(head, setting.train, setting.config, batch, workers=PLAIN_WORKERS)
    ways: dict[str, Callable[[], None]] = {
        "plain": plainly(partial(_take, plain, steps, setting.device)),
        "ours": partial(_take, ours, steps, setting.device),
        "ceiling": partial(_take, _products(setting, batch), steps, setting.device),
    }
    for way in ways.values():
        way()  # workers start, buffers are made, graphs are captured
    seconds = best_of(ways, repeats=repeats)
    rates = {name: steps * batch / value for name, value in seconds.items()}
    note = f"plain: Dataset, DataLoader with {PLAIN_WORKERS} workers, eager float32; ceiling: products and update alone"
    return Case(name=f"training, batch {batch:,}", unit="images", note=note, **rates)


def _take(step: Iterator[None], n: int, device: torch.device) -> None:
    for _ in itertools.islice(step, n):
        pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _head(setting: _Setting) -> Any:  # noqa: ANN401
    return setting.prepared.make_head(setting.train)


def _ours(setting: _Setting, batch: int) -> Iterator[None]:
    """Steps of our loop, epoch after epoch."""
    head, n = _head(setting), len(setting.train)
    batches = count_batches(head, n, batch)
    step = Step(head, setting.train, setting.config, steps=batches)
    head.train()
    for epoch in itertools.count(1):
        order = torch.randperm(n).to(setting.device)
        caption = (torch.rand(n).to(setting.device) * setting.train.captions_of).long()
        step.begin(epoch, order, caption)
        for part in torch.tensor_split(torch.empty(n), batches):
            step.run((len(part),))
            yield


def _products(setting: _Setting, batch: int) -> Iterator[None]:
    """The matrix products of a step, in its precision, and the update of its parameters, on what is there already."""
    head = _head(setting)
    layers = [module for module in head.modules() if isinstance(module, nn.Linear)]
    placed: dict[str, Any] = {"device": setting.device, "dtype": getattr(torch, _precision(setting))}
    inputs = [torch.randn(batch, layer.in_features, **placed) for layer in layers]
    slopes = [torch.randn(batch, layer.out_features, **placed) for layer in layers]
    for parameter in head.parameters():
        parameter.grad = torch.zeros_like(parameter)
    fused = setting.device.type in {"cpu", "cuda"}
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-6, fused=fused)
    products = [_product(*three, first=at == 0) for at, three in enumerate(zip(layers, inputs, slopes, strict=True))]
    while True:
        with torch.no_grad():
            for product in products:
                product()
        optimizer.step()
        yield


def _product(layer: nn.Linear, x: Tensor, slope: Tensor, *, first: bool) -> Callable[[], None]:
    weight = layer.weight.detach().to(x.dtype)
    bias = None if layer.bias is None else layer.bias.detach().to(x.dtype)

    def multiply() -> None:
        torch.addmm(bias, x, weight.T) if bias is not None else torch.mm(x, weight.T)
        torch.mm(slope.T, x)
        if not first:  # nothing is trained below the first layer
            torch.mm(slope, weight)

    return multiply


def _facts(setting: _Setting, case: Case) -> dict[str, Any]:
    monitor = Monitor(setting.config, setting.train, setting.prepared.splits["val"])
    head = _head(setting)
    monitor(head)
    started = time.perf_counter()
    monitor(head)
    validation, epoch = time.perf_counter() - started, len(setting.train) / case.ours
    return {
        "n_train": len(setting.train),
        "epoch_s": epoch,
        "validation_s": validation,
        "validation_share": validation / epoch,
        "precision": _precision(setting),
    }


def _precision(setting: _Setting) -> str:
    """The name of the precision that a step computes its products in."""
    return setting.prepared.precision
