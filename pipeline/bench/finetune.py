"""``mmcli bench finetune``: images a second and peak memory of frozen, last-2 and full, beside a plain loop."""

import ctypes
import gc
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

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
from .data import CAPTIONS, draw_photographs, make_base_checkpoint, write_captions
from .extract import budget_of, process_images, tokenize
from .harness import BenchResult, Case, chunks, time_case
from .plain import make_loader, plain_step

UNFROZEN = {"frozen": "none", "last-2": "last-2", "full": "all"}
N_CLASSES = 80


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What both ways have in common: the configuration with what is unfrozen, the checkpoint, and the images."""

    config: Config
    checkpoint: str
    listing: Manifest
    data: Path
    device: torch.device

    def load_parts(self) -> Any:  # noqa: ANN401
        """The checkpoint's model and processor, with weights of its own for each way."""
        return Encoder.parts(self.checkpoint, patches=self.config.model.max_num_patches, device=self.device)

    def make_head(self, width: int) -> Head:
        """A new head on the device."""
        classifier = self.config.classifier.model_copy(update={"num_classes": N_CLASSES})
        head = draw_head(self.config.model_copy(update={"classifier": classifier}), width=width, device=self.device)
        assert isinstance(head, Head)
        head.fusion.fit_log_norms(torch.randn(8, 2))
        return head


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
        checkpoint: A SigLIP checkpoint; by default towers of base size are made, with random weights.
        n_images: Images of a round.
        repeats: Rounds; the best of each way counts.
        unfreeze: Of ``frozen``, ``last-2`` and ``full``.
        vocabulary: Token embeddings of the made towers; by default as many as the made tokenizer needs.
        progress: Progress bars and messages; silent by default.

    Returns:
        A case for each; as facts the peak memory of both ways.

    Raises:
        InputError: A bad checkpoint.
    """
    progress = progress or Progress()
    device, batch = pick_device(config.hardware.device), config.training.batch_size
    cases, memory = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        progress.say("making images and towers")
        captions = write_captions(CAPTIONS * n_images)
        name = checkpoint or str(make_base_checkpoint(Path(scratch) / "model", captions, vocabulary))
        data = draw_photographs(Path(scratch) / "images", n_images)
        listing = _listing(data, captions)
        for label in unfreeze:
            progress.say(f"timing {label}: {n_images} images, batch {batch}, {repeats} rounds")
            section = config.finetune.model_copy(update={"unfreeze": UNFROZEN[label]})
            config = config.model_copy(update={"finetune": section})
            setting = Setting(config=config, checkpoint=name, listing=listing, data=data, device=device)
            case, memory[label] = _measure(setting, label, repeats)
            cases.append(case)
    lines = [
        f"peak memory beyond the weights, {label}: plain {peaks['plain_peak_bytes'] / 2**20:,.0f} MiB,"
        f" ours {peaks['ours_peak_bytes'] / 2**20:,.0f} MiB"
        for label, peaks in memory.items()
    ]
    lines.append("plain: AutoProcessor in a DataLoader, padded batches, the model of transformers in train mode, AdamW")
    budget, precision = config.model.max_num_patches, autocast(device).name
    title = f"finetuning at {budget} patches, batch {batch}, on {device.type} ({precision})"
    return BenchResult(title=title, cases=tuple(cases), facts={"memory": memory}, lines=tuple(lines))


def _listing(data: Path, captions: Sequence[str]) -> Manifest:
    paths = sorted(path.name for path in data.iterdir())
    rng = np.random.default_rng(0)
    return Manifest.from_columns(
        image_ids=np.arange(len(paths)),
        paths=paths,
        splits=["train"] * (len(paths) - 2) + ["val", "test"],
        captions=[list(part) for part in chunks(captions, CAPTIONS)],
        labels=[sorted(set(rng.integers(0, N_CLASSES, 3).tolist())) for _ in paths],
        category_names=[f"class {number}" for number in range(N_CLASSES)],
        name="bench",
    )


def _measure(setting: Setting, label: str, repeats: int) -> tuple[Case, dict[str, int]]:
    """A case, and the peak of each way beyond the weights; both ways have their weights in memory.

    The peak has a round of its own, because freed memory is given back before it.
    """
    store, ours = _ours(setting)
    ways = {"plain": _plain(setting), "ours": ours}
    note = "ours: the first epoch, later ones run no tower at all" if label == "frozen" else ""
    with store:
        for way in ways.values():
            way()  # workers start, buffers are made
        peaks = {f"{name}_peak_bytes": _peak_bytes(way, setting.device) for name, way in ways.items()}
        n_images = len(setting.listing.paths)
        return time_case(label, "images", n_images, ways, repeats=repeats, device=setting.device, note=note), peaks


def _peak_bytes(way: Callable[[], None], device: torch.device) -> int:
    """The most memory that a way takes: allocated on a GPU, resident on a CPU; 0 where the system does not say."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        way()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that one way has freed must not hide what the next one takes
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is forgotten
        before = _peak_resident()
        way()
        return _peak_resident() - before
    except (OSError, AttributeError):
        return 0


def _peak_resident() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _ours(setting: Setting) -> tuple[LiveStore, Callable[[], None]]:
    """An epoch of ours; of frozen towers embedding everything and a step a batch."""
    config, group, parts = setting.config, ProcessGroup(setting.device), setting.load_parts()
    towers = Towers(parts, config.finetune)
    store = LiveStore(
        setting.listing,
        setting.data,
        parts,
        config,
        captions=1 if towers.sides else CAPTIONS,
        group=group,
        progress=Progress(),
    )
    train, head = store.whole, setting.make_head(store.encoder.width)
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


def _plain(setting: Setting) -> Callable[[], None]:
    """An epoch of what a first script does."""
    config, device, listing, parts = setting.config, setting.device, setting.listing, setting.load_parts()
    Towers(parts, config.finetune)  # says which parameters are trained
    model = parts.model.train()
    head = setting.make_head(int(model.config.text_config.hidden_size)).train()
    trained = [*head.parameters(), *(weight for weight in model.parameters() if weight.requires_grad)]
    step = plain_step(trained, config, rate=1e-5)
    processor = parts.source.load("the processor", transformers.AutoProcessor)
    labels = listing.labels_matrix()
    items = [
        (str(setting.data / path), listing.first_captions[row], labels[row]) for row, path in enumerate(listing.paths)
    ]
    collate = partial(_collate, processor, budget_of(model, config.model.max_num_patches))
    loader = make_loader(items, config.training.batch_size, collate_fn=collate)

    def epoch() -> None:
        for pixels, ids, y in loader:
            with autocast(device):
                moved = {name: value.to(device) for name, value in pixels.items()}
                v_img = model.get_image_features(**moved).pooler_output
                v_txt = model.get_text_features(input_ids=ids.to(device)).pooler_output
                output = head(v_img.float(), v_txt.float())
            step(output, y.to(device))

    return epoch


def _collate(processor: Any, budget: dict[str, int], items: list[Any]) -> Any:  # noqa: ANN401
    paths, texts, labels = zip(*items, strict=True)
    return (
        process_images(processor, budget, paths),
        tokenize(processor, texts),
        torch.from_numpy(np.stack(labels)).float(),
    )
