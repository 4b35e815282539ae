"""Zero-shot scores against plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcli.heads.prototypes import class_prototypes, mean_logits, zero_shot_scores
from mmcli.heads.sigmoid import sigmoid


@given(st.integers(0, 2**32 - 1))
def test_prototypes_and_scores_equal_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompts = rng.normal(size=(4, 3, 6)) * rng.uniform(0.1, 50, (4, 3, 1))
    v_img = rng.normal(size=(5, 6)).astype(np.float32) * 9
    prototypes = class_prototypes(prompts)
    assert prototypes.dtype == np.float32
    for c in range(4):
        u = sum(e / np.sqrt((e**2).sum()) for e in prompts[c]) / 3
        np.testing.assert_allclose(prototypes[c], u / np.sqrt((u**2).sum()), atol=1e-6)
    scores = zero_shot_scores(v_img, prototypes)
    for n in range(5):
        for c in range(4):
            assert scores[n, c] == pytest.approx((v_img[n] @ prototypes[c]) / np.linalg.norm(v_img[n]), abs=1e-5)
    np.testing.assert_allclose(zero_shot_scores(v_img * 7, prototypes), scores, atol=1e-6)


def test_long_prompts_do_not_outvote_short_ones() -> None:
    prototypes = class_prototypes(np.array([[[100.0, 0.0], [0.0, 1.0]]]))
    np.testing.assert_allclose(prototypes, [[2**-0.5, 2**-0.5]], rtol=1e-6)


def test_the_mean_of_logits_is_a_geometric_mean_of_odds() -> None:
    cosines = np.random.default_rng(0).uniform(-0.2, 0.9, (2, 4, 3)).astype(np.float32)
    logits = mean_logits(list(cosines), 10.0, -3.0)
    odds = [np.exp(10.0 * cosine.astype(np.float64) - 3.0) for cosine in cosines]
    np.testing.assert_allclose(np.exp(logits), np.sqrt(odds[0] * odds[1]), rtol=1e-12)
    assert logits.dtype == np.float64
    np.testing.assert_allclose(mean_logits([cosines[0]], 10.0, -3.0), 10.0 * cosines[0].astype(np.float64) - 3.0)


def test_logits_keep_apart_what_probabilities_tie() -> None:
    cosine = np.array([[0.9, 0.9000001]], np.float32)
    assert np.diff(sigmoid(112.0 * cosine.astype(np.float64) - 16.0).astype(np.float32)) == 0
    assert np.diff(mean_logits([cosine], 112.0, -16.0)) > 0


def test_what_has_no_direction_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt embedding 1 is zero"):
        class_prototypes(np.array([[[1.0, 0.0], [0.0, 0.0]]]))
    with pytest.raises(ValueError, match="prototype 0"):
        class_prototypes(np.array([[[1.0, 0.0], [-1.0, 0.0]]]))
    with pytest.raises(ValueError, match="image embedding 2"):
        zero_shot_scores(np.array([[1.0], [2.0], [np.nan]]), np.ones((1, 1), np.float32))
    with pytest.raises(ValueError, match=r"\(C, P, D\)"):
        class_prototypes(np.ones((2, 3)))
    with pytest.raises(ValueError, match="caption embedding 0"):
        zero_shot_scores(np.zeros((1, 1)), np.ones((1, 1), np.float32), name="caption embedding")
    with pytest.raises(ValueError, match="do not fit"):
        zero_shot_scores(np.ones((2, 3)), np.ones((1, 4), np.float32))
