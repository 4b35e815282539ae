"""From a request to a plan: which experiments, with which values, of which store, for which seeds.

Nothing here imports torch, so that a dry run is quick.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml

from ...cache import FORMAT_VERSION, Store
from ...errors import InputError
from ..core.config import Config, load_config, read_sections
from ..core.defaults import ABLATIONS, DATA, RUNS
from ..core.strict_yaml import parse_yaml
from .experiments import DEFAULT, Experiment, check_row_count, read_experiments, read_grid, with_values
from .plan import Base, Plan, Row, make_plan, restrict

MOST_SEEDS = 2**32
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
Engine = Literal["local", "ray"]


@dataclass(frozen=True, kw_only=True)
class ConfigSource:
    """Where the base configuration comes from: a file, and options over it.

    Attributes:
        file: A YAML file, or None.
        options: Dotted keys to values.
        flags: Dotted keys to the names of options, for messages.
        sections: Sections under the options, such as those of a grid's file.
    """

    file: Path | None = None
    options: Mapping[str, Any]
    flags: Mapping[str, str]
    sections: Mapping[str, Any] = field(default_factory=dict)

    def read(self) -> "ConfigSource":
        """The same with the file's sections in the place of the file, which is read and checked once.

        Raises:
            InputError: The file does not resolve.
        """
        if self.file is None:
            return self
        load_config(self.file, options=self.options, flags=self.flags)
        return replace(self, file=None, sections=read_sections(self.file))

    def resolve(self, settings: Mapping[str, Any]) -> Config:
        """The configuration with some keys over everything that was given.

        Raises:
            InputError: It does not resolve.
        """
        return load_config(options={**self.options, **settings}, flags=self.flags, under=self.sections)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for, and how it is carried out.

    Attributes:
        names: Ids of experiments; by default those that a store alone serves, where no grid is given.
        grid: A grid, by path or by name.
        experiments: A file of experiments, by path or by name.
        values: Other values of experiments: ``A1=x,y``.
        only: Filters of rows: ``KEY=GLOB,...``; all have to hold.
        seeds: How many, from ``hardware.seed`` on.
        store: The store.
        source: Where the base configuration comes from.
        out: The folder of the table.
        runs: The folder of runs that were made by hand.
        data: Folder of the images, for experiments that read them.
        force: Make everything again.
        max_time: Seconds after which nothing more is begun.
        workers: How many processes work at a time.
        engine: This machine, or a Ray cluster.
        address: Address of the cluster.
    """

    store: Path
    source: ConfigSource
    names: tuple[str, ...] = ()
    grid: str | None = None
    experiments: str = DEFAULT
    values: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    seeds: int = 1
    out: Path = ABLATIONS
    runs: Path = RUNS
    data: Path = DATA
    force: bool = False
    max_time: float | None = None
    workers: int = 1
    engine: Engine = "local"
    address: str | None = None


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan, the titles of its experiments, and the base configuration."""

    plan: Plan
    titles: Mapping[str, str]
    config: Config


def plan_request(request: Request) -> Planned:
    """Read experiments, resolve every row, and plan.

    Raises:
        InputError: No such experiment, file, key or value; too many rows; or the filters leave none.
    """
    source, experiments = request.source, list[Experiment]()
    if request.grid is not None:
        grid, sections = read_grid(request.grid)
        experiments.append(grid)
        if sections and source.file is not None:
            raise InputError(
                "two configurations",
                where=request.grid,
                got=f"sections {', '.join(sections)} beside --config",
                wanted="one of them",
                do="put them into one file",
            )
        source = replace(source, sections=sections)
    if request.names or request.grid is None:
        experiments = [*_named(request), *experiments]
    base = make_base(source, request.store)
    config = base.resolve({})
    choices = [choice for experiment in experiments for choice in experiment.choices]
    first = config.hardware.seed
    if first + request.seeds > MOST_SEEDS:
        raise InputError("no such seeds", where="--seeds", got=f"{request.seeds} from {first} on", do="lower --seed")
    check_row_count(len(choices) * request.seeds, where="--seeds")
    plan = make_plan(choices, range(first, first + request.seeds), base)
    names = {experiment.name for experiment in experiments}
    filters = [_filter(text, names) for text in request.only]
    plan = restrict(plan, lambda row: all(keeps(row) for keeps in filters)) if filters else plan
    if not plan.rows:
        raise InputError(
            "no row is left",
            where="--only",
            got=" ".join(request.only),
            wanted="values of the experiments asked for",
            do="see the values with --dry-run",
        )
    titles = {experiment.name: f"{experiment.title} ({experiment.varies})" for experiment in experiments}
    return Planned(plan=plan, titles=titles, config=config)


def make_base(source: ConfigSource, store: Path) -> Base:
    """Check the configuration, once and with the file's name in messages, and look at the store.

    Args:
        source: Where the configuration comes from.
        store: The store that rows are of, unless they name another patch budget.

    Raises:
        InputError: The configuration or the store is not usable.
    """
    source, opened = source.read(), Store.open(store)
    model, key = source.resolve({}).model, opened.key
    imported = "imported" in opened.extra
    if "max_num_patches" in model.model_fields_set and model.max_num_patches != key.patches and not imported:
        raise InputError(
            "a store of another budget",
            where=store,
            got=f"{key.patches} patches",
            wanted=f"{model.max_num_patches}",
            do="name another --store, or leave model.max_num_patches out: experiment B3 varies it",
        )

    def digest(patches: int, **changes: Any) -> str:  # noqa: ANN401
        if imported and (patches != key.patches or changes):
            raise InputError(
                "no images and towers behind this store",
                where=store,
                got="a store that was imported",
                wanted="one of `mmcli extract`",
                do="leave experiments with patches and towers out",
            )
        return replace(key, patches=patches, **changes).digest

    def images_digest(patches: int) -> str:
        processor = plain_processor(key.processor)
        return digest(
            patches, dtype="float32", compute_dtype="float32", processor=processor, format_version=FORMAT_VERSION
        )

    return Base(resolve=source.resolve, store_digest=digest, patches=key.patches, images_digest=images_digest)


def plain_processor(processor: str) -> str:
    """The checkpoint's own settings of a store's processor: finetuning resizes images in one way alone."""
    settings = json.loads(processor)
    settings.pop("resizer", None)
    return json.dumps(settings, sort_keys=True)


def parse_duration(text: str) -> float:
    """Seconds of ``90``, ``90s``, ``15m``, ``2h``, ``1d``.

    Raises:
        InputError: The text is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip().lower())
    if match is None or not float(match[1]):
        raise InputError("no duration", where="--max-time", got=text, wanted="a number of s, m, h or d", do="as in 90m")
    return float(match[1]) * UNITS[match[2] or "s"]


def _named(request: Request) -> list[Experiment]:
    """The experiments asked for by name, with the values that were given for them."""
    available = read_experiments(request.experiments)
    values = dict(_parse_values(text) for text in request.values)
    names = request.names or tuple(name for name, item in available.items() if not item.needs_images)
    for name in (*names, *values):
        if name not in available:
            near = get_close_matches(name.upper(), available, n=1)
            raise InputError(
                "no such experiment",
                where="mmcli ablate",
                got=name,
                wanted=f"one of {', '.join(available)}",
                do=f"did you mean {near[0]}?" if near else "choose one of these",
            )
    return [
        with_values(available[name], values[name]) if name in values else available[name]
        for name in dict.fromkeys(names)
    ]


def _parse_values(text: str) -> tuple[str, list[Any]]:
    """``B3=36,64,100`` to the experiment and its values."""
    name, equals, listed = text.partition("=")
    try:
        values = parse_yaml(f"[{listed}]")
    except yaml.YAMLError:
        values = None
    if not equals or not values or any(isinstance(value, dict | list) for value in values):
        raise InputError(
            "cannot read values",
            where="--set-values",
            got=repr(text),
            wanted="EXPERIMENT=VALUE,VALUE",
            do="as in --set-values B3=36,64,100",
        )
    return name, values


def _filter(text: str, experiments: Collection[str]) -> Callable[[Row], bool]:
    """Whether a row has one of the values of a key of its configuration; or, of an experiment, shows one of them."""
    key, equals, listed = text.partition("=")
    globs = [glob.strip() for glob in listed.split(",") if glob.strip()]
    if not equals or not globs:
        raise InputError(
            "cannot read a filter",
            where="--only",
            got=repr(text),
            wanted="KEY=VALUE,VALUE",
            do="as in --only hash.bits=64 or --only 'A1=hadamard*'",
        )

    def shows_value(row: Row) -> bool:
        return row.experiment != key or any(fnmatchcase(row.value, glob) for glob in globs)

    def has_setting(row: Row) -> bool:
        settings = row.settings
        if settings and key not in settings:
            raise InputError(
                "no such key",
                where="--only",
                got=key,
                wanted="an experiment or a key of the configuration",
                do="see docs/configuration.md",
            )
        return bool(settings) and any(fnmatchcase(str(settings[key]).lower(), glob.lower()) for glob in globs)

    return shows_value if key in experiments else has_setting
