"""Extraction, the torch index and the finetuning of towers on a GPU that is not there: cases for ``cases.py``."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fake_cuda
import numpy as np
import torch
import transformers

from mmcli.cache import StoreKey, StoreWriter
from mmcli.heads.knn import build_index
from mmcli.pipeline.core.config import Config, load_config
from mmcli.pipeline.core.progress import Progress
from mmcli.pipeline.data.manifest import Manifest, read_manifest
from mmcli.pipeline.extraction.caption_tokens import CaptionTokenizer
from mmcli.pipeline.extraction.encoder import Encoder, EncoderParts
from mmcli.pipeline.extraction.images import Grid
from mmcli.pipeline.extraction.shards import ShardJobs, Unreadable
from mmcli.pipeline.finetuning.batches import TowerBatches, TowerStep
from mmcli.pipeline.finetuning.distributed import ProcessGroup
from mmcli.pipeline.finetuning.embeddings import LiveStore
from mmcli.pipeline.finetuning.finetune import alikeness
from mmcli.pipeline.finetuning.towers import Towers
from mmcli.pipeline.training.loop import Hooks, fit
from mmcli.pipeline.training.setup import draw_head

transformers.logging.set_verbosity_error()
CPU, GPU = torch.device("cpu"), torch.device("cuda")
Result = dict[str, Any]


def on_gpu(parts: EncoderParts, dtype: str) -> EncoderParts:
    """A checkpoint that was loaded on the CPU, on the GPU."""
    identity = type(parts.identity)(**{**vars(parts.identity), "compute_dtype": dtype})
    return parts._replace(model=parts.model.to(GPU), device=GPU, identity=identity)


@contextmanager
def real_tokens() -> Iterator[None]:
    """Token ids are those of the tokenizer, not stand-ins."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    tokenize = CaptionTokenizer.__call__

    def outside(self: CaptionTokenizer, texts: Sequence[str]) -> torch.Tensor:
        with unset_fake_temporarily():
            return tokenize(self, texts)

    with patch.object(CaptionTokenizer, "__call__", outside):
        yield


def encode(data: Path, model: Path, *, dtype: str, pin: bool = True, patches: int = 64) -> Result:
    """Encode a batch of images, one of texts, a list of texts, and the shards of a store."""
    listing, parts = read_manifest(data / "manifest.parquet"), Encoder.parts(str(model), patches=patches, device=CPU)
    result: Result = {}
    with fake_cuda.fake_cuda() as ledger, real_tokens():
        encoder = Encoder(on_gpu(parts, dtype), pin_memory=pin)

        def count(name: str, run: Callable[[], Any]) -> None:
            launches, waits = ledger.n_launches, ledger.waits.copy()
            run()
            result[name] = {"launches": ledger.n_launches - launches, "waits": dict(ledger.waits - waits)}

        side = int(encoder.spec.budget**0.5)
        grid = Grid(side, side)
        pixels = np.zeros((encoder.batch_tokens // grid.tokens, grid.tokens, encoder.spec.width), np.uint8)
        encoder.image_features(pixels, grid)  # the position embeddings of a grid are resized once
        count("images", lambda: encoder.image_features(pixels, grid))
        count("texts", lambda: encoder.text_features(torch.zeros((512, 64), dtype=torch.int64)))
        count("list of texts", lambda: encoder.encode_texts([text for texts in listing.captions for text in texts]))
        key = StoreKey(**vars(encoder.identity), dtype="float16", manifest_sha256=listing.sha256)
        out = Path(sys.argv[1]).parent / f"store-{dtype}-{pin}-{patches}"
        with StoreWriter(
            out, key, listing.table, width=encoder.width, shard_rows=32, batch_tokens=encoder.batch_tokens
        ) as writer:
            unreadable = Unreadable(data, listing.paths, "stop", encoder.spec)
            jobs = ShardJobs(encoder, listing, writer, unreadable, workers=0, progress=Progress())
            count("shard of images", lambda: jobs.encode_images(writer.missing("image")[:1]))
            count("shard of images again", lambda: jobs.encode_images(writer.missing("image")[:1]))
            count("shard of captions", lambda: jobs.encode_captions(writer.missing("text")[:1]))
    return {**result, "faults": ledger.faults}


def search(n: int, bits: int, queries: int, K: int) -> Result:
    """Search codes with the index of torch."""
    rng = np.random.default_rng(0)
    codes, asked = (rng.integers(0, 256, (size, bits // 8)).astype(np.uint8) for size in (n, queries))
    with fake_cuda.fake_cuda() as ledger:
        neighbours = build_index("hamming", packed=codes, device="cuda").search(packed=asked, K=K)
    assert neighbours.index.shape == (queries, K)
    return {"faults": ledger.faults, "launches": ledger.n_launches, "waits": dict(ledger.waits)}


def towers(data: Path, model: Path) -> dict[str, Callable[[], Result]]:
    """Extraction, the index, and towers that are trained."""
    return {
        **finetuning(data, model),
        "bfloat16": partial(encode, data, model, dtype="bfloat16"),
        "float32": partial(encode, data, model, dtype="float32"),
        "not pinned": partial(encode, data, model, dtype="bfloat16", pin=False),
        "index, 64 bits": partial(search, 100_000, 64, 2000, 20),
        "index, one query": partial(search, 5_000_000, 64, 1, 20),
        "index, 4096 bits": partial(search, 5000, 4096, 10, 50),
    }


def base(data: Path, model: Path) -> dict[str, Callable[[], Result]]:
    """Cases with towers of base size."""
    return {
        "encode": partial(encode, data, model, dtype="bfloat16", patches=256),
        "last-2": partial(tune, data, model, "last-2", patches=256),
        "all": partial(tune, data, model, "all", patches=256),
    }


def tune(
    data: Path,
    model: Path,
    unfreeze: str,
    which: str = "both",
    *,
    patches: int = 64,
    dtype: str = "bfloat16",
    n: int = 20,
    **options: Any,
) -> Result:
    """Finetune towers for an epoch, and embed everything as a look at val does."""
    whole = read_manifest(data / "manifest.parquet")
    listing = Manifest.from_columns(
        image_ids=whole.image_ids[:n],
        paths=whole.paths[:n],
        splits=["train"] * (n - 8) + ["val"] * 4 + ["test"] * 4,
        captions=whole.captions[:n],
        labels=[[row % 5] for row in range(n)],
        category_names=whole.category_names,
        name="dry",
    )
    options = {
        "finetune.unfreeze": unfreeze,
        "finetune.towers": which,
        "training.batch_size": 8,
        "training.num_epochs": 1,
        "model.max_num_patches": patches,
        "data.num_workers": 0,
        "classifier.num_classes": len(whole.category_names),
        **options,
    }
    config: Config = load_config(options=options)
    parts = Encoder.parts(str(model), patches=patches, device=CPU)
    with fake_cuda.fake_cuda() as ledger, real_tokens():
        placed = on_gpu(parts, dtype)
        trained = Towers(placed, config.finetune)
        captions = 1 if "text" in trained.sides else 5
        with LiveStore(
            listing, data, placed, config, captions=captions, group=ProcessGroup(GPU), progress=Progress()
        ) as store:
            store.embed("image", np.arange(n), quiet=True)
            store.embed("text", np.arange(n), quiet=True)
            head = draw_head(config, width=store.encoder.width, device=GPU)
            head.fit_log_norms(store.whole.log_norms())

            def look(_: Any) -> Result:
                store.renew()
                store.embed("image", np.arange(n), quiet=True)
                return {"val_mAP": 0.5, **alikeness(store.splits["val"])}

            hooks = Hooks(monitor=look, on_epoch=lambda *_: None)
            training = config.training
            each = {"batch_size": training.batch_size * training.accumulation_steps, "accumulation_steps": 1}
            batches = config.model_copy(update={"training": training.model_copy(update=each)})
            make_step = partial(TowerStep, batches=TowerBatches(trained, store, config))
            with fake_cuda.steps_of(ledger) as steps, Progress().task("", 1) as task:
                fit(head, store.splits["train"], batches, hooks, task=task, make_step=make_step)
        left = [name for name, parameter in trained.trained.items() if parameter.grad is not None]
    return {"steps": steps, "faults": [*ledger.faults, *(f"a gradient is left of {name}" for name in left)]}


def finetuning(data: Path, model: Path) -> dict[str, Callable[[], Result]]:
    """Cases whose towers are trained."""
    run = partial(tune, data, model)
    every = {"hardware.deterministic": True}
    return {
        "last-2": partial(run, "last-2"),
        "all": partial(run, "all"),
        "all, deterministic": partial(fake_cuda.deterministic, partial(run, "all", **every)),
        "last-1 of images, accumulated": partial(
            run, "last-1", "image", **{"training.accumulation_steps": 2, "training.batch_size": 3}
        ),
        "all, checkpointed": partial(run, "all", **{"finetune.gradient_checkpointing": True}),
        "last-1 of texts, augmented, float32": partial(
            run, "last-1", "text", dtype="float32", **{"finetune.augment": True, "training.mixed_precision": False}
        ),
        "frozen, augmented": partial(run, "none", **{"finetune.augment": True}),
    }
