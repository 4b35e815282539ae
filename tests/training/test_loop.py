"""The training loop against slow references: the schedule, accumulation, early stopping, reproducibility."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mmcli import InputError
from mmcli.heads.decompose import log_norms
from mmcli.heads.losses import total_loss
from mmcli.heads.model import Head
from mmcli.pipeline.core.checkpoint import CheckpointKeeper, best_checkpoint, load_head
from mmcli.pipeline.core.config import Config, SchedulerConfig, load_config
from mmcli.pipeline.core.progress import Progress
from mmcli.pipeline.training.data import Split, encode_split
from mmcli.pipeline.training.loop import FitResult, Hooks, fit
from mmcli.pipeline.training.state import TrainingState, read_state, write_state
from mmcli.pipeline.training.step import Step, learning_rate

CPU = torch.device("cpu")
D, C = 12, 5
# Digits are compared, and those of float32 on every machine.
SMALL = {
    "fusion.mlp_dims": [16, 8],
    "hash.bits": 8,
    "classifier.num_classes": C,
    "training.num_epochs": 3,
    "training.mixed_precision": False,
}


def make_split(n: int = 40, seed: int = 0) -> Split:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (n, C)).astype(np.uint8)
    v_img = (labels @ rng.normal(size=(C, D)) + 0.1 * rng.normal(size=(n, D))).astype(np.float32)
    v_txt = np.repeat(v_img[:, None], 5, axis=1) + rng.normal(size=(n, 5, D)).astype(np.float32)
    n_captions = rng.integers(1, 6, n)
    v_txt[np.arange(5) >= n_captions[:, None]] = np.nan  # a missing caption must never be drawn
    return Split.place(v_img, v_txt.astype(np.float32), n_captions, labels, CPU)


def make_head(config: Config, split: Split, seed: int = 42) -> Head:
    torch.manual_seed(seed)
    head = Head(config.fusion, config.hash, config.classifier, width=D)
    head.fit_log_norms(log_norms(split.v_img, split.v_txt[:, 0]))
    return head


def train(config: Config, split: Split, head: Head, *, resumed: TrainingState | None = None, **hooks) -> FitResult:
    hooks = {"monitor": lambda head: {"val_mAP": 0.5}, "on_epoch": lambda head, record: None} | hooks
    with Progress().task("", 1) as task:
        return fit(head, split, config, Hooks(**hooks), task=task, resumed=resumed)


def run(config: Config, *, split: Split | None = None, **options) -> tuple[Head, FitResult]:
    split = split or make_split()
    head = make_head(config, split, config.hardware.seed)
    return head, train(config, split, head, **options)


@given(
    steps=st.integers(1, 50),
    epochs=st.integers(1, 40),
    warmup=st.floats(0, 5),
    peak=st.floats(1e-5, 1.0),
)
def test_schedule_rises_to_the_peak_then_falls_to_the_floor(
    steps: int, epochs: int, warmup: float, peak: float
) -> None:
    schedule = SchedulerConfig(warmup_epochs=warmup, min_lr=1e-6)
    rates = [
        learning_rate(s, steps_per_epoch=steps, epochs=epochs, peak=peak, schedule=schedule)
        for s in range(steps * epochs)
    ]
    rise = min(round(warmup * steps), len(rates))
    assert all(a <= b for a, b in pairwise(rates[:rise]))
    assert all(a >= b - 1e-15 for a, b in pairwise(rates[rise:]))
    assert max(rates) <= peak * (1 + 1e-12)
    assert min(rates) > 0
    if 0 < rise < len(rates):
        assert rates[rise - 1] == pytest.approx(peak)
    after = learning_rate(steps * epochs, steps_per_epoch=steps, epochs=epochs, peak=peak, schedule=schedule)
    if rise < steps * epochs:
        assert after == pytest.approx(1e-6)


def test_spec10_10_and_12_warmup_is_per_step() -> None:
    """Stepped per epoch with per-step counts, the rate would stay below 1% of its peak."""
    schedule = SchedulerConfig(warmup_epochs=2.0)
    rates = [learning_rate(s, steps_per_epoch=100, epochs=30, peak=3e-4, schedule=schedule) for s in range(3000)]
    assert rates[0] == pytest.approx(3e-4 / 200)
    assert rates[199] == pytest.approx(3e-4)
    assert len(set(rates[:200])) == 200
    middle = 1e-6 + 0.5 * (3e-4 - 1e-6) * (1 + math.cos(math.pi * 0.5))
    assert rates[200 + 1400] == pytest.approx(middle)


def test_accumulation_equals_the_large_batch() -> None:
    """Two batches of 20, accumulated, make the step of one batch of 40 when no batch statistic is involved."""
    plain = {
        **SMALL,
        "hash.batch_norm": False,
        "loss.hash_weight": 0.0,
        "fusion.dropout": 0.0,
        "fusion.input_dropout": 0.0,
        "training.mixup": False,
        "training.num_epochs": 1,
    }
    large = load_config(options={**plain, "training.batch_size": 40})
    small = load_config(options={**plain, "training.batch_size": 20, "training.accumulation_steps": 2})
    heads = [run(config)[0] for config in (large, small)]
    for a, b in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_an_epoch_sees_every_image_and_only_real_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    original = Split.batch

    def spy(self, rows, caption):
        if isinstance(caption, torch.Tensor):
            seen.extend(zip(rows.tolist(), caption.tolist(), strict=True))
        return original(self, rows, caption)

    monkeypatch.setattr(Split, "batch", spy)
    split = make_split(33)
    config = load_config(options={**SMALL, "training.batch_size": 16})
    run(config, split=split)
    assert sorted(row for row, _ in seen) == sorted(list(range(33)) * 3)
    assert all(caption < split.n_captions[row] for row, caption in seen)
    assert len({caption for _, caption in seen}) == 5


def test_loss_falls_and_the_record_is_whole() -> None:
    config = load_config(
        options={
            **SMALL,
            "training.num_epochs": 30,
            "training.batch_size": 10,
            "training.early_stopping_patience": 0,
            "loss.hash_weight": 0.1,
            "loss.nested_weight": 0.5,
            "optimizer.lr_fusion": 3e-3,
        }
    )
    _, result = run(config)
    first, last = result.history[0], result.history[-1]
    assert last["bce"] < 0.85 * first["bce"]
    wanted = {
        "epoch",
        "loss",
        "bce",
        "cosine",
        "hash",
        "quant",
        "balance",
        "decorr",
        "fused",
        "nested",
        "lr",
        "grad_norm",
        "grad_norm_fusion",
        "val_mAP",
        "train_s",
        "epoch_s",
    }
    assert wanted <= set(first)
    total = first["bce"] + config.loss.cosine_weight * first["cosine"] + 0.1 * first["hash"]
    total += first["fused"] + 0.5 * first["nested"]
    assert first["loss"] == pytest.approx(total, rel=1e-4)


@pytest.fixture
def patient_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience counts from the first step on."""
    monkeypatch.setattr("mmcli.pipeline.training.loop.PATIENT_STEPS", 0)


@pytest.mark.parametrize(("steps", "epochs"), [(0, 4), (3, 4), (5, 7), (1000, 9)])
def test_patience_counts_from_a_number_of_steps_on(monkeypatch, steps: int, epochs: int) -> None:
    """One step an epoch, the best epoch is the second, patience 2."""
    monkeypatch.setattr("mmcli.pipeline.training.loop.PATIENT_STEPS", steps)
    values = iter([0.1, 0.5, *[0.4] * 9])
    options = {"training.num_epochs": 9, "training.early_stopping_patience": 2}
    monitor = lambda _: {"val_mAP": next(values)}  # noqa: E731
    _, result = run(load_config(options={**SMALL, **options, "training.batch_size": 64}), monitor=monitor)
    assert len(result.history) == max(epochs, 2 + steps if steps < 9 else 9)


@pytest.mark.usefixtures("patient_at_once")
def test_early_stopping_waits_for_patience_and_keeps_the_best(tmp_path: Path) -> None:
    values = iter([0.1, 0.5, 0.4, 0.5, 0.3, 0.2, 0.9])
    config = load_config(
        options={**SMALL, "training.num_epochs": 7, "training.early_stopping_patience": 3, "training.save_top_k": 2}
    )
    keeper = CheckpointKeeper(tmp_path, config, width=D)
    _, result = run(
        config,
        monitor=lambda head: {"val_mAP": next(values)},
        on_epoch=lambda head, row: keeper.offer(head, epoch=int(row["epoch"]), val_mAP=row["val_mAP"]),
    )
    assert (len(result.history), result.best_epoch, result.best_value, result.stopped_early) == (5, 2, 0.5, True)
    assert keeper.best.name == "epoch-002.safetensors"
    keeper.sweep()
    assert {path.name for path in tmp_path.iterdir()} == {
        "epoch-002.safetensors",
        "epoch-004.safetensors",
        "checkpoints.json",
    }


def test_same_seed_same_weights() -> None:
    config = load_config(options=SMALL)
    heads = [run(config)[0] for _ in range(2)]
    other, _ = run(load_config(options={**SMALL, "hardware.seed": 43}))
    pairs = zip(heads[0].state_dict().values(), heads[1].state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(torch.equal(a, b) for a, b in zip(heads[0].parameters(), other.parameters(), strict=True))


def test_a_checkpoint_reads_back_the_same_head(tmp_path: Path) -> None:
    config = load_config(options=SMALL)
    split = make_split()
    head, _ = run(config, split=split)
    (tmp_path / "checkpoints").mkdir()
    keeper = CheckpointKeeper(tmp_path / "checkpoints", config, width=D)
    keeper.offer(head, epoch=1, val_mAP=0.5)
    again = load_head(best_checkpoint(tmp_path), CPU)
    for a, b in zip(encode_split(head, split), encode_split(again, split, batch_size=7), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_damaged_checkpoint_is_one_line(tmp_path: Path) -> None:
    config = load_config(options=SMALL)
    keeper = CheckpointKeeper(tmp_path / "checkpoints", config, width=D)
    with pytest.raises(InputError, match=r"no checkpoint: .*no such file"):
        best_checkpoint(tmp_path)
    keeper.offer(make_head(config, make_split()), epoch=1, val_mAP=0.5)
    path = best_checkpoint(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    for bad in (path, tmp_path / "absent.safetensors"):
        with pytest.raises(InputError, match=r"checkpoint.*mmcli train-head"):
            load_head(bad, CPU)


def test_a_loss_that_diverges_is_said() -> None:
    split = make_split()
    split.v_img[3] = math.nan
    with pytest.raises(InputError, match=r"no longer finite.*epoch 1"):
        run(load_config(options={**SMALL, "hash.batch_norm": False}), split=split)


def test_gradients_are_clipped_at_the_norm_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW does not feel a gradient's length but for its epsilon, so what it is given is looked at."""
    seen: list[float] = []
    original = torch.optim.AdamW.step

    def spy(self):
        gradients = [one.grad for group in self.param_groups for one in group["params"]]
        seen.append(float(torch.cat([one.flatten() for one in gradients]).norm()))
        return original(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    norms = {}
    for limit in (None, 1e6, 0.05):
        seen.clear()
        options = {**SMALL, "training.num_epochs": 1, "training.gradient_clip_norm": limit}
        _, result = run(load_config(options=options))
        norms[limit] = list(seen)
        assert result.history[0]["grad_norm"] == pytest.approx(norms[None][0], rel=1e-4)
    assert norms[None] == norms[1e6]
    assert norms[None][0] > 0.05
    assert norms[0.05] == pytest.approx([0.05], rel=1e-3)


def test_codes_and_val_figures_come_from_eval_mode() -> None:
    """With dropout on, or batch statistics of the batch, a code would depend on chance and on its neighbours."""
    config = load_config(options={**SMALL, "fusion.dropout": 0.5})
    split = make_split()
    head, _ = run(config, split=split)
    head.train()
    first = encode_split(head, split)
    head.train()
    second = encode_split(head, split, batch_size=7)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    v_img, v_txt, _ = split.batch(torch.arange(len(split)), 0)
    torch.testing.assert_close(first[0], head(v_img, v_txt).h, rtol=1e-5, atol=1e-6)


def test_every_part_of_the_head_takes_its_own_learning_rate() -> None:
    """With a rate of next to nothing a part stays where it was."""
    frozen = {"fusion": "optimizer.lr_fusion", "hash": "optimizer.lr_hash", "classifier": "optimizer.lr_classifier"}
    for part, key in frozen.items():
        config = load_config(options={**SMALL, key: 1e-12, "optimizer.weight_decay": 0.0, "scheduler.min_lr": 0.0})
        split = make_split()
        before = {name: value.clone() for name, value in make_head(config, split).named_parameters()}
        head, _ = run(config, split=split)
        for name, value in head.named_parameters():
            moved = float((value - before[name]).detach().abs().max())
            module = name.partition(".")[0]
            own = "classifier" in module if part == "classifier" else module == part
            assert (moved < 1e-8) == own, (part, name, moved)


def test_class_balanced_weights_come_from_train_counts() -> None:
    """Rare classes weigh more, so the loss of the same head is another one."""
    split = make_split()
    split.labels[:, 0] = 0
    split.labels[0, 0] = 1
    plain, balanced = (
        run(load_config(options={**SMALL, "training.num_epochs": 1, "loss.class_weights": name}), split=split)[
            1
        ].history[0]["bce"]
        for name in ("none", "balanced")
    )
    assert abs(plain - balanced) > 1e-3


def test_the_draws_of_epochs_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[list[int]] = []
    original = Split.batch

    def spy(self, rows, caption):
        orders.append(rows.tolist())
        return original(self, rows, caption)

    monkeypatch.setattr(Split, "batch", spy)
    run(load_config(options={**SMALL, "training.batch_size": 40}))
    assert len(orders) == 3
    assert orders[0] != orders[1] != orders[2]


def assert_same_head(one: Head, other: Head) -> None:
    """Equal but for rounding."""
    for (name, value), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, theirs, rtol=1e-3, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}")


def plain_training(config: Config, split: Split, seed: int) -> tuple[Head, list[float]]:
    """What a first script does, with the same draws: one image at a time, plain AdamW, the schedule as a lambda."""
    head = make_head(config, split, seed)
    n, size, epochs = len(split), config.training.batch_size, config.training.num_epochs
    n_batches = math.ceil(n / size)
    rates = {"fusion": config.optimizer.lr_fusion, "hash": config.optimizer.lr_hash}
    rates["classifier"] = config.optimizer.lr_classifier
    groups = [{"params": head.parameter_groups()[name], "lr": rate} for name, rate in rates.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.optimizer.weight_decay, fused=False, foreach=False)
    warmup, total = round(config.scheduler.warmup_epochs * n_batches), epochs * n_batches
    means = []
    for epoch in range(1, epochs + 1):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        torch.manual_seed(seed * 1_000_003 + epoch)
        order, draws = torch.randperm(n, generator=generator), torch.rand(n, generator=generator)
        losses = []
        head.train()
        for batch in np.array_split(order.numpy(), n_batches):
            images, texts, labels = [], [], []
            for row in batch:
                caption = int(draws[row] * split.n_captions[row])
                images.append(split.v_img[row])
                texts.append(split.v_txt[row, caption])
                labels.append(split.labels[row].float())
            if config.training.mixup:
                parts, share = (images, texts, labels), [batch[k - 2] / n for k in range(len(batch))]
                images, texts, labels = (
                    [s * one + (1 - s) * part[k - 1] for k, (s, one) in enumerate(zip(share, part, strict=True))]
                    for part in parts
                )
            step = (epoch - 1) * n_batches + len(losses)
            for group, rate in zip(optimizer.param_groups, rates.values(), strict=True):
                done = (step - warmup) / (total - warmup)
                falling = 1e-6 + (rate - 1e-6) * (1 + math.cos(math.pi * done)) / 2
                group["lr"] = rate * (step + 1) / warmup if step < warmup else falling
            loss = total_loss(config.loss, head(torch.stack(images), torch.stack(texts)), torch.stack(labels)).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), config.training.gradient_clip_norm)
            optimizer.step()
            losses.append(float(loss.detach()))
        means.append(sum(losses) / len(losses))
    return head, means


@pytest.mark.parametrize("preset", ["plan", "recommended"])
def test_step_for_step_a_plain_loop(preset: str) -> None:
    config = load_config(options={**SMALL, "preset": preset, "training.batch_size": 16, "training.num_epochs": 4})
    split = make_split(45)
    head, result = run(config, split=split)
    plain, losses = plain_training(config, split, config.hardware.seed)
    assert [record["loss"] for record in result.history] == pytest.approx(losses, rel=1e-4)
    assert_same_head(head, plain)


def test_the_average_of_the_weights_is_that_of_a_slow_loop() -> None:
    """What is looked at and kept are the averaged weights; training goes on with its own."""
    config = load_config(
        options={**SMALL, "training.batch_size": 16, "training.ema_decay": 0.8, "training.num_epochs": 4}
    )
    split = make_split(45)
    trail: list[dict[str, torch.Tensor]] = []
    seen: list[dict[str, torch.Tensor]] = []
    original = torch.optim.AdamW.step
    head = make_head(config, split)
    monitor = lambda head: (seen.append({k: v.clone() for k, v in head.state_dict().items()}), {"val_mAP": 0.5})[1]  # noqa: E731

    def spy(self):
        done = original(self)
        trail.append({name: value.detach().clone() for name, value in head.state_dict().items()})
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        train(config, split, head, monitor=monitor)
    average = trail[0]
    for taken, weights in enumerate(trail[1:], start=1):
        decay = min(0.8, (1 + taken) / (10 + taken))
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}
    floats = [name for name in average if trail[0][name].is_floating_point()]
    for name in floats:
        torch.testing.assert_close(seen[-1][name], average[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("options", [{}, {"training.ema_decay": 0.9}, {"fusion.dropout": 0.3, "hash.bits": 0}])
def test_a_training_that_is_resumed_ends_with_the_same_bits(tmp_path: Path, options) -> None:
    config = load_config(options={**SMALL, "training.num_epochs": 6, "training.batch_size": 16, **options})
    split, path = make_split(45), tmp_path / "state.safetensors"
    keep = {"keep": lambda state: write_state(path, state), "keep_every_s": 0.0}

    def stop(head: Head, record: dict[str, float]) -> None:
        if record["epoch"] == 4:
            raise KeyboardInterrupt

    whole, wanted = run(config, split=split, **keep)
    with pytest.raises(KeyboardInterrupt):
        run(config, split=split, on_epoch=stop, **keep)
    state = read_state(path)
    assert state.epoch == 3
    torch.rand(7)  # whatever else draws numbers
    rest, got = run(config, split=split, resumed=state)
    assert without_times(got) == without_times(wanted)
    assert all(map(torch.equal, whole.state_dict().values(), rest.state_dict().values()))


def without_times(result: FitResult) -> list[dict[str, float]]:
    return [{key: value for key, value in record.items() if key[-2:] != "_s"} for record in result.history]


def test_the_state_of_another_head_is_refused(tmp_path: Path) -> None:
    split, states = make_split(), []
    run(load_config(options=SMALL), split=split, keep=states.append, keep_every_s=0.0)
    other = load_config(options={**SMALL, "hash.bits": 16})
    with pytest.raises(InputError, match="state of another head"):
        run(other, split=split, resumed=states[0])
    with pytest.raises(InputError, match="bfloat16"):
        run(load_config(options=SMALL), split=split, resumed=replace(states[0], precision="bfloat16"))
    write_state(tmp_path / "a", states[0])
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:200])
    with pytest.raises(InputError, match="damaged training state"):
        read_state(tmp_path / "a")
    assert read_state(tmp_path / "absent") is None


def test_mixed_precision_trains_nearly_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmcli.pipeline.core.device.has_amx", lambda: True)
    losses = {}
    for mixed in (True, False):
        head, result = run(load_config(options={**SMALL, "training.mixed_precision": mixed}))
        losses[mixed] = [record["loss"] for record in result.history]
        assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


def test_mixtures_are_trained_on_where_asked_for() -> None:
    options = {**SMALL, "training.early_stopping_patience": 0}
    losses = [run(load_config(options={**options, "training.mixup": mixup}))[-1] for mixup in (True, True, False)]
    first, again, plain = ([record["loss"] for record in result.history] for result in losses)
    assert first == again != plain


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preset": "plan"},
        {
            "training.accumulation_steps": 2,
            "training.ema_decay": 0.9,
            "loss.focal_loss": True,
            "loss.class_weights": "balanced",
            "hash.bits": 16,
            "hash.nested": [8],
            "hash.beta": 5.0,
        },
    ],
)
def test_a_step_fetches_nothing_from_the_device(options) -> None:
    """A number asked for in the middle of a step would stop a GPU, and cannot be captured into a graph."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function)
            # A fused update on a CPU reads its learning rate, a scalar, where one on a GPU gets a pointer.
            assert "_local_scalar_dense" not in name or updating, name
            assert "nonzero" not in name, name
            return function(*args, **(kwargs or {}))

    updating = False
    original = torch.optim.AdamW.step

    def update(self: torch.optim.AdamW) -> None:
        nonlocal updating
        updating = True
        original(self)
        updating = False

    config = load_config(options={**SMALL, "training.batch_size": 16, **options})
    split = make_split(45)
    head = make_head(config, split).train()
    step = Step(head, split, config, steps=3)
    step.begin(1, torch.arange(45), torch.zeros(45, dtype=torch.int64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", update)
        for _ in range(3):
            with Watch():
                step._body((8, 7))


def test_checkpoints_wait_for_a_state_before_they_go(tmp_path: Path) -> None:
    config = load_config(options={**SMALL, "training.save_top_k": 1})
    head = make_head(config, make_split())
    keeper = CheckpointKeeper(tmp_path, config, width=D)
    for epoch, value in ((3, 0.5), (6, 0.6), (7, 0.1)):
        keeper.offer(head, epoch=epoch, val_mAP=value)
    again = CheckpointKeeper(tmp_path, config, width=D)
    again.resume(5)
    assert [one.epoch for one in again.kept] == [3]
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["epoch-003.safetensors"]
    again.offer(head, epoch=6, val_mAP=0.55)
    again.sweep()
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["epoch-006.safetensors"]
    (tmp_path / "epoch-008.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="damaged checkpoint"):
        again.resume(9)


def test_the_norm_of_the_fusions_gradient_is_its_own() -> None:
    """One batch an epoch: the norms of a plain backward."""
    config = load_config(options={**SMALL, "preset": "plan", "training.batch_size": 45, "training.num_epochs": 1})
    split = make_split(45)
    _, result = run(config, split=split)
    head = make_head(config, split)
    generator = torch.Generator().manual_seed(42 * 1_000_003 + 1)
    torch.manual_seed(42 * 1_000_003 + 1)
    order = torch.randperm(45, generator=generator)
    caption = (torch.rand(45, generator=generator) * split.n_captions).long()[order]
    v_img, v_txt, y = split.batch(order, caption)
    total_loss(config.loss, head.train()(v_img, v_txt), y).loss.backward()
    norms = [torch.cat([p.grad.flatten() for p in part.parameters()]).norm() for part in (head, head.fusion)]
    record = result.history[0]
    assert [record["grad_norm"], record["grad_norm_fusion"]] == pytest.approx([float(n) for n in norms], rel=1e-4)


def test_a_training_resumed_within_an_epoch_is_the_same(tmp_path: Path) -> None:
    """A state is kept after every batch; whichever it is resumed from, it ends with the same head and records."""
    config = load_config(options={**SMALL, "training.batch_size": 10, "fusion.input_dropout": 0.2})
    split, states = make_split(45), []
    whole, result = run(config, split=split, keep=states.append, keep_within_s=0.0)
    assert [(state.epoch, state.batches) for state in states[:5]] == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5)]
    for state in states[:: len(states) // 4]:
        write_state(tmp_path / "state", state)
        torch.manual_seed(0)  # whatever else draws numbers
        again, resumed = run(config, split=split, resumed=read_state(tmp_path / "state"))
        assert all(map(torch.equal, again.state_dict().values(), whole.state_dict().values()))
        assert without_times(resumed) == without_times(result)
