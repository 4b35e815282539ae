"""``mmcli bench train``: training steps a second, beside the plain loop and beside the products alone.

Symbols: N images of train, D embedding width, C classes.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import Config
from ..core.progress import Progress
from ..training.data import Split
from ..training.monitor import Monitor
from ..training.replicas import Replicas
from ..training.step import Step, count_batches
from ..training.training_data import Prepared, prepare_training
from .data import make_full_store
from .harness import BenchResult, Case, best_of, plainly
from .loading import import_torch_seconds, time_loading, time_to_first_step
from .plain import plain_steps

PLAIN_WORKERS = 4
PLAIN_BATCH, LARGE_BATCH = 64, 1024
# Most loops a second at batch 64 take as long as a sixteenth as many at batch 1,024.
LARGE_SHARE = 16


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """What all ways have in common."""

    prepared: Prepared
    steps: int

    @property
    def train(self) -> Split:
        return self.prepared.splits["train"]

    @property
    def config(self) -> Config:
        return self.prepared.config

    @property
    def device(self) -> torch.device:
        return self.prepared.device


def bench_train(
    config: Config, *, store: Path | None, n_train: int | None, steps: int, repeats: int, replicas: int,
    progress: Progress | None = None,
) -> BenchResult:  # fmt: skip
    """Time training in several ways in one run.

    Args:
        config: Head, loss, optimiser and hardware sections are used; batches are of 64 and of 1,024.
        store: A store; one of COCO's full size with made embeddings when not given.
        n_train: Train images of the made store; COCO's 113,287 when not given.
        steps: Steps of a round at batch 64.
        repeats: Rounds; the best of each way counts.
        replicas: Heads of the case in which several train in one pass.
        progress: Who to tell.

    Returns:
        A case for each size of batch, replicas in one pass against one after another, loading against plain reading;
        as facts what validation costs of an epoch, and seconds from process start to the first step.

    Raises:
        InputError: As of :func:`~mmcli.pipeline.training.train_head.train_head`.
    """
    progress = progress or Progress()
    with tempfile.TemporaryDirectory() as scratch:
        if store is None:
            progress.say("making a store of COCO's size")
            sizes = {} if n_train is None else {"n_train": n_train}
            store = make_full_store(Path(scratch) / "store", **sizes)
        loading = time_loading(store, repeats)
        prepared = prepare_training(config, store, progress)
        setting = _Setting(prepared=prepared, steps=steps)
        progress.say(f"timing {steps} steps of batch {PLAIN_BATCH}, {repeats} rounds of every way")
        cases = [_steps(setting, PLAIN_BATCH, steps, repeats)]
        cases += [_steps(setting, LARGE_BATCH, max(2, steps // LARGE_SHARE), repeats)]
        cases += [_replicas(setting, replicas, repeats), loading.case()]
        facts = _facts(setting, cases[0]) | {
            "import_torch_s": import_torch_seconds(), "first_step_s": time_to_first_step(store, config)
        }  # fmt: skip
    lines = (
        f"an epoch of {facts['n_train']:,} images at batch {PLAIN_BATCH}: {facts['epoch_s']:.2f} s, and validation"
        f" {facts['validation_s']:.2f} s ({100 * facts['validation_share']:.0f} %)",
        f"30 epochs with validation: {30 * (facts['epoch_s'] + facts['validation_s']):.0f} s",
        f"from process start to the first step: {facts['first_step_s']:.2f} s, {facts['import_torch_s']:.2f} s of it"
        " importing torch",
    )
    title = f"training at {config.hash.bits} bits on {setting.device.type} ({facts['precision']})"
    return BenchResult(title=title, cases=tuple(cases), facts=facts, lines=lines)


def _steps(setting: _Setting, batch: int, steps: int, repeats: int) -> Case:
    ours, head = _ours(setting, batch, 1), _head(setting).train()
    plain = plain_steps(head, setting.train, setting.config, batch, workers=PLAIN_WORKERS)
    ways: dict[str, Callable[[], None]] = {
        "plain": plainly(partial(_take, plain, steps, setting.device)),
        "ours": partial(_take, ours, steps, setting.device),
        "ceiling": partial(_take, _products(setting, batch), steps, setting.device),
    }  # fmt: skip
    for way in ways.values():
        way()  # workers start, buffers are made, graphs are captured
    seconds = best_of(ways, repeats=repeats)
    rates = {name: steps * batch / value for name, value in seconds.items()}
    note = f"plain: Dataset, DataLoader with {PLAIN_WORKERS} workers, eager float32; ceiling: products and update alone"
    return Case(name=f"training, batch {batch:,}", unit="images", note=note, **rates)


def _replicas(setting: _Setting, n: int, repeats: int) -> Case:
    steps = max(2, setting.steps // n)
    one, together = _ours(setting, PLAIN_BATCH, 1), _ours(setting, PLAIN_BATCH, n)
    ways = {
        "plain": partial(_take, one, n * steps, setting.device),
        "ours": partial(_take, together, steps, setting.device),
    }
    for way in ways.values():
        way()
    rates = {name: n * steps * PLAIN_BATCH / value for name, value in best_of(ways, repeats=repeats).items()}
    return Case(
        name=f"{n} replicas in one pass", unit="images", note="plain: one after another, as fast as we can", **rates
    )


def _take(step: Iterator[None], n: int, device: torch.device) -> None:
    for _ in itertools.islice(step, n):
        pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _head(setting: _Setting) -> Any:  # noqa: ANN401
    return setting.prepared.make_head(setting.config, setting.train)


def _ours(setting: _Setting, batch: int, replicas: int) -> Iterator[None]:
    """Steps of our loop, epoch after epoch."""
    members = Replicas([_head(setting) for _ in range(replicas)], stacked=replicas > 1)
    n = len(setting.train)
    batches = count_batches(members.heads[0], n, batch)
    step = Step(members, setting.train, setting.config, steps=batches)
    members.train()
    shape = (replicas, n) if replicas > 1 else (n,)
    for epoch in itertools.count(1):
        order = torch.randperm(n).to(setting.device).expand(shape)
        caption = (torch.rand(n).to(setting.device) * setting.train.captions_of).long().expand(shape)
        step.begin(epoch, order, caption)
        for part in torch.tensor_split(torch.empty(n), batches):
            step.run((len(part),))
            yield


def _products(setting: _Setting, batch: int) -> Iterator[None]:
    """The matrix products of a step, in its precision, and the update of its parameters, on what is there already."""
    head = _head(setting)
    layers = [module for module in head.modules() if isinstance(module, nn.Linear)]
    placed: dict[str, Any] = {"device": setting.device, "dtype": getattr(torch, _precision(setting))}
    inputs = [torch.randn(batch, layer.in_features, **placed) for layer in layers]
    slopes = [torch.randn(batch, layer.out_features, **placed) for layer in layers]
    for parameter in head.parameters():
        parameter.grad = torch.zeros_like(parameter)
    fused = setting.device.type in {"cpu", "cuda"}
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-6, fused=fused)
    products = [_product(*three, first=at == 0) for at, three in enumerate(zip(layers, inputs, slopes, strict=True))]
    while True:
        with torch.no_grad():
            for product in products:
                product()
        optimizer.step()
        yield


def _product(layer: nn.Linear, x: Tensor, slope: Tensor, *, first: bool) -> Callable[[], None]:
    weight = layer.weight.detach().to(x.dtype)
    bias = None if layer.bias is None else layer.bias.detach().to(x.dtype)

    def multiply() -> None:
        torch.addmm(bias, x, weight.T) if bias is not None else torch.mm(x, weight.T)
        torch.mm(slope.T, x)
        if not first:  # nothing is trained below the first layer
            torch.mm(slope, weight)

    return multiply


def _facts(setting: _Setting, case: Case) -> dict[str, Any]:
    monitor = Monitor(setting.config, setting.train, setting.prepared.splits["val"])
    head = _head(setting)
    monitor(head)
    started = time.perf_counter()
    monitor(head)
    validation, epoch = time.perf_counter() - started, len(setting.train) / case.ours
    return {
        "n_train": len(setting.train), "epoch_s": epoch, "validation_s": validation,
        "validation_share": validation / epoch,
        "precision": _precision(setting),
    }  # fmt: skip


def _precision(setting: _Setting) -> str:
    """The name of the precision that a step computes its products in."""
    return Step(Replicas([_head(setting)], stacked=False), setting.train, setting.config, steps=1).precision
