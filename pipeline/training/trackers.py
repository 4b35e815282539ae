"""Experiment trackers: TensorBoard and Weights & Biases, each by its own library, both below the run folder.

A tracker is no part of the training: one that fails is warned of once and gets no more records.
"""

import hashlib
import logging
import math
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ...errors import InputError, first_line
from ..core.config import Config, dump_config
from ..core.run import read_info
from ..core.run_folders import RunPaths

log = logging.getLogger(__name__)
Say = Callable[[str], object]
INIT_TIMEOUT_S = 30


class Tracker(Protocol):
    """Logs every epoch and the end of a training."""

    def epoch(self, record: Mapping[str, float]) -> None:
        """Log one epoch: ``epoch``, loss terms, learning rate, val mAP, seconds."""

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Log the metrics of the finished run, and close."""


def check_trackers(*, tensorboard: bool, wandb: bool) -> None:
    """Refuse what is not installed, before anything is trained or written; imports nothing.

    Raises:
        InputError: A library that was asked for is missing.
    """
    for asked, module, option in ((tensorboard, "tensorboard", "--tensorboard"), (wandb, "wandb", "--wandb")):
        if asked and find_spec(module) is None:
            raise InputError(
                f"{module} is not installed", where=option, do=f"pip install -c constraints.txt -e '.[{module}]'"
            )


def open_trackers(
    folder: Path, config: Config, *, tensorboard: bool, wandb: bool, after: int | None = None, say: Say = log.warning
) -> list[Tracker]:
    """Open the trackers of a run; those that were opened in this folder before are resumed.

    Args:
        folder: The run folder: TensorBoard writes to ``tensorboard/``, Weights & Biases to ``wandb/``.
        config: The resolved configuration, which both keep.
        tensorboard: Whether TensorBoard is asked for.
        wandb: Whether Weights & Biases is asked for. ``WANDB_MODE`` and its other variables count; nobody is ever asked
            to log in: without a login it goes offline, and says so.
        after: Epoch that a run is resumed after: records of later ones are taken back.
        say: Shows a line.

    Raises:
        InputError: A library that was asked for is missing.
    """
    check_trackers(tensorboard=tensorboard, wandb=wandb)
    trackers: list[Tracker] = []
    if tensorboard:
        trackers.append(_Guarded("TensorBoard", lambda: _TensorBoard(folder, config, after), say))
    if wandb:
        trackers.append(_Guarded("Weights & Biases", lambda: _WeightsAndBiases(folder, config, say), say))
    return trackers


class _Guarded:
    """A tracker whose failures end it and nothing else."""

    def __init__(self, name: str, make: Callable[[], Tracker], say: Say) -> None:
        self._name, self._say = name, say
        self._tracker: Tracker | None = None
        self._try(lambda: setattr(self, "_tracker", make()))

    def epoch(self, record: Mapping[str, float]) -> None:
        if (tracker := self._tracker) is not None:
            self._try(lambda: tracker.epoch(record))

    def finish(self, metrics: Mapping[str, Any]) -> None:
        if (tracker := self._tracker) is not None:
            self._try(lambda: tracker.finish(metrics))

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - whatever a library of others raises, the training goes on
            self._tracker = None
            what = f"{self._name} failed and gets no more records; the training goes on"
            self._say(f"warning: {what}: {first_line(error)}")


class _TensorBoard:
    """Event files in ``tensorboard/`` of the run: one scalar a figure, at the epoch's number."""

    def __init__(self, folder: Path, config: Config, after: int | None) -> None:
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        purge = None if after is None else after + 1
        self._writer = writer(log_dir=str(RunPaths(folder).tensorboard), purge_step=purge)
        self._writer.add_text("config", f"```yaml\n{dump_config(config)}```")
        self._last = 0

    def epoch(self, record: Mapping[str, float]) -> None:
        self._last = int(record["epoch"])
        for tag, value in _tagged(record).items():
            self._writer.add_scalar(tag, value, self._last)
        self._writer.flush()  # seen while it trains, and kept when it is killed

    def finish(self, metrics: Mapping[str, Any]) -> None:
        for tag, value in _figures(metrics).items():
            self._writer.add_scalar(tag, value, self._last)
        self._writer.close()


class _WeightsAndBiases:
    """A run of Weights & Biases, its files in ``wandb/`` of the run."""

    def __init__(self, folder: Path, config: Config, say: Say) -> None:
        wandb = import_module("wandb")
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, save_code=False, init_timeout=INIT_TIMEOUT_S
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mmcli"),
            dir=str(folder),
            name=folder.name,
            id=_run_id(folder, config),
            resume="allow",
            reinit="create_new",
            mode=_wandb_mode(wandb, folder, say),
            config=config.model_dump(mode="json"),
            settings=settings,
        )

    def epoch(self, record: Mapping[str, float]) -> None:
        self._run.log(_tagged(record), step=int(record["epoch"]))

    def finish(self, metrics: Mapping[str, Any]) -> None:
        self._run.summary.update(_figures(metrics))
        self._run.finish(exit_code=0)


def _wandb_mode(wandb: Any, folder: Path, say: Say) -> str:  # noqa: ANN401
    """What ``WANDB_MODE`` says; offline where a login would be needed and there is none."""
    mode = os.environ.get("WANDB_MODE", "online")
    if mode in {"offline", "dryrun", "disabled"} or wandb.login(prompt=False, verify=False):
        return "offline" if mode == "dryrun" else mode
    say(
        f"note: not logged in to Weights & Biases, so it stays offline, in {folder / 'wandb'}"
        " (`wandb login`, then `wandb sync`, sends it)"
    )
    return "offline"


def _run_id(folder: Path, config: Config) -> str:
    """The same for a resumed run, another for every other run."""
    created = read_info(folder).created if RunPaths(folder).mark.is_file() else ""
    return hashlib.sha256(f"{folder.resolve()} {config.digest} {created}".encode()).hexdigest()[:12]


def _tagged(record: Mapping[str, float]) -> dict[str, float]:
    """Figures of an epoch by where a chart is looked for: ``val/mAP``, ``train/loss``."""
    names = {name: name.replace("val_", "val/", 1) if name.startswith("val_") else f"train/{name}" for name in record}
    return {names[name]: float(value) for name, value in record.items() if name != "epoch"}


def _figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a row of metrics, by their split: ``test/mAP``."""
    split = metrics.get("split", "test")
    numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {f"{split}/{name}": float(value) for name, value in numbers.items() if math.isfinite(value)}
