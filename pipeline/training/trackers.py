"""Experiment trackers: TensorBoard and Weights & Biases, each by its own library, both below the run folder.

A tracker is no part of the training: one that fails is warned of once and gets no more records.
"""

import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...errors import InputError, first_line
from ..core.config import Config, dump_config
from ..core.run import read_info
from ..core.run_folders import RunPaths

log = logging.getLogger(__name__)
Say = Callable[[str], object]
Write = Callable[[dict[str, float], int, bool], object]  # of an epoch's values, its number, and whether it is the last
INIT_TIMEOUT_S = 30


class Tracker:
    """Logs every epoch and the end of a training; a failure ends the tracker and nothing else.

    Args:
        name: The library, as a person knows it.
        connect: Opens it, and returns its function that writes.
        say: Shows a line.
    """

    def __init__(self, name: str, connect: Callable[[], Write], say: Say) -> None:
        self._name, self._say, self._epoch = name, say, 0
        self._write: Write | None = None
        with self._guard():
            self._write = connect()

    def epoch(self, record: Mapping[str, float]) -> None:
        """Log one epoch: ``epoch``, loss terms, learning rate, val mAP, seconds."""
        self._epoch = int(record["epoch"])
        # By where a chart is looked for: val/mAP, train/loss.
        names = {key: f"val/{key[4:]}" if key.startswith("val_") else f"train/{key}" for key in record}
        self._log({names[key]: float(value) for key, value in record.items() if key != "epoch"})

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Log the numbers of the finished run's metrics by their split, as ``test/mAP``, and close."""
        split = metrics.get("split", "test")
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        self._log({f"{split}/{k}": float(v) for k, v in numbers.items() if math.isfinite(v)}, last=True)

    def _log(self, values: dict[str, float], *, last: bool = False) -> None:
        if self._write is not None:
            with self._guard():
                self._write(values, self._epoch, last)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever a library of others raises, the training goes on
            self._write = None
            what = f"{self._name} failed and gets no more records; the training goes on"
            self._say(f"warning: {what}: {first_line(error)}")


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
        trackers.append(Tracker("TensorBoard", lambda: _tensorboard(folder, config, after), say))
    if wandb:
        trackers.append(Tracker("Weights & Biases", lambda: _weights_and_biases(folder, config, say), say))
    return trackers


def _tensorboard(folder: Path, config: Config, after: int | None) -> Write:
    """Event files in ``tensorboard/`` of the run: one scalar a figure, at the epoch's number."""
    writer = import_module("torch.utils.tensorboard").SummaryWriter(
        log_dir=str(folder / "tensorboard"), purge_step=None if after is None else after + 1
    )
    writer.add_text("config", f"```yaml\n{dump_config(config)}```")

    def write(values: dict[str, float], epoch: int, last: bool) -> None:
        for tag, value in values.items():
            writer.add_scalar(tag, value, epoch)
        writer.flush()  # seen while it trains, and kept when it is killed
        if last:
            writer.close()

    return write


def _weights_and_biases(folder: Path, config: Config, say: Say) -> Write:
    """A run of Weights & Biases, its files in ``wandb/`` of the run; offline where there is no login that it needs."""
    wandb = import_module("wandb")
    mode = os.environ.get("WANDB_MODE", "online").replace("dryrun", "offline")
    if mode not in {"offline", "disabled"} and not wandb.login(prompt=False, verify=False):
        mode = "offline"
        say(
            f"note: not logged in to Weights & Biases, so it stays offline, in {folder / 'wandb'}"
            " (`wandb login`, then `wandb sync`, sends it)"
        )
    created = read_info(folder).created if RunPaths(folder).mark.is_file() else ""
    identity = f"{folder.resolve()} {config.digest} {created}"  # the same for a resumed run, another for every other
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "mmcli"),
        dir=str(folder),
        name=folder.name,
        id=hashlib.sha256(identity.encode()).hexdigest()[:12],
        resume="allow",
        reinit="create_new",
        mode=mode,
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(
            silent=True, console="off", disable_git=True, save_code=False, init_timeout=INIT_TIMEOUT_S
        ),
    )

    def write(values: dict[str, float], epoch: int, last: bool) -> None:
        if last:
            run.summary.update(values)
            run.finish(exit_code=0)
        else:
            run.log(values, step=epoch)

    return write
