"""The whole configuration: sections, presets, files, and the errors a reader of them needs.

Order of precedence: defaults < preset < ``--config FILE`` < options. The sections of heads live beside the heads
(:mod:`mmcli.heads.config`); this module nests them and adds those of the pipeline (SPEC section 12).
Nothing here imports torch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from .. import InputError
from ..heads.config import (
    ClassifierConfig,
    FusionConfig,
    HashConfig,
    KnnConfig,
    LossConfig,
    NonNegative,
    Positive,
    Section,
)
from .config_errors import readable

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
# Beyond these no training goes well, and far beyond them the arithmetic of the optimiser overflows.
Rate = Annotated[float, Field(gt=0.0, le=1e6)]
Decay = Annotated[float, Field(ge=0.0, le=1e6)]
Epochs = Annotated[int, Field(gt=0, le=1_000_000)]
Preset = Literal["recommended", "plan"]
DEFAULT_MODEL = "google/siglip2-base-patch16-naflex"


class ModelConfig(Section):
    """The frozen SigLIP2 of stage 1."""

    siglip2_variant: str = DEFAULT_MODEL
    revision: str | None = None
    max_num_patches: PositiveInt = 256
    text_max_length: PositiveInt = 64
    freeze_towers: Literal[True] = True


class OptimizerConfig(Section):
    """AdamW, one learning rate per part of the head."""

    type: Literal["adamw"] = "adamw"
    lr_fusion: Rate = 3e-4
    lr_hash: Rate = 3e-4
    lr_classifier: Rate = 3e-4
    lr_towers: Rate = 1e-5
    weight_decay: Decay = 0.01
    betas: tuple[Beta, Beta] = (0.9, 0.999)


class SchedulerConfig(Section):
    """Linear warm-up, then cosine to ``min_lr``, stepped once per optimiser step."""

    type: Literal["cosine"] = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0.0, le=1e6)] = 2.0
    total_epochs: Epochs | None = None
    min_lr: NonNegative = 1e-6


class TrainingConfig(Section):
    """How a head is trained from the store."""

    batch_size: PositiveInt = 64
    num_epochs: Epochs = 30
    gradient_clip_norm: Positive | None = 1.0
    mixed_precision: bool = True
    accumulation_steps: PositiveInt = 1
    early_stopping_patience: NonNegativeInt = 5
    save_top_k: PositiveInt = 3
    monitor: Literal["knn", "classifier"] = "knn"


class DataConfig(Section):
    """Where samples come from and how images are read ahead of the model."""

    dataset: str = "coco"
    split_type: Literal["karpathy"] = "karpathy"
    num_workers: NonNegativeInt | None = None
    prefetch_factor: PositiveInt = 2
    pin_memory: bool = True


class HardwareConfig(Section):
    """Device and seed."""

    device: str = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    deterministic: bool = False


class GridConfig(Section):
    """The plan's grid; read and checked here, so that the plan's files load."""

    hash_bits: tuple[NonNegativeInt, ...] = ()
    K_neighbors: tuple[PositiveInt, ...] = ()
    cosine_weight: tuple[NonNegative, ...] = ()
    hash_weight: tuple[NonNegative, ...] = ()
    tau: tuple[Positive, ...] = ()
    max_num_patches: tuple[PositiveInt, ...] = ()
    freeze_towers: tuple[bool | Literal["frozen", "last-2", "full"], ...] = ()


class Config(Section):
    """Everything a command can be told; saved whole with every run."""

    preset: Preset = "recommended"
    model: ModelConfig = ModelConfig()
    fusion: FusionConfig = FusionConfig()
    hash: HashConfig = HashConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    training: TrainingConfig = TrainingConfig()
    knn: KnnConfig = KnnConfig()
    data: DataConfig = DataConfig()
    hardware: HardwareConfig = HardwareConfig()
    grid_search: GridConfig = GridConfig()

    @property
    def digest(self) -> str:
        """First 8 hex digits of the SHA-256 of the resolved configuration."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:8]


# The plan to the letter; `recommended` is what the sections default to. What differs, and why, is in docs/method.md.
PLAN: dict[str, Any] = {
    "fusion": {"block_norm": "none"},
    "hash": {"activation": "tanh", "batch_norm": False},
    "loss": {"hash_weight": 0.1},
    "optimizer": {"lr_classifier": 3e-4},
}
RECOMMENDED: dict[str, Any] = {
    "fusion": {"block_norm": "rms"},
    "hash": {"activation": "ste", "batch_norm": True},
    "loss": {"hash_weight": 0.0},
    "optimizer": {"lr_classifier": 3e-3},
}
PRESETS: dict[str, dict[str, Any]] = {"plan": PLAN, "recommended": RECOMMENDED}


def load_config(
    file: Path | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    flags: Mapping[str, str] | None = None,
) -> Config:
    """Resolve a configuration.

    Args:
        file: A YAML file with the sections of :class:`Config`; ``None`` for none.
        options: Dotted keys (``hash.bits``) to the values that were given; ``None`` is one of them, YAML's null.
        flags: Dotted keys to the option's name on the command line, for messages.

    Returns:
        The checked configuration.

    Raises:
        InputError: The file cannot be read, a key is unknown, or a value is refused.
    """
    given = _read_yaml(file) if file is not None else {}
    chosen = dict(options or {})
    preset = chosen.get("preset", given.get("preset", Config.model_fields["preset"].default))
    preset = preset.lower() if isinstance(preset, str) else preset
    if not isinstance(preset, str) or preset not in PRESETS:
        raise InputError(
            "unknown preset",
            where="preset",
            got=repr(preset),
            wanted=" or ".join(PRESETS),
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
            value = yaml.safe_load(text)
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


def _read_yaml(file: Path) -> dict[str, Any]:
    do = "give a YAML file with sections such as 'hash:' and 'training:'"
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            "cannot read the configuration",
            where=file,
            got=error.strerror or error,
            wanted="a readable file",
            do=do,
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(file)
        problem = getattr(error, "problem", None) or "text that is not UTF-8"
        raise InputError("broken configuration", where=where, got=problem, wanted="YAML", do=do) from None
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
