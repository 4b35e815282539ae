"""Batches, steps and what ends a training: against a plain loop, at every small size, and where numbers run away."""

import math

import numpy as np
import pytest
import torch

from mmcli import InputError
from mmcli.heads.decompose import log_norms
from mmcli.heads.label_losses import bce_loss
from mmcli.heads.model import Head
from mmcli.pipeline.core.config import Config, load_config
from mmcli.pipeline.core.progress import Progress
from mmcli.pipeline.training.data import Split, encode_split
from mmcli.pipeline.training.loop import FitResult, Hooks, fit
from mmcli.pipeline.training.step import count_batches, learning_rate

CPU = torch.device("cpu")
D, C = 12, 5
SMALL = {
    "fusion.mlp_dims": [16, 8],
    "hash.bits": 8,
    "classifier.num_classes": C,
    "training.num_epochs": 2,
    "training.early_stopping_patience": 0,
    "training.mixed_precision": False,
}
TINY = ("--set", "fusion.mlp_dims=[64, 32]", "--set", "knn.K=5", "--device", "cpu")


def make_split(n: int, *, images: int = 0, captions: int = 0) -> Split:
    """Labels are the same whatever the seeds of images and captions."""
    labels = np.random.default_rng(0).integers(0, 2, (n, C)).astype(np.uint8)
    v_img = np.random.default_rng(images).normal(size=(n, D)).astype(np.float32)
    v_txt = np.random.default_rng(100 + captions).normal(size=(n, 5, D)).astype(np.float32)
    return Split.place(v_img, v_txt, np.full(n, 5), labels, CPU)


def make_head(config: Config, split: Split) -> Head:
    torch.manual_seed(0)
    head = Head(config.fusion, config.hash, config.classifier, width=D)
    head.fit_log_norms(log_norms(split.v_img, split.v_txt[:, 0]))
    return head


def train(config: Config, split: Split) -> tuple[Head, FitResult]:
    head = make_head(config, split)
    hooks = Hooks(monitor=lambda _: {"val_mAP": 0.5}, on_epoch=lambda *_: None)
    with Progress().task("", 1) as task:
        return head, fit(head, split, config, hooks, task=task)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows and captions of every batch that the trainer gathers, in order."""
    seen = []
    original = Split.batch

    def spy(self, rows, caption):
        seen.append((rows, caption))
        return original(self, rows, caption)

    monkeypatch.setattr(Split, "batch", spy)
    return seen


def test_accumulated_steps_are_those_of_a_plain_loop(batches) -> None:
    """Three batches, two a step: the last one makes a step alone, and counts as much as a pair."""
    config = load_config(
        options={
            **SMALL,
            "preset": "plan",
            "optimizer.lr_classifier": 3e-3,
            "training.batch_size": 14,
            "training.accumulation_steps": 2,
            "training.gradient_clip_norm": 0.05,
            "hash.batch_norm": False,
            "fusion.dropout": 0.0,
            "loss.cosine_weight": 0.0,
            "loss.hash_weight": 0.0,
        }
    )
    split = make_split(42)
    head, result = train(config, split)
    assert len(batches) == 2 * 3
    plain = make_head(config, split)
    rates = {"fusion": 3e-4, "hash": 3e-4, "classifier": 3e-3}
    groups = [{"params": list(part.parameters())} for part in (plain.fusion, plain.hash, plain.classifier)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.01)
    norms = []
    for step, group in enumerate([batches[0:2], batches[2:3], batches[3:5], batches[5:6]]):
        for one, peak in zip(optimizer.param_groups, rates.values(), strict=True):
            one["lr"] = learning_rate(step, steps_per_epoch=2, epochs=2, peak=peak, schedule=config.scheduler)
        losses = []
        for rows, caption in group:
            logits = plain(split.v_img[rows], split.v_txt[rows, caption]).logits
            losses.append(bce_loss(logits, split.labels[rows]))
        optimizer.zero_grad()
        (sum(losses) / len(group)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)))
        optimizer.step()
    assert min(norms) > 0.05
    for (name, ours), wanted in zip(head.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-7, msg=name)
    assert result.history[1]["grad_norm"] == pytest.approx((norms[2] + norms[3]) / 2, rel=1e-4)


def test_the_schedule_may_be_longer_than_the_training() -> None:
    schedule = {"scheduler.total_epochs": 10, "scheduler.warmup_epochs": 0.5}
    config = load_config(options={**SMALL, **schedule, "preset": "plan"})
    _, result = train(config, make_split(128))
    for row in result.history:
        last = {"step": int(2 * row["epoch"]) - 1, "steps_per_epoch": 2, "peak": 3e-4, "schedule": config.scheduler}
        assert row["lr"] == pytest.approx(learning_rate(epochs=10, **last), rel=1e-9)
    assert row["lr"] > 2 * learning_rate(epochs=2, **last)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("n", range(1, 14))
def test_every_small_size_trains_or_is_refused_in_one_line(batches, n: int, batch_norm: bool) -> None:
    for batch_size in (1, 2, 3, 4, 5, 13, 64):
        batches.clear()
        config = load_config(
            options={
                **SMALL,
                "training.batch_size": batch_size,
                "hash.batch_norm": batch_norm,
                "training.num_epochs": 1,
                "training.accumulation_steps": 2,
            }
        )
        split = make_split(n)
        if n == 1 and batch_norm:
            with pytest.raises(InputError, match="too few train images: got 1, wanted at least 2"):
                train(config, split)
            continue
        _, result = train(config, split)
        assert math.isfinite(result.history[0]["loss"])
        sizes = [len(rows) for rows, _ in batches]
        assert sorted(int(row) for rows, _ in batches for row in rows) == list(range(n))
        if batch_norm:
            assert min(sizes) >= 2
            assert max(sizes) <= max(2, batch_size) + 1
        else:
            assert len(sizes) == math.ceil(n / batch_size)
            assert max(sizes) <= batch_size


def test_large_sizes_are_left_as_they_are() -> None:
    config = load_config(options=SMALL)
    head = make_head(config, make_split(4))
    assert count_batches(head, 113_287, 64) == 1771
    assert count_batches(head, 113_287, 10**400) == 1
    with pytest.raises(InputError, match="got 0"):
        count_batches(torch.nn.Linear(1, 1), 0, 64)


@pytest.mark.parametrize("inputs", ["image", "text", "both"])
@pytest.mark.parametrize("fusion", ["concat", "hadamard_magnitude"])
def test_an_arm_of_one_modality_does_not_depend_on_the_other(inputs: str, fusion: str) -> None:
    """With an adapter the cosine term would train the image side with captions: exact equality, bit for bit."""
    config = load_config(
        options={
            **SMALL,
            "fusion.inputs": inputs,
            "fusion.type": fusion,
            "fusion.adapter": "linear",
            "loss.cosine_weight": 2.0,
            "optimizer.lr_fusion": 1e-2,
        }
    )
    other = {"image": {"captions": 1}, "text": {"images": 1}, "both": {"captions": 1}}[inputs]
    splits = [make_split(40), make_split(40, **other)]
    heads, results = zip(*[train(config, split) for split in splits], strict=True)
    codes = [encode_split(head, split) for head, split in zip(heads, splits, strict=True)]
    same = all(torch.equal(a, b) for a, b in zip(*codes, strict=True))
    assert same == (inputs != "both")
    assert results[0].history[1]["cosine"] != results[1].history[1]["cosine"]  # logged, and of both modalities
    adapters = [head.fusion.adapter_txt if inputs == "text" else head.fusion.adapter_img for head in heads]
    assert all(float(adapter.linear.weight.detach().abs().max()) > 0 for adapter in adapters)


def test_what_alpha_cannot_do_is_said(mmcli, here) -> None:
    for words, said in (
        (("--inputs", "image", "--alpha", 1), "with --inputs image the cosine term"),
        (("--inputs", "text", "--adapter", "linear"), "with --inputs text the cosine term"),
        (("--batch-size", 1), "batch normalisation needs two images a batch"),
        (("--inputs", "image", "--alpha", 0, "--batch-size", 2), None),
        (("--batch-size", 1, "--set", "hash.batch_norm=false", "--alpha", 0), None),
    ):
        code, _, err = mmcli("train-head", *TINY, "--epochs", 1, *words)
        assert code == 0, err
        assert err.count("note:") == (said is not None), err
        assert said is None or said in err


@pytest.mark.parametrize("monitor", ["knn", "classifier"])
@pytest.mark.parametrize("bits", [0, 32])
@pytest.mark.parametrize(
    "words",
    [
        # The loss is a number, the norm of its gradient is not.
        ("loss.bce_weight=1e30", "training.gradient_clip_norm=null"),
        ("loss.bce_weight=1e300",),
        (
            "fusion.mlp_dims=[64,64,64,64,64,64,32]",
            *(f"optimizer.lr_{part}=1e6" for part in ("fusion", "hash", "classifier")),
        ),
    ],
)
def test_a_training_that_runs_away_ends_in_one_line(
    mmcli, here, monitor: str, bits: int, words: tuple[str, ...]
) -> None:
    """Also when only the last step of an epoch shows it, here the only one."""
    settings = [word for setting in ("scheduler.warmup_epochs=0", *words) for word in ("--set", setting)]
    code, out, err = mmcli(
        "train-head", *TINY, *settings, "--bits", bits, "--monitor", monitor, "--epochs", 1, "--quiet", "--json"
    )
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "lower the learning rates" in err


def test_parameters_that_are_no_numbers_end_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is measured before the step that spoils them."""
    original = torch.optim.AdamW.step

    def spoil(self, *words):
        original(self, *words)
        self.param_groups[-1]["params"][0].data[0, 0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(InputError, match=r"the head is no longer finite: epoch 1: .*lower the learning rates"):
        train(load_config(options=SMALL), make_split(8))


def test_outputs_that_are_no_numbers_are_refused() -> None:
    split = make_split(8)
    head, _ = train(load_config(options=SMALL), split)
    head.classifier.bias.data[:] = math.nan
    with pytest.raises(InputError, match="the head gives no numbers"):
        encode_split(head, split)
