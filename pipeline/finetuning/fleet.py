"""Several processes of this machine that finetune together: the command line again, once a process.

What ``accelerate launch`` does, for one machine, with errors as one line and exit codes as they are: each process finds
its rank in the environment, and Accelerate takes it from there.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..core.cores import count_cores
from ..core.interrupts import INTERRUPTED, Interrupted

# The exit code of a process whose others have gone: they have said why.
LOST = 75
# Says in each process how many there are, so that it can name the command that goes on.
PROCESSES = "MMCLI_NUM_PROCESSES"
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
        "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": threads_of(n),
    }  # fmt: skip
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
                stdout=None if rank == 0 else subprocess.DEVNULL, stderr=subprocess.PIPE if rank == 0 else stream,
            )  # fmt: skip
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
