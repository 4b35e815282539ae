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
from .harness import BenchResult, Case, Way, chunks, time_case

PLAIN_BATCH = 32
FULL_IMAGES, FULL_CAPTIONS = 123_287, 616_767
SHARD_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all ways have in common: encoder, model and processor, the files, and where stores are written."""

    encoder: Encoder
    model: Any
    processor: Any
    data: Path
    paths: tuple[str, ...]
    captions: tuple[str, ...]
    workers: int
    scratch: Path

    @property
    def device(self) -> torch.device:
        """The device that the towers run on."""
        return self.encoder.device


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
        checkpoint: A SigLIP checkpoint; by default towers of base size are made, with random weights.
        images: A folder of JPEGs; by default photographs of COCO's sizes are drawn.
        n_images: Images of a round.
        n_captions: Captions of a round.
        repeats: Rounds; the best of each way counts.
        progress: Progress bars and messages; silent by default.

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
) -> Setting:
    captions = write_captions(n_captions)
    name = checkpoint or str(make_base_checkpoint(scratch / "model", captions))
    data = images or draw_photographs(scratch / "images", n_images)
    files = [path for path in data.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg"}]
    paths = sorted(str(path.relative_to(data)) for path in files)[:n_images]
    if not paths:
        raise InputError("no JPEGs", where=data, wanted="*.jpg in it or below", do="name another folder with --images")
    for path in paths:
        image_size(data / path)  # one line here rather than an error of a worker's later
    device = pick_device(config.hardware.device)
    parts = Encoder.parts(name, patches=config.model.max_num_patches, device=device)
    processor = parts.source.load("the processor", transformers.AutoProcessor)
    return Setting(
        encoder=Encoder(parts),
        model=parts.model,
        processor=processor,
        data=data,
        paths=tuple(paths),
        captions=tuple(captions),
        workers=reader_count(config.data.num_workers, device),
        scratch=scratch,
    )


def _measure(setting: Setting, repeats: int) -> tuple[tuple[Case, ...], dict[str, Any]]:
    pieces, decode_s = _read_all(setting)
    ids = setting.encoder.tokenize(setting.captions).to(setting.device)
    few, clocks = setting.paths[: 2 * PLAIN_BATCH], list[Clock]()
    images: dict[str, Way] = {
        "plain": partial(_plain_images, setting),
        "ours": lambda: clocks.append(_extract_images(setting)),
        "ceiling": partial(_towers_alone, setting, pieces),
    }
    captions: dict[str, Way] = {
        "plain": partial(_plain_captions, setting),
        "ours": partial(_extract_captions, setting),
        "ceiling": partial(_text_alone, setting, ids),
    }
    work = {"plain": partial(_process, setting, few), "ours": partial(_cut, setting, few, "pillow")}
    torch_work = work | {"ours": partial(_cut, setting, few, "torch")}
    n_images, n_captions = len(setting.paths), len(setting.captions)
    timed = partial(time_case, repeats=repeats, device=setting.device)
    cases = [timed("images", "images", n_images, images, note=f"plain: AutoProcessor, {PLAIN_BATCH} a padded batch")]
    cases.append(timed("captions", "captions", n_captions, captions, note=f"plain: {PLAIN_BATCH} a batch"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    note = "plain: Image.open and the image processor; ours: the same numbers as uint8 patches"
    cases.append(timed("image work, one core", "images", len(few), work, note=note))
    cases.append(timed("image work, --resizer torch", "images", len(few), torch_work))
    torch.set_num_threads(threads)
    facts = {
        "decode_per_s": n_images / decode_s,
        "decode_workers": count_cores(),
        "n_images": n_images,
        "n_captions": n_captions,
        "bottleneck": clocks[-1].bottleneck,
    }
    return tuple(cases), facts


def _read_all(setting: Setting) -> tuple[list[Piece], float]:
    """Every batch in memory, and the seconds that reading them took with all cores at it."""
    spec, tokens = setting.encoder.spec, setting.encoder.batch_tokens
    workers = count_cores()
    with ImageReader(setting.data, spec, tokens=tokens, workers=workers) as reader:
        list(reader.read([setting.paths[: 8 * workers]]))  # the processes have to be there
        started = time.perf_counter()
        pieces = list(reader.read([setting.paths]))
        return pieces, time.perf_counter() - started


def _extract_images(setting: Setting) -> Clock:
    """The image part of a whole store, read, computed and written; where its time went."""
    return _extract(setting, "image", setting.paths, [["-"]] * len(setting.paths))


def _extract_captions(setting: Setting) -> Clock:
    captions = [list(part) for part in chunks(setting.captions, CAPTIONS)]
    paths = [setting.paths[row % len(setting.paths)] for row in range(len(captions))]
    return _extract(setting, "text", paths, captions)


def _extract(setting: Setting, part: str, paths: Sequence[str], captions: list[list[str]]) -> Clock:
    n, encoder = len(paths), setting.encoder
    listing = Manifest.from_columns(
        image_ids=np.arange(n),
        paths=list(paths),
        splits=["train"] * n,
        captions=captions,
        labels=[[]] * n,
        category_names=["-"],
        name="bench",
    )
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
        return jobs.clock


def _towers_alone(setting: Setting, pieces: Sequence[Piece]) -> None:
    for piece in pieces:
        assert piece.batch is not None
        setting.encoder.image_features(piece.pixels, piece.batch.grid)


def _text_alone(setting: Setting, ids: torch.Tensor) -> None:
    for part in torch.split(ids, max(1, setting.encoder.batch_tokens // ids.shape[1])):
        setting.encoder.text_features(part)


@torch.inference_mode()
def _plain_images(setting: Setting) -> None:
    """What a first script does: the processor in a DataLoader's workers, the model on padded batches."""
    files: Any = [str(setting.data / path) for path in setting.paths]
    collate = partial(process_images, setting.processor, budget_of(setting.model, setting.encoder.spec.budget))
    loader: DataLoader[Any] = DataLoader(
        files, batch_size=PLAIN_BATCH, num_workers=min(4, count_cores()), collate_fn=collate
    )
    for batch in loader:
        with autocast(setting.device):
            moved = {name: value.to(setting.device) for name, value in batch.items()}
            setting.model.get_image_features(**moved).pooler_output.float().cpu()


@torch.inference_mode()
def _plain_captions(setting: Setting) -> None:
    for texts in chunks(setting.captions, PLAIN_BATCH):
        ids = tokenize(setting.processor, texts)
        with autocast(setting.device):
            setting.model.get_text_features(input_ids=ids.to(setting.device)).pooler_output.float().cpu()


def budget_of(model: Any, budget: int) -> dict[str, int]:  # noqa: ANN401
    """The patch budget, as NaFlex processors take it; others take none."""
    return {"max_num_patches": budget} if model.config.model_type == "siglip2" else {}


def process_images(processor: Any, budget: dict[str, int], paths: Sequence[str]) -> dict[str, torch.Tensor]:  # noqa: ANN401
    """The plain way from files to what the tower reads."""
    images = [Image.open(path).convert("RGB") for path in paths]
    return dict(processor(images=images, return_tensors="pt", **budget))


def tokenize(processor: Any, texts: Sequence[str]) -> torch.Tensor:  # noqa: ANN401
    """The plain way from captions to token ids ``(n, 64)``."""
    options: dict[str, Any] = {"padding": "max_length", "padding_side": "right", "truncation": True, "max_length": 64}
    ids: torch.Tensor = processor.tokenizer([text.lower() for text in texts], return_tensors="pt", **options).input_ids
    return ids


def _process(setting: Setting, paths: Sequence[str]) -> None:
    budget = budget_of(setting.model, setting.encoder.spec.budget)
    for part in chunks(paths, PLAIN_BATCH):
        process_images(setting.processor, budget, [str(setting.data / path) for path in part])


def _cut(setting: Setting, paths: Sequence[str], resizer: Resizer) -> None:
    spec = replace(setting.encoder.spec, resizer=resizer)
    out = np.empty((spec.most_tokens, spec.width), np.uint8)
    for path in paths:
        grid = spec.grid(*image_size(setting.data / path))
        read_patches(setting.data / path, grid, spec, out[: grid.tokens])
