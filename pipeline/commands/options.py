"""What commands have in common: options that mean the same everywhere, and how a result is printed.

A command takes :class:`Settings` for the keys of the configuration that it has options for, and a dataclass for other
options that several commands share; :func:`command` turns the fields of both into options of the command line. Name,
type, default and help of an option for a key come from its field in :mod:`mmcli.pipeline.core.config`.

Heavy imports live inside function bodies, so that ``--help`` loads no torch.
"""

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, Protocol, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from ...errors import InputError
from ..core.config import Config, KeyOption, dump_config, load_config, parse_settings
from ..core.defaults import DATA

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ...heads.config import KnnConfig
    from ..core.progress import Progress

# The titles under which `--help` lists the options of a section's keys, where a command has titles.
TITLES = {
    "fusion": "Head",
    "hash": "Head",
    "head": "Head",
    "loss": "Loss",
    "optimizer": "Towers",
    "finetune": "Towers",
    "training": "Training",
    "hardware": "Device and seed",
    "preset": "Configuration",
    "data": "Store and run",
    "model": "Store and run",
}


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


def option(flag: str, help_: str, panel: str | None = None, **more: Any) -> Any:  # noqa: ANN401 - typer's own
    """An option: its name, with a word for its value where there is one (``--out DIR``), and its help."""
    name, _, metavar = flag.partition(" ")
    return typer.Option(name, metavar=metavar or None, help=help_, rich_help_panel=panel, **more)


_STORE_AND_RUN = "Store and run"
Store = Annotated[
    Path | None,
    option(
        "--store DIR",
        "Store to read, a folder or a URL [default: the newest below data/cache].",
        _STORE_AND_RUN,
        parser=parse_place,
    ),
]
StoreOut = Annotated[
    Path | None,
    option("--out DIR", "Store to write, a folder or a URL [default: data/cache/KEY].", parser=parse_place),
]
RunDir = Annotated[Path | None, option("--run DIR", "Run to read [default: the newest below runs].")]
RunOut = Annotated[Path | None, option("--out DIR", "Run folder to write [default: runs/TIME-NAME].", _STORE_AND_RUN)]
Force = Annotated[bool, option("--force", "Replace what is already there.", _STORE_AND_RUN)]
Split = Annotated[Literal["train", "val", "test"], option("--split", "Split whose images are tagged.")]
OnError = Annotated[Literal["stop", "skip"], option("--on-error", "What to do when an image cannot be read.")]
Repeats = Annotated[int, option("--repeats", "Rounds; the best of each way counts.", min=1)]
PrintConfig = Annotated[
    bool, option("--print-config", "Print the resolved configuration as YAML, train nothing.", "Configuration")
]


class Result(Protocol):
    """What every stage returns: the same facts for a program and for a person."""

    def to_json(self) -> Mapping[str, Any]:
        """The result as one JSON object."""
        ...

    def summary(self) -> Sequence["RenderableType"]:
        """The result as lines and tables for a person."""
        ...


@dataclass(frozen=True, kw_only=True)
class Output:
    """How a command reports: ``--json`` and ``--quiet``."""

    json_: Annotated[bool, option("--json", "Print the result as one JSON object on stdout.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False

    @functools.cached_property
    def progress(self) -> "Progress":
        """Progress bars on stderr, or none with ``--quiet``."""
        from ..core.progress import ConsoleProgress, Progress

        return Progress.quiet() if self.quiet else ConsoleProgress()

    def finish(self, result: Result) -> None:
        """Print a result on stdout."""
        self.show(result.to_json(), *([] if self.json_ else result.summary()))

    def show(self, facts: Mapping[str, Any], *parts: "RenderableType") -> None:
        """Print on stdout one JSON object with ``--json``, else what a person reads."""
        if self.json_:
            print(json.dumps(facts, allow_nan=False, default=str))
            return
        from ..core.console import make_console

        console = make_console()
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, str))

    def show_config(self, config: Config) -> None:
        """Print a configuration on stdout, as YAML or as JSON; loads nothing to do so."""
        print(
            json.dumps(config.model_dump(mode="json")) if self.json_ else dump_config(config),
            end="\n" if self.json_ else "",
        )


@dataclass(frozen=True, kw_only=True)
class Images:
    """The folder of the data set, and whether its images may be links."""

    data: Annotated[
        Path | None, option("--data DIR", "Folder of the data set [default: data/coco].", _STORE_AND_RUN)
    ] = None
    follow_links: Annotated[
        bool,
        option("--follow-links", "Take images that are links out of the data folder (DVC, git-annex, a hub's cache)."),
    ] = False

    @property
    def folder(self) -> Path:
        """The folder as the stages take it: with ``--follow-links`` its images may be links."""
        from ..core.files import LinkedFolder

        folder = self.data or DATA
        return LinkedFolder(folder) if self.follow_links else folder


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Where the processes of a command run: this machine, or a Ray cluster."""

    engine: Annotated[
        Literal["local", "ray"], option("--engine", "This machine, or a Ray cluster (install the extra ray).", "How")
    ] = "local"
    ray_address: Annotated[
        str | None,
        option("--ray-address ADDRESS", "Cluster of --engine ray [default: one of this machine alone].", "How"),
    ] = None

    def __post_init__(self) -> None:
        if self.ray_address is not None and self.engine != "ray":
            raise InputError(
                "--ray-address without Ray", got=self.ray_address, wanted="--engine ray", do="give both or neither"
            )


@dataclass(frozen=True, kw_only=True)
class Target:
    """The run that a training writes, or resumes."""

    out: RunOut = None
    force: Force = False
    resume: Annotated[
        Path | None, option("--resume RUN", "Resume an interrupted run with its own configuration.", _STORE_AND_RUN)
    ] = None


@dataclass(frozen=True, kw_only=True)
class Trackers:
    """Where every epoch is logged beside the run folder."""

    tensorboard: Annotated[bool, option("--tensorboard", "Log every epoch for TensorBoard, in the run folder.")] = False
    wandb: Annotated[bool, option("--wandb", "Log every epoch for Weights & Biases; offline without a login.")] = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line says of the configuration.

    Attributes:
        file: ``--config FILE``.
        words: ``--set KEY=VALUE``, each as it was given.
        options: Keys with an option of their own that were given, to their values.
    """

    file: Path | None = None
    words: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def given(self) -> dict[str, Any]:
        """Every key that the command line gives, to its value."""
        return {**self.options, **parse_settings(self.words)}

    @property
    def flags(self) -> dict[str, str]:
        """Every key that the command line gives, to the words that gave it, for messages."""
        flags = {key: KeyOption(key).flag for key in self.options}
        return flags | {key: f"--set {key}" for key in parse_settings(self.words)}

    def load(
        self,
        options: Mapping[str, Any] | None = None,
        *,
        file: Path | None = None,
        under: Mapping[str, Any] | None = None,
    ) -> Config:
        """Load and check the configuration that the command line asks for.

        Args:
            options: Values of further keys, which have an option too.
            file: The file where ``--config`` gives none.
            under: Sections that count where neither file nor options say otherwise.

        Raises:
            InputError: The file cannot be read, a key is unknown, or a value is refused.
        """
        options = options or {}
        flags = self.flags | {key: KeyOption(key).flag for key in options}
        return load_config(self.file or file, options={**self.given, **options}, flags=flags, under=under)

    def sweep(self, listed: Sequence[str], file: Path) -> "tuple[Config, list[KnnConfig] | None]":
        """The configuration, and the values of options that list several; ``None`` where none does.

        Args:
            listed: Keys of the knn section whose option takes a list.
            file: The file where ``--config`` gives none.
        """
        from ..evaluation.sweep import split_values, sweep

        values = {
            key: split_values(key.removeprefix("knn."), self.options[key]) for key in listed if key in self.options
        }
        firsts = {key: several[0] for key, several in values.items()}
        base = self.load(firsts, file=file)
        if all(len(several) == 1 for several in values.values()):
            return base, None
        checked = {
            key.removeprefix("knn."): [self.load({**firsts, key: value}, file=file).knn for value in several]
            for key, several in values.items()
        }
        return base, sweep(checked, base.knn)


@dataclass(frozen=True, kw_only=True)
class _Configuration:
    """The options of a configuration that has no option of its own for every key."""

    config: Annotated[
        Path | None, option("--config FILE", "YAML configuration; options override it.", "Configuration")
    ] = None
    set_: Annotated[
        list[str] | None,
        option("--set KEY=VALUE", "Any key of the configuration, as in optimizer.lr_hash=1e-3.", "Configuration"),
    ] = None


Command = Callable[..., None]


def command(
    *keys: str, file: bool = True, defaults: Mapping[str, str] | None = None, listed: Sequence[str] = ()
) -> Callable[[Command], Command]:
    """Let a function be a command: the fields of its dataclass parameters become options, ``--json`` and so on last.

    Args:
        keys: Keys of the configuration that have an option here; the function takes them as ``settings``.
        file: Whether it has ``--config`` and ``--set`` too.
        defaults: By key, what applies where its option is not given and the configuration's default does not; ``""``
            is for every other key.
        listed: Those of ``keys`` whose option takes several values between commas.
    """

    def decorate(function: Command) -> Command:
        parameters: list[inspect.Parameter] = []
        last: list[inspect.Parameter] = []
        groups: dict[str, type[Any]] = {}
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            kind = parameter.annotation
            if kind is Settings:
                parameters += [_key_parameter(key, defaults or {}, is_list=key in listed) for key in keys]
                parameters += _field_parameters(_Configuration) if file else []
            elif isinstance(kind, type) and is_dataclass(kind):
                groups[parameter.name] = kind
                (last if kind is Output else parameters).extend(_field_parameters(kind))
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

        @functools.wraps(function)
        def run(**values: Any) -> None:  # noqa: ANN401 - of the function's own types
            arguments = {
                name: kind(**{item.name: values.pop(item.name) for item in fields(kind)})
                for name, kind in groups.items()
            }
            if keys:
                options = {key: values.pop(_name(key)) for key in keys}
                arguments["settings"] = Settings(
                    file=values.pop("config", None),
                    words=values.pop("set_", None) or (),
                    options={key: value for key, value in options.items() if value is not None},
                )
            function(**arguments, **values)

        del run.__wrapped__
        run.__signature__ = inspect.Signature([*parameters, *last])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*parameters, *last)}
        return run

    return decorate


def _field_parameters(kind: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            item.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if item.default is MISSING else item.default,
            annotation=hints[item.name],
        )
        for item in fields(kind)
    ]


def _name(key: str) -> str:
    return key.replace(".", "__")


def _key_parameter(key: str, defaults: Mapping[str, str], *, is_list: bool) -> inspect.Parameter:
    """The option of a key: everything about it is read from its field."""
    of = KeyOption(key)
    flags = f"{of.flag}/--no-{of.flag.removeprefix('--')}" if of.type is bool else of.flag
    shown = defaults.get(key, defaults.get("", of.default))
    choices = f": {', '.join(get_args(of.type))}, or all" if is_list and get_args(of.type) else ""
    info = option(
        f"{flags} {'VALUE,..' if is_list else of.metavar}".rstrip(),
        f"{of.help}{choices}{f' [default: {shown}]' if shown else ''}.",
        "Towers" if key == "optimizer.lr_towers" else TITLES.get(key.partition(".")[0]),
    )
    kind = str if is_list else of.type
    return inspect.Parameter(
        _name(key),
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Optional[kind], info],  # noqa: UP045
    )


def refuse_with_resume(given: Mapping[str, Any], beside: str) -> None:
    """Refuse options that would configure a run that is resumed: it keeps its own configuration.

    Args:
        given: Options to their values; None, False and empty ones were not given.
        beside: The options that may be given, for the message.
    """
    for name, value in given.items():
        if value is not None and value is not False and value != ():
            raise InputError(
                "an interrupted run keeps its configuration",
                where="--resume",
                got=name,
                wanted=f"{beside} beside it",
                do="leave it out, or start a new run",
            )
