"""The smallest set of extractions, trainings, searches and votes that gives every row that was asked for.

Pure: nothing is read, trained or timed here, and torch is not imported. Rows that differ in what a training does not
read share the training; rows that differ in nothing at all share the evaluation; and of an experiment's values that
cannot differ, such as alpha on frozen towers, one row is left, which says why.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ...errors import InputError
from ..core.config import Config
from ..core.config_rules import settle
from ..data.protocols import lists_digest
from ..evaluation.sweep import own_search
from ..finetuning.settings import resolve_finetune
from .experiments import Choice
from .identity import (
    FROZEN,
    evaluation_identity,
    evaluation_idle,
    flatten,
    key_of,
    method_of,
    training_identity,
    training_idle,
)

Kind = Literal["head", "finetune", "zero-shot", "prior"]
Status = Literal["planned", "failed", "collapsed"]
TRAINED = ("head", "finetune")


@dataclass(frozen=True, kw_only=True)
class Training:
    """What has to be made before it can be evaluated: a head, finetuned towers, or a baseline.

    Attributes:
        key: Hex digest of everything that a number of it depends on.
        group: The same without the seed.
        kind: Which stage makes it.
        store: Digest of the store's key.
        patches: The store's patch budget.
        towers: What of the towers is trained.
        config: Settled; of the knn section that counts which chooses the best epoch.
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
        """Of every random draw."""
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
        experiment: Its id.
        varies: What it varies.
        value: What is shown.
        order: Place of the value in its experiment.
        seed: The seed.
        base: Digest of the base configuration, the store and the experiment's values: rows of another base are not
            beside it.
        status: Before anything ran.
        note: Why it failed or was collapsed.
        key: Of its evaluation; empty where the configuration is refused.
        training: Key of its training.
        config: Resolved; None where it is refused.
        towers: What of the towers is trained.
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
        """Every dotted key of its configuration, with what only the plan knows; nothing where it is refused."""
        if self.config is None:
            return {}
        own = {"model.max_num_patches": self.patches, "towers": self.towers}
        return flat_config(self.config) | own


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
        return {one.store: one.patches for one in self.trainings.values() if one.kind != "finetune"}

    @property
    def searches(self) -> int:
        """Searches of a split: one serves every K, vote and temperature of a training and a metric."""
        return len({(one.training, search_of(one)) for one in self.evaluations.values() if search_of(one) is not None})

    @property
    def votes(self) -> int:
        """Evaluations of neighbours."""
        return sum(search_of(one) is not None for one in self.evaluations.values())

    def count(self, *kinds: Kind) -> int:
        """How many trainings there are of some kinds."""
        return sum(one.kind in kinds for one in self.trainings.values())

    def of(self, training: str) -> tuple[Evaluation, ...]:
        """The evaluations of a training."""
        return tuple(one for one in self.evaluations.values() if one.training == training)


def restrict(plan: Plan, wanted: Callable[[Row], bool]) -> Plan:
    """The same plan for some of its rows: what only the others need is left out."""
    rows = tuple(row for row in plan.rows if wanted(row))
    keys, trainings = {row.key for row in rows}, {row.training for row in rows}
    return Plan(
        rows=rows,
        trainings={key: one for key, one in plan.trainings.items() if key in trainings},
        evaluations={key: one for key, one in plan.evaluations.items() if key in keys},
    )


def search_of(evaluation: Evaluation) -> tuple[str, str, int] | None:
    """What has to be searched for an evaluation: metric and index, and K where the K nearest depend on it.

    None where nothing votes. An exact search for more neighbours begins with those for fewer; then K is 0.
    """
    if evaluation.method not in {"knn", "hybrid"}:
        return None
    knn = evaluation.config.knn
    index = str(evaluation_identity(evaluation.config, evaluation.method).get("knn.index", ""))
    return knn.distance_metric, index, own_search(knn)


def with_seed(config: Config, seed: int) -> Config:
    """The same configuration with another seed."""
    return config.model_copy(update={"hardware": config.hardware.model_copy(update={"seed": seed})})


def training_key(config: Config, store: str, towers: str = FROZEN, lists: str = "") -> str:
    """The key of a training that was made elsewhere, from the configuration that is saved with it.

    Args:
        config: As it is in the run's ``config.yaml``.
        store: Digest of its store's key.
        towers: What of the towers was trained.
        lists: As of :func:`~mmcli.pipeline.ablation.identity.training_identity`.
    """
    identity = training_identity(config, towers, lists)
    seed = identity.pop("hardware.seed")
    kind = "head" if towers == FROZEN else "finetune"
    return key_of({"group": key_of({"kind": kind, "store": store, **identity}), "seed": seed})


def flat_config(config: Config) -> dict[str, Any]:
    """Every dotted key of a configuration, with its value as JSON has it."""
    return flatten(config.model_dump(mode="json"))


@dataclass(frozen=True, kw_only=True)
class Base:
    """What rows are resolved against.

    Attributes:
        resolve: The configuration of the base with some dotted keys over it, checked; it is not settled.
        store_digest: Digest of the store for a patch budget.
        images_digest: The same for what is trained from the images themselves.
        patches: Budget of the store that was named.
        prompts: What zero-shot is asked, hashed into its key.
    """

    resolve: Callable[[Mapping[str, Any]], Config]
    store_digest: Callable[[int], str]
    images_digest: Callable[[int], str]
    patches: int
    prompts: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Hex digest of the configuration and the store."""
        tree = self.resolve({}).model_dump(mode="json")
        for key in ("hardware", "grid_search", "model"):
            tree.pop(key)
        for key in ("num_workers", "prefetch_factor", "pin_memory"):
            tree["data"].pop(key)
        return key_of({"base": tree, "store": self.store_digest(self.patches)})


def make_plan(choices: Iterable[Choice], seeds: Sequence[int], base: Base) -> Plan:
    """Resolve every value for every seed and share what can be shared.

    Args:
        choices: Values of experiments, in order.
        seeds: Each value has a row a seed.
        base: What they are resolved against.
    """
    builder = _Builder(base, seeds)
    experiments: dict[str, list[Choice]] = {}
    for choice in choices:
        experiments.setdefault(choice.experiment, []).append(choice)
    for own in experiments.values():
        told = [(one.parts, dict(one.settings), one.method, one.towers) for one in own]
        digest = key_of({"base": base.digest, "values": told})
        for choice in own:
            builder.add(choice, digest)
    return builder.plan()


@dataclass(kw_only=True)
class _Candidate:
    row: Row
    choices: list[Choice] = field(default_factory=list)


class _Builder:
    """Collects rows and what they need."""

    def __init__(self, base: Base, seeds: Sequence[int]) -> None:
        self._base, self._seeds = base, seeds
        self._plain_knn = base.resolve({}).knn
        self._rows: dict[tuple[str, int, str], _Candidate] = {}
        self._trainings: dict[str, Training] = {}
        self._evaluations: dict[str, Evaluation] = {}

    def add(self, choice: Choice, digest: str) -> None:
        """A value, for every seed."""
        line = Row(
            experiment=choice.experiment,
            varies=choice.varies,
            value=choice.value,
            order=choice.order,
            seed=0,
            base=digest,
        )
        try:
            config = _settled(self._base.resolve(choice.settings), choice.towers)
            trained = self._trained_with(config, choice.towers)
            group = self._group(choice, trained)
        except InputError as error:
            for seed in self._seeds:
                failed = replace(line, seed=seed, status="failed", note=str(error))
                self._rows[choice.experiment, seed, f"{choice.order}"] = _Candidate(row=failed)
            return
        for seed in self._seeds:
            training = self._training(choice, with_seed(trained, seed), group)
            method = choice.method or method_of(config)
            identity = {"training": training.key, **evaluation_identity(config, method)}
            evaluation = Evaluation(
                key=key_of(identity), training=training.key, method=method, config=with_seed(config, seed)
            )
            self._evaluations.setdefault(evaluation.key, evaluation)
            self._trainings.setdefault(training.key, training)
            row = replace(
                line,
                seed=seed,
                key=evaluation.key,
                training=training.key,
                config=evaluation.config,
                towers=choice.towers,
                patches=training.patches,
            )
            self._put(row, choice)

    def plan(self) -> Plan:
        """What was collected."""
        rows = [_collapsed(one) for one in self._rows.values()]
        rank = {seed: at for at, seed in enumerate(self._seeds)}
        names = list(dict.fromkeys(row.experiment for row in rows))
        rows.sort(key=lambda row: (names.index(row.experiment), row.order, rank[row.seed]))
        # A stable sort: within a seed the order of the experiments stays. What trains towers comes last.
        trainings = sorted(self._trainings.values(), key=lambda one: (one.kind == "finetune", rank.get(one.seed, 0)))
        return Plan(
            rows=tuple(rows), trainings={one.key: one for one in trainings}, evaluations=dict(self._evaluations)
        )

    def _trained_with(self, config: Config, towers: str) -> Config:
        """The same with the base's knn section: what a row votes with is no reason to train again."""
        metric = {} if config.hash.bits else {"distance_metric": "cosine"}
        return _settled(config.model_copy(update={"knn": self._plain_knn.model_copy(update=metric)}), towers)

    def _group(self, choice: Choice, config: Config) -> str:
        store = self._store(choice)
        if choice.method is not None:
            prompts = {"prompts": self._base.prompts} if choice.method == "zero-shot" else {}
            data = {"split_type": config.data.split_type, "lists": lists_digest(config.data)}
            return key_of({"kind": choice.method, "store": store, **prompts, **data})
        identity = training_identity(config, choice.towers)
        identity.pop("hardware.seed")
        kind = "head" if choice.towers == FROZEN else "finetune"
        return key_of({"kind": kind, "store": store, **identity})

    def _training(self, choice: Choice, config: Config, group: str) -> Training:
        patches = self._patches(choice)
        if choice.method == "zero-shot":
            kind: Kind = "zero-shot"
        elif choice.method == "prior":
            kind = "prior"
        else:
            kind = "head" if choice.towers == FROZEN else "finetune"
        # Baselines without training do not depend on a seed.
        key = key_of({"group": group, "seed": config.hardware.seed}) if kind in TRAINED else group
        return Training(
            key=key,
            group=group,
            kind=kind,
            store=self._store(choice),
            patches=patches,
            towers=choice.towers,
            config=config,
        )

    def _store(self, choice: Choice) -> str:
        digest = self._base.store_digest if choice.towers == FROZEN else self._base.images_digest
        return digest(self._patches(choice))

    def _patches(self, choice: Choice) -> int:
        return int(choice.settings.get("model.max_num_patches", self._base.patches))

    def _put(self, row: Row, choice: Choice) -> None:
        # Of values that set the same keys, those that cannot differ are one row; others may well be equal.
        keys = ",".join(sorted(choice.settings))
        found = self._rows.setdefault((row.experiment, row.seed, f"{row.key} {keys}"), _Candidate(row=row))
        found.choices.append(choice)


def _settled(config: Config, towers: str) -> Config:
    """The configuration as the stage that trains it will have it."""
    if towers == FROZEN:
        return settle(config)
    return resolve_finetune(config, unfreeze=towers, towers=config.finetune.towers, start=None)


def _collapsed(found: _Candidate) -> Row:
    """The row, or the one row of several values that cannot differ, with the reason."""
    choices, row = found.choices, found.row
    if len(choices) < 2 or row.config is None:
        return row
    parts = ["/".join(_distinct(texts)) for texts in zip(*(choice.parts for choice in choices), strict=True)]
    tidy = [_joined([choice.parts[at] for choice in choices]) for at in range(len(parts))]
    differing = [
        key
        for key in dict.fromkeys(key for choice in choices for key in choice.settings)
        if len({repr(choice.settings.get(key)) for choice in choices}) > 1
    ]
    method = choices[0].method or method_of(row.config)
    idle = {**evaluation_idle(row.config, method), **training_idle(row.config, choices[0].towers)}
    reasons = _distinct([why for key in differing for at, why in idle.items() if _covers(at, key)])
    note = "; ".join(reasons) or "these values resolve to one configuration"
    return replace(row, value=", ".join(tidy), status="collapsed", note=note, stands_for=len(choices))


def _joined(texts: Sequence[str]) -> str:
    """``alpha 0.5``, ``alpha 1`` to ``alpha 0.5/1``."""
    texts = _distinct(texts)
    heads = {text.rpartition(" ")[0] for text in texts}
    if len(texts) == 1 or len(heads) > 1:
        return "/".join(texts)
    head = heads.pop()
    return f"{head} {'/'.join(text.rpartition(' ')[2] for text in texts)}".strip()


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _covers(root: str, key: str) -> bool:
    return key == root or key.startswith(f"{root}.")
