"""Who does the work: this process, processes that are killed, and a Ray cluster."""

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
import torch

from mmcli.pipeline.ablation.ablate import ablate
from mmcli.pipeline.ablation.engines import Assignment, in_processes
from mmcli.pipeline.ablation.records import read_rows
from mmcli.pipeline.ablation.request import ConfigSource, Request, plan_request
from mmcli.pipeline.ablation.worker import Unit, Worker, Workplace

OPTIONS = {
    "fusion.mlp_dims": [64, 32],
    "training.num_epochs": 3,
    "knn.K": 5,
    "hardware.device": "cpu",
}


def request_of(folder: Path, *names: str, **options) -> Request:
    source = ConfigSource(options=OPTIONS | options.pop("options", {}), flags={})
    (store,) = (folder / "data" / "cache").iterdir()
    return Request(names=names, store=store, source=source, **options)


def units_of(request: Request) -> list[Unit]:
    plan = plan_request(request).plan
    return [
        Unit(training=training, evaluations=tuple(item for item in plan.evaluations.values() if item.training == key))
        for key, training in plan.trainings.items()
    ]


def kill_first(unit: Unit) -> Unit:
    """What makes the process that takes it up kill itself."""
    return replace(unit, run=_Deadly())


class _Deadly:
    def __reduce__(self):
        return _end_here, ()


def _end_here() -> dict:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_a_unit_that_kills_its_process_fails_alone(here: Path) -> None:
    request = request_of(here, "A2", only=("A2=0,32",))
    units = units_of(request)
    units[1] = kill_first(units[1])
    place = Workplace(out=here / "out", stores={units[0].training.store: request.store}, data=here)
    records = [
        record
        for _, record in in_processes(Assignment(place=place, units=units), workers=1, devices=["cpu"])
        if record is not None
    ]
    states = {record.key: (record.status, record.note) for record in records}
    wanted = [unit.evaluations[0].key for unit in units]
    assert [states[key][0] for key in wanted] == ["finished", "failed"]
    assert "a worker was killed" in states[wanted[1]][1]


def test_a_failed_training_is_a_row_and_is_tried_again(here: Path, monkeypatch) -> None:
    from mmcli.pipeline.training import train_head

    whole = train_head.train_head

    def broken(config, **words):
        if config.hash.bits == 32:
            raise RuntimeError("the disk\nis on fire")
        return whole(config, **words)

    monkeypatch.setattr(train_head, "train_head", broken)
    request = request_of(here, "A2", out=here / "out", runs=here / "runs")
    first = ablate(request)
    assert [(row["value"], row["status"]) for row in first.rows] == [
        ("0", "finished"),
        ("32", "failed"),
        ("64", "finished"),
        ("128", "finished"),
    ]
    assert first.rows[1]["note"] == "RuntimeError: the disk is on fire"
    monkeypatch.setattr(train_head, "train_head", whole)
    again = ablate(request)
    assert (again.counted["trained"], again.counted["failed"]) == (1, 0)


def test_an_interrupted_training_is_resumed(here: Path, monkeypatch) -> None:
    """Stopped after its state was kept, it ends with the weights of one that was not."""
    from mmcli.pipeline.training import loop as trainer
    from mmcli.pipeline.training.monitor import Monitor

    request = request_of(here, "A2", only=("A2=32",), options={"training.num_epochs": 6}, out=here / "plain")
    plain = ablate(request)
    monkeypatch.setattr(trainer, "KEEP_EVERY_S", 0.0)
    validate, validations = Monitor.__call__, []

    def stopped(self, head):
        validations.append(head)
        if len(validations) == 4:
            raise KeyboardInterrupt
        return validate(self, head)

    monkeypatch.setattr(Monitor, "__call__", stopped)
    stopped_request = replace(request, out=here / "stopped")
    with pytest.raises(KeyboardInterrupt):
        ablate(stopped_request)
    result = ablate(stopped_request)
    assert len(validations) == 4 + 3  # epochs 1 to 4, then 4 to 6
    assert result.counted["trained"] == 1
    assert result.rows[0]["mAP"] == plain.rows[0]["mAP"]
    assert result.rows[0]["epochs"] == 6
    (run,) = (here / "stopped" / "runs").iterdir()
    history = [json.loads(line)["epoch"] for line in (run / "history.jsonl").read_text().splitlines()]
    assert history == [1, 2, 3, 4, 5, 6]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_seeds_train_on_a_gpu(here: Path) -> None:
    options = {"hardware.device": "cuda"}
    result = ablate(request_of(here, "A2", "C2", seeds=3, options=options, out=here / "out", runs=here / "nothing"))
    assert (result.counted["trained"], result.counted["failed"]) == (12, 0)
    assert {row["device"] for row in result.rows} == {"cuda"}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.filterwarnings("default")  # Ray has some of every kind
def test_ray_makes_the_same_table(here: Path, monkeypatch) -> None:
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    request = request_of(here, "A2", seeds=2, out=here / "plain", runs=here / "nothing")
    plain = ablate(request)
    try:
        result = ablate(replace(request, out=here / "ray", engine="ray", workers=2))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figures = [
        [(row["value"], row["seed"], row["status"], row["mAP"]) for row in table.rows] for table in (plain, result)
    ]
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
    request = request_of(here, "A2", only=("A2=32",), options={"hardware.device": "cuda"})
    (unit,) = units_of(request)
    place = Workplace(out=here / "out", stores={unit.training.store: request.store}, data=here)
    (record,) = Worker(place, device="cpu").do(unit)
    assert (record.status, record.facts["device"]) == ("finished", "cpu")
