"""What a head, its losses and its neighbours can be told; every section checks itself.

These sections are the ones of the configuration file that belong to this package. They import no torch, so a
configuration is read and refused before anything heavy is loaded.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

FusionType = Literal["concat", "hadamard", "hadamard_magnitude"]
BlockNorm = Literal["none", "rms"]
Inputs = Literal["both", "image", "text"]
Adapter = Literal["none", "linear"]
Metric = Literal["hamming", "cosine", "hybrid"]
Vote = Literal["softmax", "uniform", "rank", "threshold"]

NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
# Wider or deeper than any head; what lies beyond is a slip of the keyboard, and would only show as memory that ran out.
Width = Annotated[int, Field(gt=0, le=65536)]
MAX_LAYERS = 32


class Section(BaseModel):
    """One section of a configuration: frozen, every key checked, unknown keys refused.

    A choice may be written in any case, and the choice ``none`` as YAML's null.
    """

    # No formula here has a use for infinity, and YAML has a word for it.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _spelling(cls, values: object) -> object:
        if not isinstance(values, Mapping):
            return values
        fields = cls.model_fields
        return {key: _spelt(fields[key].annotation, value) if key in fields else value for key, value in values.items()}


def _spelt(annotation: object, value: object) -> object:
    """The choice that is meant, or the value as it is."""
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    meant = "none" if value is None else value.lower() if isinstance(value, str) else value
    return meant if meant in choices else value


class FusionConfig(Section):
    """From two raw embeddings to the fused embedding z (SPEC section 5)."""

    type: FusionType = "hadamard_magnitude"
    mlp_dims: tuple[Width, ...] = Field(default=(1024, 512), min_length=1, max_length=MAX_LAYERS)
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    activation: Literal["relu", "gelu"] = "relu"
    block_norm: BlockNorm = "rms"
    inputs: Inputs = "both"
    adapter: Adapter = "none"


class HashConfig(Section):
    """The hash layer: B bits, 0 for none."""

    bits: Annotated[int, Field(ge=0, le=4096)] = 64
    activation: Literal["tanh", "ste"] = "tanh"
    batch_norm: bool = True
    use_hash_reg: bool = True

    @field_validator("bits")
    @classmethod
    def _whole_bytes(cls, bits: int) -> int:
        if bits % 8:
            raise ValueError("bits must be 0 or a multiple of 8, because codes are packed into bytes")
        return bits


class ClassifierConfig(Section):
    """The linear classifier over the soft code h, or over z when there is no hash layer."""

    num_classes: PositiveInt = 80
    use_bias: bool = True


class HashRegConfig(Section):
    """Weights inside L_hash."""

    lambda_balance: NonNegative = 0.1
    lambda_decorr: NonNegative = 0.01


class LossConfig(Section):
    """L = bce_weight * L_bce + cosine_weight (alpha) * L_cos + hash_weight (gamma) * L_hash (SPEC section 6)."""

    bce_weight: NonNegative = 1.0
    cosine_weight: NonNegative = 1.0
    hash_weight: NonNegative = 0.1
    hash_reg: HashRegConfig = HashRegConfig()
    focal_loss: bool = False
    focal_alpha: Annotated[float, Field(ge=0.0, le=1.0)] = 0.25
    focal_gamma: NonNegative = 2.0
    class_weights: Literal["none", "balanced"] = "none"


class KnnConfig(Section):
    """Neighbours and votes (SPEC section 8)."""

    K: PositiveInt = 20
    distance_metric: Metric = "hamming"
    voting_strategy: Vote = "softmax"
    tau: Positive = 0.07
    theta: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.5
    top_n_tags: PositiveInt = 5
