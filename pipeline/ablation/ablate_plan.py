"""A plan of an ablation: rows, and the extractions, trainings, searches and votes that give them.

What is in a plan is worked out by :mod:`.ablate_planner`. Nothing is read, trained or timed here, and torch is not
imported.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..core.config import Config
from ..evaluation.sweep import own_search
from .identity import FROZEN, evaluation_identity, flatten, key_of, training_identity

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
        rows=rows, trainings={key: one for key, one in plan.trainings.items() if key in trainings},
        evaluations={key: one for key, one in plan.evaluations.items() if key in keys},
    )  # fmt: skip


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
