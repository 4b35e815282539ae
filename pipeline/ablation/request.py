"""From what the command line says to a plan: which experiments, with which values, of which store, for which seeds.

Nothing here imports torch, so that a dry run is quick.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from ...cache import FORMAT_VERSION, Store
from ...errors import InputError
from ..core.config import Config, ModelConfig, load_config, read_sections
from ..core.strict_yaml import parse_yaml
from ..data.manifest import read_manifest
from ..evaluation.prompts import TEMPLATES
from .experiments import DEFAULT, Experiment, read_experiments, read_grid, with_values
from .identity import flatten
from .plan import Base, Plan, Row, make_plan, restrict


@dataclass(frozen=True, kw_only=True)
class Told:
    """The configuration as it was given: a file, and options over it.

    Attributes:
        file: A YAML file, or None.
        options: Dotted keys to values.
        flags: Dotted keys to the names of options, for messages.
        tree: Sections under both, as those of a grid's file.
    """

    file: Path | None = None
    options: Mapping[str, Any]
    flags: Mapping[str, str]
    tree: Mapping[str, Any]

    def resolve(self, settings: Mapping[str, Any]) -> Config:
        """The configuration with some keys over everything that was given.

        Raises:
            InputError: It does not resolve.
        """
        return load_config(options={**self.flat, **self.options, **settings}, flags=self.flags)

    @property
    def flat(self) -> dict[str, Any]:
        """Dotted keys of the files."""
        return {**flatten(self.tree), **_flat_file(self.file)}


def make_base(told: Told, store: Path) -> Base:
    """Check what was given, once and with the file's name in messages, and look at the store.

    Args:
        told: The configuration.
        store: The store that rows are of, unless they name another patch budget.

    Raises:
        InputError: The configuration or the store is not usable.
    """
    if told.file is not None:
        load_config(told.file, options=told.options, flags=told.flags)
    frozen = replace(told, file=None, tree=told.flat)
    config, key, extra = frozen.resolve({}), Store.open(store).key, Store.open(store).extra
    given, budget = config.model.model_fields_set, config.model.max_num_patches
    if "max_num_patches" in given and budget != key.patches and "imported" not in extra:
        raise InputError(
            "a store of another budget",
            where=store,
            got=f"{key.patches} patches",
            wanted=f"{budget}",
            do="name another --store, or leave model.max_num_patches out: experiment B3 varies it",
        )

    def digest(patches: int, **others: Any) -> str:  # noqa: ANN401
        if (patches != key.patches or others) and "imported" in extra:
            raise InputError(
                "no images and towers behind this store",
                where=store,
                got="a store that was imported",
                wanted="one of `mmcli extract`",
                do="leave experiments with patches and towers out",
            )
        return replace(key, patches=patches, **others).digest

    return Base(
        resolve=frozen.resolve,
        store_digest=digest,
        patches=key.patches,
        prompts=TEMPLATES,
        images_digest=lambda patches: digest(
            patches,
            dtype="float32",
            compute_dtype="float32",
            processor=_own_processor(key.processor),
            format_version=FORMAT_VERSION,
        ),
    )


def model_of(store: Store, config: Config, patches: int) -> ModelConfig:
    """The checkpoint of a store, where another path to it was not given, at a patch budget."""
    key, given = store.key, "siglip2_variant" in config.model.model_fields_set
    return ModelConfig(
        siglip2_variant=config.model.siglip2_variant if given else str(store.extra.get("model_path", key.model)),
        revision=config.model.revision or key.commit,
        max_num_patches=patches,
        text_max_length=key.text_length,
    )


def check_source(store: Store, data: Path, model: ModelConfig) -> None:
    """Refuse to train towers on other images, or from another checkpoint, than those of the store that rows are of.

    Raises:
        InputError: The manifest below ``data``, or the local checkpoint, is another one.
    """
    from ..extraction.siglip import local_digest
    from ..finetuning.setup import MANIFEST

    key, name = store.key, Path(model.siglip2_variant)
    found = read_manifest(data / MANIFEST).sha256
    if found != key.manifest_sha256:
        raise InputError(
            "another data set than the store's",
            where=data,
            got=f"manifest {found[:12]}",
            wanted=f"manifest {key.manifest_sha256[:12]}",
            do="name the data set's folder with --data, or another --store",
        )
    own = key.revision.startswith("sha256:")
    if own and (not name.is_dir() or local_digest(name) != key.revision):
        raise InputError(
            "another checkpoint than the store's",
            where=model.siglip2_variant,
            got="other weights or settings",
            wanted=f"{key.model} at {key.revision[:19]}",
            do="name the store's checkpoint with --model",
        )
    if not own and (model.siglip2_variant, model.revision) != (key.model, key.revision):
        raise InputError(
            "another checkpoint than the store's",
            where=model.siglip2_variant,
            got=f"revision {model.revision}",
            wanted=f"{key.model} at {key.revision[:19]}",
            do="leave --model and model.revision out",
        )


def _own_processor(processor: str) -> str:
    """The checkpoint's settings of a store whose images may have been resized otherwise: finetuning does not."""
    settings = json.loads(processor)
    settings.pop("resizer", None)
    return json.dumps(settings, sort_keys=True)


def _flat_file(file: Path | None) -> dict[str, Any]:
    return {} if file is None else flatten(read_sections(file))


MOST_SEEDS = 2**32
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, kw_only=True)
class Order:
    """What was asked for.

    Attributes:
        names: Ids of experiments; those that a store alone serves where neither these nor a grid are given.
        grid: A grid, by path or by name.
        experiments: A file of experiments, by path or by name.
        values: Other values of experiments: ``A1=x,y``.
        only: Filters of rows: ``KEY=GLOB,...``; all have to hold.
        seeds: How many, from ``hardware.seed`` on.
        store: The store.
        told: The configuration.
    """

    names: tuple[str, ...] = ()
    grid: str | None = None
    experiments: str = DEFAULT
    values: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    seeds: int = 1
    store: Path
    told: Told


@dataclass(frozen=True, kw_only=True)
class Ordered:
    """A plan and what is to be said about it.

    Attributes:
        plan: The plan.
        titles: Of the experiments in it.
        config: The base configuration.
    """

    plan: Plan
    titles: dict[str, str]
    config: Config


def place_order(order: Order) -> Ordered:
    """Read experiments, resolve every row, and plan.

    Raises:
        InputError: No such experiment, file, key or value; or nothing is left by the filters.
    """
    told = order.told
    asked: list[Experiment] = []
    if order.grid is not None:
        grid, tree = read_grid(order.grid)
        asked.append(grid)
        told = _over(told, tree, order.grid)
    if order.names or order.grid is None:
        asked = [*_named(order), *asked]
    base = make_base(told, order.store)
    config = base.resolve({})
    first = config.hardware.seed
    if first + order.seeds > MOST_SEEDS:
        raise InputError("no such seeds", where="--seeds", got=f"{order.seeds} from {first} on", do="lower --seed")
    choices = [choice for experiment in asked for choice in experiment.choices]
    plan = make_plan(choices, range(first, first + order.seeds), base)
    filters = [_filter(text, {one.name for one in asked}) for text in order.only]
    kept = restrict(plan, lambda row: all(one(row) for one in filters)) if filters else plan
    if not kept.rows:
        raise InputError(
            "no row is left",
            where="--only",
            got=" ".join(order.only),
            wanted="values of the experiments asked for",
            do="see the values with --dry-run",
        )
    titles = {one.name: f"{one.title} ({one.varies})" for one in asked}
    return Ordered(plan=kept, titles=titles, config=config)


def parse_duration(text: str) -> float:
    """Seconds of ``90``, ``90s``, ``15m``, ``2h``, ``1d``.

    Raises:
        InputError: It is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip().lower())
    if found is None or not float(found[1]):
        raise InputError("no duration", where="--max-time", got=text, wanted="a number of s, m, h or d", do="as in 90m")
    return float(found[1]) * UNITS[found[2] or "s"]


def _named(order: Order) -> list[Experiment]:
    known = read_experiments(order.experiments)
    values = dict(_values(text, known) for text in order.values)
    names = order.names or tuple(name for name, one in known.items() if not one.needs_images)
    for name in (*names, *values):
        if name not in known:
            near = get_close_matches(name.upper(), known, n=1)
            raise InputError(
                "no such experiment",
                where="mmcli ablate",
                got=name,
                wanted=f"one of {', '.join(known)}",
                do=f"did you mean {near[0]}?" if near else "choose one of these",
            )
    return [with_values(known[name], values[name]) if name in values else known[name] for name in dict.fromkeys(names)]


def _values(text: str, known: dict[str, Experiment]) -> tuple[str, list[Any]]:
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
    if name not in known:
        raise InputError("no such experiment", where="--set-values", got=name, wanted=f"one of {', '.join(known)}")
    return name, values


def _over(told: Told, tree: dict[str, Any], grid: str) -> Told:
    """The sections of a grid's file are the configuration's, where it has any."""
    if tree and told.file is not None:
        raise InputError(
            "two configurations",
            where=grid,
            got=f"sections {', '.join(tree)} beside --config",
            wanted="one of them",
            do="put them into one file",
        )
    return Told(file=told.file, options=told.options, flags=told.flags, tree=tree)


class _filter:  # noqa: N801 - a function with a state
    """Whether a row has one of the values of a key, of an experiment, or of what it shows."""

    def __init__(self, text: str, experiments: Sequence[str] | set[str]) -> None:
        self._key, equals, listed = text.partition("=")
        self._globs = [glob.strip() for glob in listed.split(",") if glob.strip()]
        self._experiment = self._key in experiments
        if not equals or not self._globs:
            raise InputError(
                "cannot read a filter",
                where="--only",
                got=repr(text),
                wanted="KEY=VALUE,VALUE",
                do="as in --only hash.bits=64 or --only 'A1=hadamard*'",
            )

    def __call__(self, row: Row) -> bool:
        if self._experiment:
            return row.experiment != self._key or any(fnmatchcase(row.value, glob) for glob in self._globs)
        values = row.settings
        if not values:
            return False
        if self._key not in values:
            raise InputError(
                "no such key",
                where="--only",
                got=self._key,
                wanted="an experiment or a key of the configuration",
                do="see docs/configuration.md",
            )
        shown = str(values[self._key]).lower()
        return any(fnmatchcase(shown, glob.lower()) for glob in self._globs)
