"""How many cores and how much memory this process may use: in a container less than the machine has."""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")
# Folders of cgroup v1 that hold the quota, by the names that distributions give them.
_V1_FOLDERS = ("cpu", "cpu,cpuacct", "cpuacct,cpu")

# Says in each process how many there are, so that it can name the command that resumes.
PROCESSES = "MMCLI_NUM_PROCESSES"


def count_cores(root: Path = ROOT) -> int:
    """Cores by the process's affinity, and no more than the CPU time that its control groups allow, rounded up.

    The standard library knows affinity alone. A container with ``docker run --cpus 2`` sees all cores of its host, and
    one thread on each of them would be throttled most of the time.

    Args:
        root: The root of the file system that describes the control groups.
    """
    return max(1, min([_cores_of_affinity(), *(math.ceil(quota) for quota in _quotas(root))]))


def limit_threads() -> None:
    """Let OpenMP and BLAS start no more threads than a quota allows; a number that the user gave stays.

    They read the variable when they are loaded, and count all cores of the affinity where it is not set. What is no
    number of threads counts as not set: OpenMP would complain of it in every process.
    """
    cores = count_cores()
    if not re.fullmatch(r"\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*)*", os.environ.get("OMP_NUM_THREADS", "1")):
        del os.environ["OMP_NUM_THREADS"]
    if cores < _cores_of_affinity() and not os.environ.get("OMP_NUM_THREADS"):
        os.environ["OMP_NUM_THREADS"] = str(cores)


def free_memory(root: Path = ROOT) -> int:
    """Bytes of memory that this process may still take: what the machine has, and what its control groups leave.

    A container with ``docker run --memory 4g`` sees the memory of its host in ``/proc/meminfo``. File pages that a
    group can give up at once count as free, as they do for the machine.

    Args:
        root: The root of the file system that describes memory and control groups.
    """
    available = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / "proc" / "meminfo"), re.MULTILINE)
    machine = 1024 * int(available[1]) if available else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0, min([machine, *_memory_left(root)]))


def _memory_left(root: Path) -> Iterator[int]:
    """Bytes that the control groups of this process leave, of each that has a limit."""
    groups = root / "sys" / "fs" / "cgroup"
    for path in _group_paths(root):
        for folder in (path, *path.parents):
            below = folder.relative_to("/")
            for group, limit, usage in (
                (groups / below, "memory.max", "memory.current"),
                (groups / "memory" / below, "memory.limit_in_bytes", "memory.usage_in_bytes"),
            ):
                numbers = [_read(group / name).strip() for name in (limit, usage)]
                cached = re.search(r"^(?:total_)?inactive_file (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
                if all(number.isdecimal() for number in numbers):
                    yield int(numbers[0]) - int(numbers[1]) + (int(cached[1]) if cached else 0)


def _cores_of_affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quotas(root: Path) -> Iterator[float]:
    """CPU seconds a second that the control groups of this process allow, of each that has a limit."""
    groups = root / "sys" / "fs" / "cgroup"
    for path in _group_paths(root):
        for folder in (path, *path.parents):
            below = folder.relative_to("/")
            yield from _quota(groups / below / "cpu.max")
            for name in _V1_FOLDERS:
                yield from _quota(
                    groups / name / below / "cpu.cfs_quota_us", groups / name / below / "cpu.cfs_period_us"
                )


def _group_paths(root: Path) -> list[PurePosixPath]:
    """The control groups of this process; in a container the root, whatever the host calls it, counts as well."""
    lines = _read(root / "proc" / "self" / "cgroup").splitlines()
    paths = (line.split(":", 2)[2] for line in lines if line.count(":") >= 2)
    return [PurePosixPath(path) for path in dict.fromkeys(["/", *paths]) if path.startswith("/") and ".." not in path]


def _quota(*files: Path) -> Iterator[float]:
    """The limit of one group: quota and period in microseconds, in one file or in two."""
    words = " ".join(map(_read, files)).split()
    if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):
        yield int(words[0]) / int(words[1])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
