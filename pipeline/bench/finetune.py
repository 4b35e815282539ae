"""``mmcli bench finetune``: images a second and peak memory of frozen, last-2 and full, beside a plain loop."""

import ctypes
import gc
import itertools
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from ...heads.model import Head
from ..core.config import Config
from ..core.device import autocast, pick_device
from ..core.progress import Progress
from ..data.manifest import Manifest
from ..extraction.encoder import Encoder
from ..finetuning.batches import TowerBatches, TowerStep
from ..finetuning.distributed import ProcessGroup
from ..finetuning.embeddings import LiveStore
from ..finetuning.towers import Towers
from ..training.setup import draw_head
from ..training.step import Step
from .data import draw_photographs, make_base_checkpoint, write_captions
from .harness import BenchResult, Case, best_of, plainly
from .plain import plain_loss

UNFROZEN = {"frozen": "none", "last-2": "last-2", "full": "all"}
PLAIN_WORKERS = 4
N_CLASSES = 80
LOOK_EVERY_S = 0.01
TEXT_LENGTH = 64


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """What all ways have in common."""

    config: Config
    checkpoint: str
    listing: Manifest
    data: Path
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds of the best round, and the most memory of a round beyond what was there before."""

    seconds: float
    peak_bytes: int


def bench_finetune(
    config: Config,
    *,
    checkpoint: str | None,
    n_images: int,
    repeats: int,
    unfreeze: Sequence[str] = tuple(UNFROZEN),
    vocabulary: int | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Time an epoch of finetuning in two ways in one run.

    Args:
        config: Everything but the data set and the run; ``training.batch_size`` is that of both ways.
        checkpoint: A SigLIP checkpoint; towers of base size with random weights when not given.
        n_images: Images of a round.
        repeats: Rounds; the best of each way counts.
        unfreeze: Of ``frozen``, ``last-2`` and ``full``.
        vocabulary: Token embeddings of the made towers; as many as the made tokenizer knows when not given.
        progress: Who to tell.

    Returns:
        A case for each; as facts the peak memory of both ways.

    Raises:
        InputError: A bad checkpoint.
    """
    progress = progress or Progress()
    device = pick_device(config.hardware.device)
    with tempfile.TemporaryDirectory() as scratch:
        progress.say("making images and towers")
        captions = write_captions(5 * n_images)
        name = checkpoint or str(make_base_checkpoint(Path(scratch) / "model", captions, vocabulary))
        data = draw_photographs(Path(scratch) / "images", n_images)
        listing = _listing(data, captions)
        setting = _Setting(config=config, checkpoint=name, listing=listing, data=data, device=device)
        cases, facts = [], {}
        for one in unfreeze:
            progress.say(f"timing {one}: {n_images} images, batch {config.training.batch_size}, {repeats} rounds")
            plain, ours = _measure(setting, UNFROZEN[one], repeats)
            facts[one] = {"plain_peak_bytes": plain.peak_bytes, "ours_peak_bytes": ours.peak_bytes}
            note = "ours: the first epoch, later ones run no tower at all" if one == "frozen" else ""
            rates = {"plain": n_images / plain.seconds, "ours": n_images / ours.seconds}
            cases.append(Case(name=one, unit="images", note=note, **rates))
    lines = [
        f"peak memory beyond the weights, {one}: plain {_mib(fact['plain_peak_bytes'])},"
        f" ours {_mib(fact['ours_peak_bytes'])}"
        for one, fact in facts.items()
    ]
    lines.append("plain: AutoProcessor in a DataLoader, padded batches, the model of transformers in train mode, AdamW")
    budget, precision = config.model.max_num_patches, autocast(device).name
    title = f"finetuning at {budget} patches, batch {config.training.batch_size}, on {device.type} ({precision})"
    return BenchResult(title=title, cases=tuple(cases), facts={"memory": facts}, lines=tuple(lines))


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _listing(data: Path, captions: Sequence[str]) -> Manifest:
    paths = sorted(path.name for path in data.iterdir())
    rng = np.random.default_rng(0)
    labels = [sorted(set(rng.integers(0, N_CLASSES, 3).tolist())) for _ in paths]
    return Manifest.from_columns(
        image_ids=np.arange(len(paths)),
        paths=paths,
        splits=["train"] * (len(paths) - 2) + ["val", "test"],
        captions=[list(captions[5 * at : 5 * at + 5]) for at in range(len(paths))],
        labels=labels,
        category_names=[f"class {at}" for at in range(N_CLASSES)],
        name="bench",
    )


def _measure(setting: _Setting, unfreeze: str, repeats: int) -> tuple[Measured, Measured]:
    """The plain way and ours, by turns; each has the memory to itself only as far as weights go."""
    ways: dict[str, Callable[[], None]] = {}
    store, ways["ours"] = _ours(setting, unfreeze)
    ways["plain"] = plainly(_plain(setting, unfreeze))
    with store:
        for way in ways.values():
            way()  # workers start, buffers are made
        peaks = {name: _peak(way, setting.device) for name, way in ways.items()}
        seconds = best_of({name: _whole(way, setting.device) for name, way in ways.items()}, repeats=repeats)
    plain, ours = (Measured(seconds=seconds[name], peak_bytes=peaks[name]) for name in ("plain", "ours"))
    return plain, ours


def _whole(way: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A way until its last kernel."""

    def run() -> None:
        way()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def _peak(way: Callable[[], None], device: torch.device) -> int:
    """Bytes that a way takes; in a round of its own, because freed memory is given back before it."""
    with _Peak(device) as peak:
        _whole(way, device)()
    return peak.bytes


class _Peak:
    """The most memory that is taken meanwhile: allocated on a GPU, resident on a CPU (looked at every 10 ms)."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._over, self.bytes = device, threading.Event(), 0

    def __enter__(self) -> "_Peak":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            _give_back()
            self._before = _resident()
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self._over.set()
            self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            self.bytes = max(self.bytes, _resident() - self._before)


def _give_back() -> None:
    """Let the C library give freed memory back, or what one way had would count for none in the next."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _ours(setting: _Setting, unfreeze: str) -> tuple[LiveStore, Callable[[], None]]:
    """An epoch of ours; of frozen towers embedding everything and a step a batch."""
    config, group = setting.config, ProcessGroup(setting.device)
    section = config.finetune.model_copy(update={"unfreeze": unfreeze})
    config = config.model_copy(update={"finetune": section})
    parts = Encoder.parts(setting.checkpoint, patches=config.model.max_num_patches, device=setting.device)
    towers = Towers(parts, section)
    store = LiveStore(
        setting.listing,
        setting.data,
        parts,
        config,
        captions=1 if towers.sides else 5,
        group=group,
        progress=Progress(),
    )
    train, head = store.whole, _head(setting, store.encoder.width)
    steps = -(-len(train) // config.training.batch_size)
    step: Step = (
        TowerStep(head, train, config, steps=steps, batches=TowerBatches(towers, store, config))
        if towers.sides
        else Step(head, train, config, steps=steps)
    )
    numbers = itertools.count(1)

    def epoch() -> None:
        if not towers.sides:
            store.embed("image", store.used, quiet=True)
            store.embed("text", store.used, quiet=True)
        order = torch.randperm(len(train)).to(setting.device)
        step.begin(next(numbers), order, torch.zeros_like(order))
        head.train()
        for part in torch.tensor_split(order, steps):
            step.run((len(part),))

    return store, epoch


def _head(setting: _Setting, width: int) -> Head:
    classifier = setting.config.classifier.model_copy(update={"num_classes": N_CLASSES})
    head = draw_head(setting.config.model_copy(update={"classifier": classifier}), width=width, device=setting.device)
    assert isinstance(head, Head)
    head.fit_log_norms(torch.randn(8, 2))
    return head


def _plain(setting: _Setting, unfreeze: str) -> Callable[[], None]:
    """An epoch of what a first script does."""
    config, device, listing = setting.config, setting.device, setting.listing
    parts = Encoder.parts(setting.checkpoint, patches=config.model.max_num_patches, device=device)
    Towers(parts, config.finetune.model_copy(update={"unfreeze": unfreeze}))  # says which parameters are trained
    model = parts.model.train()
    head = _head(setting, int(model.config.text_config.hidden_size)).train()
    learnt = [*head.parameters(), *(one for one in model.parameters() if one.requires_grad)]
    optimizer = torch.optim.AdamW(learnt, lr=1e-5, weight_decay=config.optimizer.weight_decay)
    processor = parts.source.load("the processor", transformers.AutoProcessor)
    collate = partial(_collate, processor, _budget(setting, model))
    labels = listing.labels_matrix()
    items: Any = [
        (str(setting.data / path), listing.captions[row][0], labels[row]) for row, path in enumerate(listing.paths)
    ]
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    loader: DataLoader[Any] = DataLoader(
        items,
        batch_size=config.training.batch_size,
        shuffle=True,
        num_workers=PLAIN_WORKERS,
        collate_fn=collate,
        persistent_workers=True,
    )

    def epoch() -> None:
        for pixels, ids, y in _moved(loader, device):
            with autocast(device):
                v_img = model.get_image_features(**pixels).pooler_output
                v_txt = model.get_text_features(input_ids=ids).pooler_output
                output = head(v_img.float(), v_txt.float())
            optimizer.zero_grad()
            plain_loss(config.loss, output, y).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(learnt, 1.0)
            optimizer.step()

    return epoch


def _budget(setting: _Setting, model: Any) -> dict[str, int]:  # noqa: ANN401
    """What NaFlex processors are told and others are not."""
    return {"max_num_patches": setting.config.model.max_num_patches} if model.config.model_type == "siglip2" else {}


def _moved(
    loader: DataLoader[Any], device: torch.device
) -> Iterator[tuple[dict[str, Any], torch.Tensor, torch.Tensor]]:
    for pixels, ids, y in loader:
        yield {name: value.to(device) for name, value in pixels.items()}, ids.to(device), y.to(device)


def _collate(processor: Any, budget: dict[str, int], items: list[Any]) -> Any:  # noqa: ANN401
    images = [Image.open(path).convert("RGB") for path, _, _ in items]
    pixels = dict(processor(images=images, return_tensors="pt", **budget))
    ids = processor.tokenizer(
        [text.lower() for _, text, _ in items],
        padding="max_length",
        padding_side="right",
        truncation=True,
        max_length=TEXT_LENGTH,
        return_tensors="pt",
    ).input_ids
    return pixels, ids, torch.from_numpy(np.stack([labels for _, _, labels in items])).float()
