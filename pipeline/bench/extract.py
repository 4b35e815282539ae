"""``mmcli bench extract``: images and captions a second, beside the plain ``transformers`` loop and the ceiling."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch.utils.data import DataLoader

from ...cache import StoreKey, StoreWriter
from ...errors import InputError
from ..core.config import Config
from ..core.cores import count_cores
from ..core.device import autocast, pick_device, reader_count
from ..core.progress import Progress
from ..data.manifest import Manifest
from ..extraction.encoder import Encoder
from ..extraction.images import Resizer, image_size, read_patches
from ..extraction.reader import ImageReader, Piece
from ..extraction.shards import CAPTIONS, Clock, ShardJobs, Unreadable
from .data import draw_photographs, make_base_checkpoint, write_captions
from .harness import BenchResult, Case, best_of

PLAIN_BATCH = 32
FULL_IMAGES, FULL_CAPTIONS = 123_287, 616_767
SHARD_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """What all ways have in common."""

    encoder: Encoder
    model: Any
    processor: Any
    data: Path
    paths: tuple[str, ...]
    captions: tuple[str, ...]
    workers: int
    scratch: Path
    threads: int

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    @property
    def budget(self) -> dict[str, int]:
        """What NaFlex processors are told and others are not."""
        return {"max_num_patches": self.encoder.spec.budget} if self.encoder.spec.fixed is None else {}


def bench_extract(
    config: Config,
    *,
    checkpoint: str | None,
    images: Path | None,
    n_images: int,
    n_captions: int,
    repeats: int,
    progress: Progress | None = None,
) -> BenchResult:
    """Time extraction in several ways in one run.

    Args:
        config: Model (patches), hardware and data sections are used.
        checkpoint: A SigLIP checkpoint; towers of base size with random weights when not given.
        images: A folder of JPEGs; photographs of COCO's sizes are drawn when not given.
        n_images: Images of a round.
        n_captions: Captions of a round.
        repeats: Rounds; the best of each way counts.
        progress: Who to tell.

    Returns:
        Cases ``images``, ``captions`` and ``image work`` (one core), the bottleneck, and the time all of COCO takes.

    Raises:
        InputError: A bad checkpoint or folder.
    """
    progress = progress or Progress()
    with tempfile.TemporaryDirectory() as folder:
        progress.say("making images and towers")
        setting = _set_up(config, Path(folder), checkpoint, images, n_images, n_captions)
        progress.say(f"timing {len(setting.paths)} images and {n_captions} captions, {repeats} rounds of every way")
        cases, facts = _measure(setting, repeats)
    rates = cases[0].ours, cases[1].ours
    seconds = FULL_IMAGES / rates[0] + FULL_CAPTIONS / rates[1]
    facts |= {"coco_seconds": seconds, "patches": setting.encoder.identity.patches, "device": str(setting.device)}
    lines = (
        f"decoding alone, {facts['decode_workers']} processes: {facts['decode_per_s']:,.0f} images/s",
        f"the bottleneck of ours was {facts['bottleneck']}",
        f"all of COCO: {FULL_IMAGES:,} / {rates[0]:,.1f} + {FULL_CAPTIONS:,} / {rates[1]:,.1f} s"
        f" = {seconds / 60:,.1f} min",
    )
    title = f"extraction at {facts['patches']} patches on {setting.device} ({setting.encoder.identity.compute_dtype})"
    return BenchResult(title=title, cases=cases, facts=facts, lines=lines)


def _set_up(
    config: Config, scratch: Path, checkpoint: str | None, images: Path | None, n_images: int, n_captions: int
) -> _Setting:
    captions = write_captions(n_captions)
    name = checkpoint or str(make_base_checkpoint(scratch / "model", captions))
    data = images or draw_photographs(scratch / "images", n_images)
    found = sorted(str(path.relative_to(data)) for path in data.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg"})
    if not found:
        raise InputError("no JPEGs", where=data, wanted="*.jpg in it or below", do="name another folder with --images")
    for path in found[:n_images]:
        image_size(data / path)  # one line here rather than an error of a worker's later
    device = pick_device(config.hardware.device)
    parts = Encoder.parts(name, patches=config.model.max_num_patches, device=device)
    processor = parts.source.load("the processor", transformers.AutoProcessor)
    return _Setting(
        encoder=Encoder(parts),
        model=parts.model,
        processor=processor,
        data=data,
        paths=tuple(found[:n_images]),
        captions=tuple(captions),
        scratch=scratch,
        workers=reader_count(config.data.num_workers, device),
        threads=torch.get_num_threads(),
    )


def _measure(setting: _Setting, repeats: int) -> tuple[tuple[Case, ...], dict[str, Any]]:
    clocks: list[Clock] = []
    pieces, seconds = _resident(setting)
    ids = setting.encoder.tokenize(setting.captions).to(setting.device)
    images = best_of(
        {
            "plain": partial(_plain_images, setting),
            "ours": partial(_ours, setting, "image", clocks),
            "ceiling": partial(_towers_alone, setting, pieces),
        },
        repeats=repeats,
    )
    captions = best_of(
        {
            "plain": partial(_plain_captions, setting),
            "ours": partial(_ours, setting, "text", []),
            "ceiling": partial(_text_alone, setting, ids),
        },
        repeats=repeats,
    )
    few = setting.paths[: 2 * PLAIN_BATCH]
    work = best_of(
        {
            "plain": partial(_process, setting, few),
            "ours": partial(_cut, setting, few, "pillow"),
            "torch": partial(_cut, setting, few, "torch"),
        },
        repeats=2 * repeats,
    )
    n, m = len(setting.paths), len(setting.captions)
    cases = (
        Case(
            name="images",
            unit="images",
            plain=n / images["plain"],
            ours=n / images["ours"],
            ceiling=n / images["ceiling"],
            note=f"plain: AutoProcessor, DataLoader, padded, {PLAIN_BATCH} a batch",
        ),
        Case(
            name="captions",
            unit="captions",
            plain=m / captions["plain"],
            ours=m / captions["ours"],
            ceiling=m / captions["ceiling"],
            note=f"plain: tokenizer and get_text_features, {PLAIN_BATCH} a batch",
        ),
        Case(
            name="image work, one core",
            unit="images",
            plain=len(few) / work["plain"],
            ours=len(few) / work["ours"],
            note="plain: Image.open and the image processor; ours: the same numbers as uint8 patches",
        ),
        Case(
            name="image work, --resizer torch",
            unit="images",
            plain=len(few) / work["plain"],
            ours=len(few) / work["torch"],
        ),
    )
    facts = {
        "decode_per_s": n / seconds,
        "decode_workers": count_cores(),
        "n_images": n,
        "n_captions": m,
        "batch_tokens": setting.encoder.batch_tokens,
        "bottleneck": clocks[-1].bottleneck,
        "read_s": clocks[-1].read_s,
        "compute_s": clocks[-1].compute_s,
        "write_s": clocks[-1].write_s,
    }
    return cases, facts


def _resident(setting: _Setting) -> tuple[list[Piece], float]:
    """Every batch in memory, and the seconds that reading them took with all cores at it."""
    spec, tokens = setting.encoder.spec, setting.encoder.batch_tokens
    workers = count_cores()
    with ImageReader(setting.data, spec, tokens=tokens, workers=workers) as reader:
        list(reader.read([setting.paths[: 8 * workers]]))  # the processes have to be there
        started = time.perf_counter()
        pieces = list(reader.read([setting.paths]))
        return pieces, time.perf_counter() - started


def _ours(setting: _Setting, part: str, clocks: list[Clock]) -> None:
    """A whole store's image or text part, read, computed and written."""
    n, m = len(setting.paths), len(setting.captions)
    rows = n if part == "image" else -(-m // CAPTIONS)
    each = (
        [list(setting.captions[at : at + CAPTIONS]) for at in range(0, m, CAPTIONS)] if part == "text" else [["-"]] * n
    )
    listing = Manifest.from_columns(
        image_ids=np.arange(rows),
        paths=[*setting.paths, *setting.paths * rows][:rows],
        splits=["train"] * rows,
        captions=each,
        labels=[[]] * rows,
        category_names=["-"],
        name="bench",
    )
    encoder = setting.encoder
    key = StoreKey(**vars(encoder.identity), dtype="float16", manifest_sha256=listing.sha256)
    store = setting.scratch / f"{part}-{time.monotonic_ns()}"
    with StoreWriter(
        store, key, listing.table, width=encoder.width, shard_rows=SHARD_ROWS, batch_tokens=encoder.batch_tokens
    ) as writer:
        unreadable = Unreadable(setting.data, listing.paths, "stop", encoder.spec)
        jobs = ShardJobs(encoder, listing, writer, unreadable, workers=setting.workers, progress=Progress())
        if part == "image":
            jobs.encode_images(writer.missing("image"))
        else:
            jobs.encode_captions(writer.missing("text"))
        clocks.append(jobs.clock)


def _towers_alone(setting: _Setting, pieces: Sequence[Piece]) -> None:
    for piece in pieces:
        assert piece.batch is not None
        setting.encoder.image_features(piece.pixels, piece.batch.grid)
    _wait(setting.device)


def _text_alone(setting: _Setting, ids: torch.Tensor) -> None:
    for part in torch.split(ids, max(1, setting.encoder.batch_tokens // ids.shape[1])):
        setting.encoder.text_features(part)
    _wait(setting.device)


@torch.inference_mode()
def _plain_images(setting: _Setting) -> None:
    """What a first script does: the processor in a DataLoader's workers, the model on padded batches."""
    files: Any = [str(setting.data / path) for path in setting.paths]
    loader: DataLoader[Any] = DataLoader(
        files,
        batch_size=PLAIN_BATCH,
        num_workers=min(4, count_cores()),
        collate_fn=partial(_collate, setting.processor, setting.budget),
    )
    for batch in loader:
        with autocast(setting.device):
            moved = {name: value.to(setting.device) for name, value in batch.items()}
            setting.model.get_image_features(**moved).pooler_output.float().cpu()


def _collate(processor: Any, budget: dict[str, int], paths: list[str]) -> dict[str, torch.Tensor]:  # noqa: ANN401
    images = [Image.open(path).convert("RGB") for path in paths]
    return dict(processor(images=images, return_tensors="pt", **budget))


@torch.inference_mode()
def _plain_captions(setting: _Setting) -> None:
    for at in range(0, len(setting.captions), PLAIN_BATCH):
        texts = [text.lower() for text in setting.captions[at : at + PLAIN_BATCH]]
        ids = setting.processor.tokenizer(
            texts, padding="max_length", padding_side="right", truncation=True, max_length=64, return_tensors="pt"
        ).input_ids
        with autocast(setting.device):
            setting.model.get_text_features(input_ids=ids.to(setting.device)).pooler_output.float().cpu()


def _process(setting: _Setting, paths: Sequence[str]) -> None:
    torch.set_num_threads(1)
    for at in range(0, len(paths), PLAIN_BATCH):
        _collate(setting.processor, setting.budget, [str(setting.data / path) for path in paths[at : at + PLAIN_BATCH]])
    torch.set_num_threads(setting.threads)


def _cut(setting: _Setting, paths: Sequence[str], resizer: Resizer) -> None:
    spec = replace(setting.encoder.spec, resizer=resizer)
    torch.set_num_threads(1)
    out = np.empty((spec.most_tokens, spec.width), np.uint8)
    for path in paths:
        grid = spec.grid(*image_size(setting.data / path))
        read_patches(setting.data / path, grid, spec, out[: grid.tokens])
    torch.set_num_threads(setting.threads)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
