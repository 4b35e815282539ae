"""``mmcli finetune``: head and towers are trained from the images themselves."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ...errors import InputError
from .options import (
    FLAGS,
    ConfigFile,
    Device,
    FollowLinks,
    Force,
    Json,
    Model,
    PresetName,
    Quiet,
    Revision,
    RunOut,
    Seed,
    Set,
    data_folder,
    finish,
    make_progress,
    read_config,
    show_config,
)

if TYPE_CHECKING:
    from ..core.config import Config

# What a run that goes on may be told, beside its device: it changes what it needs of memory, not what it computes.
_MEMORY = (
    "training.batch_size",
    "training.accumulation_steps",
    "finetune.gradient_checkpointing",
    "finetune.batch_tokens",
)


def finetune(
    unfreeze: Annotated[
        str | None,
        typer.Option(
            "--unfreeze",
            metavar="none|last-N|all",
            rich_help_panel="Towers",
            help="What of the towers is trained: nothing, the last N blocks with the last norm and the head, or all [default: last-2].",
        ),
    ] = None,
    towers: Annotated[
        Literal["both", "image", "text"] | None,
        typer.Option("--towers", rich_help_panel="Towers", help="Which of them [default: both]."),
    ] = None,
    lr_towers: Annotated[
        float | None,
        typer.Option("--lr-towers", rich_help_panel="Towers", help="Peak learning rate of the towers [default: 1e-5]."),
    ] = None,
    layer_decay: Annotated[
        float | None,
        typer.Option(
            "--layer-decay",
            metavar="X",
            rich_help_panel="Towers",
            help="Factor of that rate from a block to the one below it [default: 1].",
        ),
    ] = None,
    augment: Annotated[
        bool | None,
        typer.Option(
            "--augment/--no-augment",
            rich_help_panel="Towers",
            help="Random crops of the image's own aspect ratio, and flips [default: off].",
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="RUN",
            rich_help_panel="Towers",
            help="Begin with the head of a run, and its towers if it has any.",
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            "--bits", rich_help_panel="Head and loss", help="Bits of the code, 0 or a multiple of 8 [default: 64]."
        ),
    ] = None,
    inputs: Annotated[
        Literal["both", "image", "text"] | None,
        typer.Option("--inputs", rich_help_panel="Head and loss", help="Modalities [default: both]."),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            "--alpha",
            rich_help_panel="Head and loss",
            help="Weight of the cosine term, which trains the towers [default: 1].",
        ),
    ] = None,
    gamma: Annotated[
        float | None,
        typer.Option(
            "--gamma", rich_help_panel="Head and loss", help="Weight of the hash terms [default: the preset's]."
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", rich_help_panel="Training", help="Epochs at most [default: 30].")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            rich_help_panel="Training",
            help="Images that are in memory at once [default: the preset's].",
        ),
    ] = None,
    accumulation: Annotated[
        int | None,
        typer.Option(
            "--accumulation",
            metavar="N",
            rich_help_panel="Training",
            help="So many times --batch-size are one batch; the same numbers as that batch at once [default: 1].",
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            rich_help_panel="Training",
            help="Compute activations again instead of keeping them [default: off].",
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            "--batch-tokens",
            min=1,
            rich_help_panel="Training",
            help="Patches or text tokens of one pass [default: what suits the device].",
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            "--patience",
            rich_help_panel="Training",
            help="Epochs without a better val mAP, from the 1,000th step on, before it stops; 0 never stops [default: 5].",
        ),
    ] = None,
    monitor: Annotated[
        Literal["knn", "classifier"] | None,
        typer.Option("--monitor", rich_help_panel="Training", help="What val mAP is computed from [default: knn]."),
    ] = None,
    device: Device = None,
    seed: Seed = None,
    deterministic: Annotated[
        bool | None,
        typer.Option(
            "--deterministic/--no-deterministic",
            rich_help_panel="Device and seed",
            help="Same bits twice, at some cost.",
        ),
    ] = None,
    num_processes: Annotated[
        int,
        typer.Option(
            "--num-processes",
            min=1,
            metavar="N",
            rich_help_panel="Device and seed",
            help="Processes of this machine that share every batch, one a GPU; `torchrun ... -m mmcli finetune` starts them on several machines.",
        ),
    ] = 1,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=0,
            rich_help_panel="Device and seed",
            help="Processes that read images [default: one a core with a GPU, else one for eight].",
        ),
    ] = None,
    preset: PresetName = None,
    config: ConfigFile = None,
    set_: Set = None,
    print_config: Annotated[
        bool,
        typer.Option(
            "--print-config",
            rich_help_panel="Configuration",
            help="Print the resolved configuration as YAML, train nothing.",
        ),
    ] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            rich_help_panel="Configuration",
            help="Print parameters, memory and the largest batch that fits, train nothing.",
        ),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="DIR", rich_help_panel="Data and run", help="Folder of the data set [default: data/coco]."
        ),
    ] = None,
    follow_links: FollowLinks = False,
    protocol: Annotated[
        Literal["karpathy", "coco14", "hashnet"] | None,
        typer.Option(
            "--protocol", rich_help_panel="Data and run", help="Which images train, tune and test [default: karpathy]."
        ),
    ] = None,
    protocol_lists: Annotated[
        str | None,
        typer.Option(
            "--protocol-lists",
            metavar="DIR",
            rich_help_panel="Data and run",
            help="Folder with database.txt, train.txt and test.txt of hashnet.",
        ),
    ] = None,
    patches: Annotated[
        int | None,
        typer.Option(
            "--patches", rich_help_panel="Data and run", help="Patch budget of a NaFlex checkpoint [default: 256]."
        ),
    ] = None,
    model: Model = None,
    revision: Revision = None,
    out: RunOut = None,
    force: Force = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="RUN",
            rich_help_panel="Data and run",
            help="Go on with an interrupted run, as it was configured.",
        ),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Log every epoch for TensorBoard, in the run folder.")
    ] = False,
    wandb: Annotated[
        bool, typer.Option("--wandb", help="Log every epoch for Weights & Biases; offline without a login.")
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train head and towers from the images themselves, into a run like any other; needs no store."""
    options = {
        "preset": preset,
        "hash.bits": bits,
        "fusion.inputs": inputs,
        "loss.cosine_weight": alpha,
        "loss.hash_weight": gamma,
        "optimizer.lr_towers": lr_towers,
        "finetune.layer_decay": layer_decay,
        "finetune.augment": augment,
        "finetune.gradient_checkpointing": gradient_checkpointing,
        "finetune.batch_tokens": batch_tokens,
        "finetune.unfreeze": unfreeze,
        "finetune.towers": towers,
        "training.num_epochs": epochs,
        "training.batch_size": batch_size,
        "training.accumulation_steps": accumulation,
        "training.early_stopping_patience": patience,
        "training.monitor": monitor,
        "model.siglip2_variant": model,
        "model.revision": revision,
        "model.max_num_patches": patches,
        "data.split_type": protocol,
        "data.protocol_lists": protocol_lists,
        "data.num_workers": workers,
        "hardware.device": device,
        "hardware.seed": seed,
        "hardware.deterministic": deterministic,
    }
    told: dict[str, Any] = {"tensorboard": tensorboard, "wandb": wandb, "progress": make_progress(quiet)}
    if num_processes > 1:
        from ..finetuning.distributed import launch, read_launch

        if read_launch().size == 1:  # the processes that it starts are given the same command line
            raise typer.Exit(launch(num_processes))
    if resume is not None:
        kept = {FLAGS[key]: value for key, value in options.items() if key not in {*_MEMORY, "hardware.device"}}
        others = {"--config": config, "--set": set_, "--out": out, "--force": force or None, "--from": start}
        _refuse_with_resume({**kept, **others, "--plan": plan or None})
        memory = {key: options[key] for key in _MEMORY}
        if print_config:
            from ..finetuning.settings import read_begun

            show_config(read_begun(resume, {**memory, "hardware.device": device})[1], json_)
            return
        from ..finetuning.finetune import resume_finetuning

        if follow_links:
            from ..core.run import read_info

            data = data_folder(data or Path(read_info(resume).store).parent, follow_links)
        result = resume_finetuning(resume, data=data, memory=memory, device=device, **told)
    else:
        resolved = _resolve(config, set_, options, start)
        if print_config:
            show_config(resolved, json_)
            return
        folder = data_folder(data or Path("data/coco"), follow_links)
        if plan:
            from ..finetuning.memory import plan_memory

            planned = plan_memory(resolved, data=folder, progress=told["progress"])
            finish(planned.to_json(), json_, *planned.summary())
            return
        from ..finetuning.finetune import finetune as stage

        section = resolved.finetune
        begun = None if section.start is None else Path(section.start)
        result = stage(
            resolved,
            data=folder,
            unfreeze=section.unfreeze,
            towers=section.towers,
            start=begun,
            out=out,
            force=force,
            **told,
        )
    from ..finetuning.distributed import is_first

    if is_first():
        finish(result.to_json(), json_, *result.summary())


def _resolve(
    config: Path | None, settings: list[str] | None, options: Mapping[str, Any], start: Path | None
) -> "Config":
    """The configuration; a run to begin with gives what goes with its head, under everything that is given."""
    from ..finetuning.settings import resolve_finetune, start_config

    base = read_config(config, settings, options)
    begun = start or (None if base.finetune.start is None else Path(base.finetune.start))
    if begun is not None:
        kept, asked = start_config(begun), base.model
        if "siglip2_variant" in asked.model_fields_set and asked.siglip2_variant != kept["model"]["siglip2_variant"]:
            del kept["model"]["revision"]  # it is one of the run's checkpoint
        base = read_config(config, settings, options, under=kept)
    return resolve_finetune(base, start=begun)


def _refuse_with_resume(given: Mapping[str, Any]) -> None:
    """A run is gone on with as it was configured: what would configure it otherwise is refused."""
    for option, value in given.items():
        if value is not None:
            raise InputError(
                "an interrupted run keeps its configuration",
                where="--resume",
                got=option,
                wanted="--data, --device, --batch-size with --accumulation, --gradient-checkpointing, --batch-tokens,"
                " --num-processes, --print-config, trackers, --json or --quiet beside it",
                do="leave it out, or start a new run",
            )
