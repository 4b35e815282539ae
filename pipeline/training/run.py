"""One run of a training: its folder, what is written after every epoch, and what is written at the end."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import RenderableType

from ...heads.hashing import binarise, pack_codes
from ...heads.model import BaseHead
from ..core.checkpoint import CheckpointKeeper, load_head, write_model_folder
from ..core.config import Config
from ..core.console import metrics_table
from ..core.files import append_text, write_text
from ..core.metrics_file import read_history, read_metrics
from ..core.progress import Progress
from ..core.results import Codes, write_codes
from ..core.run import Run, finish_run
from ..core.run_folders import RunPaths
from ..evaluation.metrics import classifier_row, write_scores
from .data import Split, encode_split
from .loop import FitResult, Hooks, summarise
from .monitor import CollapseWarnings
from .state import TrainingState, write_state
from .trackers import Tracker

LATENCY_QUERIES = 100


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run, how its training went, what chose the best epoch, and the classifier's row of metrics."""

    run: Run
    fit: FitResult
    monitor: str
    metrics: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Run, training and figures as one flat JSON object."""
        return {
            "run": str(self.run.folder),
            "store": self.run.info.store,
            "preset": self.run.info.preset,
            "seed": self.run.info.seed,
            "epochs": len(self.fit.history),
            "best_epoch": self.fit.best_epoch,
            "best_val_mAP": self.fit.best_value,
            "monitor": self.monitor,
            "stopped_early": self.fit.stopped_early,
            "seconds": self.fit.seconds,
            **self.metrics,
        }

    def summary(self) -> list[RenderableType]:
        """Lines and a table for the terminal."""
        ended = "stopped early" if self.fit.stopped_early else "all epochs done"
        how = f"{len(self.fit.history)} epochs in {self.fit.seconds:.1f} s ({ended})"
        best = f"best val mAP of the {self.monitor} {self.fit.best_value:.3f} in epoch {self.fit.best_epoch}"
        return [f"{how}; {best}", metrics_table([self.metrics], "test split"), f"wrote {self.run.folder}"]


class EpochMonitor(Protocol):
    """Evaluates a head in training, as :class:`~mmcli.pipeline.training.monitor.Monitor` does."""

    @property
    def prior(self) -> float:
        """Val mAP of scores that are the same for every image."""
        ...

    def __call__(self, head: BaseHead) -> Mapping[str, float]:
        """``val_mAP``, and whatever else is to be recorded."""
        ...


class TrainingRun:
    """A run that is under way: what is written after every epoch and at the end.

    Args:
        run: Its folder, which this process holds.
        config: The resolved configuration.
        splits: The splits of the store.
        monitor: Evaluates the head after every epoch.
        trackers: Experiment trackers that log every epoch.
        progress: Shows warnings of collapsed codes.
        state: The state that the training resumes from; None begins it.
    """

    def __init__(
        self,
        run: Run,
        config: Config,
        splits: Mapping[str, Split],
        monitor: EpochMonitor,
        *,
        trackers: Sequence[Tracker],
        progress: Progress,
        state: TrainingState | None = None,
    ) -> None:
        self.run, self.splits, self._config, self._monitor = run, splits, config, monitor
        self._trackers, self._progress = trackers, progress
        width = splits["train"].v_img.shape[-1]
        self._keeper = CheckpointKeeper(run.paths.checkpoints, config, width=width)
        self._warnings = CollapseWarnings(config, prior=monitor.prior, n_val=len(splits["val"]))
        # Epochs after the state are done again.
        self._keeper.resume(0 if state is None else state.epoch)
        write_text(run.paths.history, "".join(map(_line, () if state is None else state.history)))

    @property
    def hooks(self) -> Hooks:
        """What the training calls on its way."""
        return Hooks(monitor=self._monitor, on_epoch=self._record, keep=self._keep)

    def _keep(self, state: TrainingState) -> None:
        write_state(self.run.paths.state, state)
        self._keeper.sweep()

    def _record(self, head: BaseHead, record: Mapping[str, float]) -> None:
        append_text(self.run.paths.history, _line(record))
        self._keeper.offer(head, epoch=int(record["epoch"]), val_mAP=record["val_mAP"])
        for tracker in self._trackers:
            tracker.epoch(record)
        for line in self._warnings.lines(record):
            self._progress.say(line)

    def finish(self, fit: FitResult, image_ids: Mapping[str, Any]) -> TrainResult:
        """Write codes, scores, metrics and the model folder of the best epoch, then mark the run as finished.

        Args:
            fit: How the training went.
            image_ids: Image ids of every split, ``(n,)`` int64.
        """
        folder, config = self.run.folder, self._config
        head = load_head(self._keeper.best, self.splits["test"].device)
        codes = {split: self._write_codes(head, split, image_ids[split]) for split in self.splits}
        row = _classifier_row(self.run, head, codes, self.splits["test"])
        write_model_folder(folder, head, config, row)
        self._keeper.sweep()
        run = finish_run(self.run, [row])
        for tracker in self._trackers:
            tracker.finish(row)
        RunPaths(folder).state.unlink(missing_ok=True)
        return TrainResult(run=run, fit=fit, monitor=config.training.monitor, metrics=row)

    def _write_codes(self, head: BaseHead, split: str, image_id: Any) -> Codes:  # noqa: ANN401
        soft, logits = (tensor.cpu().numpy() for tensor in encode_split(head, self.splits[split]))
        norm_img, norm_txt = (norm.cpu().numpy() for norm in self.splits[split].norms())
        codes = Codes(
            image_id=image_id,
            soft=soft,
            packed=pack_codes(binarise(soft)) if self._config.hash.bits else None,
            labels=self.splits[split].own_labels.cpu().numpy(),
            logits=logits if split in {"val", "test"} else None,
            norm_img=norm_img,
            norm_txt=norm_txt,
        )
        write_codes(self.run.folder, split, codes)
        return codes


def read_fit(run: Run, config: Config) -> FitResult:
    """How the training of a finished run went."""
    return summarise(read_history(run.folder), config.training.num_epochs)


def read_result(run: Run, config: Config) -> TrainResult:
    """The result of a finished run."""
    row = next(row for row in read_metrics(run.folder) if (row["method"], row["split"]) == ("classifier", "test"))
    return TrainResult(run=run, fit=read_fit(run, config), monitor=config.training.monitor, metrics=row)


def _line(record: Mapping[str, float]) -> str:
    # A step that the loss scaler of float16 skips has an infinite gradient norm, which JSON has no word for.
    finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _classifier_row(run: Run, head: BaseHead, codes: Mapping[str, Codes], test: Split) -> dict[str, Any]:
    for split in ("val", "test"):
        probabilities = codes[split].probabilities
        assert probabilities is not None
        write_scores(run.folder, "classifier", split, codes[split].image_id, probabilities)
    row = classifier_row("test", codes["test"], val=codes["val"], run=run)
    return {**row, "query_latency_ms": _latency_ms(head, test)}


def _latency_ms(head: BaseHead, split: Split) -> float:
    """Mean time from one stored embedding to its scores, in milliseconds."""
    times = []
    with torch.inference_mode():
        for row in range(min(LATENCY_QUERIES, len(split))):
            started = time.perf_counter()
            v_img, v_txt, _ = split.batch(torch.tensor([row], device=split.device), 0)
            head(v_img, v_txt).logits.cpu()
            times.append(time.perf_counter() - started)
    return 1e3 * float(np.mean(times))
