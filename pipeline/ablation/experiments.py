"""Experiments and grids as files: which values of which keys are compared, before anything is resolved.

A value sets dotted keys of the configuration. Two further keys are not of the configuration: ``method`` (``prior`` or
``zero-shot``) and ``towers`` (``frozen``, ``last-2``, ``all``). Nothing here imports torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..core.config import Config, FinetuneConfig, GridConfig
from ..core.strict_yaml import read_yaml
from .identity import FROZEN, flatten

SHIPPED = Path(__file__).parent / "grids"
DEFAULT = "experiments"
GRID = "grid"
METHOD, TOWERS = "method", "towers"
METHODS = ("prior", "zero-shot")
IMAGES = "images"
# A plan of more rows takes minutes to list, and years to train.
MOST_ROWS = 100_000
# Keys of the whole command, or that ``towers`` sets.
FIXED = ("finetune.start", "finetune.unfreeze", "hardware.seed", "hardware.device")
NEEDED_KEYS, EXPERIMENT_KEYS = {"varies", "values"}, {"title", "needs", "varies", "values"}
# Keys of a grid, the keys of the configuration that they set, and what tables call them.
GRID_KEYS = {
    "hash_bits": ("hash.bits", "bits"),
    "K_neighbors": ("knn.K", "K"),
    "cosine_weight": ("loss.cosine_weight", "alpha"),
    "hash_weight": ("loss.hash_weight", "gamma"),
    "tau": ("knn.tau", "tau"),
    "max_num_patches": ("model.max_num_patches", "patches"),
    "freeze_towers": (TOWERS, TOWERS),
}
_TOWER_WORDS = {True: FROZEN, False: "last-2", "full": "all"}
# Files that extend one another; more are a circle through links.
_MOST_EXTENDED = 10
_SEE_DOCS = "see docs/ablations.md, or `mmcli ablate --dry-run`"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One value of an experiment.

    Attributes:
        experiment: Id of the experiment, such as ``A1``.
        varies: The key that the experiment varies, or a plain name.
        order: Place of the value in the experiment.
        parts: What tables show, joined with commas; a single part unless the experiment is a grid.
        settings: Dotted keys of the configuration, and their values.
        method: ``prior`` or ``zero-shot`` where nothing is trained.
        towers: Which part of the towers is trained.
    """

    experiment: str
    varies: str
    order: int
    parts: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    method: str | None = None
    towers: str = FROZEN

    @property
    def value(self) -> str:
        """The value as tables show it."""
        return ", ".join(self.parts)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment and its values, in order; ``needs_images`` where a store does not have all that it needs."""

    name: str
    title: str
    varies: str
    choices: tuple[Choice, ...]
    needs_images: bool = False


def read_experiments(name: str = DEFAULT) -> dict[str, Experiment]:
    """Read a file of experiments, by path or by the name of one that is shipped.

    Args:
        name: A path, ``experiments`` or ``miniature``.

    Raises:
        InputError: The file cannot be read, or holds something that is no experiment.
    """
    path = _shipped(name)
    return {key: _experiment(key, record, path) for key, record in _extended(path).items()}


def with_values(experiment: Experiment, values: Sequence[Any]) -> Experiment:
    """The same experiment with other values of its key, as ``--set-values`` gives them.

    Raises:
        InputError: The experiment varies several keys, or a value is not a plain one.
    """
    where = f"--set-values {experiment.name}"
    if "." not in experiment.varies and experiment.varies != TOWERS:
        raise InputError(
            "values of no single key",
            where=where,
            got=experiment.varies,
            wanted="an experiment that varies one key",
            do="write an experiments file of your own (--experiments)",
        )
    record = {"title": experiment.title, "varies": experiment.varies, "values": list(values)}
    return replace(_experiment(experiment.name, record, where), needs_images=experiment.needs_images)


def read_grid(name: str) -> tuple[Experiment, dict[str, Any]]:
    """Read a grid, by path or by the name of one that is shipped (``plan``).

    Returns:
        The grid as an experiment, every combination a value; and the file's other sections.

    Raises:
        InputError: The file cannot be read, has no grid, or one of too many combinations.
    """
    path = _shipped(name)
    tree = _read_tree(path)
    section = tree.pop("grid_search", None)
    unknown = set(section) - GRID_KEYS.keys() if isinstance(section, dict) else set()
    if not isinstance(section, dict) or unknown:
        raise InputError(
            "no grid",
            where=path,
            got=", ".join(sorted(unknown)) or "no section grid_search",
            wanted=f"grid_search with lists of {', '.join(GRID_KEYS)}",
        )
    try:
        grid = GridConfig(**section)
    except ValueError as error:
        reason = str(error).splitlines()[-2].strip()
        raise InputError("no grid", where=path, got=reason, wanted="lists of values") from None
    check_row_count(prod(len(values) or 1 for _, values in grid), where=path)
    return grid_experiment(grid), tree


def check_row_count(rows: int, where: object) -> None:
    """Refuse a plan of more rows than could ever be made.

    Raises:
        InputError: There are more than :data:`MOST_ROWS`.
    """
    if rows > MOST_ROWS:
        raise InputError(
            "too many rows", where=where, got=f"{rows:,}", wanted=f"at most {MOST_ROWS:,}", do="ask for fewer"
        )


def grid_experiment(grid: GridConfig) -> Experiment:
    """Every combination of a grid, as an experiment."""
    axes = {key: values for key in GRID_KEYS if (values := getattr(grid, key))}
    varies = " x ".join(GRID_KEYS[key][1] for key in axes) if axes else "nothing"
    choices = []
    for order, combination in enumerate(product(*axes.values())):
        settings: dict[str, Any] = {}
        parts = []
        for key, value in zip(axes, combination, strict=True):
            target, label = GRID_KEYS[key]
            settings[target] = _TOWER_WORDS.get(value, value) if target == TOWERS else value
            parts.append(f"{label} {_plain(settings[target])}")
        towers = settings.pop(TOWERS, FROZEN)
        choices.append(
            Choice(experiment=GRID, varies=varies, order=order, parts=tuple(parts), settings=settings, towers=towers)
        )
    images = bool(grid.max_num_patches) or any(choice.towers != FROZEN for choice in choices)
    return Experiment(name=GRID, title="grid", varies=varies, choices=tuple(choices), needs_images=images)


def config_keys() -> set[str]:
    """Every dotted key of the configuration."""
    return set(flatten(Config().model_dump()))


def _experiment(name: str, record: Any, source: object) -> Experiment:  # noqa: ANN401
    where = f"{source}, {name}"
    if not isinstance(record, dict) or not NEEDED_KEYS <= record.keys() <= EXPERIMENT_KEYS:
        raise InputError(
            "not an experiment",
            where=where,
            got=list(record) if isinstance(record, dict) else record,
            wanted="varies and values, perhaps title and needs",
            do=_SEE_DOCS,
        )
    varies, values = str(record["varies"]), record["values"]
    if not isinstance(values, list) or not values:
        raise InputError("an experiment without values", where=where, got=values, wanted="a list", do=_SEE_DOCS)
    choices = tuple(_choice(name, varies, order, value, where) for order, value in enumerate(values))
    labels = [choice.value for choice in choices]
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise InputError("a value twice", where=where, got=twice, wanted="each once")
    title, images = str(record.get("title", varies)), record.get("needs") == IMAGES
    return Experiment(name=name, title=title, varies=varies, choices=choices, needs_images=images)


def _choice(experiment: str, varies: str, order: int, value: Any, where: str) -> Choice:  # noqa: ANN401
    if isinstance(value, dict):
        settings = {str(key): setting for key, setting in value.items() if key != "value"}
        label = str(value.get("value", ", ".join(f"{key} {_plain(setting)}" for key, setting in settings.items())))
    else:
        settings, label = {varies: value}, _plain(value)
    method, towers = settings.pop(METHOD, None), _towers(settings.pop(TOWERS, FROZEN), where)
    for key in settings:
        _check_key(key, where)
    if method is not None and method not in METHODS:
        raise InputError("no such method", where=where, got=method, wanted=" or ".join(METHODS))
    return Choice(
        experiment=experiment,
        varies=varies,
        order=order,
        parts=(label,),
        settings=settings,
        method=method,
        towers=towers,
    )


def _check_key(key: str, where: str) -> None:
    if key in FIXED or (key.startswith("model.") and key != "model.max_num_patches"):
        raise InputError(
            "a key that no experiment varies",
            where=where,
            got=key,
            wanted="keys that train or evaluate on one store and checkpoint",
            do="give it to the whole command, once for each value, with another --out",
        )
    keys = config_keys()
    if key not in keys:
        near = get_close_matches(key, [*keys, METHOD, TOWERS], n=1)
        raise InputError(
            "no such key",
            where=where,
            got=key,
            wanted="a key of the configuration",
            do=f"did you mean {near[0]}?" if near else "see docs/configuration.md",
        )


def _towers(value: Any, where: str) -> str:  # noqa: ANN401
    """Which part of the towers is trained, as the finetune section spells it; ``frozen`` for nothing."""
    word = _TOWER_WORDS.get(value, value) if isinstance(value, bool | str) else "no word"
    if word in {FROZEN, "none"}:
        return FROZEN
    try:
        return FinetuneConfig(unfreeze=str(word)).unfreeze
    except ValueError:
        raise InputError(
            "no such part of the towers",
            where=where,
            got=value,
            wanted="frozen, last-1, last-2 .. or all",
            do=_SEE_DOCS,
        ) from None


def _extended(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The experiments of a file over those of the file that it extends; its own keys of an experiment count."""
    tree = _read_tree(path)
    extends = tree.pop("extends", None)
    if extends is None:
        return tree
    base = _shipped(str(extends))
    if base.absolute() in {file.absolute() for file in (*seen, path)} or len(seen) > _MOST_EXTENDED:
        raise InputError(
            "experiments that extend themselves", where=path, got=f"extends: {extends}", wanted="another file"
        )
    merged = _extended(base, (*seen, path))
    for name, record in tree.items():
        both = isinstance(record, dict) and isinstance(merged.get(name), dict)
        merged[name] = {**merged[name], **record} if both else record
    return merged


def _shipped(name: str) -> Path:
    """The shipped file of a name, or the path that the name is."""
    return {file.stem: file for file in SHIPPED.glob("*.yaml")}.get(name, Path(name))


def _read_tree(path: Path) -> dict[str, Any]:
    names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
    tree = read_yaml(path, "experiments", wanted=f"a YAML file, or one of {names}")
    if not isinstance(tree, dict):
        got = type(tree).__name__
        raise InputError("broken experiments", where=path, got=got, wanted="experiments by name", do=_SEE_DOCS)
    return {str(name): record for name, record in tree.items()}


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
