"""``mmcli bench``: this machine beside the plain way."""

from pathlib import Path
from typing import Annotated

import typer

from ...errors import InputError
from .options import ConfigFile, Device, Json, PresetName, Quiet, Set, finish, make_progress, read_config


def bench_extract(
    patches: Annotated[
        int | None, typer.Option("--patches", help="Patch budget of a NaFlex checkpoint [default: 256].")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="Checkpoint [default: base-size towers, random weights]."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", metavar="DIR", help="Folder of JPEGs [default: drawn, of COCO's sizes].")
    ] = None,
    n_images: Annotated[int, typer.Option("--n-images", min=1, help="Images of a round.")] = 96,
    n_captions: Annotated[int, typer.Option("--n-captions", min=1, help="Captions of a round.")] = 160,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Rounds; the best of each way counts.")] = 3,
    workers: Annotated[int | None, typer.Option("--workers", min=0, help="Processes that read images.")] = None,
    device: Device = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Images and captions a second: the plain transformers loop, ours, the towers alone, decoding alone."""
    resolved = read_config(
        None, None, {"model.max_num_patches": patches, "hardware.device": device, "data.num_workers": workers}
    )
    from ..bench.extract import bench_extract as stage

    result = stage(
        resolved,
        checkpoint=model,
        images=images,
        n_images=n_images,
        n_captions=n_captions,
        repeats=repeats,
        progress=make_progress(quiet),
    )
    finish(result.to_json(), json_, *result.summary())


def bench_train(
    bits: Annotated[int | None, typer.Option("--bits", help="Bits of the code [default: 64].")] = None,
    n_train: Annotated[
        int | None,
        typer.Option("--n-train", min=2048, help="Train images of the made store [default: COCO's 113,287]."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Steps of a round at batch 64.")] = 150,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Rounds; the best of each way counts.")] = 3,
    preset: PresetName = None,
    store: Annotated[
        Path | None,
        typer.Option("--store", metavar="DIR", help="Store to train from [default: one that is made, of COCO's size]."),
    ] = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Set = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Training images a second: a plain DataLoader loop, ours, the products alone; loading, and the first step."""
    options = {"preset": preset, "hash.bits": bits, "hardware.device": device}
    resolved = read_config(config, set_, options)
    from ..bench.train import bench_train as stage

    result = stage(
        resolved,
        store=store,
        n_train=n_train,
        steps=steps,
        repeats=repeats,
        progress=make_progress(quiet),
    )
    finish(result.to_json(), json_, *result.summary())


def bench_knn(
    sizes: Annotated[
        str, typer.Option("--sizes", metavar="N,..", help="Codes of each index; 1M is a million.")
    ] = "113287,1M",
    bits: Annotated[str, typer.Option("--bits", metavar="B,..", help="Bits of a code.")] = "64,128",
    index: Annotated[
        str,
        typer.Option(
            "--index", metavar="NAME,..", help="Indexes: auto, flat, fastscan, torch, gpu, ivf, hnsw, multihash."
        ),
    ] = "auto,flat,ivf,hnsw,multihash",
    k: Annotated[int, typer.Option("--k", min=1, help="Neighbours.")] = 20,
    queries: Annotated[int, typer.Option("--queries", min=1, help="Queries of a batch at most.")] = 5000,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Rounds; the best of each way counts.")] = 3,
    rivals: Annotated[bool, typer.Option("--rivals/--no-rivals", help="Time scikit-learn and USearch too.")] = True,
    device: Device = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Queries a second: the plan's loop, search and vote of ours, FAISS's search alone; every index with its recall."""
    from ..bench.knn import bench_knn as stage
    from ..bench.knn import parse_kinds, parse_numbers
    from ..core.device import pick_device

    result = stage(
        sizes=parse_numbers(sizes, "--sizes"),
        bits=parse_numbers(bits, "--bits"),
        kinds=parse_kinds(index),
        K=k,
        queries=queries,
        repeats=repeats,
        rivals=rivals,
        device=str(pick_device(device or "auto")),
        progress=make_progress(quiet),
    )
    finish(result.to_json(), json_, *result.summary())


def bench_finetune(
    patches: Annotated[
        int | None, typer.Option("--patches", help="Patch budget of a NaFlex checkpoint [default: 256].")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="Checkpoint [default: base-size towers, random weights]."),
    ] = None,
    n_images: Annotated[int, typer.Option("--n-images", min=8, help="Images of a round.")] = 48,
    batch_size: Annotated[int, typer.Option("--batch-size", min=2, help="Images of a step, in both ways.")] = 16,
    unfreeze: Annotated[
        str, typer.Option("--unfreeze", metavar="NAME,..", help="Of frozen, last-2, full.")
    ] = "frozen,last-2,full",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Rounds; the best of each way counts.")] = 2,
    workers: Annotated[int | None, typer.Option("--workers", min=0, help="Processes that read images.")] = None,
    vocabulary: Annotated[
        int | None,
        typer.Option(
            "--vocabulary",
            min=4096,
            help="Token embeddings of the made towers; SigLIP2 has 256000, on which a step of full spends seconds [default: as many as the made tokenizer knows].",
        ),
    ] = None,
    preset: PresetName = None,
    device: Device = None,
    config: ConfigFile = None,
    set_: Set = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Finetuning images a second and peak memory: a plain transformers loop, and ours."""
    options = {
        "preset": preset,
        "model.max_num_patches": patches,
        "training.batch_size": batch_size,
        "hardware.device": device,
        "data.num_workers": workers,
    }
    resolved = read_config(config, set_, options)
    names = [name.strip() for name in unfreeze.split(",")]
    from ..bench.finetune import UNFROZEN
    from ..bench.finetune import bench_finetune as stage

    if set(names) - set(UNFROZEN):
        raise InputError("nothing to time", where="--unfreeze", got=unfreeze, wanted=f"of {', '.join(UNFROZEN)}")
    result = stage(
        resolved,
        checkpoint=model,
        n_images=n_images,
        repeats=repeats,
        unfreeze=names,
        vocabulary=vocabulary,
        progress=make_progress(quiet),
    )
    finish(result.to_json(), json_, *result.summary())
