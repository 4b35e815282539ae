"""Configuration of a head, its losses and its neighbours; every section checks itself.

These sections are the ones of the configuration file that belong to this package. They import no torch, so a
configuration is read and refused before anything heavy is loaded.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationInfo, field_validator, model_validator

HeadKind = Literal["fusion", "mlp"]
FusionType = Literal["concat", "hadamard", "hadamard_magnitude"]
BlockNorm = Literal["none", "rms"]
Inputs = Literal["both", "image", "text"]
Adapter = Literal["none", "linear"]
Magnitude = Literal["own", "shuffled"]
Metric = Literal["hamming", "cosine", "hybrid", "asymmetric"]
Vote = Literal["softmax", "uniform", "rank", "threshold"]
# The key of the knn section that each vote reads; the others read none.
VOTE_PARAMETER: Mapping[str, str] = {"softmax": "tau", "threshold": "theta"}
IndexKind = Literal["auto", "flat", "fastscan", "torch", "gpu"]
# Hamming neighbours that a hybrid search reranks, K where that is more.
HYBRID_CANDIDATES = 100
Ties = Literal["index", "average"]
Predictor = Literal["knn", "classifier", "hybrid"]

NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
# Upper limits catch typos before they become a shortage of memory.
Width = Annotated[int, Field(gt=0, le=65536)]
MAX_LAYERS = 32
Bits = Annotated[int, Field(gt=0, le=4096)]


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
    """From two raw embeddings to the fused embedding z."""

    type: FusionType = Field(
        default="hadamard_magnitude",
        description="blocks that the MLP reads: directions, with their product, with log-norms",
    )
    mlp_dims: tuple[Width, ...] = Field(
        default=(1024, 512), min_length=1, max_length=MAX_LAYERS, description="widths of the MLP; the last is that of z"
    )
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0, description="share of units dropped after every layer")
    input_dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="share of the MLP's inputs dropped")
    activation: Literal["relu", "gelu"] = Field(default="relu", description="after every layer of the MLP")
    block_norm: BlockNorm = Field(
        default="rms", description="rms brings every block to root-mean-square 1; none leaves them as they are"
    )
    inputs: Inputs = Field(default="both", description="modalities the head reads")
    adapter: Adapter = Field(default="none", description="trainable residual linear map on each raw embedding")
    magnitude: Magnitude = Field(
        default="own",
        description="control: shuffled gives every image the log-norms of another, with type hadamard_magnitude",
    )

    @field_validator("magnitude")
    @classmethod
    def _something_to_shuffle(cls, magnitude: Magnitude, others: ValidationInfo) -> Magnitude:
        kind = others.data.get("type", "hadamard_magnitude")  # absent where it was refused itself
        if magnitude == "shuffled" and kind != "hadamard_magnitude":
            raise ValueError(f"own with fusion type {kind}, which reads no magnitude to shuffle")
        return magnitude


class HashConfig(Section):
    """The hash layer: B bits, 0 for none."""

    bits: int = Field(default=64, ge=0, le=4096, description="bits of a code, a multiple of 8; 0 for no hash layer")
    activation: Literal["tanh", "ste"] = Field(
        default="tanh", description="what the classifier reads: soft codes (tanh) or hard ones (straight-through)"
    )
    batch_norm: bool = Field(default=True, description="batch normalisation before the tanh")
    use_hash_reg: bool = Field(default=True, description="whether the hash terms of the loss apply")
    beta: float = Field(default=1.0, ge=1.0, le=1e3, description="slope of the tanh at the end of training, 1 at first")
    nested: tuple[Bits, ...] = Field(
        default=(),
        max_length=MAX_LAYERS,
        description="lengths of prefixes that are trained as codes of their own, beside the whole code; none for off",
    )
    code_classifier: bool = Field(default=False, description="train a further classifier, which reads the hard code")
    fused_classifier: bool = Field(default=False, description="train a further classifier, which reads z")

    @field_validator("bits")
    @classmethod
    def _whole_bytes(cls, bits: int) -> int:
        if bits % 8:
            raise ValueError("bits must be 0 or a multiple of 8, because codes are packed into bytes")
        return bits

    @field_validator("nested")
    @classmethod
    def _prefixes_of_bytes(cls, nested: tuple[int, ...]) -> tuple[int, ...]:
        if any(length % 8 for length in nested) or list(nested) != sorted(set(nested)):
            raise ValueError("rising multiples of 8, because codes are packed into bytes")
        return nested

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Lengths whose hard code has a training classifier: those of ``nested`` below ``bits``, and ``bits``."""
        if not self.bits or not (self.nested or self.code_classifier):
            return ()
        return (*(length for length in self.nested if length < self.bits), self.bits)


class ClassifierConfig(Section):
    """The linear classifier over the soft code h, or over z when there is no hash layer."""

    num_classes: PositiveInt = Field(default=80, description="tags; read from the store, checked where given")
    use_bias: bool = Field(default=True, description="whether the classifier has a bias")


class HashRegConfig(Section):
    """Weights of the terms that make up the hash loss L_hash."""

    lambda_quant: NonNegative = Field(default=1.0, description="weight of L_quant: soft codes near hard ones")
    lambda_balance: NonNegative = Field(default=0.1, description="weight of L_balance: bits on half of the time")
    lambda_decorr: NonNegative = Field(default=0.01, description="weight of L_decorr: bits that do not repeat others")


class LossConfig(Section):
    """L = bce_weight * L_bce + cosine_weight (alpha) * L_cos + hash_weight (gamma) * L_hash.

    Training classifiers that ``hash.fused_classifier`` and ``hash.nested`` ask for add a term each.
    """

    bce_weight: NonNegative = Field(default=1.0, description="weight of the classifier's cross-entropy")
    cosine_weight: NonNegative = Field(
        default=1.0, description="alpha, weight of the cosine term; trains nothing without an adapter"
    )
    hash_weight: NonNegative = Field(default=0.1, description="gamma, weight of the hash terms")
    hash_reg: HashRegConfig = HashRegConfig()
    fused_weight: NonNegative = Field(default=1.0, description="weight of the classifier that reads z")
    nested_weight: NonNegative = Field(default=1.0, description="weight of the classifiers that read hard prefixes")
    focal_loss: bool = Field(default=False, description="focal loss in the place of cross-entropy")
    focal_alpha: float = Field(default=0.25, ge=0.0, le=1.0, description="focal loss: weight of positives")
    focal_gamma: NonNegative = Field(default=2.0, description="focal loss: how strongly easy pairs are down-weighted")
    asymmetric_loss: bool = Field(
        default=False, description="asymmetric loss in the place of cross-entropy, unless focal"
    )
    asymmetric_gamma_pos: NonNegative = Field(default=0.0, description="asymmetric loss: focusing of positives")
    asymmetric_gamma_neg: NonNegative = Field(default=4.0, description="asymmetric loss: focusing of negatives")
    asymmetric_shift: float = Field(
        default=0.05,
        ge=0.0,
        lt=1.0,
        description="asymmetric loss: negatives less probable than this are ignored",
    )
    class_weights: Literal["none", "balanced"] = Field(
        default="none", description="balanced weighs positives of rare classes more"
    )


class KnnConfig(Section):
    """How neighbours are searched, and how they vote."""

    K: PositiveInt = Field(default=20, description="neighbours that vote")
    distance_metric: Metric = Field(default="hamming", description="distance; cosine where there is no hash layer")
    voting_strategy: Vote = Field(default="softmax", description="weights of the votes")
    tau: Positive = Field(default=0.07, description="temperature of the softmax vote")
    theta: float = Field(default=0.5, ge=-1.0, le=1.0, description="least similarity of the threshold vote")
    ties: Ties = Field(
        default="index",
        description="equal distances at the boundary: the lower index votes, or all share (average; hamming alone)",
    )
    index: IndexKind = Field(
        default="auto", description="how packed codes are searched; auto is the fastest that is exact"
    )
    predictor: Predictor = Field(
        default="knn", description="neighbours, classifier, or their mix with a weight tuned on val (hybrid)"
    )
    top_n_tags: PositiveInt = Field(default=5, description="tags shown for an image")
