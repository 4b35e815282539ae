"""What commands have in common: options that mean the same everywhere, and how a result is printed.

Heavy imports live inside function bodies, so that ``--help`` loads no torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from ...errors import InputError
from ..core.presets import Preset

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ...heads.config import KnnConfig
    from ..core.config import Config
    from ..core.progress import Progress


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


def parse_place(text: str) -> Path:
    """A folder's path, or what stands for one where a URL was given: ``Path`` would collapse its slashes."""
    from ...cache.places import place

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
        parser=parse_place,
        rich_help_panel="Store and run",
        help="Store to read, a folder or a URL [default: the newest below data/cache].",
    ),
]
GuardStore = Annotated[
    Path | None,
    typer.Option(
        "--store", metavar="DIR", parser=parse_place, help="Refuse a run that is not of this store's data set."
    ),
]
StoreOut = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", parser=parse_place, help="Store to write, a folder or a URL [default: data/cache/KEY]."
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
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision", help="Branch, tag or commit of a hub checkpoint [default: main]; store and run keep the commit."
    ),
]
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
        "--set",
        metavar="KEY=VALUE",
        rich_help_panel="Configuration",
        help="Any key of the configuration, as in optimizer.lr_hash=1e-3.",
    ),
]
FollowLinks = Annotated[
    bool,
    typer.Option(
        "--follow-links", help="Take images that are links out of the data folder (DVC, git-annex, a hub's cache)."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Force = Annotated[bool, typer.Option("--force", rich_help_panel="Store and run", help="Replace what is already there.")]
Split = Annotated[Literal["train", "val", "test"], typer.Option("--split", help="Whose images are tagged.")]
PresetName = Annotated[
    Preset | None,
    typer.Option("--preset", rich_help_panel="Configuration", help="Set of defaults [default: recommended]."),
]

# Which option sets which key, so that a refused value is named as it was given.
FLAGS = {
    "preset": "--preset",
    "head": "--head",
    "model.siglip2_variant": "--model",
    "model.revision": "--revision",
    "model.max_num_patches": "--patches",
    "fusion.type": "--fusion",
    "fusion.magnitude": "--magnitude",
    "fusion.block_norm": "--block-norm",
    "fusion.inputs": "--inputs",
    "fusion.adapter": "--adapter",
    "hash.bits": "--bits",
    "loss.cosine_weight": "--alpha",
    "loss.hash_weight": "--gamma",
    "loss.focal_loss": "--focal",
    "loss.class_weights": "--class-weights",
    "training.num_epochs": "--epochs",
    "training.batch_size": "--batch-size",
    "training.early_stopping_patience": "--patience",
    "training.monitor": "--monitor",
    "training.ema_decay": "--ema",
    "knn.K": "--k",
    "knn.distance_metric": "--metric",
    "knn.voting_strategy": "--vote",
    "knn.tau": "--tau",
    "knn.theta": "--theta",
    "knn.ties": "--ties",
    "knn.index": "--index",
    "knn.predictor": "--predictor",
    "data.num_workers": "--workers",
    "hardware.device": "--device",
    "hardware.seed": "--seed",
    "hardware.deterministic": "--deterministic",
    "data.split_type": "--protocol",
    "data.protocol_lists": "--protocol-lists",
    "finetune.unfreeze": "--unfreeze",
    "finetune.towers": "--towers",
    "finetune.layer_decay": "--layer-decay",
    "finetune.augment": "--augment",
    "finetune.gradient_checkpointing": "--gradient-checkpointing",
    "finetune.batch_tokens": "--batch-tokens",
    "finetune.start": "--from",
    "optimizer.lr_towers": "--lr-towers",
    "training.accumulation_steps": "--accumulation",
}


def data_folder(data: Path, follow_links: bool) -> Path:
    """The folder of the data set, as the stages take it: with ``--follow-links`` its images may be links."""
    from ..core.files import LinkedFolder

    return LinkedFolder(data) if follow_links else data


def make_progress(quiet: bool) -> "Progress":
    """Who is told how a stage goes: the terminal, or nobody."""
    from ..core.progress import ConsoleProgress, Progress

    return Progress() if quiet else ConsoleProgress()


def read_config(
    file: Path | None, settings: list[str] | None, options: Mapping[str, Any], *, under: Mapping[str, Any] | None = None
) -> "Config":
    """The configuration of a file, settings of ``--set`` and options by key; those that are None were not given.

    What is ``under`` the file, sections by name, counts where neither says otherwise.
    """
    from ..core.config import load_config, parse_settings

    given = {key: value for key, value in options.items() if value is not None}
    parsed = parse_settings(settings or [])
    flags = {key: FLAGS[key] for key in given} | {key: f"--set {key}" for key in parsed}
    return load_config(file, options={**given, **parsed}, flags=flags, under=under)


def read_sweep(
    file: Path | None, settings: list[str] | None, options: Mapping[str, Any], lists: Mapping[str, str | None]
) -> "tuple[Config, list[KnnConfig] | None]":
    """The configuration, and the values of options that list several; ``None`` where none does.

    Args:
        file: As for :func:`read_config`.
        settings: Likewise.
        options: Options that take one value.
        lists: Options of the knn section that may list several, by key, as they were given.
    """
    from ..evaluation.sweep import split_values, sweep

    values = {key: split_values(key.removeprefix("knn."), text) for key, text in lists.items() if text is not None}
    firsts = {**options, **{key: several[0] for key, several in values.items()}}
    base = read_config(file, settings, firsts)
    if all(len(several) == 1 for several in values.values()):
        return base, None
    checked = {
        key.removeprefix("knn."): [read_config(file, settings, {**firsts, key: value}).knn for value in several]
        for key, several in values.items()
    }
    return base, sweep(checked, base.knn)


def show_config(config: "Config", as_json: bool) -> None:
    """The configuration on stdout, as YAML or as JSON."""
    from ..core.config import dump_config

    print(json.dumps(config.model_dump(mode="json")) if as_json else dump_config(config), end="\n" if as_json else "")


def finish(result: Mapping[str, Any], as_json: bool, *parts: "RenderableType") -> None:
    """The result on stdout: one JSON object, or what a person reads."""
    if as_json:
        print(json.dumps(result, allow_nan=False, default=str))
        return
    from ..core.console import make_console

    console = make_console()
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))
