"""The command line: parse, build the configuration, call one stage, print. No logic.

Heavy imports live inside the command bodies, so that ``--help`` loads no torch. Progress goes to stderr; stdout gets
the result, as text or with ``--json`` as one JSON object. Exit 0 done, 2 the user's input is wrong, 130 interrupted,
1 anything else.
"""

import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from . import InputError, __version__
from .pipeline.presets import Preset

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .pipeline.config import Config
    from .pipeline.progress import Progress


class Panels(TyperCommand):
    """A command whose help lists its options by their panels, in plain text: rich would be slower to load."""

    def format_options(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401 - typer keeps click's classes private
        """One titled list a panel; options without one come last, as ``Options``."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                panels.setdefault(getattr(param, "rich_help_panel", None) or "Options", []).append(record)
        panels["Options"] = panels.pop("Options", [])
        for title, records in panels.items():
            with formatter.section(title):
                formatter.write_dl(records)


app = typer.Typer(
    name="mmcli", add_completion=False, no_args_is_help=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)  # fmt: skip
cache_app = typer.Typer(
    help="Look at a store, check it, export it, or make one of embeddings from elsewhere.", rich_markup_mode=None
)
app.add_typer(cache_app, name="cache")
bench_app = typer.Typer(help="This machine's speed, side by side with the plain way.", rich_markup_mode=None)
app.add_typer(bench_app, name="bench")


def _place(text: str) -> Path:
    """A folder's path, or what stands for one where a URL was given: ``Path`` would collapse its slashes."""
    from .cache.places import place

    try:
        return place(text)
    except InputError as error:
        raise typer.BadParameter(str(error)) from None


Data = Annotated[Path, typer.Option("--data", metavar="DIR", help="Folder of the data set.")]
Store = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="DIR",
        parser=_place,
        rich_help_panel="Store and run",
        help="Store to read, a folder or a URL [default: the newest below data/cache].",
    ),
]
GuardStore = Annotated[
    Path | None,
    typer.Option("--store", metavar="DIR", parser=_place, help="Refuse a run that is not of this store's data set."),
]
StoreOut = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", parser=_place, help="Store to write, a folder or a URL [default: data/cache/KEY]."
    ),
]
RunDir = Annotated[
    Path | None, typer.Option("--run", metavar="DIR", help="Run to read [default: the newest below runs].")
]
RunOut = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", rich_help_panel="Store and run", help="Run folder to write [default: runs/TIME-NAME]."
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        rich_help_panel="Store and run",
        help="SigLIP2 checkpoint: a local folder or a hub id.",
    ),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub checkpoint.")]
Device = Annotated[
    str | None,
    typer.Option("--device", rich_help_panel="Device and seed", help="auto, cpu, cuda, cuda:N or mps [default: auto]."),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", rich_help_panel="Device and seed", help="Seed of every random draw [default: 42]."),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", rich_help_panel="Configuration", help="YAML configuration; options override it."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", rich_help_panel="Configuration",
        help="Any key of the configuration, as in optimizer.lr_hash=1e-3.",
    ),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Force = Annotated[bool, typer.Option("--force", rich_help_panel="Store and run", help="Replace what is already there.")]
Split = Annotated[Literal["train", "val", "test"], typer.Option("--split", help="Whose images are tagged.")]
PresetName = Annotated[
    Preset | None,
    typer.Option("--preset", rich_help_panel="Configuration", help="Set of defaults [default: recommended]."),
]


INTERRUPTED = 130
# What the machine may say at any moment; any other error of the system is a defect, and keeps its traceback.
NO_FAULT_OF_OURS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE}
# Which option sets which key, so that a refused value is named as it was given.
FLAGS = {
    "preset": "--preset", "head": "--head", "model.siglip2_variant": "--model", "model.revision": "--revision",
    "model.max_num_patches": "--patches", "fusion.type": "--fusion", "fusion.magnitude": "--magnitude",
    "fusion.block_norm": "--block-norm", "fusion.inputs": "--inputs", "fusion.adapter": "--adapter",
    "hash.bits": "--bits", "loss.cosine_weight": "--alpha", "loss.hash_weight": "--gamma", "loss.focal_loss": "--focal",
    "loss.class_weights": "--class-weights", "training.num_epochs": "--epochs", "training.batch_size": "--batch-size",
    "training.early_stopping_patience": "--patience", "training.monitor": "--monitor", "training.ema_decay": "--ema",
    "knn.K": "--k", "knn.distance_metric": "--metric", "knn.voting_strategy": "--vote", "knn.tau": "--tau",
    "knn.theta": "--theta", "data.num_workers": "--workers", "hardware.device": "--device", "hardware.seed": "--seed",
    "hardware.deterministic": "--deterministic",
}  # fmt: skip


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Tag an image with its caption: frozen SigLIP2, learned hash codes, neighbours that vote and explain."""
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write.")] = Path("demo"),
    seed: Seed = None, device: Device = None, json_: Json = False, quiet: Quiet = False, force: Force = False,
) -> None:  # fmt: skip
    """Every stage, on a generated miniature: about three minutes on two cores."""
    from .pipeline.demo import run_demo

    config = _config(None, None, {"hardware.seed": seed, "hardware.device": device})
    result = run_demo(config, out=out, force=force, progress=_progress(quiet))
    _finish(result.to_json(), json_, *result.summary())


@app.command()
def prepare(
    data: Data = Path("data/coco"),
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder for manifest.parquet [default: the data folder].")] = None,
    check_images: Annotated[bool, typer.Option("--check-images/--no-check-images", help="Look for every image file.")] = True,
    json_: Json = False, quiet: Quiet = False,  # noqa: ARG001 - taken everywhere; there is no progress to show
) -> None:  # fmt: skip
    """COCO and the Karpathy split to one checked manifest, with a table of statistics."""
    from .pipeline.prepare import prepare as stage
    from .pipeline.prepare import statistics_tables

    result = stage(data, out, check_images=check_images)
    _finish(result.to_json(), json_, *statistics_tables(result.statistics), f"wrote {result.path}")


@app.command()
def extract(
    patches: Annotated[int | None, typer.Option("--patches", help="Patch budget of a NaFlex checkpoint [default: 256].")] = None,
    data: Data = Path("data/coco"),
    manifest: Annotated[Path | None, typer.Option("--manifest", metavar="FILE", help="Manifest [default: DATA/manifest.parquet].")] = None,
    out: StoreOut = None,
    model: Model = None, revision: Revision = None,
    dtype: Annotated[Literal["float16", "float32"], typer.Option("--dtype", help="How embeddings are stored.")] = "float16",
    on_error: Annotated[Literal["stop", "skip"], typer.Option("--on-error", help="What an image that cannot be read does.")] = "stop",
    resizer: Annotated[Literal["pillow", "torch"], typer.Option("--resizer", help="pillow: the processor's own numbers; torch: faster, off by one level of 255 here and there.")] = "pillow",
    batch_tokens: Annotated[int | None, typer.Option("--batch-tokens", min=1, help="Patches or text tokens of a forward pass of a new store [default: 1024 on a CPU, 32768 on a GPU].")] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=0, help="Processes that read images [default: one a core with a GPU, else one for eight].")] = None,
    processes: Annotated[int | None, typer.Option("--processes", min=1, help="Processes that compute [default: one a GPU].")] = None,
    engine: Annotated[Literal["local", "ray"], typer.Option("--engine", help="This machine, or a Ray cluster (install the extra ray).")] = "local",
    ray_address: Annotated[str | None, typer.Option("--ray-address", metavar="ADDRESS", help="Cluster of --engine ray [default: RAY_ADDRESS, else one of this machine].")] = None,
    shard: Annotated[str | None, typer.Option("--shard", metavar="I/N", help="Fill one of N stripes; run the others elsewhere.")] = None,
    device: Device = None, config: ConfigFile = None, set_: Set = None,
    json_: Json = False, quiet: Quiet = False, force: Force = False,
) -> None:  # fmt: skip
    """Stage 1: run the frozen SigLIP2 once and store its raw embeddings; resumes where it was stopped."""
    options = {
        "model.max_num_patches": patches, "model.siglip2_variant": model, "model.revision": revision,
        "data.num_workers": workers, "hardware.device": device,
    }  # fmt: skip
    resolved = _config(config, set_, options)
    from .pipeline.extract import ExtractPlan, parse_stripe

    plan = ExtractPlan(
        data=data, manifest=manifest, out=out, dtype=dtype, on_error=on_error, resizer=resizer, batch_tokens=batch_tokens, force=force,
        stripe=None if shard is None else parse_stripe(shard),
    )  # fmt: skip
    if ray_address is not None and engine != "ray":
        raise InputError("--ray-address without Ray", got=ray_address, wanted="--engine ray", do="give both or neither")
    if engine == "ray":
        from .pipeline.ray_engine import extract_on_ray

        result = extract_on_ray(resolved, plan, processes=processes, address=ray_address, progress=_progress(quiet))
    else:
        from .pipeline.fleet import extract_here

        result = extract_here(resolved, plan, processes=processes, progress=_progress(quiet))
    _finish(result.to_json(), json_, *result.summary())


@app.command("train-head", cls=Panels)
def train_head(
    head: Annotated[Literal["fusion", "mlp"] | None, typer.Option("--head", rich_help_panel="Head", help="The head, or the MLP it is compared with [default: fusion].")] = None,
    bits: Annotated[int | None, typer.Option("--bits", rich_help_panel="Head", help="Bits of the code, 0 or a multiple of 8 [default: 64].")] = None,
    fusion: Annotated[Literal["concat", "hadamard", "hadamard_magnitude"] | None, typer.Option("--fusion", rich_help_panel="Head", help="Fusion input [default: hadamard_magnitude].")] = None,
    magnitude: Annotated[Literal["own", "shuffled"] | None, typer.Option("--magnitude", rich_help_panel="Head", help="Control: log-norms of another image [default: own].")] = None,
    block_norm: Annotated[Literal["none", "rms"] | None, typer.Option("--block-norm", rich_help_panel="Head", help="Scale of the fusion's blocks [default: the preset's].")] = None,
    inputs: Annotated[Literal["both", "image", "text"] | None, typer.Option("--inputs", rich_help_panel="Head", help="Modalities [default: both].")] = None,
    adapter: Annotated[Literal["none", "linear"] | None, typer.Option("--adapter", rich_help_panel="Head", help="Trainable map on the embeddings [default: none].")] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", rich_help_panel="Loss", help="Weight of the cosine term [default: 1].")] = None,
    gamma: Annotated[float | None, typer.Option("--gamma", rich_help_panel="Loss", help="Weight of the hash terms [default: the preset's].")] = None,
    focal: Annotated[bool | None, typer.Option("--focal/--no-focal", rich_help_panel="Loss", help="Focal loss in the place of cross-entropy.")] = None,
    class_weights: Annotated[Literal["none", "balanced"] | None, typer.Option("--class-weights", rich_help_panel="Loss", help="Weights of positives [default: none].")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", rich_help_panel="Training", help="Epochs at most [default: 30].")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", rich_help_panel="Training", help="Images per step [default: 64].")] = None,
    patience: Annotated[int | None, typer.Option("--patience", rich_help_panel="Training", help="Epochs without a better val mAP before it stops; 0 never stops [default: 5].")] = None,
    monitor: Annotated[Literal["knn", "classifier"] | None, typer.Option("--monitor", rich_help_panel="Training", help="What val mAP is computed from [default: knn].")] = None,
    ema: Annotated[float | None, typer.Option("--ema", metavar="DECAY", rich_help_panel="Training", help="Moving average of the parameters, as 0.999 [default: off].")] = None,
    device: Device = None, seed: Seed = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, metavar="N", rich_help_panel="Device and seed", help="Replicas, of N seeds from --seed on.")] = 1,
    deterministic: Annotated[bool | None, typer.Option("--deterministic/--no-deterministic", rich_help_panel="Device and seed", help="Same bits twice, at some cost.")] = None,
    preset: PresetName = None, config: ConfigFile = None, set_: Set = None,
    print_config: Annotated[bool, typer.Option("--print-config", rich_help_panel="Configuration", help="Print the resolved configuration as YAML, train nothing.")] = False,
    store: Store = None, model: Model = None, out: RunOut = None, force: Force = False,
    resume: Annotated[Path | None, typer.Option("--resume", metavar="RUN", rich_help_panel="Store and run", help="Go on with an interrupted run, as it was configured.")] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log every epoch for TensorBoard, in the run folder.")] = False,
    wandb: Annotated[bool, typer.Option("--wandb", help="Log every epoch for Weights & Biases; offline without a login.")] = False,
    json_: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Stage 2: train a head from a store and write the codes of every split."""
    options = {
        "preset": preset, "head": head, "hash.bits": bits, "fusion.type": fusion, "fusion.magnitude": magnitude,
        "fusion.block_norm": block_norm, "fusion.inputs": inputs, "fusion.adapter": adapter, "loss.cosine_weight": alpha,
        "loss.hash_weight": gamma, "loss.focal_loss": focal, "loss.class_weights": class_weights,
        "training.num_epochs": epochs, "training.batch_size": batch_size, "training.early_stopping_patience": patience,
        "training.monitor": monitor, "training.ema_decay": ema, "model.siglip2_variant": model,
        "hardware.device": device, "hardware.seed": seed, "hardware.deterministic": deterministic,
    }  # fmt: skip
    if resume is not None:
        others = {
            "--config": config,
            "--set": set_,
            "--out": out,
            "--force": force or None,
            "--seeds": seeds - 1 or None,
        }
        _refuse_with_resume({**{FLAGS[key]: value for key, value in options.items()}, **others})
        config = resume / "config.yaml" if print_config else None
    from .pipeline.settle import settle

    resolved = settle(_config(config, set_, options))
    if print_config:
        _print_config(resolved, json_)
        return
    from .pipeline import train_head as stage

    told: dict[str, Any] = {"tensorboard": tensorboard, "wandb": wandb, "progress": _progress(quiet)}
    result: Any
    if resume is not None:
        result = stage.resume_training(resume, store=store, **told)
    elif seeds > 1:
        result = stage.train_replicas(resolved, seeds=seeds, store=store, out=out, force=force, **told)
    else:
        result = stage.train_head(resolved, store=store, out=out, force=force, **told)
    _finish(result.to_json(), json_, *result.summary())


@app.command("knn-eval")
def knn_eval(
    run: RunDir = None, store: GuardStore = None, split: Split = "test",
    k: Annotated[int | None, typer.Option("--k", help="Neighbours that vote [default: 20].")] = None,
    metric: Annotated[Literal["hamming", "cosine", "hybrid"] | None, typer.Option("--metric", help="Distance [default: hamming; cosine without hash].")] = None,
    vote: Annotated[Literal["softmax", "uniform", "rank", "threshold"] | None, typer.Option("--vote", help="Weights of the votes [default: softmax].")] = None,
    tau: Annotated[float | None, typer.Option("--tau", help="Temperature of the softmax vote [default: 0.07].")] = None,
    theta: Annotated[float | None, typer.Option("--theta", help="Least similarity of the threshold vote [default: 0.5].")] = None,
    config: ConfigFile = None, set_: Set = None, json_: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Stage 3: neighbours in the codes of a run vote for the tags; every metric goes to metrics.json."""
    from .pipeline.knn_eval import find_run
    from .pipeline.knn_eval import knn_eval as stage

    found = find_run(run, store=store)
    options = {
        "knn.K": k, "knn.distance_metric": metric, "knn.voting_strategy": vote, "knn.tau": tau, "knn.theta": theta,
    }  # fmt: skip
    resolved = _config(config or found.folder / "config.yaml", set_, options)
    result = stage(resolved, run=found, split=split, progress=_progress(quiet))
    _finish(result.to_json(), json_, *result.summary())


@app.command("zero-shot")
def zero_shot(
    store: Store = None, split: Split = "test", out: RunOut = None, model: Model = None, revision: Revision = None,
    device: Device = None, config: ConfigFile = None, set_: Set = None,
    json_: Json = False, quiet: Quiet = False, force: Force = False,
) -> None:  # fmt: skip
    """Baseline without training: cosine with the mean of prompts for each category name."""
    options = {"model.siglip2_variant": model, "model.revision": revision, "hardware.device": device}
    resolved = _config(config, set_, options)
    from .pipeline.zero_shot import zero_shot as stage

    result = stage(resolved, store=store, split=split, out=out, force=force, progress=_progress(quiet))
    _finish(result.to_json(), json_, *result.summary())


@bench_app.command("extract")
def bench_extract(
    patches: Annotated[int | None, typer.Option("--patches", help="Patch budget of a NaFlex checkpoint [default: 256].")] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="Checkpoint [default: base-size towers, random weights].")] = None,
    images: Annotated[Path | None, typer.Option("--images", metavar="DIR", help="Folder of JPEGs [default: drawn, of COCO's sizes].")] = None,
    n_images: Annotated[int, typer.Option("--n-images", min=1, help="Images of a round.")] = 96,
    n_captions: Annotated[int, typer.Option("--n-captions", min=1, help="Captions of a round.")] = 160,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Rounds; the best of each way counts.")] = 3,
    workers: Annotated[int | None, typer.Option("--workers", min=0, help="Processes that read images.")] = None,
    device: Device = None, json_: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Images and captions a second: the plain transformers loop, ours, the towers alone, decoding alone."""
    resolved = _config(
        None, None, {"model.max_num_patches": patches, "hardware.device": device, "data.num_workers": workers}
    )
    from .pipeline.bench_extract import bench_extract as stage

    result = stage(
        resolved, checkpoint=model, images=images, n_images=n_images, n_captions=n_captions, repeats=repeats,
        progress=_progress(quiet),
    )  # fmt: skip
    _finish(result.to_json(), json_, *result.summary())


@cache_app.command("info")
def cache_info(store: Store = None, json_: Json = False, quiet: Quiet = False) -> None:  # noqa: ARG001 - as everywhere
    """What a store is: model, patches, sizes, skipped images, distribution of norms."""
    from .cache import describe
    from .pipeline.store_views import info_summary
    from .pipeline.stores import find_store

    facts = describe(find_store(store))
    _finish(facts, json_, *info_summary(facts))


@cache_app.command("verify")
def cache_verify(
    store: Store = None,
    leaks: Annotated[bool, typer.Option("--leaks", help="List near-duplicate images across splits too.")] = False,
    threshold: Annotated[float | None, typer.Option("--threshold", min=-1, max=1, help="Least cosine of near-duplicates [default: 0.98].")] = None,
    most: Annotated[int | None, typer.Option("--most", min=0, help="Near-duplicates to list at most [default: 50].")] = None,
    json_: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Check everything in a store: checksums, counts, order, NaN, norms, key."""
    from .pipeline.store_views import check_store
    from .pipeline.stores import find_store

    checked = check_store(find_store(store), _progress(quiet), leaks=leaks, threshold=threshold, most=most)
    _finish(checked.to_json(), json_, *checked.summary())
    if checked.problems:
        raise typer.Exit(2)


@cache_app.command("export")
def cache_export(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write, new or empty.")],
    format_: Annotated[Literal["npy", "parquet"], typer.Option("--format", help="npy: as clip-retrieval, embedding-reader and autofaiss read it.")] = "npy",
    captions: Annotated[Literal["first", "all"] | None, typer.Option("--captions", help="Of npy: a row an image, or a row a caption with its image repeated [default: first].")] = None,
    store: Store = None, json_: Json = False, quiet: Quiet = False, force: Force = False,
) -> None:  # fmt: skip
    """Write a store's raw embeddings for other tools, shard by shard."""
    from .pipeline.store_views import export, export_summary
    from .pipeline.stores import find_store

    report = export(find_store(store), out, format_, _progress(quiet), captions=captions, force=force)
    _finish(report.to_json(), json_, *export_summary(report))


@cache_app.command("import")
def cache_import(
    images: Annotated[Path, typer.Option("--images", metavar="PATH", help="Image vectors: .npy or .parquet, a file or a folder of numbered ones.")],
    texts: Annotated[Path, typer.Option("--texts", metavar="PATH", help="Caption vectors, likewise: one an image, or one a caption.")],
    name: Annotated[str, typer.Option("--name", help="Model that computed them.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of that model [default: hash of the content].")] = None,
    manifest: Annotated[Path, typer.Option("--manifest", metavar="FILE", help="Manifest of their images, in their order.")] = Path("data/coco/manifest.parquet"),
    out: StoreOut = None,
    dtype: Annotated[Literal["float16", "float32"] | None, typer.Option("--dtype", help="How they are stored [default: as they are].")] = None,
    json_: Json = False, quiet: Quiet = False, force: Force = False,
) -> None:  # fmt: skip
    """Make a store of embeddings that another tool computed."""
    from .pipeline.import_store import ImportPlan, import_store

    plan = ImportPlan(
        images=images, texts=texts, manifest=manifest, name=name, revision=revision, out=out, dtype=dtype, force=force
    )  # fmt: skip
    result = import_store(plan, _progress(quiet))
    _finish(result.to_json(), json_, *result.summary())


def main() -> None:
    """Run the command line and exit with its code."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what batch systems send: the same as Ctrl-C
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer turns Ctrl-C into this code, and says nothing
            _complain("interrupted; what was finished is kept", INTERRUPTED)
    except InputError as error:
        code = _complain(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        code = _complain("interrupted; what was finished is kept", INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe left; Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        if error.errno not in NO_FAULT_OF_OURS:
            raise
        code = _complain(f"{error.strerror}: {error.filename or 'while writing'}; what was finished is kept", 1)
    except Exception as error:
        # Typer keeps its usage errors in a private module; they all have a message and an exit code.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        code = _complain(f"{message().replace('Value error, ', '')} (see --help)", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _complain(line: str, code: int) -> int:
    print(f"mmcli: {' '.join(line.split())}", file=sys.stderr)
    return code


def _progress(quiet: bool) -> "Progress":
    from .pipeline.progress import ConsoleProgress, Progress

    return Progress() if quiet else ConsoleProgress()


def _config(file: Path | None, settings: list[str] | None, options: Mapping[str, Any]) -> "Config":
    from .pipeline.config import load_config, parse_settings

    given = {key: value for key, value in options.items() if value is not None}
    parsed = parse_settings(settings or [])
    flags = {key: FLAGS[key] for key in given} | {key: f"--set {key}" for key in parsed}
    return load_config(file, options={**given, **parsed}, flags=flags)


def _print_config(config: "Config", as_json: bool) -> None:
    from .pipeline.config import dump_config

    print(json.dumps(config.model_dump(mode="json")) if as_json else dump_config(config), end="\n" if as_json else "")


def _refuse_with_resume(given: Mapping[str, Any]) -> None:
    """A run is gone on with as it was configured: what would configure it otherwise is refused."""
    for option, value in given.items():
        if value is not None:
            raise InputError(
                "an interrupted run keeps its configuration", where="--resume", got=option,
                wanted="--store, --tensorboard, --wandb, --json or --quiet beside it",
                do="leave it out, or start a new run",
            )  # fmt: skip


def _finish(result: Mapping[str, Any], as_json: bool, *parts: "RenderableType") -> None:
    """The result on stdout: one JSON object, or what a person reads."""
    if as_json:
        print(json.dumps(result, allow_nan=False, default=str))
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))
