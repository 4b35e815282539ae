"""Several processes of this machine that finetune together: the command line again, once a process.

What ``accelerate launch`` does, for one machine, with errors as one line and exit codes as they are: each process finds
its rank in the environment, and Accelerate takes it from there.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

OPTION = "--num-processes"
LOOK_EVERY_S = 0.1
# How long the others may take to end by themselves when one has ended.
GRACE_S = 30.0


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
        "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n))),
    }  # fmt: skip
    processes = [
        subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", __package__.partition(".")[0], *words],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=None if rank == 0 else subprocess.DEVNULL,
        )
        for rank in range(n)
    ]  # fmt: skip
    try:
        return _wait(processes)
    except KeyboardInterrupt:
        _end(processes, signal.SIGINT)
        raise


def _wait(processes: Sequence["subprocess.Popen[bytes]"]) -> int:
    while True:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        if failed:
            # Who waits for one that has gone would wait for ever.
            _end(processes, signal.SIGTERM)
            return failed[0] if failed[0] > 0 else 1
        if None not in codes:
            return 0
        time.sleep(LOOK_EVERY_S)


def _end(processes: Sequence["subprocess.Popen[bytes]"], sign: int) -> None:
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
