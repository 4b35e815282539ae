"""The whole configuration: its sections, how it is read, and :func:`resolve`, which says what a step will see.

Order of precedence: defaults < preset < ``--config FILE`` < options. :func:`load_config` reads and checks what was
given; :func:`resolve` then decides, once, what the keys and the store say about one another, and the result is
saved with every run and changes no more. The sections of heads live beside the heads (:mod:`mmcli.heads.config`).
Nothing here imports torch.
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, field_validator
from pydantic.fields import FieldInfo

from ...errors import InputError
from ...heads.config import (
    ClassifierConfig,
    FusionConfig,
    HashConfig,
    HeadKind,
    KnnConfig,
    LossConfig,
    NonNegative,
    Positive,
    Section,
)
from .config_errors import one_of, readable, refuse_truth_values
from .presets import PRESETS, Preset
from .strict_yaml import parse_yaml, read_yaml

# The option of a key, where commands have one, with a word for its value where its type does not say enough.
OPTION_NAMES = {
    "preset": "--preset",
    "head": "--head",
    "model.siglip2_variant": "--model NAME",
    "model.revision": "--revision NAME",
    "model.max_num_patches": "--patches",
    "fusion.type": "--fusion",
    "fusion.magnitude": "--magnitude",
    "fusion.block_norm": "--block-norm",
    "fusion.inputs": "--inputs",
    "fusion.adapter": "--adapter",
    "hash.bits": "--bits",
    "loss.cosine_weight": "--alpha",
    "loss.hash_weight": "--gamma",
    "loss.focal_loss": "--focal",
    "loss.class_weights": "--class-weights",
    "training.num_epochs": "--epochs",
    "training.batch_size": "--batch-size",
    "training.accumulation_steps": "--accumulation N",
    "training.early_stopping_patience": "--patience",
    "training.monitor": "--monitor",
    "training.ema_decay": "--ema DECAY",
    "optimizer.lr_towers": "--lr-towers",
    "finetune.unfreeze": "--unfreeze none|last-N|all",
    "finetune.towers": "--towers",
    "finetune.layer_decay": "--layer-decay X",
    "finetune.augment": "--augment",
    "finetune.gradient_checkpointing": "--gradient-checkpointing",
    "finetune.batch_tokens": "--batch-tokens",
    "finetune.start": "--from RUN",
    "knn.K": "--k",
    "knn.distance_metric": "--metric",
    "knn.voting_strategy": "--vote",
    "knn.tau": "--tau",
    "knn.theta": "--theta",
    "knn.ties": "--ties",
    "knn.index": "--index",
    "knn.predictor": "--predictor",
    "data.num_workers": "--workers",
    "data.split_type": "--protocol",
    "data.protocol_lists": "--protocol-lists DIR",
    "hardware.device": "--device",
    "hardware.seed": "--seed",
    "hardware.deterministic": "--deterministic",
}

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
# Beyond these no training goes well, and far beyond them the arithmetic of the optimiser overflows.
Rate = Annotated[float, Field(gt=0.0, le=1e6)]
Decay = Annotated[float, Field(ge=0.0, le=1e6)]
# What each of them selects is in pipeline/data/protocols.py.
ProtocolName = Literal["karpathy", "coco14", "hashnet"]
Epochs = Annotated[int, Field(gt=0, le=1_000_000)]
DEFAULT_MODEL = "google/siglip2-base-patch16-naflex"


class ModelConfig(Section):
    """The frozen SigLIP2 of stage 1."""

    siglip2_variant: str = Field(default=DEFAULT_MODEL, description="SigLIP2 checkpoint: a local folder or a hub id")
    revision: str | None = Field(
        default=None, description="branch, tag or commit of a hub checkpoint; a run records the commit"
    )
    max_num_patches: PositiveInt = Field(default=256, description="patch budget of a NaFlex checkpoint")
    text_max_length: PositiveInt = Field(
        default=64, description="tokens of a caption: as many as the text tower was trained with"
    )
    freeze_towers: bool = Field(
        default=True, description="whether the towers stay as they are; only `mmcli finetune` can train them"
    )


class OptimizerConfig(Section):
    """AdamW, one learning rate per part of the head."""

    type: Literal["adamw"] = Field(default="adamw", description="the optimiser")
    lr_fusion: Rate = Field(default=3e-4, description="peak learning rate of fusion and adapters")
    lr_hash: Rate = Field(default=3e-4, description="peak learning rate of the hash layer")
    lr_classifier: Rate = Field(default=3e-4, description="peak learning rate of the classifier")
    lr_towers: Rate = Field(default=1e-5, description="peak learning rate of unfrozen towers")
    weight_decay: Decay = Field(default=0.01, description="decoupled weight decay")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="decay of the two moments of AdamW")


class SchedulerConfig(Section):
    """Linear warm-up, then cosine to ``min_lr``, stepped once per optimiser step."""

    type: Literal["cosine"] = Field(default="cosine", description="the schedule")
    warmup_epochs: float = Field(default=2.0, ge=0.0, le=1e6, description="epochs of linear warm-up")
    total_epochs: Epochs | None = Field(
        default=None, description="epoch at which the rate reaches min_lr; training.num_epochs where null"
    )
    min_lr: NonNegative = Field(default=1e-6, description="learning rate at the end")


class TrainingConfig(Section):
    """How a head is trained from the store."""

    batch_size: PositiveInt = Field(default=64, description="images a step, and in memory at once")
    num_epochs: Epochs = Field(default=30, description="epochs at most")
    gradient_clip_norm: Positive | None = Field(default=1.0, description="largest gradient norm; null clips nothing")
    mixed_precision: bool = Field(default=True, description="half precision where the device has it")
    accumulation_steps: PositiveInt = Field(
        default=1,
        description="batches an optimiser step; to `mmcli finetune` the parts of one large batch",
    )
    early_stopping_patience: NonNegativeInt = Field(
        default=5,
        description="epochs without a better val mAP, from the 1,000th step on, before training stops; 0 never stops",
    )
    save_top_k: PositiveInt = Field(default=3, description="checkpoints kept")
    monitor: Literal["knn", "classifier"] = Field(default="knn", description="what val mAP is computed from")
    mixup: bool = Field(default=False, description="train on mixtures of two images and of their labels")
    ema_decay: Beta | None = Field(
        default=None, description="decay of an exponential moving average of the parameters, as 0.999; off without"
    )


class FinetuneConfig(Section):
    """What `mmcli finetune` trains of the towers, and how; no other command reads it."""

    unfreeze: str = Field(
        default="last-2",
        description="what of the towers is trained: none, all, or last-N: the last N blocks with last norm and head",
    )
    towers: Literal["both", "image", "text"] = Field(default="both", description="which towers are trained")
    layer_decay: float = Field(
        default=1.0, gt=0.0, le=1.0, description="factor of the learning rate from a block to the one below it"
    )
    augment: bool = Field(default=False, description="random crops of the image's own aspect ratio, and flips")
    gradient_checkpointing: bool = Field(
        default=False, description="compute a block's activations again in the backward pass instead of keeping them"
    )
    batch_tokens: PositiveInt | None = Field(
        default=None, description="patches or text tokens of one pass; by itself what suits the device"
    )
    fsdp: bool = Field(default=False, description="spread trained blocks over the processes (FSDP)")
    start: str | None = Field(default=None, description="run to begin with: its head, and its towers if it has any")

    @field_validator("unfreeze", mode="before")
    @classmethod
    def _what_of_a_tower(cls, unfreeze: object) -> object:
        unfreeze = "none" if unfreeze is None else unfreeze.lower() if isinstance(unfreeze, str) else unfreeze
        unfreeze = {"frozen": "none", "full": "all"}.get(str(unfreeze), unfreeze)
        if not isinstance(unfreeze, str) or not re.fullmatch(r"none|all|last-[1-9]\d{0,3}", unfreeze):
            raise ValueError("none, last-N with N from 1 on, or all")
        return unfreeze


class DataConfig(Section):
    """Where samples come from and how images are read ahead of the model."""

    dataset: str = Field(default="coco", description="name of the data set")
    split_type: ProtocolName = Field(default="karpathy", description="which images train, tune and test")
    protocol_lists: str | None = Field(
        default=None, description="folder with database.txt, train.txt and test.txt of hashnet"
    )
    num_workers: NonNegativeInt | None = Field(
        default=None, description="processes that read images; by itself one a core with a GPU, else one for eight"
    )
    prefetch_factor: PositiveInt = Field(default=2, description="batches read ahead by each of them")
    pin_memory: bool = Field(default=True, description="page-locked memory for copies to a GPU")


class HardwareConfig(Section):
    """The device that computes, and the seed of every random draw."""

    device: str = Field(default="auto", description="device: auto, cpu, cuda, cuda:N or mps")
    seed: int = Field(default=42, ge=0, lt=2**32, description="seed of every random draw")
    deterministic: bool = Field(
        default=False,
        description="use deterministic algorithms: exactly repeatable, but slower",
    )


class GridConfig(Section):
    """Values that `mmcli ablate --grid` combines; other commands check them and do not read them."""

    hash_bits: tuple[NonNegativeInt, ...] = Field(default=(), description="values of hash.bits")
    K_neighbors: tuple[PositiveInt, ...] = Field(default=(), description="values of knn.K")
    cosine_weight: tuple[NonNegative, ...] = Field(default=(), description="values of loss.cosine_weight")
    hash_weight: tuple[NonNegative, ...] = Field(default=(), description="values of loss.hash_weight")
    tau: tuple[Positive, ...] = Field(default=(), description="values of knn.tau")
    max_num_patches: tuple[PositiveInt, ...] = Field(default=(), description="values of model.max_num_patches")
    freeze_towers: tuple[Literal[True, False, "frozen", "last-2", "full"], ...] = Field(
        default=(), description="what of the towers is trained"
    )


class Config(Section):
    """Every key of the configuration, by sections; saved whole with every run."""

    preset: Preset = Field(default="recommended", description="set of defaults under everything that is given")
    head: HeadKind = Field(
        default="fusion", description="fusion, or the baseline: an MLP on raw embeddings, without hash and neighbours"
    )
    model: ModelConfig = ModelConfig()
    fusion: FusionConfig = FusionConfig()
    hash: HashConfig = HashConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    training: TrainingConfig = TrainingConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    knn: KnnConfig = KnnConfig()
    data: DataConfig = DataConfig()
    hardware: HardwareConfig = HardwareConfig()
    grid_search: GridConfig = GridConfig()

    @property
    def digest(self) -> str:
        """First 8 hex digits of the SHA-256 of the resolved configuration."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:8]


def load_config(
    file: Path | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    flags: Mapping[str, str] | None = None,
    under: Mapping[str, Any] | None = None,
) -> Config:
    """Read a configuration and check it.

    Args:
        file: A YAML file with the sections of :class:`Config`; ``None`` for none.
        options: Dotted keys (``hash.bits``) to the values that were given; ``None`` is one of them, YAML's null.
        flags: Dotted keys to the option's name on the command line, for messages.
        under: Sections that count where neither file nor options say otherwise.

    Returns:
        The checked configuration.

    Raises:
        InputError: The file cannot be read, a key is unknown, or a value is refused.
    """
    sections = _merge(under or {}, read_sections(file) if file is not None else {})
    chosen = dict(options or {})
    preset = chosen.get("preset", sections.get("preset", Config.model_fields["preset"].default))
    preset = preset.lower() if isinstance(preset, str) else preset
    if not isinstance(preset, str) or preset not in PRESETS:
        raise InputError(
            "unknown preset",
            where="preset",
            got=repr(preset),
            wanted=one_of(PRESETS),
            do="choose one of these",
        )
    tree = _merge(PRESETS[preset], {**sections, "preset": preset})
    for key, value in chosen.items():
        tree = _merge(tree, _nest(key, value))
    names = flags or {}
    refuse_truth_values(tree, Config, file, set(chosen), names)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise readable(error, Config, file, set(chosen), names) from None


@dataclass(frozen=True, kw_only=True)
class StoreFacts:
    """What a store says about the keys of a configuration.

    Attributes:
        folder: The store, for messages.
        model: Checkpoint that the store was made with, as its key names it.
        model_path: Where that checkpoint was read from; its name where nobody wrote that down.
        commit: Commit of a hub checkpoint.
        patches: Patch budget.
        text_length: Tokens of a caption.
        n_classes: Number of categories.
    """

    folder: Path
    model: str
    model_path: str
    commit: str | None
    patches: int
    text_length: int
    n_classes: int


def resolve(config: Config, store: StoreFacts | None = None) -> Config:
    """Make a checked configuration say what a step will see; to resolve it again changes nothing.

    A store decides the model with its commit, the patch budget, the text length and the number of classes. With
    ``head: mlp`` there is no hash layer and no neighbour: ``hash.bits`` becomes 0 and ``training.monitor`` classifier.
    Without a hash layer neighbours are found on z: ``knn.distance_metric`` becomes cosine.

    Args:
        config: A configuration of :func:`load_config`, which knows what was given and what is a default.
        store: The facts of the store that is read, where one is.

    Returns:
        The configuration that is saved with the run, and that nothing changes from here on.

    Raises:
        InputError: A key was given a value that another key, or the store, leaves no room for.
    """
    if store is not None:
        config = _resolve_store(config, store)
    return _resolve_metric(_resolve_mlp(config))


def _resolve_store(config: Config, store: StoreFacts) -> Config:
    classes = config.classifier.num_classes
    if "num_classes" in config.classifier.model_fields_set and classes != store.n_classes:
        raise InputError(
            "wrong number of classes",
            where="classifier.num_classes",
            got=classes,
            wanted=f"{store.n_classes}, as in {store.folder}",
            do="leave it out, it is read from the store",
        )
    is_named = "siglip2_variant" in config.model.model_fields_set
    name = config.model.siglip2_variant if is_named else store.model_path
    model = ModelConfig(
        siglip2_variant=name,
        revision=store.commit if name == store.model else config.model.revision,
        max_num_patches=store.patches,
        text_max_length=store.text_length,
    )
    return _with(config.model_copy(update={"model": model}), "classifier", num_classes=store.n_classes)


def _resolve_mlp(config: Config) -> Config:
    if config.head != "mlp":
        return config
    default = FusionConfig()
    for key in ("type", "adapter", "magnitude"):  # the other keys of the section it shares with the head
        value, plain = getattr(config.fusion, key), getattr(default, key)
        if value != plain:
            raise _conflict(f"fusion.{key}", value, f"{plain} with --head mlp, which reads raw embeddings")
    if "bits" in config.hash.model_fields_set and config.hash.bits:
        raise _conflict("hash.bits", config.hash.bits, "0 with --head mlp, which has no hash layer")
    monitor = config.training.monitor
    if "monitor" in config.training.model_fields_set and monitor != "classifier":
        raise _conflict("training.monitor", monitor, "classifier with --head mlp, which has no neighbours")
    return _with(_with(config, "hash", bits=0), "training", monitor="classifier")


def _resolve_metric(config: Config) -> Config:
    metric = config.knn.distance_metric
    if config.hash.bits or metric == "cosine":
        return config
    if "distance_metric" in config.knn.model_fields_set:
        reason, other = ("--head mlp", "--head fusion") if config.head == "mlp" else ("--bits 0", "--bits 64")
        raise _conflict("knn.distance_metric", metric, f"cosine with {reason}", other)
    return _with(config, "knn", distance_metric="cosine")


def _with(config: Config, section: str, **values: Any) -> Config:  # noqa: ANN401
    """A copy in which a section has other values."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _conflict(key: str, got: object, wanted: str, other: str = "--head fusion") -> InputError:
    what = "no hash layer" if key in {"hash.bits", "knn.distance_metric"} else "keys that conflict"
    return InputError(what, where=key, got=got, wanted=wanted, do=f"leave it out, or give {other}")


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
    """What a person should know before a training with a resolved configuration: keys that change nothing."""
    lines = []
    fusion = config.fusion
    is_asked = "cosine_weight" in config.loss.model_fields_set or "adapter" in fusion.model_fields_set
    if is_asked and config.loss.cosine_weight > 0:
        if config.head == "mlp":
            lines.append("note: --head mlp has no directions, so there is no cosine term: alpha changes nothing")
        elif fusion.inputs != "both":
            lines.append(
                f"note: with --inputs {fusion.inputs} the cosine term would train on the other modality, so it takes no"
                " part: it is logged, but alpha changes nothing"
            )
        elif fusion.adapter == "none" and config.model.freeze_towers:
            lines.append(
                "note: the towers are frozen and there is no adapter, so the cosine term has no trainable input: it is"
                " logged, but alpha changes nothing (--adapter linear makes it live)"
            )
    if config.training.batch_size == 1 and config.hash.bits and config.hash.batch_norm:
        lines.append(
            "note: batch normalisation needs two images a batch, so --batch-size 1 is taken as 2 (--set"
            " hash.batch_norm=false leaves it at 1)"
        )
    return lines


class KeyOption:
    """The option of a key on the command line, as its field describes it.

    Args:
        key: A dotted key of ``OPTION_NAMES``.

    Attributes:
        flag: The option's name, such as ``--bits``.
        metavar: A word for its value; empty where its type says enough.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.flag, _, self.metavar = OPTION_NAMES[key].partition(" ")

    @property
    def _field(self) -> FieldInfo:
        *sections, name = self.key.split(".")
        model: Any = Config
        for section in sections:
            model = model.model_fields[section].annotation
        field: FieldInfo = model.model_fields[name]
        return field

    @property
    def type(self) -> Any:  # noqa: ANN401 - a type or a Literal
        """The type of its value, without null."""
        kind: Any = self._field.annotation
        if NoneType in get_args(kind):
            kind = next(part for part in get_args(kind) if part is not NoneType)
        return get_args(kind)[0] if hasattr(kind, "__metadata__") else kind

    @property
    def help(self) -> str:
        """What the key means, without a full stop."""
        text = self._field.description or ""
        is_choice = text.partition(" ")[0].strip(",") in get_args(self.type)
        return text if is_choice else text[:1].upper() + text[1:]

    @property
    def default(self) -> str:
        """The default as help shows it: the value, ``the preset's`` where presets differ, or nothing for null."""
        values = [functools.reduce(getattr, self.key.split("."), preset) for preset in _preset_configs()]
        if self.key != "preset" and any(value != values[0] for value in values):
            return "the preset's"
        shown = f"{values[0]:g}" if isinstance(values[0], float) else str(values[0])
        return {"None": "", "True": "on", "False": "off"}.get(shown, shown)


@functools.cache
def _preset_configs() -> list[Config]:
    return [load_config(options={"preset": preset}) for preset in PRESETS]


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Turn ``KEY=VALUE`` words into dotted keys and YAML values.

    Raises:
        InputError: A word has no key or no ``=``, or its value is not YAML.
    """
    parsed = {}
    for word in settings:
        key, equals, text = word.partition("=")
        try:
            value = parse_yaml(text)
        except yaml.YAMLError:
            text = ""
        if not key or not equals or not text.strip():
            raise InputError(
                "cannot read a setting",
                where="--set",
                got=repr(word),
                wanted="KEY=VALUE",
                do="as in --set hash.bits=32",
            )
        parsed[key] = value
    return parsed


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that :func:`load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def read_sections(file: Path) -> dict[str, Any]:
    """The sections of a configuration file, not yet checked.

    Raises:
        InputError: It cannot be read, or does not hold sections.
    """
    do = "give a YAML file with sections such as 'hash:' and 'training:'"
    tree = read_yaml(file, "configuration", wanted="a readable file", do=do)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError("broken configuration", where=file, got=type(tree).__name__, wanted="sections", do=do)
    return tree


def _nest(key: str, value: object) -> dict[str, Any]:
    head, _, rest = key.partition(".")
    return {head: _nest(rest, value) if rest else value}


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
