"""From what the command line says to a plan: which experiments, with which values, of which store, for which seeds.

Nothing here imports torch, so that a dry run is quick.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from ... import InputError
from ..core.config import Config
from ..core.strict_yaml import parse_yaml
from .ablate_plan import Plan, Row, restrict
from .base import Told, make_base
from .experiments import DEFAULT, Experiment, read_experiments, read_grid, with_values
from .plan import make_plan

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
            "no row is left", where="--only", got=" ".join(order.only), wanted="values of the experiments asked for",
            do="see the values with --dry-run",
        )  # fmt: skip
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
                "no such experiment", where="mmcli ablate", got=name, wanted=f"one of {', '.join(known)}",
                do=f"did you mean {near[0]}?" if near else "choose one of these",
            )  # fmt: skip
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
            "cannot read values", where="--set-values", got=repr(text), wanted="EXPERIMENT=VALUE,VALUE",
            do="as in --set-values B3=36,64,100",
        )  # fmt: skip
    if name not in known:
        raise InputError("no such experiment", where="--set-values", got=name, wanted=f"one of {', '.join(known)}")
    return name, values


def _over(told: Told, tree: dict[str, Any], grid: str) -> Told:
    """The sections of a grid's file are the configuration's, where it has any."""
    if tree and told.file is not None:
        raise InputError(
            "two configurations", where=grid, got=f"sections {', '.join(tree)} beside --config", wanted="one of them",
            do="put them into one file",
        )  # fmt: skip
    return Told(file=told.file, options=told.options, flags=told.flags, tree=tree)


class _filter:  # noqa: N801 - a function with a state
    """Whether a row has one of the values of a key, of an experiment, or of what it shows."""

    def __init__(self, text: str, experiments: Sequence[str] | set[str]) -> None:
        self._key, equals, listed = text.partition("=")
        self._globs = [glob.strip() for glob in listed.split(",") if glob.strip()]
        self._experiment = self._key in experiments
        if not equals or not self._globs:
            raise InputError(
                "cannot read a filter", where="--only", got=repr(text), wanted="KEY=VALUE,VALUE",
                do="as in --only hash.bits=64 or --only 'A1=hadamard*'",
            )  # fmt: skip

    def __call__(self, row: Row) -> bool:
        if self._experiment:
            return row.experiment != self._key or any(fnmatchcase(row.value, glob) for glob in self._globs)
        values = row.settings
        if not values:
            return False
        if self._key not in values:
            raise InputError(
                "no such key", where="--only", got=self._key, wanted="an experiment or a key of the configuration",
                do="see docs/configuration.md",
            )  # fmt: skip
        shown = str(values[self._key]).lower()
        return any(fnmatchcase(shown, glob.lower()) for glob in self._globs)
