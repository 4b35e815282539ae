"""``mmcli bench train``: training images a second, beside the plain loop and beside the matrix products alone."""

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
from ..training.setup import Prepared, prepare_training
from ..training.step import Step, count_batches
from .data import N_TRAIN, make_full_store
from .harness import BenchResult, Case, time_case
from .plain import WORKERS, plain_steps

PLAIN_BATCH, LARGE_BATCH = 64, 1024
# Most loops a second at batch 64 take as long as a sixteenth as many at batch 1,024.
LARGE_SHARE = 16


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all ways have in common: the store on the device, and the resolved configuration."""

    prepared: Prepared

    @property
    def train(self) -> Split:
        """The split that all ways train on."""
        return self.prepared.splits["train"]

    @property
    def config(self) -> Config:
        """The configuration as the store resolves it."""
        return self.prepared.config

    def make_head(self) -> Any:  # noqa: ANN401
        """A new head on the device."""
        return self.prepared.make_head(self.train)

    @property
    def precision(self) -> str:
        """The name of the precision that a step computes its products in."""
        return self.prepared.precision


def bench_train(
    config: Config,
    *,
    store: Path | None,
    n_train: int | None,
    steps: int,
    repeats: int,
    progress: Progress | None = None,
) -> BenchResult:
    """Time training in several ways in one run.

    Args:
        config: Head, loss, optimiser and hardware sections are used; batches are of 64 and of 1,024.
        store: The store; by default one of COCO's full size is made, with drawn embeddings.
        n_train: Train images of the store that is made; by default COCO's 113,287.
        steps: Steps of a round at batch 64.
        repeats: Rounds; the best of each way counts.
        progress: Progress bars and messages; silent by default.

    Returns:
        A case for each batch size; as facts how long an epoch takes, and validation after it.

    Raises:
        InputError: See :func:`~mmcli.pipeline.training.train_head.train_head`.
    """
    progress = progress or Progress()
    with tempfile.TemporaryDirectory() as scratch:
        if store is None:
            progress.say("making a store of COCO's size")
            store = make_full_store(Path(scratch) / "store", n_train=n_train or N_TRAIN)
        setting = Setting(prepared=prepare_training(config, store, progress))
    progress.say(f"timing {steps} steps of batch {PLAIN_BATCH}, {repeats} rounds of every way")
    cases = (
        _case(setting, PLAIN_BATCH, steps, repeats),
        _case(setting, LARGE_BATCH, max(2, steps // LARGE_SHARE), repeats),
    )
    n_images, validation_s = len(setting.train), _validation_seconds(setting)
    epoch_s = n_images / cases[0].ours
    share = validation_s / epoch_s
    facts = {
        "n_train": n_images,
        "epoch_s": epoch_s,
        "validation_s": validation_s,
        "validation_share": share,
        "precision": setting.precision,
    }
    lines = (
        f"an epoch of {n_images:,} images at batch {PLAIN_BATCH}: {epoch_s:.2f} s, and validation {validation_s:.2f} s"
        f" ({100 * share:.0f} %)",
        f"30 epochs with validation: {30 * (epoch_s + validation_s):.0f} s",
    )
    device = setting.prepared.device.type
    title = f"training at {config.hash.bits} bits on {device} ({setting.precision})"
    return BenchResult(title=title, cases=cases, facts=facts, lines=lines)


def _case(setting: Setting, batch: int, steps: int, repeats: int) -> Case:
    loops = {
        "plain": plain_steps(setting.make_head().train(), setting.train, setting.config, batch),
        "ours": our_steps(setting, batch),
        "ceiling": product_steps(setting, batch),
    }
    ways = {name: partial(_take, loop, steps) for name, loop in loops.items()}
    for way in ways.values():
        way()  # workers start, buffers are made, graphs are captured
    note = f"plain: Dataset, DataLoader with {WORKERS} workers, eager float32; ceiling: products and update alone"
    device, name = setting.prepared.device, f"training, batch {batch:,}"
    return time_case(name, "images", steps * batch, ways, repeats=repeats, device=device, note=note)


def _take(loop: Iterator[None], steps: int) -> None:
    for _ in itertools.islice(loop, steps):
        pass


def our_steps(setting: Setting, batch: int) -> Iterator[None]:
    """Steps of our loop, epoch after epoch, without end."""
    head = setting.make_head()
    train, device = setting.train, setting.prepared.device
    n = len(train)
    batches = count_batches(head, n, batch)
    step = Step(head, train, setting.config, steps=batches)
    head.train()
    for epoch in itertools.count(1):
        caption = (torch.rand(n).to(device) * train.captions_of).long()
        step.begin(epoch, torch.randperm(n).to(device), caption)
        for part in torch.tensor_split(torch.empty(n), batches):
            step.run((len(part),))
            yield


def product_steps(setting: Setting, batch: int) -> Iterator[None]:
    """The matrix products of a step, in its precision, and the update of its parameters, on arrays in place."""
    head, device = setting.make_head(), setting.prepared.device
    layers = [module for module in head.modules() if isinstance(module, nn.Linear)]
    options: dict[str, Any] = {"device": device, "dtype": getattr(torch, setting.precision)}
    inputs = [torch.randn(batch, layer.in_features, **options) for layer in layers]
    slopes = [torch.randn(batch, layer.out_features, **options) for layer in layers]
    for parameter in head.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-6, fused=device.type in {"cpu", "cuda"})
    products = [
        _products(layer, x, slope, first=layer is layers[0])
        for layer, x, slope in zip(layers, inputs, slopes, strict=True)
    ]
    while True:
        with torch.no_grad():
            for multiply in products:
                multiply()
        optimizer.step()
        yield


def _products(layer: nn.Linear, x: Tensor, slope: Tensor, *, first: bool) -> Callable[[], None]:
    """The products of a layer's forward and backward pass; nothing is trained below the first layer."""
    weight = layer.weight.detach().to(x.dtype)
    bias = None if layer.bias is None else layer.bias.detach().to(x.dtype)

    def multiply() -> None:
        torch.addmm(bias, x, weight.T) if bias is not None else torch.mm(x, weight.T)
        torch.mm(slope.T, x)
        if not first:
            torch.mm(slope, weight)

    return multiply


def _validation_seconds(setting: Setting) -> float:
    monitor = Monitor(setting.config, setting.train, setting.prepared.splits["val"])
    head = setting.make_head()
    monitor(head)
    started = time.perf_counter()
    monitor(head)
    return time.perf_counter() - started
