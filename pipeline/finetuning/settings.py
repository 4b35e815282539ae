"""The configuration of ``mmcli finetune``, resolved before anything is loaded. Nothing here imports torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from ...errors import InputError
from ..core.config import Config, FinetuneConfig, load_config, resolve
from ..core.progress import Progress
from ..core.run import TRAINED, RunInfo, begun_config, open_run, read_info
from ..core.run_folders import RunPaths

WhichTowers = Literal["both", "image", "text"]
KIND = "finetune"
# What a resumed run may change: where it computes and how much memory it needs, but not what it computes.
RESUMABLE = {
    "training.batch_size": "--batch-size",
    "training.accumulation_steps": "--accumulation",
    "finetune.gradient_checkpointing": "--gradient-checkpointing",
    "finetune.batch_tokens": "--batch-tokens",
    "hardware.device": "--device",
}


class LogOptions(TypedDict, total=False):
    """How a training reports.

    Attributes:
        tensorboard: Log every epoch for TensorBoard, below the run folder.
        wandb: Log every epoch for Weights & Biases, below the run folder.
        progress: Progress bars; none by default.
    """

    tensorboard: bool
    wandb: bool
    progress: Progress | None


class RunOptions(LogOptions, total=False):
    """Where a run is written, and how its training reports.

    Attributes:
        out: The run folder; a new one below ``runs`` by default.
        runs: The folder of all runs; ``runs`` by default.
        force: Replace an existing run in ``out``.
    """

    out: Path | None
    runs: Path
    force: bool


def resolve_finetune(
    config: Config, *, unfreeze: str | None = None, towers: WhichTowers | None = None, start: Path | None = None
) -> Config:
    """The configuration of a finetuning, with what was asked for in its sections.

    ``model.freeze_towers`` becomes whether nothing of them is trained; a head that reads one modality takes one tower.

    Args:
        config: A checked configuration; its finetune section says what is not given here.
        unfreeze: ``none``, ``last-N`` or ``all``.
        towers: Which towers are trained.
        start: The run to begin with.

    Raises:
        InputError: An impossible value, or keys that do not go together.
    """
    given = config.finetune
    changes = {
        "unfreeze": unfreeze_of(config, unfreeze),
        "towers": towers or given.towers,
        "start": str(start) if start else given.start,
    }
    try:
        section = FinetuneConfig.model_validate({**given.model_dump(), **changes})
    except ValueError:
        raise InputError(
            "no such part of the towers",
            where="--unfreeze, --towers",
            got=f"{unfreeze}, {towers}",
            wanted="none, last-N with N from 1 on, or all; both, image or text",
            do="as in --unfreeze last-2",
        ) from None
    frozen, inputs = section.unfreeze == "none", config.fusion.inputs
    if not frozen and inputs != "both":
        if section.towers not in {"both", inputs}:
            raise InputError(
                "a tower that the head does not read",
                where="--towers",
                got=section.towers,
                wanted=f"{inputs}, with --inputs {inputs}",
                do="leave it out, or give --inputs both",
            )
        section = section.model_copy(update={"towers": inputs})
    if not frozen or section.augment:
        _check_live(config)
    model = config.model.model_copy(update={"freeze_towers": frozen})
    return resolve(config.model_copy(update={"finetune": section, "model": model}))


def _check_live(config: Config) -> None:
    """Refuse options that need frozen towers: a running average of the head, and shuffled magnitudes."""
    if config.training.ema_decay is not None:
        raise InputError(
            "no running average while the towers are trained",
            where="training.ema_decay",
            got=config.training.ema_decay,
            wanted="none, because the head would be averaged without the towers",
            do="leave it out, or give --unfreeze none",
        )
    if config.fusion.magnitude != "own":
        raise InputError(
            "no shuffled magnitudes while the towers are trained",
            where="fusion.magnitude",
            got=config.fusion.magnitude,
            wanted="own",
            do="leave it out, or give --unfreeze none",
        )


def read_begun(folder: Path, changes: Mapping[str, Any]) -> tuple[RunInfo, Config]:
    """The record of a run of ``finetune``, and the configuration with which it would be resumed.

    Args:
        folder: The run.
        changes: Values of the keys of ``RESUMABLE``; None keeps the run's. The product of ``training.batch_size`` and
            ``training.accumulation_steps`` stays.

    Raises:
        InputError: No run of ``finetune``, another batch, or a value that no configuration may have.
    """
    settings = begun_config(folder, kind=KIND)
    info = read_info(folder, kind=KIND)
    if info.kind != KIND:
        raise InputError("cannot resume", where=folder, got=f"a run of {info.kind}", wanted=f"a run of {KIND}")
    config = load_config(settings)
    before = config.training
    options = {key: value for key, value in changes.items() if value is not None}
    if options:
        config = load_config(options=options, flags=RESUMABLE, under=config.model_dump(mode="json"))
    now, batch = config.training, before.batch_size * before.accumulation_steps
    if now.batch_size * now.accumulation_steps != batch:
        raise InputError(
            "another batch",
            where=folder,
            got=f"{now.batch_size} x {now.accumulation_steps}",
            wanted=f"--batch-size times --accumulation {batch}, as it was begun",
            do="give both, or leave both out",
        )
    return info, config


def unfreeze_of(config: Config, option: str | None) -> str:
    """What is asked for: the option, else the file's ``finetune.unfreeze``, else ``none`` where it freezes towers."""
    if option is not None:
        return option
    says_unfreeze = "unfreeze" in config.finetune.model_fields_set
    says_frozen = "freeze_towers" in config.model.model_fields_set and config.model.freeze_towers
    return "none" if says_frozen and not says_unfreeze else config.finetune.unfreeze


def start_config(start: Path) -> dict[str, Any]:
    """Sections of a finished run that a finetuning which begins with it takes over, as a tree.

    The head is what it is, its protocol decides which images it has seen, and the towers are those of its embeddings.

    Raises:
        InputError: No finished run of a head.
    """
    open_run(start, kind=TRAINED[0])
    tree = load_config(RunPaths(start).config).model_dump(mode="json")
    kept = {name: tree[name] for name in ("preset", "head", "fusion", "hash", "loss", "classifier", "knn")}
    model = {key: tree["model"][key] for key in ("siglip2_variant", "revision", "max_num_patches", "text_max_length")}
    data = {key: tree["data"][key] for key in ("split_type", "protocol_lists")}
    return {**kept, "model": model, "data": data}
