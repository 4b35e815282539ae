"""Train head and towers from the images themselves; a run like any other comes out, with towers of its own.

What does not change is embedded once: with ``--unfreeze none`` everything, with ``--towers image`` every caption. The
rest goes through the towers in every step (:mod:`~mmcli.pipeline.finetuning.batches`) and is embedded anew for every
evaluation on val.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch

from ...errors import InputError
from ...heads.model import BaseHead
from ..core.config import Config, notices
from ..core.defaults import RUNS
from ..core.device import is_memory_shortage
from ..core.progress import Progress
from ..core.run import Run, mark, open_run, write_info
from ..core.run_folders import RunPaths
from ..extraction.siglip import local_digest
from ..training.data import Diverged, Split
from ..training.loop import FitResult, Hooks, Record, fit
from ..training.monitor import Monitor
from ..training.run import TrainingRun, TrainResult, read_result
from ..training.state import TrainingState, check_precision, read_state
from ..training.step import Step
from ..training.train_head import Place, RunSession
from .batches import TowerBatches, TowerStep
from .checkpoint import TowerKeeper, read_base, save_towers, write_record
from .distributed import device_here, open_group
from .memory import short_of_memory
from .settings import KIND, LogOptions, RunOptions, WhichTowers, read_begun, resolve_finetune
from .setup import Setup, set_up

# Above this mean cosine of two images the directions say hardly anything; towers of the miniature begin at 0.36.
ALIKE = 0.95
# ... and so much of the first distance to 1 that is left is a collapse.
LEFT = 0.5
# A state is as large as three times what is trained, and an epoch may take hours.
KEEP_WITHIN_S = 300.0


def finetune(
    config: Config,
    *,
    data: Path,
    unfreeze: str | None = None,
    towers: WhichTowers | None = None,
    start: Path | None = None,
    **options: Unpack[RunOptions],
) -> TrainResult:
    """Train a head, and the towers below it, on the images and captions of a manifest.

    Started in several processes (``torchrun``, ``accelerate launch``), each calls this and takes a share of every
    batch; the first one writes.

    Args:
        config: The configuration; its finetune section says what is not given here.
        data: The data set's folder, with ``manifest.parquet``.
        unfreeze: ``none``, ``last-N`` (the last N blocks with the last norm and the head of a tower) or ``all``.
        towers: Which towers are trained: ``both``, ``image`` or ``text``.
        start: A finished run of ``train-head`` or ``finetune`` whose head, and towers if it has any, are begun with.
        **options: Where the run is written (``out``, ``runs``, ``force``) and how its training reports
            (``tensorboard``, ``wandb``, ``progress``); see :class:`~mmcli.pipeline.finetuning.settings.RunOptions`.

    Raises:
        InputError: A bad manifest, image or checkpoint, keys that do not go together, a start of another encoder or
            data set, too little memory, or a loss that diverges.
    """
    config = resolve_finetune(config, unfreeze=unfreeze, towers=towers, start=start)
    place = Place(out=options.get("out"), runs=options.get("runs", RUNS), force=options.get("force", False))
    with _open_session(config, data, options) as (session, setup):
        for line in (*notices(setup.config), *setup.towers.summary()):
            session.progress.say(line)
        run = None
        if setup.group.is_first:
            head = "mlp" if config.head == "mlp" else f"b{config.hash.bits}-{config.fusion.type}"
            name, device = f"{head}-{config.finetune.unfreeze}", str(setup.group.device)
            run = session.start(setup.describe(KIND), setup.config, place, name=name, device=device)
        return _Training(session, setup, run).train()


def resume_finetuning(
    folder: Path,
    *,
    data: Path | None = None,
    memory: Mapping[str, Any] | None = None,
    device: str | None = None,
    **options: Unpack[LogOptions],
) -> TrainResult:
    """Resume an interrupted finetuning with its own configuration; a finished one is left as it is.

    Args:
        folder: The run; every process has to see it.
        data: Where its data set is now; where it was when not given.
        memory: Changes that need less memory for the same numbers; see
            :func:`~mmcli.pipeline.finetuning.settings.read_begun`.
        device: Where to compute; as configured where that device is here, else ``auto``.
        **options: How the training reports; see :class:`~mmcli.pipeline.finetuning.settings.LogOptions`.

    Raises:
        InputError: No run of ``finetune``, another data set or checkpoint, a damaged state; or as of :func:`finetune`.
    """
    info, config = read_begun(folder, {**(memory or {}), "hardware.device": device})
    if info.status == "finished":
        (options.get("progress") or Progress.quiet()).say(f"{folder} is finished already")
        return read_result(open_run(folder, kind=KIND), config)
    if device is None:
        hardware = config.hardware.model_copy(update={"device": device_here(config.hardware.device)})
        config = config.model_copy(update={"hardware": hardware})
    run: Run | None = Run(folder=folder, info=info)
    with _open_session(config, data or Path(info.store).parent, options, held=run) as (session, setup):
        if setup.digest(setup.towers.parts.identity) != read_base(folder, info).get("store_digest"):
            raise InputError(
                "cannot resume",
                where=folder,
                got="another data set or checkpoint",
                wanted="those of the run",
                do="name the data set's folder with --data, or train again",
            )
        check_precision(info.precision, setup.precision)
        state = read_state(RunPaths(folder).state)
        setup.group.barrier()  # nobody reads it while the first process writes it anew
        if run is not None and setup.group.is_first:
            run, state = session.resume(run)
        else:
            run = None
        return _Training(session, setup, run, state).train()


@contextmanager
def _open_session(
    config: Config, data: Path, options: LogOptions, *, held: Run | None = None
) -> Iterator[tuple[RunSession, Setup]]:
    """The processes have met, a run to resume is held by the first of them, and everything is loaded."""
    with open_group(config.hardware.device) as group:
        progress = (options.get("progress") if group.is_first else None) or Progress.quiet()
        trackers = {name: bool(options.get(name)) for name in ("tensorboard", "wandb")}
        with RunSession(progress, **trackers) as session:
            if held is not None and group.is_first:
                session.hold(held)
            with set_up(config, data, group, progress) as setup:
                yield session, setup


class _Training:
    """One finetuning, as one of its processes goes through it.

    Args:
        session: Holds the run.
        setup: What is trained, and on what.
        run: The run that this process writes; the first one alone does.
        state: The state that the training resumes from; None begins it.
    """

    def __init__(self, session: RunSession, setup: Setup, run: Run | None, state: TrainingState | None = None) -> None:
        self._session, self._setup, self._run, self._state = session, setup, run, state
        self._folder = Path(setup.group.broadcast_text("" if run is None else str(run.folder)))
        history = () if state is None else state.history
        self._keeper = TowerKeeper(
            RunPaths(self._folder).checkpoints, setup.shards, writes=setup.group.is_first, history=history
        )
        self._writer: TrainingRun | None = None

    def train(self) -> TrainResult:
        """Train, embed everything with the best towers, and write all that a run has."""
        setup, store = self._setup, self._setup.store
        first = Monitor(setup.config, store.splits["train"], store.splits["val"]).rows
        setup.embed({side: first if side in setup.changing else store.used for side in ("image", "text")})
        fitted = self._fit()
        setup.group.barrier()
        if setup.towers.trained:
            self._restore_best(fitted.best_epoch)
        setup.embed(dict.fromkeys(setup.changing, store.used))
        result = None
        if self._writer is not None:
            result = self._writer.finish(fitted, store.image_ids)
            self._keeper.remove()
        setup.group.barrier()
        return result or read_result(open_run(self._folder, kind=KIND), setup.config)

    def _fit(self) -> FitResult:
        """Train; a batch is all that one optimiser step sees."""
        setup, config = self._setup, self._setup.config
        training, splits = config.training, setup.splits()
        monitor = Monitor(config, splits["train"], splits["val"])
        head = setup.first_head(monitor)
        hooks = self._hooks(splits, LiveMonitor(setup, head, monitor, self._session.progress))
        whole = {"batch_size": training.batch_size * training.accumulation_steps, "accumulation_steps": 1}
        config = config.model_copy(update={"training": training.model_copy(update=whole)})
        make_step: Any = Step
        if setup.changing:
            batches = TowerBatches(setup.towers, setup.store, setup.config, setup.shards)
            make_step = partial(TowerStep, batches=batches)
        try:
            with self._session.progress.task("epochs", training.num_epochs) as task:
                return fit(head, splits["train"], config, hooks, task=task, resumed=self._state, make_step=make_step)
        except Diverged:
            if self._run is not None:
                mark(self._run, "failed")
            raise
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_memory_shortage(error):
                raise
            raise short_of_memory(setup.config, setup.group.device) from None

    def _hooks(self, splits: Mapping[str, Split], monitor: "LiveMonitor") -> Hooks:
        """What is called on the way; in other processes than the first, only what all of them do together."""
        written = None if self._run is None else self._begin_writing(self._run, splits, monitor)

        def on_epoch(head: BaseHead, record: Record) -> None:
            if written is not None:
                written.on_epoch(head, record)
            self._keeper.offer(int(record["epoch"]), record["val_mAP"])

        def keep(state: TrainingState) -> None:
            if written is not None and written.keep is not None:
                written.keep(state)
                self._keeper.sweep()

        # The state of shards is gathered from all processes, at moments that do not depend on a clock.
        sharded = self._setup.shards.sharded
        return Hooks(
            monitor=monitor,
            on_epoch=on_epoch,
            keep=keep if written is not None or sharded else None,
            keep_every_s=0.0 if sharded else None,
            keep_within_s=math.inf if sharded else KEEP_WITHIN_S,
        )

    def _begin_writing(self, run: Run, splits: Mapping[str, Split], monitor: "LiveMonitor") -> Hooks:
        setup, progress = self._setup, self._session.progress
        identity = setup.towers.parts.identity
        base = {"model": run.info.model, "revision": identity.revision, "store_digest": setup.digest(identity)}
        write_record(self._folder, setup.config, setup.towers, base)
        trackers = self._session.trackers(run, setup.config, self._state)
        self._writer = TrainingRun(
            run, setup.config, splits, monitor, trackers=trackers, progress=progress, state=self._state
        )
        return self._writer.hooks

    def _restore_best(self, epoch: int) -> None:
        """Take the towers of the best epoch, and write them as a checkpoint that the run then names as its own."""
        setup = self._setup
        trained = self._keeper.restore(epoch)
        if self._writer is not None:
            folder = save_towers(self._folder, setup.towers, trained)
            identity = replace(setup.towers.parts.identity, revision=local_digest(folder))
            run = self._writer.run
            self._writer.run = replace(run, info=replace(run.info, store_digest=setup.digest(identity)))
            write_info(self._writer.run)


class LiveMonitor:
    """The monitor of towers that change; warns once if they make all directions alike.

    Every process computes the head, and a GPU may round a sum differently each time. What is the best epoch and when to
    stop must not hang on that, so once an epoch all of them take the first one's weights and figures.

    Args:
        setup: What is trained, and on what.
        head: The head in training.
        monitor: Evaluates a head on embeddings.
        progress: Shows the warning.
    """

    def __init__(self, setup: Setup, head: BaseHead, monitor: Monitor, progress: Progress) -> None:
        self._setup, self._head, self._monitor, self.prior = setup, head, monitor, monitor.prior
        self._progress, self._warned = progress, False
        self._first = alikeness(setup.store.splits["val"])

    def __call__(self, head: BaseHead) -> dict[str, float]:
        """``val_mAP`` and facts of the codes, from towers as they are now; of trained ones how alike directions are."""
        self._take_weights(head)
        setup = self._setup
        if not setup.towers.sides:
            return self._take_figures(self._monitor(head))
        setup.embed(dict.fromkeys(setup.towers.sides, self._monitor.rows), quiet=True)
        figures = self._take_figures(self._monitor(head) | alikeness(setup.store.splits["val"]))
        self._warn(figures)
        return figures

    def _take_weights(self, head: BaseHead) -> None:
        """The first process's, of the head in training, its running average, and what of the towers all have whole."""
        shards = self._setup.shards
        whole = [value for name, value in shards.local.items() if not shards.is_part(name)]
        heads = {id(module): module for module in (self._head, head)}.values()
        tensors = [tensor for module in heads for tensor in (*module.parameters(), *module.buffers())]
        self._setup.group.broadcast([*tensors, *whole])

    def _take_figures(self, figures: Mapping[str, float]) -> dict[str, float]:
        values = torch.tensor(list(figures.values()), dtype=torch.float64, device=self._setup.group.device)
        self._setup.group.broadcast([values])
        return dict(zip(figures, values.tolist(), strict=True))

    def _warn(self, figures: Mapping[str, float]) -> None:
        for name, first in self._first.items():
            # Towers that begin with a high cosine are no worse for it.
            collapsed = figures[name] > ALIKE and 1 - figures[name] < LEFT * (1 - first)
            if collapsed and self._setup.config.loss.cosine_weight and not self._warned:
                self._warned = True
                self._progress.say(
                    f"warning: embeddings are collapsing: the mean cosine between any two images of val is"
                    f" {figures[name]:.2f} ({name}; {first:.2f} at the start); the cosine term has no negatives: lower"
                    " --alpha, or set it to 0"
                )


def alikeness(split: Split) -> dict[str, float]:
    """Mean cosine of the directions of any two images of a split, and of their first captions: ``|mean_n d_n|^2``."""
    vectors = {"img": split.v_img[split.rows], "txt": split.v_txt[split.rows, 0]}
    return {
        f"alike_{name}": float(torch.nn.functional.normalize(v.float(), dim=-1).mean(0).square().sum())
        for name, v in vectors.items()
    }
