"""What ``mmcli finetune`` is told, made consistent before anything is loaded. Nothing here imports torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ...errors import InputError
from ..core.config import Config, FinetuneConfig, load_config, resolve
from ..core.run import TRAINED, RunInfo, begun_config, open_run, read_info

WhichTowers = Literal["both", "image", "text"]
KIND = "finetune"
# What a run that goes on may be told: where it computes and what it needs of memory, not what it computes.
TOLD = {
    "training.batch_size": "--batch-size",
    "training.accumulation_steps": "--accumulation",
    "finetune.gradient_checkpointing": "--gradient-checkpointing",
    "finetune.batch_tokens": "--batch-tokens",
    "hardware.device": "--device",
}


def settle_finetune(config: Config, *, unfreeze: str, towers: WhichTowers, start: Path | None) -> Config:
    """The configuration of a finetuning, with what was asked for in its sections.

    ``model.freeze_towers`` becomes whether nothing of them is trained; a head that reads one modality takes one tower.

    Args:
        config: A checked configuration.
        unfreeze: ``none``, ``last-N`` or ``all``.
        towers: Which of them.
        start: The run to begin with.

    Raises:
        InputError: An impossible value, or keys that do not go together.
    """
    try:
        section = FinetuneConfig.model_validate(
            {**config.finetune.model_dump(), "unfreeze": unfreeze, "towers": towers, "start": start and str(start)}
        )
    except ValueError:
        raise InputError(
            "no such part of the towers",
            where="--unfreeze, --towers",
            got=f"{unfreeze}, {towers}",
            wanted="none, last-N with N from 1 on, or all; both, image or text",
            do="as in --unfreeze last-2",
        ) from None
    frozen = section.unfreeze == "none"
    read = config.fusion.inputs
    if not frozen and read != "both":
        if section.towers not in {"both", read}:
            raise InputError(
                "a tower that the head does not read",
                where="--towers",
                got=section.towers,
                wanted=f"{read}, with --inputs {read}",
                do="leave it out, or give --inputs both",
            )
        section = section.model_copy(update={"towers": read})
    if not frozen or section.augment:
        _check_live(config)
    model = config.model.model_copy(update={"freeze_towers": frozen})
    return resolve(config.model_copy(update={"finetune": section, "model": model}))


def _check_live(config: Config) -> None:
    """Refuse what only embeddings that stay the same can have."""
    if config.training.ema_decay is not None:
        raise InputError(
            "a running average of a head alone",
            where="training.ema_decay",
            got=config.training.ema_decay,
            wanted="none while towers are trained, because the head would be averaged without them",
            do="leave it out, or give --unfreeze none",
        )
    if config.fusion.magnitude != "own":
        raise InputError(
            "magnitudes of other images",
            where="fusion.magnitude",
            got=config.fusion.magnitude,
            wanted="own while embeddings change",
            do="leave it out, or give --unfreeze none",
        )


def with_memory(config: Config, memory: Mapping[str, Any], where: object) -> Config:
    """The configuration of a run that goes on, with other needs of memory and the same numbers.

    Args:
        config: As the run was configured.
        memory: Of the keys of ``TOLD``; the product of ``training.batch_size`` and ``training.accumulation_steps``
            stays. What is None was not given.
        where: The run, for messages.

    Raises:
        InputError: Another batch, or a value that no configuration may have.
    """
    before = config.training
    given = {key: value for key, value in memory.items() if value is not None}
    if given:
        config = load_config(options=given, flags=TOLD, under=config.model_dump(mode="json"))
    now, whole = config.training, before.batch_size * before.accumulation_steps
    if now.batch_size * now.accumulation_steps != whole:
        raise InputError(
            "another batch",
            where=where,
            got=f"{now.batch_size} x {now.accumulation_steps}",
            wanted=f"--batch-size times --accumulation {whole}, as it was begun",
            do="give both, or leave both out",
        )
    return config


def read_begun(folder: Path, told: Mapping[str, Any]) -> tuple[RunInfo, Config]:
    """What a run of ``finetune`` says of itself, and its configuration as it would go on.

    Args:
        folder: The run.
        told: As of :func:`with_memory`.

    Raises:
        InputError: No run of ``finetune``; or as of :func:`with_memory`.
    """
    settings = begun_config(folder, kind=KIND)
    info = read_info(folder, kind=KIND)
    if info.kind != KIND:
        raise InputError("cannot resume", where=folder, got=f"a run of {info.kind}", wanted=f"a run of {KIND}")
    return info, with_memory(load_config(settings), told, folder)


def unfreeze_of(config: Config, option: str | None) -> str:
    """What is asked for: the option, else the file's ``finetune.unfreeze``, else ``none`` where it freezes towers."""
    if option is not None:
        return option
    given = "unfreeze" in config.finetune.model_fields_set
    told = "freeze_towers" in config.model.model_fields_set and config.model.freeze_towers
    return "none" if told and not given else config.finetune.unfreeze


def start_config(start: Path) -> dict[str, Any]:
    """Sections of a finished run that a finetuning which begins with it takes over, as a tree.

    The head is what it is, its protocol decides which images it has seen, and the towers are those of its embeddings.

    Raises:
        InputError: No finished run of a head.
    """
    open_run(start, kind=TRAINED[0])
    tree = load_config(start / "config.yaml").model_dump(mode="json")
    kept = {name: tree[name] for name in ("preset", "head", "fusion", "hash", "loss", "classifier", "knn")}
    model = {key: tree["model"][key] for key in ("siglip2_variant", "revision", "max_num_patches", "text_max_length")}
    data = {key: tree["data"][key] for key in ("split_type", "protocol_lists")}
    return {**kept, "model": model, "data": data}
