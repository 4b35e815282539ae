"""How many cores and how much memory there are to use: no more than a container allows."""

import os
from pathlib import Path

import pytest

from mmcli.pipeline.core import cores
from mmcli.pipeline.core.cores import count_cores, free_memory, limit_threads


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A machine of so many cores whose control groups are described by files below ``tmp_path``."""

    def make(n: int, files: dict[str, str]) -> Path:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(n)), raising=False)
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


V2, V1 = "sys/fs/cgroup/", "sys/fs/cgroup/cpu,cpuacct/"
SLICE = {"proc/self/cgroup": "0::/user.slice/job\n"}
CASES = [
    ({}, 64),
    ({f"{V2}cpu.max": "200000 100000\n"}, 2),
    ({f"{V2}cpu.max": "max 100000\n"}, 64),
    ({f"{V2}cpu.max": "150000 100000\n"}, 2),
    ({f"{V2}cpu.max": "10000 100000\n"}, 1),
    ({f"{V2}cpu.max": "12800000 100000\n"}, 64),
    ({f"{V1}cpu.cfs_quota_us": "400000\n", f"{V1}cpu.cfs_period_us": "100000\n"}, 4),
    ({f"{V1}cpu.cfs_quota_us": "-1\n", f"{V1}cpu.cfs_period_us": "100000\n"}, 64),
    ({**SLICE, f"{V2}user.slice/job/cpu.max": "300000 100000\n"}, 3),
    ({**SLICE, f"{V2}user.slice/job/cpu.max": "max 100000", f"{V2}user.slice/cpu.max": "500000 100000\n"}, 5),
    # The host's name of a container's group: inside, only the root of it is to be seen.
    ({"proc/self/cgroup": "0::/docker/1234\n", f"{V2}cpu.max": "200000 100000"}, 2),
    (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/job\n",
            f"{V1}job/cpu.cfs_quota_us": "100000",
            f"{V1}job/cpu.cfs_period_us": "50000",
        },
        2,
    ),
    ({f"{V2}cpu.max": "0 0"}, 64),
    ({f"{V2}cpu.max": "nonsense"}, 64),
    ({f"{V2}cpu.max": ""}, 64),
    ({"proc/self/cgroup": "0::/../..\nnonsense\n", f"{V2}cpu.max": "200000 100000"}, 2),
]


@pytest.mark.parametrize(("files", "wanted"), CASES)
def test_a_quota_counts_as_the_cores_that_it_allows(machine, files, wanted: int) -> None:
    assert count_cores(machine(64, files)) == wanted


def test_the_affinity_counts_where_it_is_less(machine) -> None:
    assert count_cores(machine(1, {f"{V2}cpu.max": "400000 100000"})) == 1


def test_a_system_that_does_not_know_its_cores_has_one(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert count_cores(tmp_path) == 1


@pytest.mark.parametrize(
    ("given", "quota", "wanted"),
    [
        (None, 2, "2"),
        ("", 2, "2"),
        ("abc", 2, "2"),
        ("-1", 64, None),
        ("0", 64, None),
        ("7", 2, "7"),
        ("4,2", 2, "4,2"),
        (None, 64, None),
    ],
)
def test_threads_follow_a_quota_but_not_against_the_user(machine, monkeypatch, given, quota, wanted) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(cores, "count_cores", lambda: quota)
    machine(64, {})
    limit_threads()
    assert os.environ.get("OMP_NUM_THREADS") == wanted


GIB = 2**30
MACHINE = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:   {64 * GIB // 1024} kB\n"}
V1_MEMORY = {f"{V2}memory/memory.limit_in_bytes": f"{4 * GIB}\n", f"{V2}memory/memory.usage_in_bytes": f"{GIB}\n"}


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, 64 * GIB),
        ({f"{V2}memory.max": "max\n", f"{V2}memory.current": "5\n"}, 64 * GIB),
        ({f"{V2}memory.max": f"{4 * GIB}\n", f"{V2}memory.current": f"{GIB}\n"}, 3 * GIB),
        # File pages can be given up at once.
        (
            {
                f"{V2}memory.max": f"{4 * GIB}",
                f"{V2}memory.current": f"{3 * GIB}",
                f"{V2}memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
            },
            3 * GIB,
        ),
        ({f"{V2}memory.max": f"{GIB}", f"{V2}memory.current": f"{2 * GIB}"}, 0),
        (V1_MEMORY, 3 * GIB),
        ({**SLICE, f"{V2}user.slice/memory.max": f"{2 * GIB}", f"{V2}user.slice/memory.current": "0"}, 2 * GIB),
        ({f"{V2}memory.max": "nonsense", f"{V2}memory.current": "0"}, 64 * GIB),
    ],
)
def test_free_memory_is_what_a_container_leaves(machine, files, wanted: int) -> None:
    assert free_memory(machine(4, {**MACHINE, **files})) == wanted


@pytest.mark.parametrize("n", [1, 64])
def test_readers_and_processes_share_the_cores(machine, monkeypatch, n: int) -> None:
    import torch

    from mmcli.pipeline.core.device import reader_count
    from mmcli.pipeline.finetuning import distributed as finetune_fleet

    machine(n, {})
    assert reader_count(None, torch.device("cpu")) == max(1, n // 8)
    assert reader_count(None, torch.device("cuda")) == n
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert finetune_fleet.threads_of(2) == str(max(1, n // 2))
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert finetune_fleet.threads_of(2) == "5"
