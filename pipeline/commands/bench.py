"""``mmcli bench``: this machine beside the plain way."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ...errors import InputError
from .options import Output, Repeats, Settings, command, option

_Store = Annotated[Path | None, option("--store DIR", "Store to read [default: one that is made, of COCO's size].")]
_NTrain = Annotated[
    int | None, option("--n-train", "Train images of the made store [default: COCO's 113,287].", min=2048)
]
_Model = Annotated[str | None, option("--model NAME", "Checkpoint [default: base-size towers, random weights].")]


@command("model.max_num_patches", "hardware.device", "data.num_workers", file=False)
def bench_extract(
    settings: Settings,
    output: Output,
    model: _Model = None,
    images: Annotated[Path | None, option("--images DIR", "Folder of JPEGs [default: drawn, of COCO's sizes].")] = None,
    n_images: Annotated[int, option("--n-images", "Images of a round.", min=1)] = 96,
    n_captions: Annotated[int, option("--n-captions", "Captions of a round.", min=1)] = 160,
    repeats: Repeats = 3,
) -> None:
    """Images and captions a second: the plain transformers loop, ours, the towers alone, decoding alone."""
    config = settings.load()
    from ..bench.extract import bench_extract as stage

    result = stage(
        config,
        checkpoint=model,
        images=images,
        n_images=n_images,
        n_captions=n_captions,
        repeats=repeats,
        progress=output.progress,
    )
    output.finish(result)


@command("hash.bits", "preset", "hardware.device")
def bench_train(
    settings: Settings,
    output: Output,
    n_train: _NTrain = None,
    steps: Annotated[int, option("--steps", "Steps of a round at batch 64.", min=2)] = 150,
    repeats: Repeats = 3,
    store: _Store = None,
) -> None:
    """Training images a second: a plain DataLoader loop, ours, the matrix products alone."""
    config = settings.load()
    from ..bench.train import bench_train as stage

    result = stage(
        config,
        store=store,
        n_train=n_train,
        steps=steps,
        repeats=repeats,
        progress=output.progress,
    )
    output.finish(result)


@dataclass(frozen=True, kw_only=True)
class Searches:
    """Options of a benchmark of searches."""

    sizes: Annotated[str, option("--sizes N,..", "Codes of each index; 1M is a million.")] = "113287,1M"
    bits: Annotated[str, option("--bits B,..", "Bits of a code.")] = "64,128"
    index: Annotated[str, option("--index NAME,..", "Indexes: auto, flat, fastscan, torch, gpu.")] = "auto,flat"
    k: Annotated[int, option("--k", "Neighbours.", min=1)] = 20
    queries: Annotated[int, option("--queries", "Queries of a batch at most.", min=1)] = 5000
    repeats: Repeats = 3
    baselines: Annotated[bool, option("--baselines/--no-baselines", "Time scikit-learn too.")] = True


@command("hardware.device", file=False)
def bench_knn(settings: Settings, searches: Searches, output: Output) -> None:
    """Queries a second: a plain loop, search and vote of ours, FAISS's search alone; every index with its recall."""
    config = settings.load()
    from ..bench.knn import Workload, parse_kinds, parse_numbers
    from ..bench.knn import bench_knn as stage
    from ..core.device import pick_device

    workload = Workload(
        sizes=parse_numbers(searches.sizes, "--sizes"),
        bits=parse_numbers(searches.bits, "--bits"),
        kinds=parse_kinds(searches.index),
        K=searches.k,
        queries=searches.queries,
    )
    result = stage(
        workload,
        repeats=searches.repeats,
        baselines=searches.baselines,
        device=str(pick_device(config.hardware.device)),
        progress=output.progress,
    )
    output.finish(result)


@command("model.max_num_patches", "data.num_workers", "preset", "hardware.device")
def bench_finetune(
    settings: Settings,
    output: Output,
    model: _Model = None,
    n_images: Annotated[int, option("--n-images", "Images of a round.", min=8)] = 48,
    batch_size: Annotated[int, option("--batch-size", "Images of a step, in both ways.", min=2)] = 16,
    unfreeze: Annotated[str, option("--unfreeze NAME,..", "Of frozen, last-2, full.")] = "frozen,last-2,full",
    repeats: Repeats = 2,
    vocabulary: Annotated[
        int | None,
        option(
            "--vocabulary",
            "Token embeddings of the made towers; SigLIP2 has 256000, on which a step of full spends seconds"
            " [default: as many as the made tokenizer knows].",
            min=4096,
        ),
    ] = None,
) -> None:
    """Finetuning images a second and peak memory: a plain transformers loop, and ours."""
    config = settings.load({"training.batch_size": batch_size})
    names = [name.strip() for name in unfreeze.split(",")]
    from ..bench.finetune import UNFROZEN
    from ..bench.finetune import bench_finetune as stage

    if set(names) - set(UNFROZEN):
        raise InputError("nothing to time", where="--unfreeze", got=unfreeze, wanted=f"of {', '.join(UNFROZEN)}")
    result = stage(
        config,
        checkpoint=model,
        n_images=n_images,
        repeats=repeats,
        unfreeze=names,
        vocabulary=vocabulary,
        progress=output.progress,
    )
    output.finish(result)


@command("training.num_epochs", "preset", "hardware.device")
def bench_ablate(
    settings: Settings,
    output: Output,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="EXPERIMENT...",
            help="Experiments that a store alone serves [default: A1 A2 A3 B2 B4 C1 C2 C3 C4].",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, option("--seeds N", "Rows of N seeds.", min=1)] = 1,
    n_train: _NTrain = None,
    workers: Annotated[int, option("--workers", "Processes, each with its share of threads.", min=1)] = 1,
    store: _Store = None,
    out: Annotated[Path | None, option("--out DIR", "Keep the table and its runs here [default: thrown away].")] = None,
) -> None:
    """Experiments on a store of COCO's size: seconds of planning, training, evaluating, and a loop without sharing."""
    from ..ablation.request import ConfigSource
    from ..bench.ablate import NAMES
    from ..bench.ablate import bench_ablate as stage

    result = stage(
        ConfigSource(file=settings.file, options=settings.given, flags=settings.flags),
        names=names or NAMES,
        store=store,
        n_train=n_train,
        seeds=seeds,
        workers=workers,
        out=out,
        progress=output.progress,
    )
    output.finish(result)
