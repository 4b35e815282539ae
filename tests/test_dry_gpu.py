"""The project on a GPU that is not there: launches, waits, devices and dtypes of what only a GPU runs.

``tests/dry_gpu`` runs it with fake tensors that say they lie on CUDA, in processes of their own, because the backend that
they need has to be there before torch is. Numbers here are of the code as it is: a change that raises one has to say why.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Results = dict[str, dict[str, Any]]
Dry = Callable[..., Results]

# Most launches of a step of a head, by case.
LAUNCHES = {
    "recommended": 274,
    "plan": 243,
    "small": 272,
    "direction-only": 271,
    "0 bits": 180,
    "32 bits": 262,
    "128 bits": 274,
    "mlp": 157,
    "fusion concat": 269,
    "fusion hadamard": 271,
    "image alone": 269,
    "text alone": 269,
    "adapter": 334,
    "focal": 280,
    "balanced": 276,
    "average": 301,
    "accumulation": 558,
    "two sizes": 274,
    "float32": 237,
    "float16": 288,
    "beta": 276,
    "straight-through": 280,
    "no mixtures": 268,
    "unclipped": 269,
    "deterministic": 274,
    "monitor": 274,
    "monitor of the classifier": 274,
}
AVERAGED = ("average", "accumulation")
# Of a step of towers and head.
TOWER_LAUNCHES = {
    "last-2": 907,
    "all": 954,
    "all, deterministic": 954,
    "last-1 of images, accumulated": 1231,
    "all, checkpointed": 1066,
    "last-1 of texts, augmented, float32": 530,
    "frozen, augmented": 488,
}


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Dry:
    """Run a group of cases of ``tests/dry_gpu/cases.py``, once each."""
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux, to build a CUDA backend without a device")
    folder, here = tmp_path_factory.mktemp("dry-gpu"), Path(__file__).parent / "dry_gpu"
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch, library = Path(spec.origin).parent, folder / "no_cuda.so"
    subprocess.run(
        [
            compiler,
            "-O0",
            "-std=c++20",
            "-shared",
            "-fPIC",
            f"-I{torch}/include",
            "-o",
            library,
            here / "no_cuda.cpp",
            f"-L{torch}/lib",
            "-lc10",
            "-ltorch_cpu",
            f"-Wl,-rpath,{torch}/lib",
        ],
        check=True,
    )
    done: dict[str, Results] = {}

    def run(group: str, *words: Path) -> Results:
        if group not in done:
            command = [sys.executable, "-W", "ignore", here / "cases.py", library, group, *words]
            ended = subprocess.run(
                command,
                check=False,
                capture_output=True,
                text=True,
                timeout=900,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            assert ended.returncode == 0, ended.stderr[-2000:]
            done[group] = json.loads(ended.stdout.splitlines()[-1])
        return done[group]

    return run


def faults(results: Results) -> dict[str, list[str]]:
    return {name: result["faults"] for name, result in results.items() if result["faults"]}


def test_a_step_of_a_head_runs_on_a_gpu_without_a_fault(dry: Dry) -> None:
    """No wrong device or dtype, nothing made in a graph that outlives it, nothing read by one that was freed."""
    results = dry("heads")
    assert not faults(results)
    assert results.keys() == LAUNCHES.keys()


def test_a_step_of_a_head_never_waits_for_the_gpu(dry: Dry) -> None:
    """But for those of float16, whose scaler asks whether anything is inf, and torch's average, which sends its count."""
    for name, result in dry("heads").items():
        waits = {place.partition(" at ")[0] for step in result["steps"] for place in step["waits"]}
        allowed = {"float16": {"a number is fetched"}} | {case: {"host to device"} for case in AVERAGED}
        assert waits <= allowed.get(name, set()), (name, waits)


def test_every_size_of_batch_warms_up_and_is_then_replayed(dry: Dry) -> None:
    for name, result in dry("heads").items():
        if name == "float16":
            assert {step["how"] for step in result["steps"]} == {"eager"}
            continue
        sizes = {tuple(step["sizes"]) for step in result["steps"]}
        assert len(sizes) == result["graphs"] == (2 if name == "two sizes" else 1)
        for size in sizes:
            how = [step["how"] for step in result["steps"] if tuple(step["sizes"]) == size]
            assert how[:4] == ["eager"] * 3 + ["captured"], (name, how)
            assert set(how[4:]) == {"replayed"}, (name, how)
        # Outside the graph are the learning rates, one of each group of parameters, and the average.
        outside = max(step["on_default_stream"] for step in result["steps"][1:])
        assert outside <= (32 if name in AVERAGED else 3), (name, outside)


def test_a_step_of_a_head_launches_no_more_than_it_did(dry: Dry) -> None:
    most = {name: max(step["launches"] for step in result["steps"][1:]) for name, result in dry("heads").items()}
    assert {name: n for name, n in most.items() if n > LAUNCHES[name]} == {}


def test_towers_encode_on_a_gpu_and_wait_once_a_shard(dry: Dry, miniature) -> None:
    results = dry("towers", miniature.data, miniature.model)
    assert not faults(results)
    for name, n_images, n_texts in (("bfloat16", 52, 33), ("float32", 40, 27)):
        case = results[name]
        assert case["images"]["launches"] <= n_images
        assert case["texts"]["launches"] <= n_texts
        assert not case["images"]["waits"]
        assert not case["texts"]["waits"]
        for part in ("list of texts", "shard of images again", "shard of captions"):
            assert list(case[part]["waits"].values()) == [1], (name, part)


def test_batches_are_pinned_where_the_configuration_says_so(dry: Dry, miniature) -> None:
    results = dry("towers", miniature.data, miniature.model)
    assert any("not pinned" in wait for wait in results["not pinned"]["images"]["waits"])
    assert any("not pinned" in wait for wait in results["not pinned"]["texts"]["waits"])


def test_the_torch_index_searches_on_a_gpu(dry: Dry, miniature) -> None:
    results = dry("towers", miniature.data, miniature.model)
    for name, blocks in (("index, 64 bits", 2), ("index, one query", 1), ("index, 4096 bits", 1)):
        waits: Counter[str] = Counter()
        for wait, n in results[name]["waits"].items():
            waits[wait.split(" at ")[0]] += n
        # The codes once, then queries and results a block.
        assert waits == {"host to device": 1 + blocks, "device to host": blocks}, name


def test_towers_are_trained_on_a_gpu_without_a_fault(dry: Dry, miniature) -> None:
    """Also with ``--deterministic``, which refuses operations that add up in any order."""
    results = dry("towers", miniature.data, miniature.model)
    assert not faults(results)
    for name, launches in TOWER_LAUNCHES.items():
        first, *others = results[name]["steps"]
        assert first
        assert others
        assert max(step["launches"] for step in others) <= launches, name
        # Which captions a step reads is asked of the GPU once.
        assert all(sum(step["waits"].values()) <= 1 for step in others), (name, others[-1]["waits"])


@pytest.mark.slow
def test_towers_of_base_size_run_on_a_gpu_without_a_fault(dry: Dry, miniature, tmp_path: Path) -> None:
    from mmcli.pipeline.bench.data import make_base_checkpoint, write_captions

    model = make_base_checkpoint(tmp_path / "base", write_captions(100))
    results = dry("base", miniature.data, model)
    assert not faults(results)
    assert results["encode"]["images"]["launches"] <= 172
