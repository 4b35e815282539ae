"""Trackers: figures read back from their own files, nothing asked on a terminal, and failures that stop no training."""

import importlib.util
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from mmcli import InputError
from mmcli.pipeline.core.config import Config, load_config
from mmcli.pipeline.training import trackers
from mmcli.pipeline.training.trackers import check_trackers, open_trackers

EPOCHS = [{"epoch": float(n), "loss": 1 / n, "lr": 1e-3, "val_mAP": n / 10, "train_s": 0.5} for n in (1, 2, 3)]
METRICS = {
    "mAP": 0.5,
    "P@5": float("nan"),
    "n_images": 10,
    "split": "test",
    "method": "classifier",
    "note": None,
    "ok": True,
}
installed = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs the extra tensorboard")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@installed
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_every_epoch_as_it_ends_and_the_metrics(tmp_path: Path) -> None:
    (tracker,) = open_trackers(tmp_path, Config(), tensorboard=True, wandb=False)
    for n, record in enumerate(EPOCHS, 1):
        tracker.epoch(record)
        assert len(scalars(tmp_path)["val/mAP"]) == n  # without waiting for the end
    tracker.finish(METRICS)
    found = scalars(tmp_path)
    assert found.keys() == {"train/loss", "train/lr", "train/train_s", "val/mAP", "test/mAP", "test/n_images"}
    assert found["val/mAP"] == [(n, pytest.approx(n / 10)) for n in (1, 2, 3)]
    assert found["test/mAP"] == [(3, 0.5)]
    assert {path.name for path in tmp_path.iterdir()} == {"tensorboard"}


class FakeRun:
    def __init__(self, **words: object) -> None:
        self.words, self.logged, self.summary, self.code = words, [], {}, None

    def log(self, record: dict, step: int) -> None:
        self.logged.append((step, record))

    def finish(self, exit_code: int) -> None:
        self.code = exit_code


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A ``wandb`` that writes down what it is told; ``logged_in`` says what its login answers."""
    recorded = SimpleNamespace(runs=[], logged_in=False, prompts=[])

    def init(**words: object) -> FakeRun:
        recorded.runs.append(FakeRun(**words))
        return recorded.runs[-1]

    def login(*, prompt: bool = True, verify: bool = True) -> bool:
        recorded.prompts.append(prompt)
        return recorded.logged_in

    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.init, module.login, module.Settings = init, login, lambda **words: words
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return recorded


def test_wandb_gets_configuration_epochs_and_metrics(fake: SimpleNamespace, tmp_path: Path) -> None:
    fake.logged_in = True
    config = load_config(options={"hash.bits": 32})
    (tracker,) = open_trackers(tmp_path, config, tensorboard=False, wandb=True)
    for record in EPOCHS:
        tracker.epoch(record)
    tracker.finish(METRICS)
    (run,) = fake.runs
    assert [step for step, _ in run.logged] == [1, 2, 3]
    assert run.logged[1][1] == {"train/loss": 0.5, "train/lr": 1e-3, "train/train_s": 0.5, "val/mAP": 0.2}
    assert run.summary == {"test/mAP": 0.5, "test/n_images": 10.0}
    assert run.code == 0
    assert run.words["config"]["hash"]["bits"] == 32
    assert (run.words["dir"], run.words["mode"], run.words["project"]) == (str(tmp_path), "online", "mmcli")


@pytest.mark.parametrize(
    ("mode", "logged_in", "wanted", "said"),
    [
        (None, True, "online", 0),
        (None, False, "offline", 1),
        ("online", False, "offline", 1),
        ("offline", False, "offline", 0),
        ("offline", True, "offline", 0),
        ("dryrun", False, "offline", 0),
        ("disabled", False, "disabled", 0),
    ],
)
def test_wandb_never_asks(mode, logged_in, wanted, said, fake, tmp_path, monkeypatch) -> None:
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    fake.logged_in = logged_in
    lines: list[str] = []
    open_trackers(tmp_path, Config(), tensorboard=False, wandb=True, say=lines.append)
    assert fake.runs[0].words["mode"] == wanted
    assert not any(fake.prompts)
    assert len(lines) == said
    assert all("not logged in" in line and "wandb sync" in line for line in lines)


def test_a_resumed_run_keeps_its_wandb_id(fake: SimpleNamespace, tmp_path: Path) -> None:
    for seed in (1, 1, 2):
        open_trackers(
            tmp_path, load_config(options={"hardware.seed": seed}), tensorboard=False, wandb=True, say=lambda line: None
        )
    first, again, other = (run.words["id"] for run in fake.runs)
    assert first == again != other


@pytest.mark.parametrize("when", ["init", "epoch", "finish"])
def test_a_failing_tracker_warns_once_and_stops_nothing(when, fake, tmp_path, monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the server is gone\nand a second line")

    lines: list[str] = []
    fake.logged_in = True
    if when == "init":
        monkeypatch.setattr(sys.modules["wandb"], "init", broken)
    (tracker,) = open_trackers(tmp_path, Config(), tensorboard=False, wandb=True, say=lines.append)
    if when != "init":
        setattr(fake.runs[0], {"epoch": "log", "finish": "finish"}[when], broken)
    for record in EPOCHS:
        tracker.epoch(record)
    tracker.finish(METRICS)
    assert lines == [
        "warning: Weights & Biases failed and gets no more records; the training goes on: the server is gone"
    ]


def test_ctrl_c_is_no_failure_of_a_tracker(fake: SimpleNamespace, tmp_path: Path) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    fake.logged_in = True
    (tracker,) = open_trackers(tmp_path, Config(), tensorboard=False, wandb=True)
    fake.runs[0].log = interrupted
    with pytest.raises(KeyboardInterrupt):
        tracker.epoch(EPOCHS[0])


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_library_is_one_line_at_the_start(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda module: None)
    asked = {"tensorboard": False, "wandb": False, name: True}
    for refuse in (lambda: check_trackers(**asked), lambda: open_trackers(tmp_path / "run", Config(), **asked)):
        with pytest.raises(InputError, match=rf"{name} is not installed: --{name}; pip install .*\[{name}\]"):
            refuse()
    assert list(tmp_path.iterdir()) == []
    check_trackers(tensorboard=False, wandb=False)
    assert open_trackers(tmp_path, Config(), tensorboard=False, wandb=False) == []


def test_the_real_wandb_writes_below_the_run_without_a_login(tmp_path: Path) -> None:
    """In a process and a home of its own, because it keeps servers and settings; no network is needed."""
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("needs the extra wandb")
    script = (
        "from pathlib import Path; from mmcli.pipeline.core.config import Config\n"
        "from mmcli.pipeline.training.trackers import open_trackers\n"
        "Path('run').mkdir()\n"
        "(t,) = open_trackers(Path('run'), Config(), tensorboard=False, wandb=True)\n"
        f"for r in {EPOCHS!r}: t.epoch(r)\n"
        "t.finish({'mAP': 0.5, 'split': 'test'})\n"
    )
    import os

    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(tmp_path)}
    environment.pop("NETRC", None)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "not logged in" in done.stderr
    assert "warning" not in done.stderr
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert b"val/mAP" in file.read_bytes()
    assert not (tmp_path / "wandb").exists()
