"""What a training, an evaluation and a row depend on: configurations that give the same numbers have one identity.

A key of the configuration plays no part where nothing reads it (``data.num_workers``), where another key turns off what
reads it (``hash.beta`` without bits), or where what it weighs has no trainable input (alpha with frozen towers).
Nothing here imports torch.
"""

from collections.abc import Mapping
from typing import Any, Literal

from ...cache.key import digest_of
from ...heads.config import VOTE_PARAMETER, LossConfig
from ..core.config import Config
from ..data.protocols import lists_digest
from ..evaluation.prompts import TEMPLATES

Kind = Literal["head", "finetune", "zero-shot", "prior"]
# To be raised when the meaning of a key or the computation behind it changes: earlier rows are then computed again.
VERSION = 1
FROZEN = "frozen"
# Keys that no number of a training from a store depends on; the store's own digest stands for the model.
_ASIDE = (
    "preset",
    "model",
    "classifier.num_classes",
    "optimizer.type",
    "scheduler.type",
    "training.save_top_k",
    "data.dataset",
    "data.num_workers",
    "data.prefetch_factor",
    "data.pin_memory",
    "hardware.device",
    "grid_search",
    "knn.ties",
    "knn.index",
    "knn.predictor",
    "knn.top_n_tags",
)
# Keys of a training of towers that ``towers`` replaces, or that only change how much memory it takes.
_OF_MEMORY = ("finetune.unfreeze", "finetune.gradient_checkpointing", "finetune.batch_tokens")
_FOCAL = ("loss.focal_alpha", "loss.focal_gamma")
_ASYMMETRIC = ("loss.asymmetric_gamma_pos", "loss.asymmetric_gamma_neg", "loss.asymmetric_shift")
_OF_HASH = (
    "hash.activation",
    "hash.batch_norm",
    "hash.use_hash_reg",
    "hash.beta",
    "hash.nested",
    "hash.code_classifier",
    "hash.fused_classifier",
    "loss.hash_weight",
    "loss.hash_reg",
    "loss.fused_weight",
    "loss.nested_weight",
    "optimizer.lr_hash",
)
# Where any of these is left, all of them are, and the hash terms count.
_OF_TERMS = ("loss.hash_weight", "loss.hash_reg", "hash.use_hash_reg")
_OF_FUSION = ("fusion.type", "fusion.block_norm", "fusion.adapter")
_OF_MONITOR = ("knn.K", "knn.distance_metric", "knn.voting_strategy", "knn.tau", "knn.theta")
Rule = tuple[bool, str, tuple[str, ...]]


def training_identity(config: Config, towers: str = FROZEN, lists: str = "") -> dict[str, Any]:
    """Every key that a number of a training depends on, dotted, with its value; the seed is one of them.

    Args:
        config: A resolved configuration; its knn section counts where neighbours choose the best epoch.
        towers: Which part of the towers is trained.
        lists: Digest of the protocol's lists as a run read them; by default that of their present content.
    """
    tree = config.model_dump(mode="json")
    if tree["scheduler"]["total_epochs"] is None:
        tree["scheduler"]["total_epochs"] = tree["training"]["num_epochs"]
    tree["data"]["protocol_lists"] = lists or lists_digest(config.data) or None
    left = (*_ASIDE, *(("finetune",) if towers == FROZEN else _OF_MEMORY), *training_idle(config, towers))
    kept = {key: value for key, value in flatten(tree).items() if not _below(key, left)}
    return kept | {"towers": towers}


def training_idle(config: Config, towers: str = FROZEN) -> dict[str, str]:
    """Keys that play no part in a training as it is configured, and why."""
    by_classifier = config.training.monitor != "knn"
    rules = (
        (towers == FROZEN, "no tower is trained", ("optimizer.lr_towers",)),
        (config.fusion.type != "hadamard_magnitude", "the fusion reads no magnitude", ("fusion.magnitude",)),
        (config.head == "mlp", "the MLP on raw embeddings has no such part", _OF_FUSION),
        (by_classifier, "the classifier chooses the best epoch", _OF_MONITOR),
        *_hash_rules(config),
        *_loss_rules(config.loss),
    )
    idle = _cosine_idle(config, towers) | ({} if by_classifier else _vote_idle(config))
    for applies, why, keys in rules:
        idle |= dict.fromkeys(keys, why) if applies else {}
    return idle


def evaluation_identity(config: Config, method: str) -> dict[str, Any]:
    """Every key that an evaluation of a trained head depends on, dotted, with its value.

    Args:
        config: A resolved configuration, of which the knn section counts.
        method: ``knn``, ``hybrid``, or one without neighbours.
    """
    tree = {f"knn.{key}": value for key, value in config.knn.model_dump(mode="json").items()}
    left = ("knn.predictor", "knn.top_n_tags", *evaluation_idle(config, method))
    return {"method": method} | {key: value for key, value in tree.items() if not _below(key, left)}


def evaluation_idle(config: Config, method: str) -> dict[str, str]:
    """Keys of the knn section that play no part in an evaluation, and why."""
    if method not in {"knn", "hybrid"}:
        return {f"knn.{key}": f"the method {method} has no neighbours" for key in type(config.knn).model_fields}
    idle = _vote_idle(config)
    idle["knn.index"] = "every index finds the same neighbours"
    if config.knn.distance_metric != "hamming":
        idle["knn.ties"] = "only Hamming distances tie"
    return idle


def method_of(config: Config) -> str:
    """What predicts, by the name that a row has."""
    return "mlp" if config.head == "mlp" else config.knn.predictor


def key_of(parts: Mapping[str, Any]) -> str:
    """The hex digest of an identity."""
    return digest_of({"version": VERSION, **parts})


def kind_of(method: str | None, towers: str) -> Kind:
    """Which stage makes what a value needs: a baseline for a method of its own, else a head, or towers with a head."""
    if method is not None:
        return "prior" if method == "prior" else "zero-shot"
    return "head" if towers == FROZEN else "finetune"


def group_key(config: Config, store: str, towers: str = FROZEN, lists: str = "") -> str:
    """The key of a training apart from its seed; the arguments are those of :func:`training_key`."""
    identity = training_identity(config, towers, lists)
    identity.pop("hardware.seed")
    return key_of({"kind": kind_of(None, towers), "store": store, **identity})


def baseline_key(kind: Kind, config: Config, store: str) -> str:
    """The key of a baseline without training: it depends on the images and labels, and zero-shot on its prompts."""
    asked = {"prompts": TEMPLATES} if kind == "zero-shot" else {}
    data = {"split_type": config.data.split_type, "lists": lists_digest(config.data)}
    return key_of({"kind": kind, "store": store, **asked, **data})


def seed_key(group: str, seed: int) -> str:
    """The key of a training with its seed."""
    return key_of({"group": group, "seed": seed})


def training_key(config: Config, store: str, towers: str = FROZEN, lists: str = "") -> str:
    """The key of a training, from the configuration that is saved with its run.

    Args:
        config: The configuration in the run's ``config.yaml``.
        store: Digest of the store's key.
        towers: Which part of the towers was trained.
        lists: Digest of the protocol's lists, as in :func:`training_identity`.
    """
    return seed_key(group_key(config, store, towers, lists), config.hardware.seed)


def flat_config(config: Config) -> dict[str, Any]:
    """Every dotted key of a configuration, with its value as JSON has it."""
    return flatten(config.model_dump(mode="json"))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested sections."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _hash_rules(config: Config) -> tuple[Rule, ...]:
    bits, terms = config.hash.bits, config.hash.use_hash_reg
    silent = bool(bits and terms and not config.loss.hash_weight)
    return (
        (not bits, "there is no hash layer", _OF_HASH),
        (bool(bits) and not terms, "hash.use_hash_reg is off", _OF_TERMS),
        (silent, "the hash terms have weight 0 (loss.hash_weight)", _OF_TERMS),
    )


def _loss_rules(loss: LossConfig) -> tuple[Rule, ...]:
    focal = loss.focal_loss
    return (
        (not focal, "the loss is not focal", _FOCAL),
        (focal, "the loss is focal", ("loss.asymmetric_loss", *_ASYMMETRIC)),
        (not focal and not loss.asymmetric_loss, "the loss is not asymmetric", _ASYMMETRIC),
    )


def _cosine_idle(config: Config, towers: str) -> dict[str, str]:
    inputs = config.fusion.inputs
    if config.head == "mlp":
        why = "the MLP has no directions, so there is no cosine term"
    elif inputs != "both":
        why = f"with inputs {inputs} the cosine term takes no part"
    elif towers == FROZEN and config.fusion.adapter == "none":
        why = "the towers are frozen and there is no adapter: the cosine term has no trainable input"
    else:
        return {}
    return {"loss.cosine_weight": f"{why}, so alpha changes nothing"}


def _vote_idle(config: Config) -> dict[str, str]:
    used = VOTE_PARAMETER.get(config.knn.voting_strategy)
    return {
        f"knn.{parameter}": f"{parameter} matters to {vote} votes alone"
        for vote, parameter in VOTE_PARAMETER.items()
        if parameter != used
    }


def _below(key: str, roots: tuple[str, ...]) -> bool:
    return any(key == root or key.startswith(f"{root}.") for root in roots)
