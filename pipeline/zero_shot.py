"""Baseline without training: cosine of the image embedding with the mean of prompts for each category name."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import RenderableType

from ..cache import StoreMismatch
from ..heads.prototypes import class_prototypes, to_probability, zero_shot_scores
from .config import Config
from .device import pick_device
from .encoder import Encoder
from .evaluation import Labels, Scores, metrics_row, write_scores
from .progress import Progress
from .runs import Run, finish_run, start_run
from .stores import LabelledStore, describe_run, find_store, read_store, resolve_config
from .tables import metrics_table

# A short ensemble in the manner of CLIP's (Radford et al. 2021, section 3.1.4); lower case, as SigLIP2 is trained.
TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "a photo of the {}.",
    "there is a {} in the photo.",
    "a {} in a scene.",
    "{}",
)
LATENCY_QUERIES = 100


@dataclass(frozen=True, kw_only=True)
class ZeroShotResult:
    """A finished run and its row of metrics."""

    run: Run
    metrics: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """One flat JSON object."""
        return {"run": str(self.run.folder), "store": self.run.info.store, **self.metrics}

    def summary(self) -> list[RenderableType]:
        """What a person reads at the end."""
        return [metrics_table([self.metrics], f"{self.metrics['split']} split"), f"wrote {self.run.folder}"]


def zero_shot(
    config: Config,
    *,
    store: Path | None = None,
    split: str = "test",
    out: Path | None = None,
    runs: Path = Path("runs"),
    templates: Sequence[str] = TEMPLATES,
    force: bool = False,
    progress: Progress | None = None,
) -> ZeroShotResult:
    """Tag the images of a split by the names of the categories alone.

    Args:
        config: Model and hardware sections are used; the model is the store's when none was given.
        store: The store; the newest below ``data/cache`` when not given.
        split: Whose images are tagged.
        out: The run folder; a new one below ``runs`` when not given.
        runs: The folder of all runs.
        templates: Prompts with ``{}`` for the category's name.
        force: Replace an existing run in ``out``.
        progress: Who to tell.

    Raises:
        InputError: A bad store, a split without images, or a checkpoint other than the one the store was made with.
    """
    progress = progress or Progress()
    labelled = read_store(find_store(store), config)
    config, listing = resolve_config(config, labelled), labelled.listing
    rows = {name: listing.rows(name) for name in (split, "val") if name == split or (listing.splits == name).any()}
    encoder = _matching_encoder(config, labelled)
    names = listing.category_names
    progress.say(f"zero-shot on {labelled.store.folder}: {len(names)} categories x {len(templates)} prompts")
    prompts = [template.replace("{}", name) for name in names for template in templates]
    embedded = encoder.encode_texts(prompts).reshape(len(names), len(templates), -1)
    prototypes = class_prototypes(embedded)
    run = start_run(
        describe_run("zero-shot", config, labelled), config, label="zero-shot", out=out, runs=runs,
        device=str(encoder.device), force=force,
    )  # fmt: skip
    scores = {name: _probability(encoder, labelled.embeddings.v_img[at], prototypes) for name, at in rows.items()}
    for name, at in rows.items():
        write_scores(run.folder, "zero-shot", name, listing.image_ids[at], scores[name])
    row = _row(split, scores, {name: listing.labels_matrix()[at] for name, at in rows.items()})
    if "note" in row:
        progress.say(f"note: {row['note']}")
    row["query_latency_ms"] = _latency_ms(encoder, labelled.embeddings.v_img, prototypes)
    return ZeroShotResult(run=finish_run(run, [row]), metrics=row)


def _row(split: str, scores: dict[str, Scores], labels: dict[str, Labels]) -> dict[str, Any]:
    """The metrics of a split, its threshold tuned on val; a data set without val has no figures that are tuned."""
    none = (scores[split][:0], labels[split][:0])
    val = (scores["val"], labels["val"]) if "val" in scores else none
    return metrics_row("zero-shot", split, scores[split], labels[split], tuned_on=None if split == "val" else val)


def _matching_encoder(config: Config, labelled: LabelledStore) -> Encoder:
    """The checkpoint of the store; another one, or changed weights under the same name, is refused."""
    key = labelled.store.key
    encoder = Encoder.load(
        config.model.siglip2_variant, revision=config.model.revision or _commit(key.revision), patches=key.patches,
        text_length=key.text_length, device=pick_device(config.hardware.device),
    )  # fmt: skip
    if encoder.identity.revision != key.revision:
        raise StoreMismatch(
            "a store of another model", where=labelled.store.folder, got=f"{key.model} at {key.revision[:19]}",
            wanted=f"{encoder.identity.model} at {encoder.identity.revision[:19]}",
            do="name the checkpoint of the store with --model, or run `mmcli extract` again",
        )  # fmt: skip
    return encoder


def _commit(revision: str) -> str | None:
    """The hub commit that a store was made with; nothing for a local checkpoint."""
    return None if revision.startswith("sha256:") else revision


def _probability(
    encoder: Encoder, v_img: npt.NDArray[Any], prototypes: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    cosine = zero_shot_scores(v_img.astype(np.float32), prototypes)
    return to_probability(cosine, encoder.logit_scale, encoder.logit_bias)


def _latency_ms(encoder: Encoder, v_img: npt.NDArray[Any], prototypes: npt.NDArray[np.float32]) -> float:
    """Mean time from one stored embedding to its scores, in milliseconds."""
    times = []
    for row in range(min(LATENCY_QUERIES, len(v_img))):
        started = time.perf_counter()
        _probability(encoder, v_img[row : row + 1], prototypes)
        times.append(time.perf_counter() - started)
    return 1e3 * float(np.mean(times))
