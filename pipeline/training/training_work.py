"""What trainings have in common around the training itself: run folders that are held, marked and gone on with."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from ..core.config import Config
from ..core.interrupts import Interrupted
from ..core.progress import Progress
from ..core.run import Run, RunInfo, mark, read_info, start_run
from ..core.run_folders import clean_up, hold
from ..finetuning.fleet import PROCESSES
from .state import STATE, TrainingState, kept_epoch, read_state
from .trackers import Tracker, check_trackers, open_trackers


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run goes.

    Attributes:
        out: Its folder; a new one below ``runs`` when not given.
        runs: The folder of all runs.
        force: Replace an existing run in ``out``.
        suffix: Ends the name of a new folder.
    """

    out: Path | None
    runs: Path
    force: bool
    suffix: str = ""


class Work:
    """Begins, holds and goes on with runs; one that ends too early says so.

    Args:
        progress: Who to tell.
        tensorboard: Whether every epoch is logged for TensorBoard.
        wandb: Whether every epoch is logged for Weights & Biases.

    Raises:
        InputError: A tracker that is not installed.
    """

    def __init__(self, progress: Progress, *, tensorboard: bool, wandb: bool) -> None:
        check_trackers(tensorboard=tensorboard, wandb=wandb)
        self.progress, self._trackers = progress, {"tensorboard": tensorboard, "wandb": wandb}
        self._open: list[Run] = []
        self._resumed = False
        self._held = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        left = []
        with self._held:
            for run in self._open:
                if error is not None and read_info(run.folder).status == "running":
                    mark(run, "interrupted")
                    left.append(run)
        if isinstance(error, KeyboardInterrupt) and left:
            raise self._interrupted(left) from error

    def _interrupted(self, left: Sequence[Run]) -> Interrupted:
        """What is kept of runs, and how they go on; a command line that went on with one does so again."""
        epochs = {run.folder: kept_epoch(run.folder / STATE) for run in left}
        kept = ", ".join(
            f"{folder} is kept up to epoch {epoch}" if epoch else f"no epoch of {folder} was kept"
            for folder, epoch in epochs.items()
        )
        options = [f"--{name}" for name, wanted in self._trackers.items() if wanted]
        if PROCESSES in os.environ:
            options += ["--num-processes", os.environ[PROCESSES]]
        commands = [[run.info.kind, "--resume", str(run.folder), *options] for run in left]
        return Interrupted(kept, commands=() if self._resumed else commands)

    def start(self, info: RunInfo, config: Config, place: Place, *, name: str, device: str) -> Run:
        """Start a run in a folder of its own, which this process holds.

        Raises:
            InputError: As of :func:`~mmcli.pipeline.core.run.start_run`.
        """
        run = start_run(
            info, config, label=name + place.suffix, out=place.out, runs=place.runs, device=device, force=place.force
        )
        self.hold(run)
        self._open.append(run)
        return run

    def take_up(self, run: Run) -> tuple[Run, TrainingState | None]:
        """Go on with a run that this process holds: the run, and where it stood.

        Raises:
            InputError: A damaged state.
        """
        clean_up(run.folder)
        state = read_state(run.folder / STATE)
        after = f"going on after epoch {state.epoch}" if state else "no epoch was kept: from the start"
        self.progress.say(after + (f" and {state.batches} batches" if state and state.batches else ""))
        run = mark(run, "running")
        self._open.append(run)
        self._resumed = True
        return run, state

    def hold(self, run: Run) -> None:
        """Keep other processes from a run until this work ends."""
        self._held.enter_context(hold(run.folder))

    def trackers(self, run: Run, config: Config, *, after: int | None) -> list[Tracker]:
        """Who else is told of every epoch; ``after`` which one, where the run goes on."""
        return list(open_trackers(run.folder, config, **self._trackers, after=after, say=self.progress.say))
