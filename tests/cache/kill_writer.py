"""Kills a writer at chosen moments; run by test_kill.py in a process of its own, which may fork.

Usage: ``kill_writer.py points|times SCENARIO FOLDER STRIDE``. ``points`` kills at each moment that matters (or every
STRIDE-th), and leaves one folder for each: ``FOLDER/1``, ``FOLDER/2``, ... ``times`` kills after eight random times.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from kit import stores
from mmcli.cache import files

ROWS = 5  # two shards a part


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def die_at(point: int) -> None:
    """Arm the process: the ``point``-th moment is its last. Moments are before a call, and within a write."""
    left = [point]

    def tick() -> None:
        left[0] -= 1
        if left[0] == 0:
            die()

    def around(call):
        def armed(*args, **kwargs):
            tick()
            return call(*args, **kwargs)

        return armed

    def fill(stream, data):
        stream.write(data[: len(data) // 2])
        stream.flush()
        tick()
        stream.write(data[len(data) // 2 :])

    for name in ("fsync", "replace", "link"):
        setattr(os, name, around(getattr(os, name)))
    Path.unlink = around(Path.unlink)
    files._fill = fill


def prepare(scenario: str, folder: Path) -> None:
    """What stands in the folder before the writer starts."""
    if scenario == "new":
        return
    sibling = stores.Data()
    if scenario == "reuse":
        sibling.write(folder.with_name(f"{folder.name}-sibling"), stores.key(patches=512), shard_rows=ROWS)
        return
    stores.Data(seed=0 if scenario == "mend" else 1).write(folder, stores.key(), shard_rows=ROWS)
    if scenario == "mend":
        path = folder / "text-00001.h5"
        data = bytearray(path.read_bytes())
        data[-5] ^= 4
        path.write_bytes(data)


def work(scenario: str, folder: Path) -> None:
    with stores.Data().writer(folder, stores.key(), shard_rows=ROWS, overwrite=scenario == "replace") as writer:
        if scenario == "reuse":
            writer.reuse_text(folder.with_name(f"{folder.name}-sibling"))
        stores.Data().fill(writer)
        writer.finish()


def run(scenario: str, folder: Path, *, point: int | None = None, after_s: float | None = None) -> bool:
    """Fork a writer and kill it; whether it was killed before it was done."""
    child = os.fork()
    if child == 0:
        try:
            if point is not None:
                die_at(point)
            work(scenario, folder)
        except BaseException as error:  # noqa: BLE001 - a fork must never return
            print(error, file=sys.stderr)  # noqa: T201
            os._exit(3)
        os._exit(0)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the writer failed of itself")
    return os.WIFSIGNALED(status)


def main(how: str, scenario: str, root: Path, stride: int) -> None:
    root.mkdir()
    if how == "points":
        point = 1
        while True:
            folder = root / str(point)
            prepare(scenario, folder)
            if not run(scenario, folder, point=point):
                shutil.rmtree(folder)
                break
            point += stride
        print(len(list(root.glob("*[0-9]"))))  # noqa: T201
    else:
        start = time.perf_counter()
        run(scenario, root / "whole")
        whole_s = time.perf_counter() - start
        killed = 0
        for point in range(1, 9):
            prepare(scenario, root / str(point))
            killed += run(scenario, root / str(point), after_s=random.Random(point).uniform(0, whole_s))
        shutil.rmtree(root / "whole")
        print(killed)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
