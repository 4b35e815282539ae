"""What is looked at after an epoch, and what is said when a training has collapsed."""

import numpy as np
import pytest
import torch

from mmcli.heads.decompose import log_norms
from mmcli.heads.hashing import binarise, pack_codes
from mmcli.heads.knn import build_index
from mmcli.heads.metrics import mean_average_precision
from mmcli.heads.model import make_head
from mmcli.heads.voting import vote
from mmcli.pipeline.core.config import load_config
from mmcli.pipeline.training.data import Split
from mmcli.pipeline.training.monitor import CollapseWarnings, Monitor

D, C = 12, 5


def make(options=(), n: int = 80):
    config = load_config(options={"hash.bits": 16, "classifier.num_classes": C, "knn.K": 7, **dict(options)})
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (n, C)).astype(np.uint8)
    v = (labels @ rng.normal(size=(C, D)) + 0.3 * rng.normal(size=(n, D))).astype(np.float32)
    whole = Split.place(v, np.repeat(v[:, None], 5, 1), np.full(n, 5), labels, torch.device("cpu"))
    train, val = whole.part(np.arange(0, n - 20)), whole.part(np.arange(n - 20, n))
    torch.manual_seed(0)
    head = make_head("fusion", config.fusion, config.hash, config.classifier, width=D)
    head.fit_log_norms(log_norms(train.v_img, train.v_txt[:, 0]))
    return config, train, val, head


def codes(head, split):
    with torch.inference_mode():
        output = head.eval()(*split.batch(torch.arange(len(split)), 0)[:2])
    return output.features.numpy(), output.logits.numpy()


def test_val_map_is_that_of_the_neighbours_or_of_the_classifier() -> None:
    config, train, val, head = make()
    (base, _), (query, logits) = codes(head, train), codes(head, val)
    index = build_index("hamming", packed=pack_codes(binarise(base)))
    found = index.search(packed=pack_codes(binarise(query)), K=7)
    truth = val.own_labels.numpy()
    wanted = mean_average_precision(vote(found, train.own_labels.numpy(), config.knn), truth)
    seen = Monitor(config, train, val)(head)
    assert seen["val_mAP"] == wanted
    assert seen["mean_abs_h"] == pytest.approx(np.abs(query).mean())
    assert seen["bit_balance"] == pytest.approx(np.abs(binarise(query).mean(0)).mean())
    by_classifier = load_config(options={"hash.bits": 16, "training.monitor": "classifier"})
    assert Monitor(by_classifier, train, val)(head)["val_mAP"] == mean_average_precision(logits, truth)


def test_a_sample_of_train_votes_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmcli.pipeline.training.monitor.VOTERS", 10)
    config, train, val, head = make()
    monitor = Monitor(config, train, val)
    few = train.sample(10, config.hardware.seed)
    index = build_index("hamming", packed=pack_codes(binarise(codes(head, few)[0])))
    found = index.search(packed=pack_codes(binarise(codes(head, val)[0])), K=7)
    wanted = mean_average_precision(vote(found, few.own_labels.numpy(), config.knn), val.own_labels.numpy())
    assert monitor(head)["val_mAP"] == wanted


def test_without_a_hash_layer_there_are_no_facts_of_codes() -> None:
    config, train, val, head = make({"hash.bits": 0, "knn.distance_metric": "cosine"})
    assert set(Monitor(config, train, val)(head)) == {"val_mAP"}


def test_the_prior_is_what_equal_scores_reach() -> None:
    config, train, val, _ = make()
    truth = val.own_labels.numpy()
    assert Monitor(config, train, val).prior == pytest.approx(mean_average_precision(np.zeros(truth.shape), truth))


def warnings_of(options: dict[str, object] | None = None) -> CollapseWarnings:
    config = load_config(options={"hash.bits": 64, "hash.activation": "tanh", **(options or {})})
    return CollapseWarnings(config, prior=0.05, n_val=100)


HEALTHY = {
    "epoch": 3.0,
    "val_mAP": 0.4,
    "dead_bits": 0.0,
    "mean_abs_h": 0.6,
    "grad_norm": 0.1,
    "grad_norm_fusion": 0.05,
}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({}, None),
        ({"dead_bits": 17.0}, "17 of 64 bits"),
        ({"mean_abs_h": 0.99}, "saturated"),
        ({"grad_norm_fusion": 1e-7}, "no gradient reaches the fusion"),
        ({"val_mAP": 0.05}, "that of the class frequencies"),
        ({"val_mAP": 0.05, "epoch": 2.0}, None),
    ],
)
def test_a_collapse_is_said_once(record, said: str | None) -> None:
    warnings = warnings_of()
    lines = warnings.lines(HEALTHY | record)
    assert len(lines) == (said is not None)
    assert said is None or (said in lines[0] and "recommended" in lines[0])
    assert said is None or warnings.lines(HEALTHY | record | {"epoch": 4.0}) == []


def test_a_straight_through_code_may_be_saturated() -> None:
    assert warnings_of({"hash.activation": "ste"}).lines(HEALTHY | {"mean_abs_h": 0.999}) == []
    assert warnings_of({"hash.bits": 0}).lines(HEALTHY | {"grad_norm_fusion": 0.0}) == []
