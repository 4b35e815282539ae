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
from ..core.defaults import RUNS
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
        """The row, the run and its store as one flat JSON object."""
        return {"run": str(self.run.folder), "store": self.run.info.store, **self.metrics}

    def summary(self) -> list[RenderableType]:
        """The table and the folder, as they are printed."""
        row = self.metrics
        title = f"{row['split']} split, inputs {row['inputs']}, {row['n_prompts']} prompts a class"
        return [metrics_table([self.metrics], title), f"wrote {self.run.folder}"]


def zero_shot(
    config: Config,
    *,
    store: Path | None = None,
    split: str = "test",
    out: Path | None = None,
    templates: Sequence[str] = TEMPLATES,
    inputs: Inputs = "image",
    force: bool = False,
    progress: Progress | None = None,
) -> ZeroShotResult:
    """Tag the images of a split by the names of the categories alone.

    Args:
        config: Model and hardware sections are used; the model is the store's when none was given.
        store: The store; the newest below ``data/cache`` when not given.
        split: The split whose images are tagged.
        out: The run folder; a new one below ``runs`` when not given.
        templates: Prompts with ``{}`` for the category's name.
        inputs: Whose cosine with the prompts counts: the image's, its first caption's, or both by the mean of logits.
        force: Replace an existing run in ``out``.
        progress: Progress bars and messages; none are shown when not given.

    Raises:
        InputError: A bad store, a split without images, an image without the caption that is asked for, a checkpoint
            that cannot be loaded, or another one than the store was made with.
    """
    progress = progress or Progress()
    labelled = _read(find_store(store), config)
    revision = config.model.revision
    config, listing = resolve_config(config, labelled), labelled.listing
    rows = _rows(config, listing, split)
    if inputs != "image":
        _check_captions(labelled, rows)
    encoder = _matching_encoder(config, labelled, revision)
    names, precision = listing.category_names, encoder.identity.compute_dtype
    progress.say(
        f"zero-shot of {labelled.store.folder}: {len(names)} categories x {len(templates)} prompts, {inputs},"
        f" on {device_line(encoder.device, precision)}"
    )
    prompts = [template.replace(GAP, name) for name in names for template in templates]
    prototypes = class_prototypes(encoder.encode_texts(prompts).reshape(len(names), len(templates), -1))
    score = _Scorer(labelled, prototypes, encoder, inputs)
    info = describe_run("zero-shot", config, labelled, precision=precision)
    device = str(encoder.device)
    run = start_run(info, config, label="zero-shot", out=out, runs=RUNS, device=device, force=force)
    with interruptible(f"{run.folder} is not finished", also=[] if out is None else ["--force"]):
        logits = {name: score(chosen_rows) for name, chosen_rows in rows.items()}
        labels = {name: listing.labels_matrix()[chosen_rows] for name, chosen_rows in rows.items()}
        for name, chosen_rows in rows.items():
            image_id = listing.image_ids[chosen_rows]
            write_scores(run.folder, "zero-shot", name, image_id, sigmoid(logits[name]), labels[name])
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
        rows = chosen(config.data, listing)
        return {name: rows[name] for name in dict.fromkeys((split, "val"))}
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


def _check_captions(labelled: LabelledStore, rows: Mapping[str, npt.NDArray[np.int64]]) -> None:
    """Refuse images without a caption where captions are asked for."""
    for split, of_split in rows.items():
        without = of_split[labelled.embeddings.n_captions[of_split] == 0]
        if len(without):
            first = labelled.listing.image_ids[without[0]]
            raise InputError(
                "images without a caption",
                where=labelled.store.folder,
                wanted="a caption for each",
                got=f"{len(without)} of {len(of_split)} {split} images, the first of them image id {first}",
                do="give --inputs image, or a manifest with captions",
            )


def _matching_encoder(config: Config, labelled: LabelledStore, asked: str | None) -> Encoder:
    """The checkpoint of the store; another one, or changed weights under the same name, is refused.

    Of an imported store only the width can be compared with the checkpoint that it names, or that was given for it.

    Args:
        config: With the checkpoint that the store, or the user, names.
        labelled: The store.
        asked: The revision that the user asked for; the commit of the store when not given.
    """
    store, name, device = labelled.store, config.model.siglip2_variant, pick_device(config.hardware.device)
    # An imported store may name a folder, whose revision is a word of whoever imported it.
    revision = asked or (store.key.commit if name == store.key.model and not Path(name).is_dir() else None)
    if "imported" in store.extra:
        encoder = _imported_encoder(name, revision, device)
        fits = encoder.width == store.width
        got, wanted = f"embeddings {store.width} wide", f"{encoder.width}, as {encoder.identity.model} makes them"
        do = "give --model the right checkpoint"
    else:
        key = store.key
        encoder = Encoder.load(name, revision=revision, patches=key.patches, text_length=key.text_length, device=device)
        fits = encoder.identity.revision == key.revision
        got, wanted = (f"{x.model} at {x.revision[:47]}" for x in (key, encoder.identity))
        do = "leave --revision out and name the checkpoint of the store with --model, or run `mmcli extract` again"
    if not fits:
        raise StoreMismatch("a store of another model", where=store.folder, got=got, wanted=wanted, do=do)
    return encoder


def _imported_encoder(name: str, revision: str | None, device: torch.device) -> Encoder:
    """The checkpoint that an imported store names, or that was given for it."""
    try:
        source = find_model(name, revision)
        patches = _patches(source.load("the configuration", AutoConfig))
        return Encoder.load(name, revision=source.commit, patches=patches, device=device)
    except InputError as error:
        raise InputError(
            error.what,
            where=error.where,
            got=error.got,
            wanted="the checkpoint that computed this imported store",
            do="give --model its folder or hub id",
        ) from error


def _patches(config: Any) -> int:  # noqa: ANN401
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
