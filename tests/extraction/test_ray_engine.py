"""The Ray engine's store is the local engine's: when an actor is killed, when some is there already, with bad images."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from mmcli import InputError
from mmcli.cache import Store, Stripe, verify
from mmcli.pipeline.core.config import load_config
from mmcli.pipeline.core.progress import Progress
from mmcli.pipeline.data.manifest import read_manifest
from mmcli.pipeline.extraction import ray_cluster
from mmcli.pipeline.extraction.extract import ExtractPlan, Job, extract
from mmcli.pipeline.extraction.ray_engine import EncodeShards, describe, extract_on_ray, read_shard

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install -c constraints.txt -e '.[ray]'"
)
pytestmark = pytest.mark.filterwarnings("default")  # Ray has some of every kind


def config_of(miniature):
    options = {"model.siglip2_variant": str(miniature.model), "model.max_num_patches": 64, "hardware.device": "cpu"}
    return load_config(options=options | {"data.num_workers": 0})


def plan_of(miniature, out: Path, **options) -> ExtractPlan:
    return ExtractPlan(**{"data": miniature.data, "out": out, "shard_rows": 2, "batch_tokens": 256} | options)


def content(folder: Path) -> dict[str, object]:
    """Every byte of a store but the time it was made."""
    outcome: dict[str, object] = {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}
    document = json.loads(outcome["manifest.json"])
    return outcome | {"manifest.json": {name: document[name] for name in document.keys() - {"created", "checksum"}}}


@pytest.fixture(scope="module")
def ray(miniature):
    """A Ray of this machine, with files of its own in a short path, as sockets need."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # names a cluster that is not to be joined
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            patch.delenv(name, raising=False)
        with ray_cluster.cluster(None) as ray:
            yield ray
    shutil.rmtree(folder, ignore_errors=True)


def local(miniature, ray, processes: int, out: Path, **options) -> Path:
    """The store of the local engine, with as many threads as an actor has."""
    before = torch.get_num_threads()
    torch.set_num_threads(ray_cluster.share_out(ray, config_of(miniature), processes).threads)
    try:
        return extract(config_of(miniature), plan_of(miniature, out, **options)).store
    finally:
        torch.set_num_threads(before)


def wait_for(outcome, seconds: float = 40):
    deadline = time.monotonic() + seconds
    while not (it := outcome()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
    return it


def shards_at_work(store: Path) -> dict[int, int]:
    """The processes other than this one that hold the lock of a shard of the store, each with its shard."""
    at_work = {}
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            held = re.fullmatch(rf"{re.escape(str(store))}/\.lock-(\d+)-of-\d+", str(link.readlink()))
        except OSError:
            continue
        if held and int(link.parts[2]) != os.getpid():
            at_work[int(link.parts[2])] = int(held[1])
    return at_work


def stop_in_the_middle(store: Path) -> tuple[int, int] | None:
    """Stop a process whose shard is not whole yet: its id and its shard; None where each has written its shard."""
    for pid, shard in shards_at_work(store).items():
        os.kill(pid, signal.SIGSTOP)
        if not (store / f"text-{shard:05d}.h5").exists():
            return pid, shard
        os.kill(pid, signal.SIGCONT)
    return None


def kill_one(store: Path, seen: dict[str, object]) -> None:
    """SIGKILL to an actor that is in the middle of a shard, when some are written and some are not."""
    wait_for(lambda: list(store.glob("image-*.h5")))
    pid, seen["shard"] = wait_for(lambda: stop_in_the_middle(store))
    seen |= {"written": (store / f"text-{seen['shard']:05d}.h5").exists()}
    seen["title"] = Path(f"/proc/{pid}/cmdline").read_bytes().decode().strip("\0")
    seen |= {"killed": pid, "manifest": (store / "manifest.json").exists()}
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: pid not in shards_at_work(store))


@pytest.fixture(scope="module")
def spoiled(miniature, tmp_path_factory) -> Path:
    """A copy of the data with three images that cannot be read, two of them all of a shard."""
    data = tmp_path_factory.mktemp("spoiled") / "data"
    shutil.copytree(miniature.data, data)
    paths = read_manifest(data / "manifest.parquet").paths
    for row in (16, 17):
        (data / paths[row]).unlink()
    (data / paths[21]).write_bytes((data / paths[21]).read_bytes()[:-600])
    return data


@pytest.fixture(scope="module")
def killed(miniature, ray, spoiled: Path, tmp_path_factory):
    """A run over spoiled data, an actor of which was killed: the result, and what the killer saw."""
    out, seen = tmp_path_factory.mktemp("killed") / "s", {}
    killer = threading.Thread(target=kill_one, args=(out, seen))
    killer.start()
    result = extract_on_ray(config_of(miniature), plan_of(miniature, out, data=spoiled, on_error="skip"), processes=2)
    killer.join()
    return result, seen


@needs_ray
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds the actor in /proc")
def test_an_actor_killed_within_a_shard_changes_nothing(miniature, ray, killed, spoiled, tmp_path) -> None:
    result, seen = killed
    assert seen["killed"] != os.getpid()
    assert "EncodeShards" in seen["title"]
    assert (seen["written"], seen["manifest"]) == (False, False)
    assert not Path(f"/proc/{seen['killed']}").exists()
    assert (result.finished, result.was_finished) == (True, False)
    assert (result.store / f"text-{seen['shard']:05d}.h5").is_file()
    wanted = local(miniature, ray, 2, tmp_path / "local", data=spoiled, on_error="skip")
    assert content(result.store) == content(wanted)
    assert {path.name for path in result.store.glob(".*")} == {".lock"}


@needs_ray
def test_unreadable_images_are_left_out_with_their_reasons(miniature, killed, spoiled: Path) -> None:
    result, _ = killed
    assert sorted(Store.open(result.store).skipped) == sorted(result.skipped) == [16, 17, 21]
    assert [said in result.skipped[row] for row, said in ((16, "no file"), (21, "damaged"))] == [True, True]
    assert result.n_encoded == 57
    plan = plan_of(miniature, result.store, data=spoiled, on_error="skip")
    again = extract_on_ray(config_of(miniature), plan, processes=2)
    assert (again.was_finished, again.n_encoded, sorted(again.skipped)) == (True, 0, [16, 17, 21])


@needs_ray
def test_a_stripe_resumes_and_keeps_what_is_whole(miniature, ray, tmp_path: Path) -> None:
    whole = local(miniature, ray, 1, tmp_path / "whole", shard_rows=16)
    shutil.copytree(whole, tmp_path / "s")
    for name in ("manifest.json", "image-00001.h5", "image-00002.h5", "text-00002.h5"):
        (tmp_path / "s" / name).unlink()
    (tmp_path / "s" / "text-00003.h5").write_bytes(b"damaged")
    kept = (tmp_path / "s" / "image-00003.h5").stat().st_mtime_ns
    plan = plan_of(miniature, tmp_path / "s", shard_rows=16, stripe=Stripe(1, 2))
    result = extract_on_ray(config_of(miniature), plan, processes=1)
    assert (result.finished, result.n_encoded, len(result.damaged)) == (False, 16, 1)
    assert not (tmp_path / "s" / "image-00002.h5").exists()
    assert (tmp_path / "s" / "image-00003.h5").stat().st_mtime_ns == kept
    local(miniature, ray, 1, tmp_path / "s", stripe=Stripe(0, 2))
    assert content(tmp_path / "s") == content(whole)
    assert verify(tmp_path / "s").ok


def test_an_actor_says_what_stops_it(miniature, spoiled, tmp_path: Path) -> None:
    config, plan = config_of(miniature), plan_of(miniature, tmp_path / "s", data=spoiled)
    facts = describe(config, plan, "cpu")
    job = Job.create(config, plan, read_manifest(spoiled / "manifest.parquet"), facts)
    shares = ray_cluster.Shares(device="cpu", actors=1, threads=torch.get_num_threads(), actor={}, reader={})
    actor = EncodeShards(job, shares, 31)
    refusals = {}
    for number in (0, 8, 10):
        paths = job.listing.paths[2 * number : 2 * number + 2]
        refusals[number] = actor.encode(number, read_shard(number, paths, spoiled, facts.spec, 256)).refusal
    assert refusals[0] is None
    assert "no file" in str(refusals[8])
    assert "damaged" in str(refusals[10])
    assert "--on-error skip" in str(refusals[10])
    assert {path.name for path in (tmp_path / "s").glob("*.h5")} == {"image-00000.h5", "text-00000.h5"}


def listening() -> dict[str, str]:
    """Addresses that processes below this one, and this one, listen on: ``/proc``'s hexadecimal, and the command."""
    sockets = {}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":
                sockets[f"socket:[{words[9]}]"] = words[1].rpartition(":")[0]
    outcome = {}
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target, command = str(link.readlink()), (link.parents[1] / "cmdline").read_text()
        except OSError:
            continue
        if target in sockets:
            outcome[f"{sockets[target]} {target}"] = command
    return outcome


@needs_ray
@pytest.mark.skipif(not Path("/proc/net/tcp").is_file(), reason="finds the sockets in /proc")
def test_a_cluster_of_this_machine_is_nobody_elses(ray, monkeypatch) -> None:
    """Loopback in /proc: 127.0.0.1 ends in 0100007F, alone or within an IPv6 address; ::1 is 0...01000000."""
    servers = {
        index: name
        for index, name in listening().items()
        if "gcs_server" in name or "raylet" in name or "ray::" in name
    }
    assert any("gcs_server" in name for name in servers.values())
    assert any("raylet" in name for name in servers.values())
    outside = [
        index for index in servers if not index.split()[0].endswith(("0100007F", "00000000000000000000000001000000"))
    ]
    assert outside == []
    assert ray.nodes()[0]["NodeManagerAddress"] == "127.0.0.1"
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_cluster_is_joined_by_the_option_alone(miniature, tmp_path: Path, monkeypatch) -> None:
    joined = []

    @contextlib.contextmanager
    def cluster(address):
        joined.append(address)
        raise InputError("stop")
        yield

    monkeypatch.setattr("mmcli.pipeline.extraction.ray_engine.cluster", cluster)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    said = []
    progress = Progress()
    monkeypatch.setattr(progress, "say", said.append)
    for address in (None, "10.0.0.2:6379"):
        plan = plan_of(miniature, tmp_path / "s")
        with pytest.raises(InputError, match="stop"):
            extract_on_ray(config_of(miniature), plan, address=address, progress=progress)
    assert joined == [None, "10.0.0.2:6379"]
    assert len(said) == 1
    assert "RAY_ADDRESS is 10.0.0.1:6379, but only --ray-address joins" in said[0]


@needs_ray
def test_a_cluster_that_does_not_answer_is_one_line(miniature, tmp_path: Path, monkeypatch) -> None:
    ray_cluster.import_ray()
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(InputError, match=r"no Ray cluster: 127\.0\.0\.1:1: .*ray start --head"):
        extract_on_ray(config_of(miniature), plan_of(miniature, tmp_path / "s"), address="127.0.0.1:1")


def test_without_ray_the_command_that_installs_it_is_named(miniature, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match=r"Ray is not installed: --engine ray: .*pip install .*\.\[ray\]"):
        extract_on_ray(config_of(miniature), plan_of(miniature, tmp_path / "s"))
