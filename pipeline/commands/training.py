"""The commands that train a head from a store, and evaluate: train-head, knn-eval, zero-shot, compare."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..core.config import KeyOption, ProtocolName, resolve
from ..core.defaults import RUNS
from .options import (
    Force,
    Output,
    PrintConfig,
    RunDir,
    RunOut,
    Settings,
    Split,
    Store,
    Target,
    Trackers,
    command,
    option,
    parse_place,
    refuse_with_resume,
)


@command(
    "head",
    "hash.bits",
    "fusion.type",
    "fusion.magnitude",
    "fusion.block_norm",
    "fusion.inputs",
    "fusion.adapter",
    "loss.cosine_weight",
    "loss.hash_weight",
    "loss.focal_loss",
    "loss.class_weights",
    "training.num_epochs",
    "training.batch_size",
    "training.early_stopping_patience",
    "training.monitor",
    "training.ema_decay",
    "hardware.device",
    "hardware.seed",
    "hardware.deterministic",
    "preset",
    "data.split_type",
    "data.protocol_lists",
    "model.siglip2_variant",
    defaults={"model.siglip2_variant": "the store's"},
)
def train_head(
    settings: Settings,
    trackers: Trackers,
    output: Output,
    seeds: Annotated[
        int, option("--seeds N", "Train N replicas, with the seeds from --seed on.", "Device and seed", min=1)
    ] = 1,
    print_config: PrintConfig = False,
    store: Store = None,
    *,
    target: Target,
) -> None:
    """Stage 2: train a head from a store and write the codes of every split."""
    if target.resume is not None:
        options = {KeyOption(key).flag: value for key, value in settings.options.items()}
        others = {"--config": settings.file, "--set": settings.words, "--out": target.out, "--force": target.force}
        refuse_with_resume(
            {**options, **others, "--seeds": seeds > 1}, "--store, --tensorboard, --wandb, --json or --quiet"
        )
        if print_config:
            from ..core.run import begun_config

            settings = replace(settings, file=begun_config(target.resume))
    config = resolve(settings.load())
    if print_config:
        output.show_config(config)
        return
    from ..extraction.stores import Reading

    # Torch takes a second or two to import, and so does a large store to read.
    reading = None if target.resume is not None or seeds > 1 else Reading(store, config)
    from ..training import train_head as stage

    logged: dict[str, Any] = {**vars(trackers), "progress": output.progress}
    result: Any
    if target.resume is not None:
        result = stage.resume_training(target.resume, store=store, **logged)
    elif seeds > 1:
        result = stage.train_replicas(config, seeds=seeds, store=store, out=target.out, force=target.force, **logged)
    else:
        result = stage.train_head(config, store=reading, out=target.out, force=target.force, **logged)
    output.finish(result)


_LISTED = ("knn.K", "knn.distance_metric", "knn.voting_strategy", "knn.tau", "knn.theta")


@command(
    *_LISTED,
    "knn.predictor",
    "knn.ties",
    "knn.index",
    "hardware.device",
    listed=_LISTED,
    defaults={"": "the run's", "hardware.device": "auto"},
)
def knn_eval(
    settings: Settings,
    output: Output,
    run: RunDir = None,
    store: Annotated[
        Path | None,
        option("--store DIR", "Refuse a run that is not of this store's data set.", parser=parse_place),
    ] = None,
    split: Split = "test",
    protocol: Annotated[
        ProtocolName | None, option("--protocol", "Refuse a run that was trained with another protocol.")
    ] = None,
) -> None:
    """Stage 3: neighbours in the codes of a run vote for the tags; every metric goes to metrics.json.

    Where --k, --metric, --vote, --tau or --theta lists several values (or is `all`), every combination is evaluated
    from one search a metric, into knn_table.json.
    """
    from ..core.config import load_config
    from ..core.run import find_run
    from ..data.protocols import check_protocol

    source = find_run(run, store=store)
    file = source.paths.config
    if protocol is not None:
        check_protocol(protocol, load_config(file).data.split_type, where=source.folder)
    if settings.file is None:  # a run may have been trained on a device that this machine does not have
        settings = replace(settings, options={"hardware.device": "auto", **settings.options})
    config, sweep = settings.sweep(_LISTED, file)
    from ..evaluation import knn_eval as stage

    result: Any
    if sweep is None:
        result = stage.knn_eval(config, run=source, split=split, progress=output.progress)
    else:
        result = stage.knn_table(config, sweep, run=source, split=split, progress=output.progress)
    output.finish(result)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What images and captions are compared with."""

    inputs: Annotated[
        Literal["image", "text", "both"],
        option("--inputs", "What is compared with the prompts: the image, its caption, or both."),
    ] = "image"
    prompts: Annotated[
        Path | None, option("--prompts FILE", "Templates in the place of ours, one a line, with {} for the name.")
    ] = None
    print_prompts: Annotated[bool, option("--print-prompts", "Print the templates, score nothing.")] = False


@command(
    "data.split_type",
    "data.protocol_lists",
    "model.siglip2_variant",
    "model.revision",
    "hardware.device",
    defaults={"model.siglip2_variant": "the store's"},
)
def zero_shot(
    settings: Settings,
    prompts: Prompts,
    output: Output,
    store: Store = None,
    split: Split = "test",
    out: RunOut = None,
    force: Force = False,
) -> None:
    """Baseline without training: cosine with the mean of prompts for each category name."""
    from ..evaluation.prompts import TEMPLATES, read_prompts

    templates = TEMPLATES if prompts.prompts is None else read_prompts(prompts.prompts)
    if prompts.print_prompts:
        print(json.dumps({"prompts": templates}) if output.json_ else "\n".join(templates))
        return
    config = settings.load()
    from ..evaluation.zero_shot import zero_shot as stage

    result = stage(
        config,
        store=store,
        split=split,
        templates=templates,
        inputs=prompts.inputs,
        out=out,
        force=force,
        progress=output.progress,
    )
    output.finish(result)


@command()
def compare(
    output: Output,
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run.", show_default=False)],
    run_b: Annotated[
        Path,
        typer.Argument(metavar="RUN_B", help="A run to compare it with; the same for two methods.", show_default=False),
    ],
    method: Annotated[
        str | None,
        option(
            "--method",
            "Method of both: knn, classifier, zero-shot [default: knn where both have it, else classifier].",
        ),
    ] = None,
    method_a: Annotated[str | None, option("--method-a NAME", "Method of RUN_A alone.")] = None,
    method_b: Annotated[str | None, option("--method-b NAME", "Method of RUN_B alone.")] = None,
    split: Split = "test",
) -> None:
    """Is one run better than another? Paired bootstrap over the images that both scored."""
    from ..evaluation.compare import compare as stage

    output.finish(stage(run_a, run_b, method_a=method_a or method, method_b=method_b or method, split=split))


@command()
def runs(
    output: Output,
    folder: Annotated[Path, option("--runs DIR", "Folder of all runs.")] = RUNS,
    sort: Annotated[str, option("--sort", "created, name, knn, classifier or bits.")] = "created",
) -> None:
    """List runs with their data, preset, bits and mAP, and mark the one that other commands take by default."""
    from ..evaluation.run_list import list_runs

    output.finish(list_runs(folder, order=sort))
