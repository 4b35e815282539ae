"""How quickly a store comes into memory, and how long ``mmcli train-head`` takes to its first step.

Loading is set beside plain reading: every shard, in order, with ``read`` into memory that is new each time, as ours is.
The first step is timed in a process of its own, which runs the command itself and ends when the step is done.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from ... import InputError
from ...cache import Store, is_remote
from ..core.config import Config
from .harness import Case, best_of

MARK = "first step done"
# Runs the command line as it is, but for the step: it says when the first one is done, and ends the process.
RUN_TO_FIRST_STEP = f"""
import os, sys
from mmcli.cli import main
from mmcli.pipeline.training.step import Step
whole = Step.run
def run(self, sizes):
    whole(self, sizes)
    if self._device.type == "cuda":
        import torch
        torch.cuda.synchronize(self._device)
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
            name="loading a store", unit="MB", plain=size / self.plain_s, ours=size / self.ours_s,
            ceiling=size / self.plain_s, note=note,
        )  # fmt: skip


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
        n_bytes=sum(path.stat().st_size for path in paths), plain_s=best["plain"], ours_s=best["ours"],
        first_s=first_s, was_noted=was_noted, cold_plain_s=cold["plain"], cold_ours_s=cold["ours"],
    )  # fmt: skip


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
