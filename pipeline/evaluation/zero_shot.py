"""Baseline without training: cosine of an image, or its caption, with the mean of prompts for each category name."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from rich.console import RenderableType
from transformers import AutoConfig

from ...cache import Store, StoreMismatch
from ...errors import InputError
from ...heads.prototypes import class_prototypes, mean_logits, zero_shot_scores
from ...heads.sigmoid import sigmoid
from ..core.config import Config, ModelConfig
from ..core.console import metrics_table
from ..core.device import device_line, pick_device
from ..core.interrupts import interruptible
from ..core.progress import Progress
from ..core.run import Run, finish_run, start_run
from ..data.manifest import Manifest
from ..data.protocols import chosen
from ..extraction.encoder import Encoder
from ..extraction.model_source import find_model
from ..extraction.siglip import fixed_patches
from ..extraction.stores import LabelledStore, describe_run, find_store, read_store, resolve_config
from .metrics import Labels, Scores, metrics_row, write_scores
from .prompts import GAP, TEMPLATES

Inputs = Literal["image", "text", "both"]
LATENCY_QUERIES = 100
ANY_PATCHES = 256


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
        row = self.metrics
        title = f"{row['split']} split, inputs {row['inputs']}, {row['n_prompts']} prompts a class"
        return [metrics_table([self.metrics], title), f"wrote {self.run.folder}"]


def zero_shot(
    config: Config,
    *,
    store: Path | None = None,
    split: str = "test",
    out: Path | None = None,
    runs: Path = Path("runs"),
    templates: Sequence[str] = TEMPLATES,
    inputs: Inputs = "image",
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
        inputs: Whose cosine with the prompts counts: the image's, its first caption's, or both by the mean of logits.
        force: Replace an existing run in ``out``.
        progress: Who to tell.

    Raises:
        InputError: A bad store, a split without images, an image without the caption that is asked for, a checkpoint
            that cannot be loaded, or another one than the store was made with.
    """
    progress = progress or Progress()
    labelled = _read(find_store(store), config)
    asked = config.model.revision
    config, listing = resolve_config(config, labelled), labelled.listing
    rows = _rows(config, listing, split)
    _check_captions(labelled, rows, inputs)
    encoder = _matching_encoder(config, labelled, asked)
    names = listing.category_names
    progress.say(
        f"zero-shot of {labelled.store.folder}: {len(names)} categories x {len(templates)} prompts, {inputs},"
        f" on {device_line(encoder.device, encoder.identity.compute_dtype)}"
    )
    prompts = [template.replace(GAP, name) for name in names for template in templates]
    embedded = encoder.encode_texts(prompts).reshape(len(names), len(templates), -1)
    score = _Scorer(labelled, class_prototypes(embedded), encoder, inputs)
    run = start_run(
        describe_run("zero-shot", config, labelled, precision=encoder.identity.compute_dtype),
        config,
        label="zero-shot",
        out=out,
        runs=runs,
        device=str(encoder.device),
        force=force,
    )
    with interruptible(f"{run.folder} is not finished", also=[] if out is None else ["--force"]):
        return _finish(run, score, listing, rows, split, progress, inputs=inputs, templates=templates)


def _finish(
    run: Run,
    score: "_Scorer",
    listing: Manifest,
    rows: Mapping[str, npt.NDArray[np.int64]],
    split: str,
    progress: Progress,
    *,
    inputs: Inputs,
    templates: Sequence[str],
) -> ZeroShotResult:
    """Score the images, and write what a run has."""
    logits = {name: score(at) for name, at in rows.items()}
    labels = {name: listing.labels_matrix()[at] for name, at in rows.items()}
    for name, at in rows.items():
        write_scores(run.folder, "zero-shot", name, listing.image_ids[at], sigmoid(logits[name]), labels[name])
    row = _row(run, split, logits, labels)
    if "note" in row:
        progress.say(f"note: {row['note']}")
    row |= {"inputs": inputs, "n_prompts": len(templates), "prompts": list(templates)}
    row["query_latency_ms"] = _latency_ms(score, len(listing))
    return ZeroShotResult(run=finish_run(run, [row]), metrics=row)


class _Scorer:
    """Logits of images, from their stored embeddings."""

    def __init__(
        self, labelled: LabelledStore, prototypes: npt.NDArray[np.float32], encoder: Encoder, inputs: Inputs
    ) -> None:
        self._embeddings, self._prototypes = labelled.embeddings, prototypes
        self._scale, self._bias, self._inputs = encoder.logit_scale, encoder.logit_bias, inputs

    def __call__(self, rows: npt.NDArray[np.int64] | slice) -> npt.NDArray[np.float64]:
        parts = []
        if self._inputs != "text":
            parts.append((self._embeddings.v_img[rows], "image embedding"))
        if self._inputs != "image":
            parts.append((self._embeddings.v_txt[rows, 0], "caption embedding"))
        cosines = [zero_shot_scores(v.astype(np.float32), self._prototypes, name=name) for v, name in parts]
        return mean_logits(cosines, self._scale, self._bias)


def _rows(config: Config, listing: Manifest, split: str) -> dict[str, npt.NDArray[np.int64]]:
    """Rows of a split and of val under the protocol; a manifest's own splits may lack val."""
    if config.data.split_type != "karpathy":
        found = chosen(config.data, listing)
        return {name: found[name] for name in dict.fromkeys((split, "val"))}
    return {name: listing.rows(name) for name in (split, "val") if name == split or (listing.splits == name).any()}


def _row(run: Run, split: str, logits: Mapping[str, Scores], labels: Mapping[str, Labels]) -> dict[str, Any]:
    """The metrics of a split, its thresholds tuned on val; a data set without val has no figures that are tuned."""
    none = (logits[split][:0], labels[split][:0])
    val = None if split == "val" else (logits["val"], labels["val"]) if "val" in logits else none
    return metrics_row("zero-shot", split, logits[split], labels[split], tuned_on=val, logits=True, run=run)


def _read(folder: Path, config: Config) -> LabelledStore:
    """The store; one that was imported only names its model, so whatever --model says may be its checkpoint."""
    imported = "imported" in Store.open(folder).extra
    return read_store(folder, config.model_copy(update={"model": ModelConfig()}) if imported else config)


def _check_captions(labelled: LabelledStore, rows: Mapping[str, npt.NDArray[np.int64]], inputs: Inputs) -> None:
    """Refuse images without a caption where captions are asked for."""
    for split, at in rows.items():
        without = at[labelled.embeddings.n_captions[at] == 0] if inputs != "image" else at[:0]
        if len(without):
            first = labelled.listing.image_ids[without[0]]
            raise InputError(
                "images without a caption",
                where=labelled.store.folder,
                wanted="a caption for each",
                got=f"{len(without)} of {len(at)} {split} images, the first of them image id {first}",
                do="give --inputs image, or a manifest with captions",
            )


def _matching_encoder(config: Config, labelled: LabelledStore, asked: str | None) -> Encoder:
    """The checkpoint of the store; another one, or changed weights under the same name, is refused.

    Args:
        config: With the checkpoint that the store, or the user, names.
        labelled: The store.
        asked: The revision that the user asked for; the commit of the store when not given.
    """
    key, device = labelled.store.key, pick_device(config.hardware.device)
    name = config.model.siglip2_variant
    # An imported store may name a folder, whose revision is a word of whoever imported it.
    revision = asked or (key.commit if name == key.model and not Path(name).is_dir() else None)
    if "imported" in labelled.store.extra:
        return _named_encoder(name, revision, labelled, device)
    encoder = Encoder.load(name, revision=revision, patches=key.patches, text_length=key.text_length, device=device)
    if encoder.identity.revision != key.revision:
        raise StoreMismatch(
            "a store of another model",
            where=labelled.store.folder,
            got=f"{key.model} at {key.revision[:47]}",
            wanted=f"{encoder.identity.model} at {encoder.identity.revision[:47]}",
            do="leave --revision out and name the checkpoint of the store with --model, or run `mmcli extract` again",
        )
    return encoder


def _named_encoder(name: str, revision: str | None, labelled: LabelledStore, device: torch.device) -> Encoder:
    """The checkpoint that an imported store names, or that was given for it; only its width can be compared."""
    try:
        source = find_model(name, revision)
        config = source.load("the configuration", AutoConfig)
        encoder = Encoder.load(name, revision=source.commit, patches=_own_patches(config), device=device)
    except InputError as error:
        raise InputError(
            error.what,
            where=error.where,
            got=error.got,
            wanted="the checkpoint that computed this imported store",
            do="give --model its folder or hub id",
        ) from error
    if encoder.width != labelled.store.width:
        raise StoreMismatch(
            "a store of another model",
            where=labelled.store.folder,
            got=f"embeddings {labelled.store.width} wide",
            wanted=f"{encoder.width}, as {encoder.identity.model} makes them",
            do="give --model the right checkpoint",
        )
    return encoder


def _own_patches(config: Any) -> int:  # noqa: ANN401
    """The patch budget of a fixed-resolution checkpoint; any for the others, because no image is encoded here."""
    return fixed_patches(config) if getattr(config, "model_type", None) == "siglip" else ANY_PATCHES


def _latency_ms(score: _Scorer, n_images: int) -> float:
    """Mean time from one stored embedding to its scores, in milliseconds."""
    times = []
    for row in range(min(LATENCY_QUERIES, n_images)):
        started = time.perf_counter()
        sigmoid(score(slice(row, row + 1)))
        times.append(time.perf_counter() - started)
    return 1e3 * float(np.mean(times))
