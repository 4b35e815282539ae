"""Experiments and grids as files: which values of which keys are compared, before anything is resolved.

A value sets dotted keys of the configuration. Two further keys are not of the configuration: ``method`` (``prior`` or
``zero-shot``) and ``towers`` (``frozen``, ``last-2``, ``all``). Nothing here imports torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ...errors import InputError
from ..core.config import Config, FinetuneConfig, GridConfig
from ..core.strict_yaml import read_yaml

SHIPPED = Path(__file__).parent / "grids"
DEFAULT = "experiments"
GRID = "grid"
METHOD, TOWERS = "method", "towers"
METHODS = ("prior", "zero-shot")
IMAGES = "images"
# Of the whole command, or said by ``towers``.
FIXED = ("finetune.start", "finetune.unfreeze", "hardware.seed", "hardware.device")
EXPERIMENT_KEYS = {"title", "needs", "varies", "values"}
# Keys of the plan's grid, what they set, and what tables call them.
GRID_KEYS = {
    "hash_bits": ("hash.bits", "bits"),
    "K_neighbors": ("knn.K", "K"),
    "cosine_weight": ("loss.cosine_weight", "alpha"),
    "hash_weight": ("loss.hash_weight", "gamma"),
    "tau": ("knn.tau", "tau"),
    "max_num_patches": ("model.max_num_patches", "patches"),
    "freeze_towers": (TOWERS, TOWERS),
}
_TOWER_WORDS = {True: "frozen", False: "last-2", "full": "all"}
# Files that extend one another; more are a circle through links.
_MOST_EXTENDED = 10
_DO = "see docs/ablations.md, or `mmcli ablate --dry-run`"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One value of an experiment.

    Attributes:
        experiment: Its id, as ``A1``.
        varies: The key that it varies, or a plain name.
        order: Place of the value in the experiment.
        parts: What tables show, joined with commas; one part but for grids.
        settings: Dotted keys of the configuration, and their values.
        method: ``prior`` or ``zero-shot`` where nothing is trained.
        towers: What of the towers is trained.
    """

    experiment: str
    varies: str
    order: int
    parts: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    method: str | None = None
    towers: str = "frozen"

    @property
    def value(self) -> str:
        """What tables show."""
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
        InputError: It cannot be read, or says something that is no experiment.
    """
    path = _find(name)
    return {key: _experiment(key, record, path) for key, record in _tree(path).items()}


def with_values(experiment: Experiment, values: Sequence[Any]) -> Experiment:
    """The same experiment with other values of its key, as of ``--set-values``.

    Raises:
        InputError: It varies no single key, or a value is no plain one.
    """
    where = f"--set-values {experiment.name}"
    record = {"title": experiment.title, "varies": experiment.varies, "values": list(values)}
    if "." not in experiment.varies and experiment.varies != TOWERS:
        raise InputError(
            "values of no single key",
            where=where,
            got=experiment.varies,
            wanted="an experiment that varies one key",
            do="write an experiments file of your own (--experiments)",
        )
    replaced = _experiment(experiment.name, record, where)
    return replace(replaced, needs_images=experiment.needs_images)


def read_grid(name: str) -> tuple[Experiment, dict[str, Any]]:
    """Read a grid, by path or by the name of one that is shipped (``plan``).

    Returns:
        The grid as an experiment, every combination a value; and the file's other sections.

    Raises:
        InputError: It cannot be read, or has no grid.
    """
    path = _find(name)
    tree = _load(path)
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
        raise InputError(
            "no grid", where=path, got=str(error).splitlines()[-2].strip(), wanted="lists of values"
        ) from None
    return grid_experiment(grid), tree


def grid_experiment(grid: GridConfig) -> Experiment:
    """Every combination of a grid, as an experiment."""
    listed = {key: values for key in GRID_KEYS if (values := getattr(grid, key))}
    choices = []
    for order, combination in enumerate(product(*listed.values())):
        settings: dict[str, Any] = {}
        parts = []
        for key, value in zip(listed, combination, strict=True):
            target, shown = GRID_KEYS[key]
            settings[target] = _TOWER_WORDS.get(value, value) if target == TOWERS else value
            parts.append(f"{shown} {_plain(settings[target])}")
        towers = settings.pop(TOWERS, "frozen")
        varies = " x ".join(GRID_KEYS[key][1] for key in listed)
        choices.append(
            Choice(experiment=GRID, varies=varies, order=order, parts=tuple(parts), settings=settings, towers=towers)
        )
    varies = choices[0].varies if listed else "nothing"
    images = bool(grid.max_num_patches) or any(choice.towers != "frozen" for choice in choices)
    return Experiment(name=GRID, title="grid", varies=varies, choices=tuple(choices), needs_images=images)


def known_key(key: str) -> bool:
    """Whether a dotted key is one of the configuration."""
    model: Any = Config
    for part in key.split("."):
        fields = getattr(model, "model_fields", {})
        if part not in fields:
            return False
        model = fields[part].annotation
    return not (isinstance(model, type) and issubclass(model, BaseModel))


def _experiment(name: str, record: Any, where: object) -> Experiment:  # noqa: ANN401
    if not isinstance(record, dict) or not {"varies", "values"} <= record.keys() <= {
        "title",
        "needs",
        "varies",
        "values",
    }:
        raise InputError(
            "not an experiment",
            where=f"{where}, {name}",
            got=list(record) if isinstance(record, dict) else record,
            wanted="varies and values, perhaps title and needs",
            do=_DO,
        )
    varies, values = str(record["varies"]), record["values"]
    if not isinstance(values, list) or not values:
        raise InputError("an experiment without values", where=f"{where}, {name}", got=values, wanted="a list", do=_DO)
    choices = tuple(_choice(name, varies, at, value, where) for at, value in enumerate(values))
    shown = [choice.value for choice in choices]
    if len(set(shown)) < len(shown):
        twice = next(value for value in shown if shown.count(value) > 1)
        raise InputError("a value twice", where=f"{where}, {name}", got=twice, wanted="each once")
    return Experiment(
        name=name,
        title=str(record.get("title", varies)),
        varies=varies,
        choices=choices,
        needs_images=record.get("needs") == IMAGES,
    )


def _choice(experiment: str, varies: str, order: int, value: Any, where: object) -> Choice:  # noqa: ANN401
    if isinstance(value, dict):
        settings = {str(key): one for key, one in value.items() if key != "value"}
        shown = str(value.get("value", ", ".join(f"{key} {_plain(one)}" for key, one in settings.items())))
    else:
        settings, shown = {varies: value}, _plain(value)
    method, towers = settings.pop(METHOD, None), _towers(settings.pop(TOWERS, "frozen"), f"{where}, {experiment}")
    for key in settings:
        if key in FIXED or (key.startswith("model.") and key != "model.max_num_patches"):
            raise InputError(
                "a key that no experiment varies",
                where=f"{where}, {experiment}",
                got=key,
                wanted="keys that train or evaluate on one store and checkpoint",
                do="give it to the whole command, once for each value, with another --out",
            )
        if not known_key(key):
            near = get_close_matches(key, [*_every_key(), METHOD, TOWERS], n=1)
            raise InputError(
                "no such key",
                where=f"{where}, {experiment}",
                got=key,
                wanted="a key of the configuration",
                do=f"did you mean {near[0]}?" if near else "see docs/configuration.md",
            )
    if method is not None and method not in METHODS:
        raise InputError("no such method", where=f"{where}, {experiment}", got=method, wanted=" or ".join(METHODS))
    return Choice(
        experiment=experiment,
        varies=varies,
        order=order,
        parts=(shown,),
        settings=settings,
        method=method,
        towers=towers,
    )


def _towers(value: Any, where: str) -> str:  # noqa: ANN401
    """What of the towers is trained, as the finetune section spells it; ``frozen`` for nothing."""
    told = _TOWER_WORDS.get(value, value) if isinstance(value, bool | str) else "no word"
    if told in {"frozen", "none"}:
        return "frozen"
    try:
        return FinetuneConfig(unfreeze=str(told)).unfreeze
    except ValueError:
        raise InputError(
            "no such part of the towers", where=where, got=value, wanted="frozen, last-1, last-2 .. or all", do=_DO
        ) from None


def _tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The experiments of a file, over those that it extends; of an experiment in both, what the file says counts."""
    tree = _load(path)
    under = tree.pop("extends", None)
    if under is None:
        return tree
    base = _find(str(under))
    if base.absolute() in {one.absolute() for one in (*seen, path)} or len(seen) > _MOST_EXTENDED:
        raise InputError(
            "experiments that extend themselves", where=path, got=f"extends: {under}", wanted="another file"
        )
    merged = _tree(base, (*seen, path))
    for name, record in tree.items():
        both = isinstance(record, dict) and isinstance(merged.get(name), dict)
        merged[name] = {**merged[name], **record} if both else record
    return merged


def _find(name: str) -> Path:
    shipped = {file.stem: file for file in SHIPPED.glob("*.yaml")}
    return shipped.get(name, Path(name))


def _load(path: Path) -> dict[str, Any]:
    names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
    tree = read_yaml(path, "experiments", wanted=f"a YAML file, or one of {names}")
    if not isinstance(tree, dict):
        raise InputError(
            "broken experiments", where=path, got=type(tree).__name__, wanted="experiments by name", do=_DO
        )
    return {str(name): record for name, record in tree.items()}


def _every_key(model: Any = Config, prefix: str = "") -> list[str]:  # noqa: ANN401
    found = []
    for name, one in model.model_fields.items():
        nested = isinstance(one.annotation, type) and issubclass(one.annotation, BaseModel)
        found += _every_key(one.annotation, f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
    return found


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
