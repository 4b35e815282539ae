"""Who does the work: processes that are killed, and a Ray cluster."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mmcli.pipeline.ablation.ablate import Means, ablate
from mmcli.pipeline.ablation.engines import in_processes
from mmcli.pipeline.ablation.records import read_rows
from mmcli.pipeline.ablation.request import Order, Told, place_order
from mmcli.pipeline.ablation.worker import Unit, Worker, Workplace

OPTIONS = {
    "fusion.mlp_dims": [64, 32],
    "training.num_epochs": 3,
    "knn.K": 5,
    "hardware.device": "cpu",
}


def order_of(folder: Path, *names: str, **options) -> Order:
    told = Told(options=OPTIONS | options.pop("options", {}), flags={}, tree={})
    (store,) = (folder / "data" / "cache").iterdir()
    return Order(names=names, store=store, told=told, **options)


def units_of(order: Order) -> list[Unit]:
    plan = place_order(order).plan
    return [Unit(trainings=(one,), evaluations=plan.of(key), runs={}) for key, one in plan.trainings.items()]


def kill_first(unit: Unit) -> Unit:
    """What makes the process that takes it up kill itself."""
    return replace(unit, runs=_Deadly())


class _Deadly(dict):
    def __reduce__(self):
        return _end_here, ()


def _end_here() -> dict:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_a_unit_that_kills_its_process_fails_and_the_others_are_done(here: Path) -> None:
    order = order_of(here, "A2", only=("A2=0,32",))
    units = units_of(order)
    units[1] = kill_first(units[1])
    place = Workplace(out=here / "out", stores={units[0].trainings[0].store: order.store}, data=here)
    records = [
        record
        for _, record in in_processes(place, units, lambda: False, workers=1, devices=["cpu"])
        if record is not None
    ]
    states = {record.key: (record.status, record.note) for record in records}
    wanted = [unit.evaluations[0].key for unit in units]
    assert [states[key][0] for key in wanted] == ["finished", "failed"]
    assert "a worker was killed" in states[wanted[1]][1]


def test_a_training_that_fails_is_kept_as_failed_and_tried_again(here: Path, monkeypatch) -> None:
    from mmcli.pipeline.training import train_head

    whole = train_head.train_head

    def broken(config, **words):
        if config.hash.bits == 32:
            raise RuntimeError("the disk\nis on fire")
        return whole(config, **words)

    monkeypatch.setattr(train_head, "train_head", broken)
    means = Means(out=here / "out", runs=here / "runs")
    first = ablate(order_of(here, "A2"), means)
    assert [(row["value"], row["status"]) for row in first.rows] == [
        ("0", "finished"),
        ("32", "failed"),
        ("64", "finished"),
        ("128", "finished"),
    ]
    assert first.rows[1]["note"] == "RuntimeError: the disk is on fire"
    monkeypatch.setattr(train_head, "train_head", whole)
    again = ablate(order_of(here, "A2"), means)
    assert (again.counted["trained"], again.counted["failed"]) == (1, 0)


def test_an_interrupted_training_goes_on(here: Path, monkeypatch) -> None:
    """Stopped after its state was kept, it ends with the weights of one that was not."""
    from mmcli.pipeline.training import loop as trainer

    order = order_of(here, "A2", only=("A2=32",), options={"training.num_epochs": 6})
    plain = ablate(order, Means(out=here / "plain", runs=here / "runs"))
    monkeypatch.setattr(trainer, "KEEP_EVERY_S", 0.0)
    check, seen = trainer._Loop._check, []

    def stopped(self, epoch, means):
        seen.append(epoch)
        if seen == [1, 2, 3, 4]:
            raise KeyboardInterrupt
        check(self, epoch, means)

    monkeypatch.setattr(trainer._Loop, "_check", stopped)
    means = Means(out=here / "stopped", runs=here / "runs")
    with pytest.raises(KeyboardInterrupt):
        ablate(order, means)
    result = ablate(order, means)
    assert seen == [1, 2, 3, 4, 4, 5, 6]
    assert result.counted["trained"] == 1
    assert result.rows[0]["mAP"] == plain.rows[0]["mAP"]
    assert result.rows[0]["epochs"] == 6
    (run,) = (here / "stopped" / "runs").iterdir()
    history = [json.loads(line)["epoch"] for line in (run / "history.jsonl").read_text().splitlines()]
    assert history == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.filterwarnings("default")  # Ray has some of every kind
def test_ray_makes_the_same_table(here: Path, monkeypatch) -> None:
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    order, means = order_of(here, "A2", seeds=2), Means(out=here / "plain", runs=here / "nothing")
    plain = ablate(order, means)
    try:
        result = ablate(order, replace(means, out=here / "ray", engine="ray", workers=2))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figures = [[(row["value"], row["seed"], row["status"], row["mAP"]) for row in one.rows] for one in (plain, result)]
    assert figures[0] == figures[1]
    assert len(read_rows(here / "ray")) == 8


@pytest.mark.slow
def test_workers_end_with_the_one_that_started_them(here: Path) -> None:
    (store,) = (here / "data" / "cache").iterdir()
    words = [
        "ablate",
        "A1",
        "A2",
        "--seeds",
        "9",
        "--workers",
        "2",
        "--store",
        store,
        "--set",
        "training.num_epochs=40",
        "--device",
        "cpu",
        "--quiet",
    ]
    process = subprocess.Popen([sys.executable, "-m", "mmcli", *map(str, words)], cwd=here, start_new_session=True)
    runs = here / "runs/ablations/runs"
    while process.poll() is None and not list(runs.glob("*/history.jsonl")):
        time.sleep(0.01)
    group = os.getpgid(process.pid)
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while _alive(group) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _alive(group)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_worker_takes_the_device_that_it_is_given(here: Path) -> None:
    order = order_of(here, "A2", only=("A2=32",), options={"hardware.device": "cuda"})
    (unit,) = units_of(order)
    place = Workplace(out=here / "out", stores={unit.trainings[0].store: order.store}, data=here)
    (record,) = Worker(place, device="cpu").do(unit)
    assert (record.status, record.facts["device"]) == ("finished", "cpu")
