"""``mmcli finetune``: head and towers are trained from the images themselves."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.config import KeyOption
from .options import (
    Images,
    Output,
    PrintConfig,
    Settings,
    Target,
    Trackers,
    command,
    option,
    refuse_with_resume,
)

if TYPE_CHECKING:
    from ..core.config import Config

# Keys that a resumed run may have other values of, beside its device: they change what it needs of memory, not what
# it computes.
_MEMORY = (
    "training.batch_size",
    "training.accumulation_steps",
    "finetune.gradient_checkpointing",
    "finetune.batch_tokens",
)


@command(
    "finetune.unfreeze",
    "finetune.towers",
    "optimizer.lr_towers",
    "finetune.layer_decay",
    "finetune.augment",
    "finetune.start",
    "hash.bits",
    "fusion.inputs",
    "loss.cosine_weight",
    "loss.hash_weight",
    "training.num_epochs",
    "training.batch_size",
    "training.accumulation_steps",
    "finetune.gradient_checkpointing",
    "finetune.batch_tokens",
    "training.early_stopping_patience",
    "training.monitor",
    "hardware.device",
    "hardware.seed",
    "hardware.deterministic",
    "data.num_workers",
    "preset",
    "data.split_type",
    "data.protocol_lists",
    "model.max_num_patches",
    "model.siglip2_variant",
    "model.revision",
)
def finetune(
    settings: Settings,
    images: Images,
    trackers: Trackers,
    output: Output,
    num_processes: Annotated[
        int,
        option(
            "--num-processes N",
            "Processes of this machine that share every batch, one a GPU; `torchrun ... -m mmcli finetune` starts them"
            " on several machines.",
            "Device and seed",
            min=1,
        ),
    ] = 1,
    print_config: PrintConfig = False,
    plan: Annotated[
        bool,
        option("--plan", "Print parameters, memory and the largest batch that fits, train nothing.", "Configuration"),
    ] = False,
    *,
    target: Target,
) -> None:
    """Train head and towers from the images themselves, into a run like any other; needs no store."""
    if num_processes > 1:
        from ..finetuning.distributed import launch, read_launch

        if read_launch().size == 1:  # the processes that it starts are given the same command line
            raise typer.Exit(launch(num_processes))
    logged: dict[str, Any] = {**vars(trackers), "progress": output.progress}
    if target.resume is not None:
        _refuse(settings, {"--out": target.out, "--force": target.force, "--plan": plan})
        if print_config:
            output.show_config(_begun(target.resume, settings))
            return
        result = _resume(target.resume, settings, images, logged)
    else:
        config = _resolve(settings)
        if print_config:
            output.show_config(config)
            return
        if plan:
            from ..finetuning.memory import plan_memory

            output.finish(plan_memory(config, data=images.folder, progress=output.progress))
            return
        result = _begin(config, images, target, logged)
    from ..finetuning.distributed import is_first

    if is_first():
        output.finish(result)


def _begin(config: "Config", images: Images, target: Target, logged: dict[str, Any]) -> Any:  # noqa: ANN401
    from ..finetuning.finetune import finetune as stage

    section = config.finetune
    return stage(
        config,
        data=images.folder,
        unfreeze=section.unfreeze,
        towers=section.towers,
        start=None if section.start is None else Path(section.start),
        out=target.out,
        force=target.force,
        **logged,
    )


def _refuse(settings: Settings, others: dict[str, Any]) -> None:
    fixed = {
        KeyOption(key).flag: value
        for key, value in settings.options.items()
        if key not in {*_MEMORY, "hardware.device"}
    }
    refuse_with_resume(
        {**fixed, "--config": settings.file, "--set": settings.words, **others},
        "--data, --device, --batch-size with --accumulation, --gradient-checkpointing, --batch-tokens,"
        " --num-processes, --print-config, trackers, --json or --quiet",
    )


def _begun(run: Path, settings: Settings) -> "Config":
    """The configuration that a run would be resumed with."""
    from ..finetuning.settings import read_begun

    return read_begun(run, settings.options)[1]


def _resume(run: Path, settings: Settings, images: Images, logged: dict[str, Any]) -> Any:  # noqa: ANN401
    from ..finetuning.finetune import resume_finetuning

    if images.follow_links and images.data is None:
        from ..core.run import read_info

        images = replace(images, data=Path(read_info(run).store).parent)
    return resume_finetuning(
        run,
        data=None if images.data is None else images.folder,
        memory={key: settings.options.get(key) for key in _MEMORY},
        device=settings.options.get("hardware.device"),
        **logged,
    )


def _resolve(settings: Settings) -> "Config":
    """The configuration; a run to begin with gives what goes with its head, under everything that is given."""
    from ..finetuning.settings import resolve_finetune, start_config

    config = settings.load()
    start = None if config.finetune.start is None else Path(config.finetune.start)
    if start is not None:
        kept, asked = start_config(start), config.model
        if "siglip2_variant" in asked.model_fields_set and asked.siglip2_variant != kept["model"]["siglip2_variant"]:
            del kept["model"]["revision"]  # it is one of the run's checkpoint
        config = settings.load(under=kept)
    return resolve_finetune(config, start=start)
