"""Train head and towers from the images themselves; a run like any other comes out, with towers of its own.

What does not change is embedded once: with ``--unfreeze none`` everything, with ``--towers image`` every caption. The
rest goes through the towers in every step (:mod:`~mmcli.pipeline.finetuning.batches`) and is embedded anew
to look at val.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...heads.model import BaseHead
from ..core.config import Config
from ..core.config_rules import notices
from ..core.device import is_memory_shortage
from ..core.progress import Progress
from ..core.run import Run, mark, open_run, write_info
from ..extraction.siglip import local_digest
from ..training.data import Diverged, Split
from ..training.loop import FitResult, Hooks, Record, fit
from ..training.monitor import Monitor
from ..training.run import TrainingRun, TrainResult, read_result
from ..training.state import STATE, TrainingState, check_precision, read_state
from ..training.step import Step
from ..training.train_head import Place, RunSession
from .batches import Feed, TowerStep
from .checkpoint import TowerKeeper, base_of, save_towers, write_record
from .distributed import device_here, open_team
from .memory import short_of_memory
from .settings import KIND, WhichTowers, read_begun, settle_finetune
from .setup import Live, describe, digest_of, set_up

# Above this mean cosine of two images the directions say hardly anything; towers of the miniature begin at 0.36.
ALIKE = 0.95
# ... and so much of the first distance to 1 that is left is a collapse.
LEFT = 0.5


class LiveMonitor:
    """The monitor of towers that change; says once if they make everything alike.

    Every process of a team computes the head, and a GPU may round a sum differently each time. What is the best epoch
    and when to stop must not hang on that, so once an epoch all of them take the first one's weights and figures.

    Args:
        live: What is trained, and on what.
        head: The head in training.
        inner: Looks at a head.
        progress: Who to tell.
    """

    def __init__(self, live: Live, head: BaseHead, inner: Monitor, progress: Progress) -> None:
        self._live, self._head, self._inner, self.prior = live, head, inner, inner.prior
        self._progress, self._told = progress, False
        self._alpha = live.config.loss.cosine_weight
        self._first = alikeness(live.store.splits["val"])

    def __call__(self, head: BaseHead) -> dict[str, float]:
        """``val_mAP`` and facts of the codes, from towers as they are now; of trained ones how alike directions are."""
        self._take_weights(head)
        if not self._live.towers.sides:
            return self._take_figures(self._inner(head))
        self._embed()
        found = self._take_figures(self._inner(head) | alikeness(self._live.store.splits["val"]))
        self._warn(found)
        return found

    def _embed(self) -> None:
        store, sides = self._live.store, self._live.towers.sides
        self._live.shards.gather()
        store.renew()
        if "image" in sides:
            store.embed_images(self._inner.rows, None)
        if "text" in sides:
            store.embed_captions(self._inner.rows, None)
        self._live.shards.scatter()

    def _take_weights(self, head: BaseHead) -> None:
        """The first process's, of the head in training, its running average, and what of the towers all have whole."""
        shards = self._live.shards
        whole = [value for name, value in shards.local.items() if not shards.is_part(name)]
        heads = {id(one): one for one in (self._head, head)}.values()
        tensors = [tensor for one in heads for tensor in (*one.parameters(), *one.buffers())]
        self._live.team.broadcast_([*tensors, *whole])

    def _take_figures(self, found: Mapping[str, float]) -> dict[str, float]:
        values = torch.tensor(list(found.values()), dtype=torch.float64, device=self._live.team.device)
        self._live.team.broadcast_([values])
        return dict(zip(found, values.tolist(), strict=True))

    def _warn(self, found: Mapping[str, float]) -> None:
        for name, first in self._first.items():
            # Towers that begin with a high one are no worse for it.
            collapsed = found[name] > ALIKE and 1 - found[name] < LEFT * (1 - first)
            if collapsed and self._alpha and not self._told:
                self._told = True
                self._progress.say(
                    f"warning: the directions of any two of val have a mean cosine of {found[name]:.2f} ({name}), at"
                    f" first {first:.2f}: the cosine term has no negatives and draws all of them together; lower"
                    " --alpha, 0 leaves it out"
                )


def alikeness(split: Split) -> dict[str, float]:
    """Mean cosine of the directions of any two images of a split, and of their first captions: ``|mean_n d_n|^2``."""
    given = {"img": split.v_img[split.rows], "txt": split.v_txt[split.rows, 0]}
    return {
        f"alike_{name}": float(torch.nn.functional.normalize(v.float(), dim=-1).mean(0).square().sum())
        for name, v in given.items()
    }


RUNS = Path("runs")
# A state is as large as three times what is trained, and an epoch may take hours.
KEEP_WITHIN_S = 300.0


def finetune(
    config: Config,
    *,
    data: Path,
    unfreeze: str = "last-2",
    towers: WhichTowers = "both",
    start: Path | None = None,
    out: Path | None = None,
    runs: Path = RUNS,
    force: bool = False,
    tensorboard: bool = False,
    wandb: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a head, and the towers below it, on the images and captions of a manifest.

    Started in several processes (``accelerate launch``), each calls this and takes a share of every batch; the first
    one writes.

    Args:
        config: Everything is used; the arguments here override its finetune section.
        data: The data set's folder, with ``manifest.parquet``.
        unfreeze: ``none``, ``last-N`` (the last N blocks with the last norm and the head of a tower) or ``all``.
        towers: Which of them.
        start: A finished run of ``train-head`` or ``finetune`` whose head, and towers if it has any, are begun with.
        out: The run folder; a new one below ``runs`` when not given.
        runs: The folder of all runs.
        force: Replace an existing run in ``out``.
        tensorboard: Log every epoch for TensorBoard, below the run folder.
        wandb: Log every epoch for Weights & Biases, likewise.
        progress: Who to tell.

    Raises:
        InputError: A bad manifest, image or checkpoint, keys that do not go together, a start of another encoder or
            data set, too little memory, or a loss that diverges.
    """
    config = settle_finetune(config, unfreeze=unfreeze, towers=towers, start=start)
    place = Place(out=out, runs=runs, force=force)
    with _at_work(config, data, progress, tensorboard=tensorboard, wandb=wandb) as (work, live):
        for line in (*notices(live.config), *live.towers.summary()):
            work.progress.say(line)
        run = None
        if live.team.first:
            head = "mlp" if config.head == "mlp" else f"b{config.hash.bits}-{config.fusion.type}"
            name = f"{head}-{config.finetune.unfreeze}"
            run = work.start(describe(KIND, live), live.config, place, name=name, device=str(live.team.device))
        return _Training(work, live, run).finish(None)


def resume_finetuning(
    folder: Path,
    *,
    data: Path | None = None,
    memory: Mapping[str, Any] | None = None,
    device: str | None = None,
    tensorboard: bool = False,
    wandb: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Go on with a finetuning that was interrupted, as it was configured; a finished one is left as it is.

    Args:
        folder: The run; every process has to see it.
        data: Where its data set is now; where it was when not given.
        memory: As of :func:`~mmcli.pipeline.finetuning.settings.with_memory`.
        device: Where to compute; as configured where that is here, else ``auto``.
        tensorboard: As of :func:`finetune`.
        wandb: Likewise.
        progress: Who to tell.

    Raises:
        InputError: No run of ``finetune``, another data set or checkpoint, a damaged state; or as of :func:`finetune`.
    """
    info, config = read_begun(folder, {**(memory or {}), "hardware.device": device})
    if info.status == "finished":
        (progress or Progress()).say(f"{folder} is finished already")
        return read_result(open_run(folder, kind=KIND), config)
    if device is None:
        hardware = config.hardware.model_copy(update={"device": device_here(config.hardware.device)})
        config = config.model_copy(update={"hardware": hardware})
    run = Run(folder=folder, info=info)
    data = data or Path(info.store).parent
    with _at_work(config, data, progress, tensorboard=tensorboard, wandb=wandb, held=run) as (work, live):
        if digest_of(live, live.towers.parts.identity) != base_of(folder, info).get("store_digest"):
            raise InputError(
                "cannot resume",
                where=folder,
                got="another data set or checkpoint",
                wanted="those of the run",
                do="name the data set's folder with --data, or train again",
            )
        check_precision(info.precision, live.precision)
        state = read_state(folder / STATE)
        live.team.wait()  # nobody reads it while the first process writes it anew
        if live.team.first:
            run, state = work.resume(run)
        return _Training(work, live, run if live.team.first else None).finish(state)


@contextmanager
def _at_work(
    config: Config, data: Path, progress: Progress | None, *, tensorboard: bool, wandb: bool, held: Run | None = None
) -> Iterator[tuple[RunSession, Live]]:
    """The processes are together, a run to go on with is held by the first of them, and everything is loaded."""
    with open_team(config.hardware.device) as team:
        told = (progress or Progress()) if team.first else Progress()
        with RunSession(told, tensorboard=tensorboard, wandb=wandb) as work:
            if held is not None and team.first:
                work.hold(held)
            with set_up(config, data, team, told) as live:
                yield work, live


class _Training:
    """One finetuning, as one of its processes goes through it; that of the first has the run."""

    def __init__(self, work: RunSession, live: Live, run: Run | None) -> None:
        self._work, self._live, self._run = work, live, run
        self._team, self._config = live.team, live.config
        self._folder = Path(live.team.tell("" if run is None else str(run.folder)))
        self._keeper = TowerKeeper(self._folder / "checkpoints", live.shards, writes=live.team.first)
        self._writer: TrainingRun | None = None

    def finish(self, state: TrainingState | None) -> TrainResult:
        """Train, embed everything with the best towers, and write all that a run has."""
        live, team = self._live, self._team
        live.embed()
        fitted = self._fit(state)
        team.wait()
        if live.towers.trained:
            self._keeper.restore(fitted.best_epoch)
            trained = live.shards.wholes()
            if self._writer is not None:
                self._writer.run = self._save(self._writer.run, trained)
            live.shards.gather()
            live.store.renew()
        for side in sorted(live.changing):  # in one order in all processes
            embed = live.store.embed_images if side == "image" else live.store.embed_captions
            embed(live.store.used)
        result = None
        if self._writer is not None:
            result = self._writer.finish(fitted, live.store.image_ids)
            self._keeper.remove()
        team.wait()
        return result or read_result(open_run(self._folder, kind=KIND), self._config)

    def _hooks(self, head: BaseHead, splits: Mapping[str, Split], inner: Monitor, state: TrainingState | None) -> Hooks:
        live = self._live
        monitor = LiveMonitor(live, head, inner, self._work.progress)
        self._keeper.take_up(_best_epoch(state))
        hooks = None if self._run is None else self._begin_writing(self._run, splits, monitor, state)
        values = [float(record["val_mAP"]) for record in (() if state is None else state.history)]

        def on_epoch(head: BaseHead, record: Record) -> None:
            if hooks is not None:
                hooks.on_epoch(head, record)
            if live.towers.trained:
                self._keeper.offer(int(record["epoch"]), best=record["val_mAP"] > max(values, default=-1.0))
            values.append(record["val_mAP"])

        def keep(state: TrainingState) -> None:
            if hooks is not None and hooks.keep is not None:
                hooks.keep(state)
                self._keeper.sweep()

        sharded = live.shards.sharded
        return Hooks(
            monitor=monitor,
            on_epoch=on_epoch,
            # To keep a state of shards all processes have to be there, at moments that do not depend on a clock.
            keep=keep if hooks is not None or sharded else None,
            keep_every_s=0.0 if sharded else None,
            keep_within_s=math.inf if sharded else KEEP_WITHIN_S,
        )

    def _begin_writing(
        self, run: Run, splits: Mapping[str, Split], monitor: LiveMonitor, state: TrainingState | None
    ) -> Hooks:
        live, config = self._live, self._config
        identity = live.towers.parts.identity
        base = {"model": run.info.model, "revision": identity.revision, "store_digest": digest_of(live, identity)}
        write_record(self._folder, config, live.towers, base)
        trackers = self._work.trackers(run, config, state)
        self._writer = TrainingRun(
            run, config, splits, monitor, trackers=trackers, progress=self._work.progress, state=state
        )
        return self._writer.hooks

    def _fit(self, state: TrainingState | None) -> FitResult:
        """Train; a batch is all that one optimiser step sees."""
        live, config = self._live, self._config
        training = config.training
        whole = {"batch_size": training.batch_size * training.accumulation_steps, "accumulation_steps": 1}
        config = config.model_copy(update={"training": training.model_copy(update=whole)})
        make_step: Any = Step
        if live.changing:
            make_step = partial(TowerStep, feed=Feed(live.towers, live.store, self._config, live.shards))
        splits = live.splits()
        inner = Monitor(config, splits["train"], splits["val"])
        head = live.first_head(inner)
        hooks = self._hooks(head, splits, inner, state)
        try:
            with self._work.progress.task("epochs", training.num_epochs) as task:
                return fit(head, splits["train"], config, hooks, task=task, resumed=state, make_step=make_step)
        except Diverged:
            if self._run is not None:
                mark(self._run, "failed")
            raise
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_memory_shortage(error):
                raise
            raise short_of_memory(self._config, self._team.device) from None

    def _save(self, run: Run, trained: Mapping[str, Tensor]) -> Run:
        """Write the best towers, and let the run say whose codes it has."""
        folder = save_towers(run.folder, self._live.towers, trained)
        identity = replace(self._live.towers.parts.identity, revision=local_digest(folder))
        saved = replace(run, info=replace(run.info, store_digest=digest_of(self._live, identity)))
        write_info(saved)
        return saved


def _best_epoch(state: TrainingState | None) -> int:
    best = max(state.history if state else (), key=lambda record: record["val_mAP"], default=None)
    return 0 if best is None else int(best["epoch"])
