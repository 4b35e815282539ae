"""The commands that train and evaluate: train-head, knn-eval, zero-shot."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ...errors import InputError
from .options import (
    FLAGS,
    ConfigFile,
    Device,
    Force,
    GuardStore,
    Json,
    Model,
    PresetName,
    Quiet,
    Revision,
    RunDir,
    RunOut,
    Seed,
    Set,
    Split,
    Store,
    finish,
    make_progress,
    read_config,
    read_sweep,
    show_config,
)


def train_head(
    head: Annotated[
        Literal["fusion", "mlp"] | None,
        typer.Option(
            "--head", rich_help_panel="Head", help="The head, or the MLP it is compared with [default: fusion]."
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option("--bits", rich_help_panel="Head", help="Bits of the code, 0 or a multiple of 8 [default: 64]."),
    ] = None,
    fusion: Annotated[
        Literal["concat", "hadamard", "hadamard_magnitude"] | None,
        typer.Option("--fusion", rich_help_panel="Head", help="Fusion input [default: hadamard_magnitude]."),
    ] = None,
    magnitude: Annotated[
        Literal["own", "shuffled"] | None,
        typer.Option("--magnitude", rich_help_panel="Head", help="Control: log-norms of another image [default: own]."),
    ] = None,
    block_norm: Annotated[
        Literal["none", "rms"] | None,
        typer.Option(
            "--block-norm", rich_help_panel="Head", help="Scale of the fusion's blocks [default: the preset's]."
        ),
    ] = None,
    inputs: Annotated[
        Literal["both", "image", "text"] | None,
        typer.Option("--inputs", rich_help_panel="Head", help="Modalities [default: both]."),
    ] = None,
    adapter: Annotated[
        Literal["none", "linear"] | None,
        typer.Option("--adapter", rich_help_panel="Head", help="Trainable map on the embeddings [default: none]."),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", rich_help_panel="Loss", help="Weight of the cosine term [default: 1].")
    ] = None,
    gamma: Annotated[
        float | None,
        typer.Option("--gamma", rich_help_panel="Loss", help="Weight of the hash terms [default: the preset's]."),
    ] = None,
    focal: Annotated[
        bool | None,
        typer.Option("--focal/--no-focal", rich_help_panel="Loss", help="Focal loss in the place of cross-entropy."),
    ] = None,
    class_weights: Annotated[
        Literal["none", "balanced"] | None,
        typer.Option("--class-weights", rich_help_panel="Loss", help="Weights of positives [default: none]."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", rich_help_panel="Training", help="Epochs at most [default: 30].")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", rich_help_panel="Training", help="Images per step [default: the preset's]."),
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
    ema: Annotated[
        float | None,
        typer.Option(
            "--ema",
            metavar="DECAY",
            rich_help_panel="Training",
            help="Moving average of the parameters, as 0.999 [default: off].",
        ),
    ] = None,
    device: Device = None,
    seed: Seed = None,
    seeds: Annotated[
        int,
        typer.Option(
            "--seeds",
            min=1,
            metavar="N",
            rich_help_panel="Device and seed",
            help="Replicas, of N seeds from --seed on.",
        ),
    ] = 1,
    deterministic: Annotated[
        bool | None,
        typer.Option(
            "--deterministic/--no-deterministic",
            rich_help_panel="Device and seed",
            help="Same bits twice, at some cost.",
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
    protocol: Annotated[
        Literal["karpathy", "coco14", "hashnet"] | None,
        typer.Option(
            "--protocol", rich_help_panel="Store and run", help="Which images train, tune and test [default: karpathy]."
        ),
    ] = None,
    protocol_lists: Annotated[
        str | None,
        typer.Option(
            "--protocol-lists",
            metavar="DIR",
            rich_help_panel="Store and run",
            help="Folder with database.txt, train.txt and test.txt of hashnet.",
        ),
    ] = None,
    store: Store = None,
    model: Model = None,
    out: RunOut = None,
    force: Force = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="RUN",
            rich_help_panel="Store and run",
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
    """Stage 2: train a head from a store and write the codes of every split."""
    options = {
        "preset": preset,
        "head": head,
        "hash.bits": bits,
        "fusion.type": fusion,
        "fusion.magnitude": magnitude,
        "fusion.block_norm": block_norm,
        "fusion.inputs": inputs,
        "fusion.adapter": adapter,
        "loss.cosine_weight": alpha,
        "loss.hash_weight": gamma,
        "loss.focal_loss": focal,
        "loss.class_weights": class_weights,
        "training.num_epochs": epochs,
        "training.batch_size": batch_size,
        "training.early_stopping_patience": patience,
        "training.monitor": monitor,
        "training.ema_decay": ema,
        "model.siglip2_variant": model,
        "data.split_type": protocol,
        "data.protocol_lists": protocol_lists,
        "hardware.device": device,
        "hardware.seed": seed,
        "hardware.deterministic": deterministic,
    }
    if resume is not None:
        others = {
            "--config": config,
            "--set": set_,
            "--out": out,
            "--force": force or None,
            "--seeds": seeds - 1 or None,
        }
        _refuse_with_resume({**{FLAGS[key]: value for key, value in options.items()}, **others})
        from ..core.run import begun_config

        config = begun_config(resume) if print_config else None
    from ..core.config_rules import settle

    resolved = settle(read_config(config, set_, options))
    if print_config:
        show_config(resolved, json_)
        return
    from ..extraction.stores import Reading

    # Torch takes a second or two to import, and so does a large store to read.
    reading = None if resume is not None or seeds > 1 else Reading(store, resolved)
    from ..training import train_head as stage

    told: dict[str, Any] = {"tensorboard": tensorboard, "wandb": wandb, "progress": make_progress(quiet)}
    result: Any
    if resume is not None:
        result = stage.resume_training(resume, store=store, **told)
    elif seeds > 1:
        result = stage.train_replicas(resolved, seeds=seeds, store=store, out=out, force=force, **told)
    else:
        result = stage.train_head(resolved, store=reading, out=out, force=force, **told)
    finish(result.to_json(), json_, *result.summary())


def knn_eval(
    run: RunDir = None,
    store: GuardStore = None,
    split: Split = "test",
    predictor: Annotated[
        Literal["knn", "classifier", "hybrid"] | None,
        typer.Option(
            "--predictor", help="Neighbours, classifier, or their mix, its weight tuned on val [default: knn]."
        ),
    ] = None,
    k: Annotated[str | None, typer.Option("--k", metavar="N,..", help="Neighbours that vote [default: 20].")] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            metavar="NAME,..",
            help="hamming, cosine, hybrid, asymmetric, or all [default: hamming; cosine without hash].",
        ),
    ] = None,
    vote: Annotated[
        str | None,
        typer.Option("--vote", metavar="NAME,..", help="softmax, uniform, rank, threshold, or all [default: softmax]."),
    ] = None,
    tau: Annotated[
        str | None, typer.Option("--tau", metavar="X,..", help="Temperature of the softmax vote [default: 0.07].")
    ] = None,
    theta: Annotated[
        str | None,
        typer.Option("--theta", metavar="X,..", help="Least similarity of the threshold vote [default: 0.5]."),
    ] = None,
    ties: Annotated[
        Literal["index", "average"] | None,
        typer.Option(
            "--ties",
            help="Who votes among equals at the boundary: the lower index, or all of them share [default: index].",
        ),
    ] = None,
    index: Annotated[
        Literal["auto", "flat", "fastscan", "torch", "gpu", "ivf", "hnsw", "multihash"] | None,
        typer.Option("--index", help="How packed codes are searched [default: auto, the fastest that is exact]."),
    ] = None,
    protocol: Annotated[
        Literal["karpathy", "coco14", "hashnet"] | None,
        typer.Option("--protocol", help="Refuse a run that was trained with another protocol."),
    ] = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Set = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Stage 3: neighbours in the codes of a run vote for the tags; every metric goes to metrics.json.

    Where --k, --metric, --vote, --tau or --theta lists several values, every combination is evaluated from one search a
    metric, into knn_table.json.
    """
    from ..core.config import load_config
    from ..data.protocols import check_protocol
    from ..evaluation.knn_eval import find_run

    found = find_run(run, store=store)
    file = config or found.folder / "config.yaml"
    if protocol is not None:
        trained = load_config(found.folder / "config.yaml").data.split_type
        check_protocol(protocol, trained, where=found.folder)
    # A run may have been trained on a device that this machine does not have.
    here = device or ("auto" if config is None else None)
    told = {"knn.predictor": predictor, "knn.ties": ties, "knn.index": index, "hardware.device": here}
    lists = {
        "knn.K": k,
        "knn.distance_metric": metric,
        "knn.voting_strategy": vote,
        "knn.tau": tau,
        "knn.theta": theta,
    }
    resolved, sweep = read_sweep(file, set_, told, lists)
    from ..evaluation import knn_eval as single
    from ..evaluation import knn_eval as table

    result: Any
    if sweep is None:
        result = single.knn_eval(resolved, run=found, split=split, progress=make_progress(quiet))
    else:
        result = table.knn_table(resolved, sweep, run=found, split=split, progress=make_progress(quiet))
    finish(result.to_json(), json_, *result.summary())


def zero_shot(
    store: Store = None,
    split: Split = "test",
    inputs: Annotated[
        Literal["image", "text", "both"],
        typer.Option("--inputs", help="What is compared with the prompts: the image, its caption, or both."),
    ] = "image",
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", metavar="FILE", help="Templates in the place of ours, one a line, with {} for the name."
        ),
    ] = None,
    protocol: Annotated[
        Literal["karpathy", "coco14", "hashnet"] | None,
        typer.Option("--protocol", help="Which images are tagged, and which tune thresholds [default: karpathy]."),
    ] = None,
    protocol_lists: Annotated[
        str | None,
        typer.Option(
            "--protocol-lists", metavar="DIR", help="Folder with database.txt, train.txt and test.txt of hashnet."
        ),
    ] = None,
    print_prompts: Annotated[bool, typer.Option("--print-prompts", help="Print the templates, score nothing.")] = False,
    out: RunOut = None,
    model: Model = None,
    revision: Revision = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Set = None,
    json_: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """Baseline without training: cosine with the mean of prompts for each category name."""
    from ..evaluation.prompts import TEMPLATES, read_prompts

    templates = TEMPLATES if prompts is None else read_prompts(prompts)
    if print_prompts:
        print(json.dumps({"prompts": templates}) if json_ else "\n".join(templates))
        return
    options = {
        "model.siglip2_variant": model,
        "model.revision": revision,
        "hardware.device": device,
        "data.split_type": protocol,
        "data.protocol_lists": protocol_lists,
    }
    resolved = read_config(config, set_, options)
    from ..evaluation.zero_shot import zero_shot as stage

    result = stage(
        resolved,
        store=store,
        split=split,
        templates=templates,
        inputs=inputs,
        out=out,
        force=force,
        progress=make_progress(quiet),
    )
    finish(result.to_json(), json_, *result.summary())


def _refuse_with_resume(given: Mapping[str, Any]) -> None:
    """A run is gone on with as it was configured: what would configure it otherwise is refused."""
    for option, value in given.items():
        if value is not None:
            raise InputError(
                "an interrupted run keeps its configuration",
                where="--resume",
                got=option,
                wanted="--store, --tensorboard, --wandb, --json or --quiet beside it",
                do="leave it out, or start a new run",
            )
