"""The smallest set of extractions, trainings, searches and votes that gives every row that was asked for.

Pure: nothing is read, trained or timed here, and torch is not imported. Rows that differ in what a training does not
read share the training; rows that differ in nothing at all share the evaluation; and of an experiment's values that
cannot differ, such as alpha on frozen towers, one row is left, which says why.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...errors import InputError
from ..core.config import Config, resolve
from ..evaluation.sweep import search_key
from ..finetuning.settings import resolve_finetune
from .experiments import Choice
from .identity import (
    FROZEN,
    Kind,
    baseline_key,
    evaluation_identity,
    evaluation_idle,
    flat_config,
    group_key,
    key_of,
    kind_of,
    method_of,
    seed_key,
    training_idle,
)

Status = Literal["planned", "failed", "collapsed"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """What has to be made before it can be evaluated: a head, finetuned towers, or a baseline.

    Attributes:
        key: Hex digest of everything that a figure of it depends on.
        group: The key without the seed; seeds of one method share it.
        kind: Which stage makes it.
        store: Digest of the store's key.
        patches: The store's patch budget.
        towers: Which part of the towers is trained.
        config: Resolved; its knn section is the one that chooses the best epoch.
    """

    key: str
    group: str
    kind: Kind
    store: str
    patches: int
    towers: str
    config: Config

    @property
    def seed(self) -> int:
        """The seed of every random draw."""
        return self.config.hardware.seed


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One row of figures: a training, a method, and the settings of its votes."""

    key: str
    training: str
    method: str
    config: Config


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: a value of an experiment, with one seed.

    Attributes:
        experiment: Id of the experiment.
        varies: What the experiment varies.
        value: The value as tables show it.
        order: Place of the value in its experiment.
        seed: The seed.
        base: Digest of the base configuration, the store and the experiment's values; the table keeps the rows of one
            base for each experiment.
        status: Its state before anything ran.
        note: Why it failed or was collapsed.
        key: Key of its evaluation; empty where the configuration is refused.
        training: Key of its training.
        config: The resolved configuration; None where it is refused.
        towers: Which part of the towers is trained.
        patches: Patch budget of its images.
        stands_for: How many values of the experiment this row is.
    """

    experiment: str
    varies: str
    value: str
    order: int
    seed: int
    base: str
    status: Status = "planned"
    note: str = ""
    key: str = ""
    training: str = ""
    config: Config | None = None
    towers: str = FROZEN
    patches: int = 0
    stands_for: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        """Every dotted key of its configuration, with its patches and towers; nothing where it is refused."""
        if self.config is None:
            return {}
        return flat_config(self.config) | {"model.max_num_patches": self.patches, "towers": self.towers}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every row, and what has to be made for them.

    Attributes:
        rows: In the order of the experiments as asked for, values, seeds.
        trainings: By key, in the order in which they are best made: every value with the first seed before the second.
        evaluations: By key.
    """

    rows: tuple[Row, ...]
    trainings: Mapping[str, Training]
    evaluations: Mapping[str, Evaluation]

    @property
    def asked(self) -> int:
        """Rows before values that cannot differ were collapsed."""
        return sum(row.stands_for for row in self.rows)

    @property
    def stores(self) -> dict[str, int]:
        """Patch budgets of the stores that are read, by digest."""
        return {training.store: training.patches for training in self.trainings.values() if training.kind != "finetune"}

    @property
    def searches(self) -> int:
        """Searches of a split: one serves every K, vote and temperature of a training and a metric."""
        searches = {(item.training, search_of(item)) for item in self.evaluations.values()}
        return sum(search is not None for _, search in searches)

    @property
    def votes(self) -> int:
        """Evaluations in which neighbours vote."""
        return sum(search_of(item) is not None for item in self.evaluations.values())

    def count(self, *kinds: Kind) -> int:
        """How many trainings there are of some kinds."""
        return sum(training.kind in kinds for training in self.trainings.values())


def search_of(evaluation: Evaluation) -> tuple[str, int] | None:
    """The search that serves an evaluation, as :func:`~mmcli.pipeline.evaluation.sweep.search_key` names it.

    None where nothing votes.
    """
    return search_key(evaluation.config.knn) if evaluation.method in {"knn", "hybrid"} else None


def restrict(plan: Plan, wanted: Callable[[Row], bool]) -> Plan:
    """The same plan for some of its rows: what only the others need is left out."""
    rows = tuple(row for row in plan.rows if wanted(row))
    keys, trainings = {row.key for row in rows}, {row.training for row in rows}
    return Plan(
        rows=rows,
        trainings={key: training for key, training in plan.trainings.items() if key in trainings},
        evaluations={key: item for key, item in plan.evaluations.items() if key in keys},
    )


@dataclass(frozen=True, kw_only=True)
class Base:
    """What rows are resolved against.

    Attributes:
        resolve: The checked base configuration with some dotted keys over it.
        store_digest: Digest of the store for a patch budget.
        images_digest: The digest of the images and the model, for what is trained from the images themselves.
        patches: Budget of the store that was named.
    """

    resolve: Callable[[Mapping[str, Any]], Config]
    store_digest: Callable[[int], str]
    images_digest: Callable[[int], str]
    patches: int


def make_plan(choices: Iterable[Choice], seeds: Sequence[int], base: Base) -> Plan:
    """Resolve every value for every seed and share what can be shared.

    Args:
        choices: Values of experiments, in order.
        seeds: Each value has a row for each of them.
        base: What they are resolved against.
    """
    plain = base.resolve({})
    digest = _base_digest(plain, base)
    experiments: dict[str, list[Choice]] = {}
    for choice in choices:
        experiments.setdefault(choice.experiment, []).append(choice)
    alike: dict[tuple[object, ...], list[_Value]] = {}
    trainings: dict[str, Training] = {}
    evaluations: dict[str, Evaluation] = {}
    for listed in experiments.values():
        contents = [(choice.parts, dict(choice.settings), choice.method, choice.towers) for choice in listed]
        base_key = key_of({"base": digest, "values": contents})
        for value in (value for choice in listed for value in _resolve(choice, seeds, base, plain, base_key)):
            alike.setdefault(value.likeness, []).append(value)
            if value.training and value.evaluation:
                trainings.setdefault(value.training.key, value.training)
                evaluations.setdefault(value.evaluation.key, value.evaluation)
    names, rank = list(experiments), {seed: place for place, seed in enumerate(seeds)}
    rows = sorted(
        map(_collapsed, alike.values()), key=lambda row: (names.index(row.experiment), row.order, rank[row.seed])
    )
    # A stable sort: within a seed the order of the experiments stays. What trains towers comes last.
    ordered = sorted(trainings.values(), key=lambda item: (item.kind == "finetune", rank[item.seed]))
    return Plan(rows=tuple(rows), trainings={item.key: item for item in ordered}, evaluations=evaluations)


@dataclass(frozen=True, kw_only=True)
class _Value:
    """A value of an experiment with a seed, and what it needs; nothing where the configuration is refused."""

    choice: Choice
    row: Row
    training: Training | None = None
    evaluation: Evaluation | None = None

    @property
    def likeness(self) -> tuple[object, ...]:
        """Equal for values that set the same keys and cannot differ, and are one row; others may well be equal."""
        same = (self.row.key, *sorted(self.choice.settings)) if self.row.key else (self.choice.order,)
        return self.row.experiment, self.row.seed, same


def _resolve(choice: Choice, seeds: Sequence[int], base: Base, plain: Config, base_key: str) -> Iterator[_Value]:
    """A value with every seed; where it is refused, a failed row a seed."""
    line = Row(
        experiment=choice.experiment,
        varies=choice.varies,
        value=choice.value,
        order=choice.order,
        seed=0,
        base=base_key,
        towers=choice.towers,
    )
    try:
        config = _settled(base.resolve(choice.settings), choice.towers)
        training = _training(choice, config, plain, base)
    except InputError as error:
        for seed in seeds:
            yield _Value(choice=choice, row=replace(line, seed=seed, status="failed", note=str(error)))
        return
    method = choice.method or method_of(config)
    identity = evaluation_identity(config, method)
    for seed in seeds:
        seeded = _with_seed(config, seed)
        # Baselines without training do not depend on a seed.
        key = training.group if choice.method else seed_key(training.group, seed)
        seeded_training = replace(training, key=key, config=_with_seed(training.config, seed))
        evaluation = Evaluation(key=key_of({"training": key, **identity}), training=key, method=method, config=seeded)
        row = replace(line, seed=seed, key=evaluation.key, training=key, config=seeded, patches=training.patches)
        yield _Value(choice=choice, row=row, training=seeded_training, evaluation=evaluation)


def _training(choice: Choice, config: Config, plain: Config, base: Base) -> Training:
    """What a value needs, before it has a seed.

    Its knn section is that of the base: what a row votes with is no reason to train again.
    """
    metric = {} if config.hash.bits else {"distance_metric": "cosine"}
    config = _settled(config.model_copy(update={"knn": plain.knn.model_copy(update=metric)}), choice.towers)
    patches = int(choice.settings.get("model.max_num_patches", base.patches))
    store = (base.store_digest if choice.towers == FROZEN else base.images_digest)(patches)
    kind = kind_of(choice.method, choice.towers)
    group = baseline_key(kind, config, store) if choice.method else group_key(config, store, choice.towers)
    return Training(key="", group=group, kind=kind, store=store, patches=patches, towers=choice.towers, config=config)


def _settled(config: Config, towers: str) -> Config:
    """The configuration as the stage that trains it will have it."""
    if towers == FROZEN:
        return resolve(config)
    return resolve_finetune(config, unfreeze=towers, towers=config.finetune.towers, start=None)


def _with_seed(config: Config, seed: int) -> Config:
    return config.model_copy(update={"hardware": config.hardware.model_copy(update={"seed": seed})})


def _base_digest(plain: Config, base: Base) -> str:
    """Hex digest of the base configuration and its store, apart from the machine's settings."""
    tree = plain.model_dump(mode="json")
    for key in ("hardware", "grid_search", "model"):
        tree.pop(key)
    for key in ("num_workers", "prefetch_factor", "pin_memory"):
        tree["data"].pop(key)
    return key_of({"base": tree, "store": base.store_digest(base.patches)})


def _collapsed(values: Sequence[_Value]) -> Row:
    """The row, or the one row of several values that cannot differ, with the reason."""
    row, choices = values[0].row, [value.choice for value in values]
    if len(values) < 2 or row.config is None:
        return row
    parts = [_joined(texts) for texts in zip(*(choice.parts for choice in choices), strict=True)]
    differing = [
        key
        for key in dict.fromkeys(key for choice in choices for key in choice.settings)
        if len({repr(choice.settings.get(key)) for choice in choices}) > 1
    ]
    method = choices[0].method or method_of(row.config)
    idle = {**evaluation_idle(row.config, method), **training_idle(row.config, row.towers)}
    reasons = dict.fromkeys(why for key in differing for root, why in idle.items() if f"{key}.".startswith(f"{root}."))
    note = "; ".join(reasons) or "these values resolve to one configuration"
    return replace(row, value=", ".join(parts), status="collapsed", note=note, stands_for=len(values))


def _joined(texts: Iterable[str]) -> str:
    """``alpha 0.5``, ``alpha 1`` to ``alpha 0.5/1``."""
    distinct = list(dict.fromkeys(texts))
    labels = {text.rpartition(" ")[0] for text in distinct}
    if len(distinct) == 1 or len(labels) > 1:
        return "/".join(distinct)
    return f"{labels.pop()} {'/'.join(text.rpartition(' ')[2] for text in distinct)}".strip()
