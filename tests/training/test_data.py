"""Splits share the arrays of their store; what is drawn, gathered and shuffled is checked one by one."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmcli.heads.config import ClassifierConfig, FusionConfig, HashConfig
from mmcli.heads.model import Head
from mmcli.pipeline.training.data import Split

CPU, D, C = torch.device("cpu"), 6, 4


def make_split(n: int = 30, seed: int = 0, rows: np.ndarray | None = None) -> Split:
    rng = np.random.default_rng(seed)
    v_img = (rng.lognormal(1, 0.5, (n, 1)) * rng.normal(size=(n, D))).astype(np.float16)
    v_txt = (rng.lognormal(1, 0.5, (n, 5, 1)) * rng.normal(size=(n, 5, D))).astype(np.float16)
    n_captions = rng.integers(1, 6, n).astype(np.uint8)
    v_txt[np.arange(5) >= n_captions[:, None]] = 0
    whole = Split.place(v_img, v_txt, n_captions, rng.integers(0, 2, (n, C)).astype(np.uint8), CPU)
    return whole if rows is None else whole.part(rows)


@given(st.permutations(range(30)), st.integers(1, 30), st.data())
def test_a_batch_is_what_a_loop_gathers(order: list[int], n: int, data: st.DataObject) -> None:
    split = make_split(rows=np.array(order[:n]))
    at = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=7))
    captions = [data.draw(st.integers(0, int(split.captions_of[place]) - 1)) for place in at]
    got = split.batch(torch.tensor(at), torch.tensor(captions))
    for k, (place, caption) in enumerate(zip(at, captions, strict=True)):
        row = order[place]
        wanted = split.v_img[row], split.v_txt[row, caption], split.labels[row]
        assert all(torch.equal(mine[k], theirs.float()) for mine, theirs in zip(got, wanted, strict=True))
    stacked = split.batch(torch.tensor([at, at]), torch.tensor([captions, captions]))
    assert all(torch.equal(two, torch.stack([one, one])) for two, one in zip(stacked, got, strict=True))
    assert torch.equal(torch.cat([part[0] for part in split.chunks(4)]), split.v_img[order[:n]].float())


def test_parts_share_memory_and_a_sample_is_drawn_once() -> None:
    whole = make_split(100)
    part = whole.part(np.arange(10, 60))
    assert part.v_txt.data_ptr() == whole.v_txt.data_ptr()
    assert (len(part), part.own_labels.shape) == (50, (50, C))
    assert part.sample(50, 3) is part
    drawn = [part.sample(20, seed).rows.tolist() for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 20
    assert drawn[0] == sorted(drawn[0])
    assert set(drawn[0]) <= set(range(10, 60))


def test_shuffled_magnitudes_keep_directions_and_norms() -> None:
    part = make_split(100).part(np.arange(20, 90))
    part.v_img[25], part.norm_img[25] = 0, 0
    shuffled = part.shuffle_magnitudes(1)
    at = torch.arange(len(part))
    for caption in (0, part.captions_of - 1):
        plain, other = part.batch(at, caption), shuffled.batch(at, caption)
        for v, w in zip(plain[:2], other[:2], strict=True):
            some = v.norm(dim=1) > 0
            cosine = torch.nn.functional.cosine_similarity(v[some], w[some])
            torch.testing.assert_close(cosine, torch.ones_like(cosine))
        assert torch.equal(plain[2], other[2])
    real = [(row, caption) for row in range(len(part)) for caption in range(int(part.captions_of[row]))]
    places, captions = (torch.tensor(column) for column in zip(*real, strict=True))
    for which in (0, 1):
        before, after = (one.batch(places, captions)[which].norm(dim=1) for one in (part, shuffled))
        assert (before != after).float().mean() > 0.8
        if which == 1:
            torch.testing.assert_close(before.sort().values, after.sort().values, rtol=1e-4, atol=1e-4)
    images = [one.batch(at, 0)[0].norm(dim=1) for one in (part, shuffled)]
    nonzero = images[0] > 0
    assert images[1][~nonzero].tolist() == [0.0]
    torch.testing.assert_close(images[0].sort().values, images[1].sort().values, rtol=1e-4, atol=1e-4)
    again = part.shuffle_magnitudes(1).batch(at, 0)[0]
    assert torch.equal(again, shuffled.batch(at, 0)[0])
    assert not torch.equal(part.shuffle_magnitudes(2).batch(at, 0)[0], again)


@pytest.mark.parametrize("shuffled", [False, True])
def test_statistics_are_those_of_train_as_it_is_read(shuffled: bool) -> None:
    split = make_split(100).part(np.arange(5, 70))
    split = split.shuffle_magnitudes(0) if shuffled else split
    head = Head(FusionConfig(mlp_dims=(4,)), HashConfig(bits=8), ClassifierConfig(num_classes=C), width=D)
    head.fit_log_norms(split.log_norms())
    v_img, v_txt, _ = split.batch(torch.arange(len(split)), 0)
    m = torch.stack([torch.log(v.norm(dim=1) + 1e-6) for v in (v_img, v_txt)], dim=1)
    torch.testing.assert_close(head.fusion.m_mean, m.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.fusion.m_std, m.std(0, correction=0), rtol=1e-3, atol=1e-4)
