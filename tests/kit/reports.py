"""A data set, a run and rows of experiments for reports, drawn by a seed in a second; nothing is trained.

Names and captions hold markup of every kind that a report is written in.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmcli.pipeline.ablation.records import write_rows
from mmcli.pipeline.core.config import load_config
from mmcli.pipeline.core.results import Codes, write_codes
from mmcli.pipeline.core.run import Run, RunInfo, finish_run, now, start_run
from mmcli.pipeline.data.manifest import Manifest, write_manifest
from mmcli.pipeline.evaluation.metrics import classifier_row, metrics_row, write_scores
from mmcli.pipeline.evaluation.search import Evaluated, NeighbourSearch

NAMES = ("person", "<b>cat</b>", "a|b", "$x_1$ & 50%", "`dog`", "quo\"te'd", "plain")
SCRIPT = "<script>window.pwned = 1</script>"
CAPTIONS = (
    SCRIPT,
    "[click](javascript:alert(1)) *bold* _under_",
    "a | b ``` c",
    "</td></tr></table>",
    "$\\frac{1}{2}$ \\input{x} 100%",
    '"><img src=x onerror="window.pwned = 1">',
    "line\none and   two",
    "a plain caption",
)
SIZES = {"train": 120, "val": 40, "test": 60}
BITS, SEEDS = 32, (1, 2, 3)


@dataclass(frozen=True)
class Kit:
    """Where everything lies."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def run(self) -> Path:
        return self.runs / "head"

    @property
    def ablations(self) -> Path:
        return self.runs / "ablations"


def make_kit(root: Path, *, norms: bool = True, rows: bool = True) -> Kit:
    kit, rng = Kit(root), np.random.default_rng(0)
    ids = {split: np.arange(n) + 1000 * at for at, (split, n) in enumerate(SIZES.items())}
    labels = {split: (rng.random((n, len(NAMES))) < 0.35).astype(np.uint8) for split, n in SIZES.items()}
    labels["test"][:2] = 0  # an image without a label has no AP
    listing = _write_data(kit, ids, labels)
    _write_run(kit, ids, labels, listing.sha256, norms=norms)
    if rows:
        _write_rows(kit, ids["test"], labels["test"])
    return kit


def _write_data(kit: Kit, ids, labels) -> Manifest:
    rng = np.random.default_rng(1)
    columns: dict[str, list] = {"image_ids": [], "paths": [], "splits": [], "captions": [], "labels": []}
    for split in SIZES:
        (kit.data / split).mkdir(parents=True)
        for image, y in zip(ids[split], labels[split], strict=True):
            path = f"{split}/{image}.jpg"
            size = (40, 24) if image % 2 else (24, 40)
            Image.new("RGB", size, tuple(rng.integers(0, 256, 3).tolist())).save(kit.data / path)
            for key, value in zip(
                columns,
                (int(image), path, split, [CAPTIONS[image % len(CAPTIONS)]], np.flatnonzero(y).tolist()),
                strict=True,
            ):
                columns[key].append(value)
    (kit.data / "test" / f"{ids['test'][5]}.jpg").write_bytes(b"no image")
    listing = Manifest.from_columns(**columns, category_names=NAMES, name='kit <i>"x"</i>')
    write_manifest(kit.data / "manifest.parquet", listing)
    return listing


def _write_run(kit: Kit, ids, labels, sha256: str, *, norms: bool) -> None:
    rng = np.random.default_rng(2)
    config = load_config(options={"hash.bits": BITS, "knn.K": 10})
    info = RunInfo(
        kind="train-head",
        status="running",
        created=now(),
        config_digest="0" * 8,
        preset="recommended",
        seed=1,
        store=str(kit.root / "gone"),
        store_digest="d" * 64,
        model="m",
        patches=64,
        manifest_sha256=sha256,
        category_names=NAMES,
    )
    run = start_run(info, config, label="x", out=kit.run, runs=kit.runs, device="cpu")
    base = rng.normal(size=(len(NAMES), BITS))
    codes = {}
    for split, y in labels.items():
        soft = np.tanh(y @ base + rng.normal(0, 1.2, (len(y), BITS))).astype(np.float32)
        logits = (3 * y - 1.5 + rng.normal(0, 1.6, y.shape)).astype(np.float32)
        lengths = rng.gamma(9, 1, (2, len(y))).astype(np.float32)
        codes[split] = Codes(
            image_id=ids[split],
            soft=soft,
            packed=np.packbits(soft >= 0, axis=1),
            labels=y,
            logits=None if split == "train" else logits,
            norm_img=lengths[0] if norms else None,
            norm_txt=lengths[1] if norms else None,
        )
        write_codes(run.folder, split, codes[split])
    lines = [
        {"epoch": e, "loss": 1 / e, "bce": 0.5 / e, "cosine": 0.8, "decorr": 0.0, "val_mAP": 0.6 - 0.2 / e}
        for e in range(1, 6)
    ]
    (run.folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_scores(run.folder, "classifier", "test", codes["test"].image_id, codes["test"].probabilities)
    rows = [knn_row(run, codes, config.knn), classifier_row("test", codes["test"], val=codes["val"])]
    finish_run(run, rows)


def knn_row(run: Run, codes, knn) -> dict:
    """What ``knn-eval`` writes, as far as a report reads it."""
    evaluated = Evaluated(base=codes["train"], val=codes["val"], query=codes["test"], split="test")
    test, val, _ = NeighbourSearch(evaluated, [knn]).vote(knn)
    write_scores(run.folder, "knn", "test", codes["test"].image_id, test)
    row = metrics_row("knn", "test", test, codes["test"].labels, tuned_on=(val, codes["val"].labels))
    return row | {
        "K": knn.K,
        "distance_metric": "hamming",
        "voting_strategy": "softmax",
        "tau": knn.tau,
        "query_latency_ms": 0.1,
    }


def scores_of(labels, skill: float, seed: int) -> np.ndarray:
    """Scores that know something of the labels; the same seed draws the same noise."""
    return (1 / (1 + np.exp(-np.random.default_rng(seed).normal(size=labels.shape) - skill * labels))).astype(
        np.float32
    )


# How much the values know: the first question is a clear yes, the second a tie, the third a clear no.
SKILLS = {
    ("A1", "hadamard_magnitude / rms"): 3.0,
    ("A1", "hadamard / rms"): 1.0,
    ("A1", "concat / rms"): 1.0,
    ("A3", "knn"): 1.0,
    ("A3", "classifier"): 3.0,
    ("A2", "0"): 2.0,
    ("A2", "32"): 1.0,
    ("A2", "64"): 2.0,
    ("C2", "hamming"): 1.5,
    ("C2", "cosine"): 1.5,
    ("base", "zero-shot"): 0.5,
    ("base", "full"): 3.0,
}


def row_of(kit: Kit, ids, labels, experiment: str, value: str, order: int, seed: int, skill: float) -> dict:
    from safetensors.numpy import save_file

    scores = scores_of(labels, skill, seed)
    name = f"scores/{experiment}-{order}-{seed}.safetensors"
    (kit.ablations / "scores").mkdir(parents=True, exist_ok=True)
    save_file({"scores": scores, "image_id": ids, "labels": labels}, kit.ablations / name)
    figures = metrics_row("knn", "test", scores, labels, tuned_on=(scores, labels))
    latency = (0.5 + 0.01 * seed) * (3.0 if value == "cosine" else 1.0)
    return {
        "experiment": experiment,
        "varies": "x",
        "value": value,
        "order": order,
        "seed": seed,
        "status": "finished",
        "note": "",
        "key": name,
        "training_key": "",
        "base": "b",
        "run": "runs/none",
        "scores": name,
        "preset": "recommended",
        "config": "{}",
        **figures,
        "query_latency_ms": latency,
        "query_latency_ms_p50": latency,
        "index_bytes": 1000 * (order + 1),
        "n_index": 120,
        "train_s": 1.5,
    }


def _write_rows(kit: Kit, ids, labels) -> None:
    rows = [
        row_of(kit, ids, labels, experiment, value, order, seed, skill)
        for order, ((experiment, value), skill) in enumerate(SKILLS.items())
        for seed in SEEDS
    ]
    failed = {key: rows[0][key] for key in ("varies", "training_key", "base", "preset", "config")}
    rows.append(
        {
            **failed,
            "experiment": "B3",
            "value": "512",
            "order": 0,
            "seed": 1,
            "status": "failed",
            "note": f"no store {SCRIPT}",
            "key": "k",
        }
    )
    write_rows(kit.ablations, rows)
