"""What one key of a configuration says about others: settled once, before anything is trained or printed.

Nothing here imports torch.
"""

from typing import Any

from ...errors import InputError
from ...heads.config import FusionConfig
from .config import Config

# What an MLP on raw embeddings cannot do; the other keys of the fusion section it shares with the head.
FUSION_ALONE = ("type", "adapter", "magnitude")


def settle(config: Config) -> Config:
    """Make a checked configuration say what will be done; settling twice changes nothing.

    With ``head: mlp`` there is no hash layer and no neighbour: ``hash.bits`` becomes 0 and ``training.monitor``
    classifier. Without a hash layer ``knn.distance_metric`` becomes cosine, because neighbours are found on z.

    Args:
        config: Of :func:`mmcli.pipeline.core.config.load_config`, which knows what was given and what is a default.

    Returns:
        The configuration that is saved with the run.

    Raises:
        InputError: A key was given a value that another key leaves no room for.
    """
    return _settle_metric(_settle_mlp(config))


def check_frozen(config: Config) -> None:
    """Refuse to train towers where a store is read.

    Raises:
        InputError: ``model.freeze_towers`` is false.
    """
    if not config.model.freeze_towers:
        raise InputError(
            "towers are not trained from a store",
            where="model.freeze_towers",
            got="false",
            wanted="true",
            do="leave it out, or train them with `mmcli finetune`",
        )


def notices(config: Config) -> list[str]:
    """What a person should know before training: keys that were given and change nothing, or are taken otherwise.

    Args:
        config: A settled configuration.

    Returns:
        Lines, often none.
    """
    lines = []
    told = "cosine_weight" in config.loss.model_fields_set or "adapter" in config.fusion.model_fields_set
    if told and config.loss.cosine_weight > 0:
        lines += _cosine_notices(config)
    if config.training.batch_size == 1 and config.hash.bits and config.hash.batch_norm:
        lines.append(
            "note: batch normalisation needs two images a batch, so --batch-size 1 is taken as 2 (--set"
            " hash.batch_norm=false leaves it at 1)"
        )
    return lines


def _settle_mlp(config: Config) -> Config:
    if config.head != "mlp":
        return config
    default = FusionConfig()
    for key in FUSION_ALONE:
        value, plain = getattr(config.fusion, key), getattr(default, key)
        if value != plain:
            raise _no_room(f"fusion.{key}", value, f"{plain} with --head mlp, which reads raw embeddings")
    if "bits" in config.hash.model_fields_set and config.hash.bits:
        raise _no_room("hash.bits", config.hash.bits, "0 with --head mlp, which has no hash layer")
    monitor = config.training.monitor
    if "monitor" in config.training.model_fields_set and monitor != "classifier":
        raise _no_room("training.monitor", monitor, "classifier with --head mlp, which has no neighbours")
    return _with(_with(config, "hash", bits=0), "training", monitor="classifier")


def _settle_metric(config: Config) -> Config:
    """Without a hash layer neighbours are found by cosine on z, and the saved configuration says so."""
    metric = config.knn.distance_metric
    if config.hash.bits or metric == "cosine":
        return config
    if "distance_metric" in config.knn.model_fields_set:
        given, other = ("--head mlp", "--head fusion") if config.head == "mlp" else ("--bits 0", "--bits 64")
        raise _no_room("knn.distance_metric", metric, f"cosine with {given}", other)
    return _with(config, "knn", distance_metric="cosine")


def _with(config: Config, section: str, **values: Any) -> Config:  # noqa: ANN401
    """A copy in which a section has other values."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _no_room(key: str, got: object, wanted: str, other: str = "--head fusion") -> InputError:
    what = "no hash layer" if key in {"hash.bits", "knn.distance_metric"} else "keys that do not go together"
    return InputError(what, where=key, got=got, wanted=wanted, do=f"leave it out, or give {other}")


def _cosine_notices(config: Config) -> list[str]:
    inputs = config.fusion.inputs
    if config.head == "mlp":
        return ["note: --head mlp has no directions, so there is no cosine term: alpha changes nothing"]
    if inputs != "both":
        return [
            f"note: with --inputs {inputs} the cosine term would train on the other modality, so it takes no part: it"
            " is logged, but alpha changes nothing"
        ]
    if config.fusion.adapter == "none" and config.model.freeze_towers:
        return [
            "note: the towers are frozen and there is no adapter, so the cosine term has no trainable input: it is"
            " logged, but alpha changes nothing (--adapter linear makes it live)"
        ]
    return []
