"""Zero-shot scores: how near an image, its caption, or both are to the mean of prompts for each category name.

Symbols: N images, C classes, P prompts a class, D embedding width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


def class_prototypes(prompt_embeddings: Floats) -> npt.NDArray[np.float32]:
    """One unit vector a class: the mean of its normalised prompt embeddings, normalised again.

    ``t_c = u / ||u||``, ``u = mean_p(e_cp / ||e_cp||)``: the ensemble in embedding space of Radford et al. 2021,
    section 3.1.4. Without the inner normalisation long embeddings would outvote short ones.

    Args:
        prompt_embeddings: Raw text embeddings ``(C, P, D)``.

    Returns:
        ``(C, D)`` float32.

    Raises:
        ValueError: Another shape, or an embedding that is zero or not finite.
    """
    if prompt_embeddings.ndim != 3 or 0 in prompt_embeddings.shape:
        raise ValueError(f"prompt embeddings must be (C, P, D), got shape {prompt_embeddings.shape}")
    return _unit(_unit(prompt_embeddings, "prompt embedding").mean(axis=1), "prototype").astype(np.float32)


def zero_shot_scores(
    v: Floats, prototypes: npt.NDArray[np.float32], *, name: str = "image embedding"
) -> npt.NDArray[np.float32]:
    """Cosine of every image, or every caption, with every class.

    Args:
        v: Raw embeddings ``(N, D)``, of images or of captions.
        prototypes: Unit vectors ``(C, D)``, of :func:`class_prototypes`.
        name: What the embeddings are, for messages.

    Returns:
        ``(N, C)`` float32 in [-1, 1], in class order.

    Raises:
        ValueError: Widths that differ, or an embedding that is zero or not finite.
    """
    if v.ndim != 2 or v.shape[1] != prototypes.shape[1]:
        raise ValueError(f"{name}s {v.shape} do not fit prototypes {prototypes.shape}")
    cosine = _unit(v, name).astype(np.float32) @ prototypes.T
    return cosine.clip(-1.0, 1.0).astype(np.float32)


def mean_logits(
    cosines: Sequence[npt.NDArray[np.float32]], logit_scale: float, logit_bias: float
) -> npt.NDArray[np.float64]:
    """The mean over modalities of SigLIP's logits ``scale * cosine + bias``: one modality's own where there is one.

    A mean of logits is a geometric mean of odds: image and caption have an equal say about every class. The cosine of
    the mean direction is the same but for a factor ``1 / ||d_img + d_txt||`` of the image, the smaller the better the
    caption fits it; that factor would move images with good captions down in the ranking of every class.

    Args:
        cosines: ``(N, C)`` for each modality.
        logit_scale: The learned scale, already exponentiated (checkpoints keep its logarithm).
        logit_bias: The learned bias.

    Returns:
        ``(N, C)`` float64, to be ranked as they are: their probabilities (Zhai et al. 2023, section 3.2) tie near 1.
    """
    cosine: npt.NDArray[np.float64] = np.mean([part.astype(np.float64) for part in cosines], axis=0)
    return logit_scale * cosine + logit_bias


def _unit(v: Floats, name: str) -> npt.NDArray[np.float64]:
    v = np.asarray(v, dtype=np.float64)
    n = np.linalg.norm(v, axis=-1, keepdims=True)
    if not (np.isfinite(n).all() and (n > 0).all()):
        row = int(np.flatnonzero(~(np.isfinite(n) & (n > 0)))[0])
        raise ValueError(f"{name} {row} is zero or not finite, so it has no direction")
    unit: npt.NDArray[np.float64] = v / n
    return unit
