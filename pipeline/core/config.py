"""The whole configuration: sections, presets, files, and the errors a reader of them needs.

Order of precedence: defaults < preset < ``--config FILE`` < options. The sections of heads live beside the heads
(:mod:`mmcli.heads.config`); this module nests them and adds those of the pipeline (SPEC section 12).
Nothing here imports torch.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError, field_validator

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
from .presets import PRESETS, Preset
from .strict_yaml import parse_yaml, read_yaml

# What the keys are called in formulas.
SYMBOLS = {"alpha": "cosine_weight", "gamma": "hash_weight", "B": "bits", "C": "num_classes"}


def readable(
    error: ValidationError, root: type[BaseModel], file: Path | None, chosen: set[str], flags: Mapping[str, str]
) -> InputError:
    """Turn the first refused key into one line that names it as its owner wrote it.

    Args:
        error: What pydantic says.
        root: The model that was filled.
        file: The file that was read, if any.
        chosen: Dotted keys given as options.
        flags: Dotted keys to the option's name on the command line.
    """
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    option = next((flags.get(c) for c in chosen if key == c or key.startswith(c + ".")), None)
    where = option or (f"{file}, key {key}" if file else key)
    if first["type"] == "extra_forbidden":
        known = _known_keys(root, path[:-1])
        symbol = SYMBOLS.get(path[-1])
        near = [symbol] if symbol in known else difflib.get_close_matches(path[-1], known, n=1, cutoff=0.0)
        return InputError(
            "unknown key",
            where=where,
            got=path[-1],
            wanted=f"one of {', '.join(known)}",
            do=f"did you mean {near[0]}?",
        )
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']+)'", first["ctx"]["expected"])
        meant = difflib.get_close_matches(str(first["input"]).lower(), choices, n=1)
        do = f"did you mean {meant[0]}?" if meant else "change it"
        wanted = first["ctx"]["expected"].replace("'", "")
        return InputError("refused value", where=where, got=repr(first["input"]), wanted=wanted, do=do)
    if first["type"] == "model_type":
        keys = ", ".join(_known_keys(root, path))
        return InputError(
            "refused value", where=where, got=repr(first["input"]), wanted=f"keys: {keys}", do="change it"
        )
    wanted = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return InputError("refused value", where=where, got=repr(first["input"]), wanted=wanted, do="change it")


def one_of(choices: Iterable[str]) -> str:
    """``a, b or c``."""
    *most, last = choices
    return f"{', '.join(most)} or {last}" if most else last


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        inner = model.model_fields[part].annotation
        assert isinstance(inner, type)
        assert issubclass(inner, BaseModel)
        model = inner
    return list(model.model_fields)


Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
# Beyond these no training goes well, and far beyond them the arithmetic of the optimiser overflows.
Rate = Annotated[float, Field(gt=0.0, le=1e6)]
Decay = Annotated[float, Field(ge=0.0, le=1e6)]
# What each of them selects is in protocols.py.
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

    batch_size: PositiveInt = Field(default=64, description="images a step")
    num_epochs: Epochs = Field(default=30, description="epochs at most")
    gradient_clip_norm: Positive | None = Field(default=1.0, description="largest gradient norm; null clips nothing")
    mixed_precision: bool = Field(default=True, description="half precision where the device has it")
    accumulation_steps: PositiveInt = Field(
        default=1, description="batches an optimiser step; to `mmcli finetune` they are the parts of one large batch"
    )
    early_stopping_patience: NonNegativeInt = Field(
        default=5, description="epochs without a better val mAP before training stops; 0 never stops"
    )
    save_top_k: PositiveInt = Field(default=3, description="checkpoints kept")
    monitor: Literal["knn", "classifier"] = Field(default="knn", description="what val mAP is computed from")
    mixup: bool = Field(default=False, description="train on mixtures of two images and of their labels")
    ema_decay: Beta | None = Field(
        default=None, description="decay of an exponential moving average of the parameters; null for none"
    )


class FinetuneConfig(Section):
    """What `mmcli finetune` trains of the towers, and how; no other command reads it."""

    unfreeze: str = Field(
        default="last-2", description="none, all, or last-N: the last N blocks of a tower, its last norm and its head"
    )
    towers: Literal["both", "image", "text"] = Field(default="both", description="which towers")
    layer_decay: float = Field(
        default=1.0, gt=0.0, le=1.0, description="factor of the learning rate from a block to the one below it"
    )
    augment: bool = Field(default=False, description="random crops of the image's own aspect ratio, and flips")
    gradient_checkpointing: bool = Field(
        default=False, description="compute a block's activations again in the backward pass instead of keeping them"
    )
    batch_tokens: PositiveInt | None = Field(
        default=None, description="patches or text tokens of one pass; what suits the device where null"
    )
    fsdp: bool = Field(default=False, description="spread trained blocks over the processes (FSDP)")
    start: str | None = Field(default=None, description="run whose head, and towers if it has any, it begins with")

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
    split_type: ProtocolName = Field(default="karpathy", description="protocol: which images train, tune and test")
    protocol_lists: str | None = Field(default=None, description="folder of the lists of hashnet; null for the others")
    num_workers: NonNegativeInt | None = Field(
        default=None, description="processes that read images; chosen for the machine where null"
    )
    prefetch_factor: PositiveInt = Field(default=2, description="batches read ahead by each of them")
    pin_memory: bool = Field(default=True, description="page-locked memory for copies to a GPU")


class HardwareConfig(Section):
    """Device and seed."""

    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:N or mps")
    seed: int = Field(default=42, ge=0, lt=2**32, description="seed of every random draw")
    deterministic: bool = Field(default=False, description="same bits twice, at some cost")


class GridConfig(Section):
    """The plan's grid; read and checked here, so that the plan's files load."""

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
    """Everything a command can be told; saved whole with every run."""

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
    """Resolve a configuration.

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
    given = _merge(under or {}, read_sections(file) if file is not None else {})
    chosen = dict(options or {})
    preset = chosen.get("preset", given.get("preset", Config.model_fields["preset"].default))
    preset = preset.lower() if isinstance(preset, str) else preset
    if not isinstance(preset, str) or preset not in PRESETS:
        raise InputError(
            "unknown preset",
            where="preset",
            got=repr(preset),
            wanted=one_of(PRESETS),
            do="choose one of these",
        )
    tree = _merge(PRESETS[preset], {**given, "preset": preset})
    for key, value in chosen.items():
        tree = _merge(tree, _nest(key, value))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise readable(error, Config, file, set(chosen), flags or {}) from None


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
