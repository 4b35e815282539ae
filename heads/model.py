"""The head: fusion, hash layer, classifier; and the MLP it is compared with.

Symbols: N images, D embedding width, C classes, B bits, z fused embedding, h soft code.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from .config import ClassifierConfig, FusionConfig, HashConfig, HeadKind
from .fusion import Fusion, make_mlp
from .hashing import HashLayer, straight_through
from .hub import HubModule


class HeadOutput(NamedTuple):
    """What a head gives for a batch.

    Attributes:
        z: Fused embedding ``(N, mlp_dims[-1])``.
        h: Soft codes ``(N, B)`` float32, or ``None`` without hash layer.
        logits: ``(N, C)``.
        d_img: Image directions ``(N, D)``; ``None`` for the MLP baseline, which does not decompose.
        d_txt: Caption directions ``(N, D)``; ``None`` for the MLP baseline.
        hash_reg: Whether the hash terms of the loss apply (``hash.use_hash_reg``).
        both: Whether the head reads both modalities. One that reads a single one must learn nothing from the other,
            so the cosine term does not apply.
        fused_logits: Of the training classifier that reads z ``(N, C)``; ``None`` in ``eval()`` mode, or without one.
        prefix_logits: Of the training classifiers that read hard prefixes of the code, ``(N, C)`` each; none in
            ``eval()`` mode.
    """

    z: Tensor
    h: Tensor | None
    logits: Tensor
    d_img: Tensor | None
    d_txt: Tensor | None
    hash_reg: bool = True
    both: bool = True
    fused_logits: Tensor | None = None
    prefix_logits: tuple[Tensor, ...] = ()

    @property
    def features(self) -> Tensor:
        """What neighbours are searched with: h, or z without hash layer."""
        return self.z if self.h is None else self.h


class BaseHead(HubModule):
    """The interface that a trainer uses; :class:`Head` and :class:`MlpBaseline` implement it."""

    def forward(self, v_img: Tensor, v_txt: Tensor) -> HeadOutput:
        """Codes and logits of raw embeddings ``(N, D)`` and ``(N, D)``."""
        raise NotImplementedError

    def fit_log_norms(self, m: Tensor) -> None:
        """Take the statistics that are not learned from log-norms ``(N, 2)`` of train: an image, then its caption."""

    def set_progress(self, progress: float) -> None:
        """Take notice of the share of the training that is done, in [0, 1]."""

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by the learning rate they take: fusion (with adapters), hash, classifier."""
        raise NotImplementedError


class Head(BaseHead):
    """Raw embeddings to codes and logits.

    In ``eval()`` mode the output of an image depends on that image alone: dropout is off and batch normalisation uses
    the running statistics.

    Training classifiers guide the head and are not read afterwards: one over z (``hash.fused_classifier``), and one
    over the hard code (``hash.code_classifier``) and each of its prefixes (``hash.nested``), with straight-through
    gradients.

    Args:
        fusion: The fusion section.
        hash: The hash section; with ``bits`` 0 there is no hash layer and the classifier reads z.
        classifier: The classifier section.
        width: Embedding width D.
    """

    kind: ClassVar[HeadKind] = "fusion"

    def __init__(
        self,
        fusion: FusionConfig,
        hash: HashConfig,  # noqa: A002
        classifier: ClassifierConfig,
        *,
        width: int,
    ) -> None:
        super().__init__(width, fusion=fusion, hash=hash, classifier=classifier)
        self.fusion = Fusion(fusion, width)
        self.hash = HashLayer(hash, fusion.mlp_dims[-1]) if hash.bits else None
        self._hash_reg, self._both = hash.use_hash_reg, fusion.inputs == "both"
        self.classifier = self._linear(hash.bits or fusion.mlp_dims[-1], classifier)
        fused = hash.fused_classifier and hash.bits > 0
        self.fused_classifier = self._linear(fusion.mlp_dims[-1], classifier) if fused else None
        self.prefix_classifiers = nn.ModuleList(self._linear(length, classifier) for length in hash.prefixes)
        self._prefixes = hash.prefixes

    @staticmethod
    def _linear(n_features: int, config: ClassifierConfig) -> nn.Linear:
        return nn.Linear(n_features, config.num_classes, bias=config.use_bias)

    @classmethod
    def from_build(cls, build: Mapping[str, Any]) -> Self:
        """Build a head from the JSON of ``build``."""
        return cls(
            FusionConfig(**build["fusion"]),
            HashConfig(**build["hash"]),
            ClassifierConfig(**build["classifier"]),
            width=build["width"],
        )

    def forward(self, v_img: Tensor, v_txt: Tensor) -> HeadOutput:
        """Codes and logits of raw embeddings ``(N, D)`` and ``(N, D)``.

        Raises:
            InputError: Widths that do not fit, or statistics that were never fitted.
        """
        fused = self.fusion(v_img, v_txt)
        h, read = None, fused.z
        if self.hash is not None:
            h = self.hash(fused.z)
            read = self.hash.read(h)
        output = HeadOutput(fused.z, h, self.classifier(read), fused.d_img, fused.d_txt, self._hash_reg, self._both)
        return self._guided(output) if self.training and h is not None else output

    def _guided(self, output: HeadOutput) -> HeadOutput:
        """The output with the logits of the training classifiers."""
        assert output.h is not None
        fused = None if self.fused_classifier is None else self.fused_classifier(output.z)
        hard = straight_through(output.h) if self._prefixes else output.h
        readers = zip(self._prefixes, self.prefix_classifiers, strict=True)
        prefixes = tuple(reader(hard[..., :length]) for length, reader in readers)
        return output._replace(fused_logits=fused, prefix_logits=prefixes)

    def fit_log_norms(self, m: Tensor) -> None:
        """Standardise log-norms by those of train ``(N, 2)``: an image, then its caption."""
        self.fusion.fit_log_norms(m)

    def set_progress(self, progress: float) -> None:
        """Raise the slope of the hash layer's tanh with the share of the training that is done."""
        if self.hash is not None:
            self.hash.set_progress(progress)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by the learning rate they take: fusion (with adapters), hash, classifier."""
        hash_parameters = [] if self.hash is None else list(self.hash.parameters())
        return {
            "fusion": list(self.fusion.parameters()),
            "hash": hash_parameters,
            "classifier": [
                parameter
                for part in (self.classifier, self.fused_classifier, self.prefix_classifiers)
                if part is not None
                for parameter in part.parameters()
            ],
        }


class MlpBaseline(BaseHead):
    """Baseline: ``[v_img; v_txt]`` raw through the same MLP and a classifier; no decomposition, hash or neighbours.

    Args:
        fusion: ``mlp_dims``, ``dropout``, ``activation`` and ``inputs`` are used.
        classifier: The classifier section.
        width: Embedding width D.
    """

    kind: ClassVar[HeadKind] = "mlp"

    def __init__(self, fusion: FusionConfig, classifier: ClassifierConfig, *, width: int) -> None:
        super().__init__(width, fusion=fusion, classifier=classifier)
        self._inputs = fusion.inputs
        self.mlp = make_mlp(fusion, width * (2 if fusion.inputs == "both" else 1))
        self.classifier = nn.Linear(fusion.mlp_dims[-1], classifier.num_classes, bias=classifier.use_bias)

    @classmethod
    def from_build(cls, build: Mapping[str, Any]) -> Self:
        """Build a baseline from the JSON of ``build``."""
        return cls(FusionConfig(**build["fusion"]), ClassifierConfig(**build["classifier"]), width=build["width"])

    def forward(self, v_img: Tensor, v_txt: Tensor) -> HeadOutput:
        """Logits of raw embeddings ``(N, D)`` and ``(N, D)``."""
        used = {"both": (v_img, v_txt), "image": (v_img,), "text": (v_txt,)}[self._inputs]
        z = self.mlp(torch.cat(used, dim=-1).float())
        return HeadOutput(z, None, self.classifier(z), None, None)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by the learning rate they take."""
        return {"fusion": list(self.mlp.parameters()), "hash": [], "classifier": list(self.classifier.parameters())}


HEADS: dict[HeadKind, type[Head] | type[MlpBaseline]] = {"fusion": Head, "mlp": MlpBaseline}


def make_head(
    kind: HeadKind,
    fusion: FusionConfig,
    hash: HashConfig,  # noqa: A002
    classifier: ClassifierConfig,
    *,
    width: int,
) -> Head | MlpBaseline:
    """The head that a configuration asks for, its parameters drawn, its statistics not fitted.

    Args:
        kind: ``fusion`` or ``mlp``.
        fusion: The fusion section.
        hash: The hash section; the MLP has no hash layer, and must be asked for with ``bits`` 0.
        classifier: The classifier section.
        width: Embedding width D.

    Raises:
        ValueError: Bits for the MLP.
    """
    if kind == "fusion":
        return Head(fusion, hash, classifier, width=width)
    if hash.bits:
        raise ValueError(f"the MLP baseline has no hash layer for {hash.bits} bits")
    return MlpBaseline(fusion, classifier, width=width)
