"""Runs parts of the project on a GPU that is not there, and prints what it would have been asked to do as JSON.

    python cases.py LIBRARY GROUP [DATA MODEL]
"""  # noqa: D415

import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fake_cuda

fake_cuda.load(sys.argv[1])

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from mmcli.cache import StoreKey, StoreWriter  # noqa: E402
from mmcli.heads.knn import build_index  # noqa: E402
from mmcli.heads.model import make_head  # noqa: E402
from mmcli.pipeline.config import Config, load_config  # noqa: E402
from mmcli.pipeline.encoder import Encoder, EncoderParts  # noqa: E402
from mmcli.pipeline.finetune_data import LiveStore  # noqa: E402
from mmcli.pipeline.finetune_feed import Feed  # noqa: E402
from mmcli.pipeline.finetune_monitor import alikeness  # noqa: E402
from mmcli.pipeline.finetune_step import TowerStep  # noqa: E402
from mmcli.pipeline.finetune_team import Team  # noqa: E402
from mmcli.pipeline.finetune_towers import Towers  # noqa: E402
from mmcli.pipeline.manifest import Manifest, read_manifest  # noqa: E402
from mmcli.pipeline.monitor import Monitor  # noqa: E402
from mmcli.pipeline.patches import Grid  # noqa: E402
from mmcli.pipeline.progress import Progress  # noqa: E402
from mmcli.pipeline.shard_jobs import ShardJobs  # noqa: E402
from mmcli.pipeline.splits import Split  # noqa: E402
from mmcli.pipeline.step import Step  # noqa: E402
from mmcli.pipeline.trainer import Member, fit  # noqa: E402
from mmcli.pipeline.training_data import draw_head  # noqa: E402
from mmcli.pipeline.unreadable import Unreadable  # noqa: E402

CPU, GPU = torch.device("cpu"), torch.device("cuda")
Result = dict[str, Any]


@contextmanager
def steps_of(ledger: Any) -> Iterator[list[Result]]:
    """What each optimiser step was: its sizes, how it ran, launches and waits."""
    steps: list[Result] = []

    def watched(run: Callable[..., None]) -> Callable[..., None]:
        def wrapped(self: Step, sizes: tuple[int, ...]) -> None:
            launches, waits, graphs = ledger.n_launches, ledger.waits.copy(), (ledger.captured, ledger.replayed)
            on_default = ledger.on_default_stream
            run(self, sizes)
            how = "captured" if ledger.captured > graphs[0] else "replayed" if ledger.replayed > graphs[1] else "eager"
            steps.append({
                "sizes": sizes, "how": how, "launches": ledger.n_launches - launches,
                "on_default_stream": ledger.on_default_stream - on_default, "waits": dict(ledger.waits - waits),
            })  # fmt: skip

        return wrapped

    with patch.object(Step, "run", watched(Step.run)), patch.object(TowerStep, "run", watched(TowerStep.run)):
        yield steps


def train_heads(*, n: int = 384, seeds: Sequence[int] = (1,), epochs: int = 2, looks: bool = False, bfloat16: bool = True, **options: Any) -> Result:
    """Train heads on a store's arrays, one after another or in one pass."""
    options = {"preset": "recommended", "training.num_epochs": epochs, "training.batch_size": 64, "knn.K": 5, **options}
    config = load_config(options=options)
    width, classes, rng = 768, 80, np.random.default_rng(0)
    v = rng.normal(size=(n, width)).astype(np.float16)
    labels = rng.integers(0, 2, (n, classes)).astype(np.uint8)
    with fake_cuda.fake_cuda(bfloat16=bfloat16) as ledger:
        split = Split.place(v, np.repeat(v[:, None], 5, 1), np.full(n, 5), labels, GPU)
        members = []
        for seed in seeds:
            head = make_head(config.head, config.fusion, config.hash, config.classifier, width=width).to(GPU)
            if hasattr(head, "fusion"):
                head.fusion.fit_log_norms(split.log_norms())
            monitor = Monitor(config, split, split) if looks else (lambda _: {"val_mAP": 0.5})
            members.append(Member(head=head, seed=seed, monitor=monitor, on_epoch=lambda *_: None))
        with steps_of(ledger) as steps, Progress().task("", 1) as task:
            fit(members, split, config, task=task)
    return {"steps": steps, "faults": ledger.faults, "graphs": ledger.captured, "waits": dict(ledger.waits)}


def deterministic(run: Callable[[], Result]) -> Result:
    """As with ``--deterministic``."""
    torch.use_deterministic_algorithms(True)
    try:
        return run()
    finally:
        torch.use_deterministic_algorithms(False)


FOCAL = {"loss.focal_loss": True, "loss.asymmetric_loss": False}
HEADS: dict[str, Callable[[], Result]] = {
    **{preset: partial(train_heads, preset=preset) for preset in ("recommended", "plan", "small", "direction-only")},
    **{f"{bits} bits": partial(train_heads, **{"hash.bits": bits}) for bits in (0, 32, 128)},
    "mlp": partial(train_heads, head="mlp", **{"hash.bits": 0}),
    **{f"fusion {kind}": partial(train_heads, **{"fusion.type": kind}) for kind in ("concat", "hadamard")},
    **{f"{side} alone": partial(train_heads, **{"fusion.inputs": side}) for side in ("image", "text")},
    "adapter": partial(train_heads, **{"fusion.adapter": "linear"}),
    "focal": partial(train_heads, **FOCAL),
    "balanced": partial(train_heads, **{"loss.class_weights": "balanced"}),
    "average": partial(train_heads, **{"training.ema_decay": 0.9}),
    "accumulation": partial(train_heads, **{"training.accumulation_steps": 2, "training.ema_decay": 0.9}),
    "two sizes": partial(train_heads, n=333, epochs=3),
    "float32": partial(train_heads, **{"training.mixed_precision": False}),
    "float16": partial(train_heads, bfloat16=False),
    "beta": partial(train_heads, **{"hash.beta": 5.0}),
    "straight-through": partial(train_heads, **{"hash.activation": "ste"}),
    "no mixtures": partial(train_heads, **{"training.mixup": False}),
    "unclipped": partial(train_heads, **{"training.gradient_clip_norm": None}),
    "deterministic": partial(deterministic, partial(train_heads, **{"hardware.deterministic": True})),
    "monitor": partial(train_heads, n=900, epochs=1, looks=True),
    "monitor of the classifier": partial(train_heads, epochs=1, looks=True, **{"training.monitor": "classifier"}),
    "3 replicas": partial(train_heads, seeds=(1, 2, 3)),
    "3 replicas, plan": partial(train_heads, seeds=(1, 2, 3), preset="plan"),
    "3 replicas, small": partial(train_heads, seeds=(1, 2, 3), preset="small"),
    "3 replicas, average": partial(train_heads, seeds=(1, 2, 3), **{"training.ema_decay": 0.9}),
    "3 replicas, adapter": partial(train_heads, seeds=(1, 2, 3), **{"fusion.adapter": "linear"}),
    "3 replicas, focal": partial(train_heads, seeds=(1, 2, 3), **FOCAL),
}


def on_gpu(parts: EncoderParts, dtype: str) -> EncoderParts:
    """A checkpoint that was loaded on the CPU, on the GPU."""
    identity = type(parts.identity)(**{**vars(parts.identity), "compute_dtype": dtype})
    return parts._replace(model=parts.model.to(GPU), device=GPU, identity=identity)


@contextmanager
def real_tokens() -> Iterator[None]:
    """Token ids are those of the tokenizer, not stand-ins."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    tokenize = Encoder.tokenize

    def outside(self: Encoder, texts: Sequence[str]) -> torch.Tensor:
        with unset_fake_temporarily():
            return tokenize(self, texts)

    with patch.object(Encoder, "tokenize", outside):
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
        with StoreWriter(out, key, listing.table, width=encoder.width, shard_rows=64, batch_tokens=encoder.batch_tokens) as writer:
            unreadable = Unreadable(data, listing.paths, "stop", encoder.spec)
            jobs = ShardJobs(encoder, listing, writer, unreadable, workers=0, ahead=2, progress=Progress())
            count("shard of images", lambda: jobs.encode_images(writer.missing("image")[:1]))
            count("shard of images again", lambda: jobs.encode_images(writer.missing("image")[:1]))
            count("shard of captions", lambda: jobs.encode_captions(writer.missing("text")[:1]))
    return {**result, "faults": ledger.faults}


def search(n: int, bits: int, queries: int, K: int) -> Result:
    """Search codes with the index of torch."""
    rng = np.random.default_rng(0)
    codes, asked = (rng.integers(0, 256, (size, bits // 8)).astype(np.uint8) for size in (n, queries))
    with fake_cuda.fake_cuda() as ledger:
        found = build_index("hamming", packed=codes, device="cuda").search(packed=asked, K=K)
    assert found.index.shape == (queries, K)
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
    """Towers of base size."""
    return {
        "encode": partial(encode, data, model, dtype="bfloat16", patches=256),
        "last-2": partial(tune, data, model, "last-2", patches=256),
        "all": partial(tune, data, model, "all", patches=256),
    }


def tune(
    data: Path, model: Path, unfreeze: str, which: str = "both", *, patches: int = 64, dtype: str = "bfloat16", n: int = 20, **options: Any
) -> Result:
    """Finetune towers for an epoch, and embed everything as a look at val does."""
    whole = read_manifest(data / "manifest.parquet")
    listing = Manifest.from_columns(
        image_ids=whole.image_ids[:n], paths=whole.paths[:n], splits=["train"] * (n - 8) + ["val"] * 4 + ["test"] * 4,
        captions=whole.captions[:n], labels=[[row % 5] for row in range(n)], category_names=whole.category_names, name="dry",
    )  # fmt: skip
    options = {
        "finetune.unfreeze": unfreeze, "finetune.towers": which, "training.batch_size": 8, "training.num_epochs": 1,
        "model.max_num_patches": patches, "data.num_workers": 0, "classifier.num_classes": len(whole.category_names), **options,
    }  # fmt: skip
    config: Config = load_config(options=options)
    parts = Encoder.parts(str(model), patches=patches, device=CPU)
    with fake_cuda.fake_cuda() as ledger, real_tokens():
        placed = on_gpu(parts, dtype)
        trained = Towers(placed, config.finetune)
        captions = 1 if "text" in trained.sides else 5
        with LiveStore(listing, data, placed, config, captions=captions, team=Team(GPU), progress=Progress()) as store:
            store.embed_images(np.arange(n), None)
            store.embed_captions(np.arange(n), None)
            head = draw_head(config, width=store.encoder.width, device=GPU)
            if hasattr(head, "fusion"):
                head.fusion.fit_log_norms(store.whole.log_norms())

            def look(_: Any) -> Result:
                store.renew()
                store.embed_images(np.arange(n), None)
                return {"val_mAP": 0.5, **alikeness(store.splits["val"])}

            member = Member(head=head, seed=1, monitor=look, on_epoch=lambda *_: None)
            training = config.training
            each = {"batch_size": training.batch_size * training.accumulation_steps, "accumulation_steps": 1}
            batches = config.model_copy(update={"training": training.model_copy(update=each)})
            make_step = partial(TowerStep, feed=Feed(trained, store, config))
            with steps_of(ledger) as steps, Progress().task("", 1) as task:
                fit([member], store.splits["train"], batches, task=task, make_step=make_step)
        left = [name for name, parameter in trained.trained.items() if parameter.grad is not None]
    return {"steps": steps, "faults": [*ledger.faults, *(f"a gradient is left of {name}" for name in left)]}


def finetuning(data: Path, model: Path) -> dict[str, Callable[[], Result]]:
    """Towers that are trained."""
    run = partial(tune, data, model)
    every = {"hardware.deterministic": True}
    return {
        "last-2": partial(run, "last-2"),
        "all": partial(run, "all"),
        "all, deterministic": partial(deterministic, partial(run, "all", **every)),
        "last-1 of images, accumulated": partial(run, "last-1", "image", **{"training.accumulation_steps": 2}),
        "all, checkpointed": partial(run, "all", **{"finetune.gradient_checkpointing": True}),
        "last-1 of texts, augmented, float32": partial(
            run, "last-1", "text", dtype="float32", **{"finetune.augment": True, "training.mixed_precision": False}
        ),
        "frozen, augmented": partial(run, "none", **{"finetune.augment": True}),
    }


def main() -> None:
    """Run the cases of a group; one that raises is a fault."""
    transformers.logging.set_verbosity_error()
    group, where = sys.argv[2], [Path(word) for word in sys.argv[3:]]
    cases = HEADS if group == "heads" else {"towers": towers, "base": base}[group](*where)
    results = {}
    for name, run in cases.items():
        try:
            results[name] = run()
        except Exception:  # noqa: BLE001 - whatever a case raises is what is looked for
            results[name] = {"faults": [traceback.format_exc()], "steps": []}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
