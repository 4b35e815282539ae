"""A store as the stages after extraction see it: embeddings with labels and splits."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.console import RenderableType
from rich.text import Text

from ...cache import (
    FORMAT_VERSION,
    Embeddings,
    ExportReport,
    LeakReport,
    Store,
    StoreKey,
    StoreMismatch,
    export_store,
    find_leaks,
    newest_store,
    passes,
    verify,
)
from ...cache.export import Captions, Format
from ...cache.key import ComputeDtype
from ...cache.layout import StoredDtype
from ...errors import InputError
from ..core.config import Config, StoreFacts, resolve
from ..core.console import FittingTable
from ..core.defaults import STORES
from ..core.json_result import JsonResult
from ..core.progress import Progress
from ..core.run import RunInfo, now
from ..data.manifest import CORE, Manifest
from ..data.manifest_checks import SCHEMA
from ..data.protocols import lists_digest

if TYPE_CHECKING:
    from .siglip import Identity

_DIGITS = re.compile("[0-9a-f]{7,40}")


@dataclass(frozen=True, kw_only=True)
class LabelledStore:
    """A store, its arrays and its listing, all in manifest order, without the images that could not be read."""

    store: Store
    embeddings: Embeddings
    listing: Manifest


def find_store(folder: Path | None, cache: Path = STORES) -> Path:
    """The store that the user names, or else the newest finished one.

    Raises:
        InputError: There is none.
    """
    return folder if folder is not None else newest_store(cache)


class Reading:
    """A store that is read by a thread while the process does something else: importing torch takes as long.

    Args:
        folder: The store; the newest below ``data/cache`` when not given.
        config: The configuration that :func:`read_store` is going to be given.

    Attributes:
        folder: The store.
        is_newest: Whether no store was named.
    """

    def __init__(self, folder: Path | None, config: Config) -> None:
        self.folder, self.is_newest = find_store(folder), folder is None
        self._store = Store.open(self.folder)
        _check_model(self._store, config)
        self._pool = ThreadPoolExecutor(1)
        self._embeddings = self._pool.submit(self._store.load)

    def result(self) -> tuple[Store, Embeddings]:
        """The store and its arrays, or what the reading ended with."""
        with self._pool:
            return self._store, self._embeddings.result()


def read_store(folder: Path, config: Config, reading: Reading | None = None) -> LabelledStore:
    """Open, check and load a store.

    Args:
        folder: The store.
        config: Where its model section was given by the user, the store must be of that model and budget.
        reading: The reading of this store, where it is under way already.

    Raises:
        InputError: The store is damaged, unfinished, or of another model than the configuration names.
    """
    store, embeddings = (reading or Reading(folder, config)).result()
    kept = np.setdiff1d(np.arange(store.n_images), list(store.skipped)) if store.skipped else None
    if kept is not None:
        embeddings = Embeddings(**{name: values[kept] for name, values in vars(embeddings).items()})
    return LabelledStore(store=store, embeddings=embeddings, listing=_listing(store, kept))


def _listing(store: Store, kept: npt.NDArray[np.int64] | None) -> Manifest:
    """The store's index as a manifest; captions, most of its bytes, are read when they are first used."""

    def rows(names: Sequence[str] | None) -> pa.Table:
        table = store.columns(names).drop_columns(["shard", "row"])
        return table if kept is None else table.take(kept)

    where = str(store.folder)
    if set(store.column_names) >= set(SCHEMA.names):
        return Manifest.from_parts(rows(CORE), lambda: rows(None), where=where)
    return Manifest.from_table(rows(None), where=where)


def resolve_config(config: Config, labelled: LabelledStore) -> Config:
    """Resolve a configuration with the facts of a store; see :func:`mmcli.pipeline.core.config.resolve`."""
    key = labelled.store.key
    facts = StoreFacts(
        folder=labelled.store.folder,
        model=key.model,
        model_path=str(labelled.store.extra.get("model_path", key.model)),
        commit=key.commit,
        patches=key.patches,
        text_length=key.text_length,
        n_classes=len(labelled.listing.category_names),
    )
    return resolve(config, facts)


def describe_run(kind: str, config: Config, labelled: LabelledStore, *, precision: str) -> RunInfo:
    """The ``run.json`` of a run that reads this store and computes in a precision."""
    key = labelled.store.key
    return RunInfo(
        kind=kind,
        status="running",
        created=now(),
        config_digest=config.digest,
        preset=config.preset,
        seed=config.hardware.seed,
        store=str(labelled.store.folder),
        store_digest=key.digest,
        model=key.model,
        patches=key.patches,
        manifest_sha256=key.manifest_sha256,
        category_names=labelled.listing.category_names,
        lists_digest=lists_digest(config.data),
        precision=precision,
    )


def _is_other_commit(revision: str | None, key: StoreKey) -> bool:
    """Whether the configuration names a commit and the store's is another one; a branch may be any commit."""
    if revision is None or not (_DIGITS.fullmatch(revision) and _DIGITS.fullmatch(key.revision)):
        return False
    return not key.revision.startswith(revision)


def _check_model(store: Store, config: Config) -> None:
    """Refuse a store of another model than the user's configuration names; what it leaves out may be anything."""
    model, key, given = config.model, store.key, config.model.model_fields_set
    name = model.siglip2_variant
    is_same_name = {name, Path(name).name} & {key.model, str(store.extra.get("model_path", key.model))}
    for what, wanted, got, is_wrong in (
        ("model", name, key.model, "siglip2_variant" in given and not is_same_name),
        ("patches", model.max_num_patches, key.patches, "max_num_patches" in given),
        ("revision", model.revision, key.revision, _is_other_commit(model.revision, key)),
        ("text length", model.text_max_length, key.text_length, "text_max_length" in given),
    ):
        if is_wrong and wanted != got:
            raise StoreMismatch(
                "a store of another model",
                where=store.folder,
                got=f"{what} {got}",
                wanted=f"{what} {wanted}",
                do="name another --store, or run `mmcli extract` for this model",
            )


THRESHOLD, MOST = 0.98, 50
_MOST_SKIPPED = 5
_BAR = 40


@dataclass(frozen=True, kw_only=True)
class Checked(JsonResult):
    """The findings of ``mmcli cache verify``; leaks are no damage."""

    store: Path
    problems: tuple[str, ...]
    leaks: LeakReport | None

    def summary(self) -> list[RenderableType]:
        """Lines and tables for a person at the end of the command."""
        if self.problems:
            return list(self.problems)
        return [f"{self.store} is whole", *(_leak_parts(self.leaks) if self.leaks else [])]


def check_store(
    folder: Path, progress: Progress, *, leaks: bool, threshold: float | None = None, most: int | None = None
) -> Checked:
    """Check a store and, where it is whole and ``leaks`` is set, look for near-duplicates across splits.

    Args:
        folder: The store.
        progress: Progress bars; pass ``Progress()`` to silence them.
        leaks: Whether to look for near-duplicates.
        threshold: Least cosine of two images that count as near-duplicates.
        most: Pairs to list at most.

    Raises:
        InputError: No store; a threshold without ``leaks``; an index without splits.
    """
    if not leaks and (threshold is not None or most is not None):
        got = "--threshold" if threshold is not None else "--most"
        raise InputError(f"{got} needs --leaks", got=f"{got} alone", wanted="--leaks too", do="add --leaks")
    report = verify(folder)
    if report.problems or not leaks:
        return Checked(store=folder, problems=report.problems, leaks=None)
    store = Store.open(folder)
    with progress.task("images compared", passes(store) * store.n_images) as task:
        report_of_leaks = find_leaks(
            store,
            THRESHOLD if threshold is None else threshold,
            most=MOST if most is None else most,
            check=False,
            tick=task.advance,
        )
    return Checked(store=folder, problems=(), leaks=report_of_leaks)


def export(
    folder: Path,
    out: Path,
    format: Format,  # noqa: A002
    progress: Progress,
    *,
    captions: Captions | None,
    force: bool,
) -> ExportReport:
    """Export a store, counting its images; see :func:`mmcli.cache.export_store`.

    Raises:
        InputError: See :func:`mmcli.cache.export_store`; or ``captions`` for parquet, which always has all of them.
    """
    if captions is not None and format == "parquet":
        raise InputError(
            "--captions needs --format npy", got="--format parquet", do="leave it out: parquet always has all captions"
        )
    store = Store.open(folder)
    with progress.task("images exported", store.n_images) as task:
        return export_store(store, out, format, captions=captions or "first", force=force, tick=task.advance)


def export_summary(report: ExportReport) -> list[RenderableType]:
    """Lines for a person at the end of an export."""
    rows = "" if report.n_rows == report.n_images else f" in {report.n_rows:,} rows"
    files = "1 file" if len(report.files) == 1 else f"{len(report.files):,} files"
    lines: list[RenderableType] = [f"{report.n_images:,} images{rows}, {files}, {megabytes(report.n_bytes)}"]
    if report.n_skipped:
        lines.append(f"left out: {report.n_skipped:,} images without an embedding (`mmcli cache info` says why)")
    if report.format == "npy" and report.n_without_caption:
        lines.append(f"left out: {report.n_without_caption:,} images without a caption")
    return [*lines, f"wrote {report.folder}"]


def info_summary(facts: Mapping[str, Any]) -> list[RenderableType]:
    """The facts of :func:`mmcli.cache.describe` as tables for a person."""
    table = FittingTable(show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in _info_rows(facts):
        table.add_row(name, Text(value))
    parts: list[RenderableType] = [table]
    for title, name in (("norms of images", "norm_img"), ("norms of captions", "norm_txt")):
        if facts[name] is not None:
            parts += ["", *_norms(title, facts[name], facts[f"histogram_{name}"])]
    if facts["skipped"]:
        parts += ["", *_skipped(facts["skipped_images"])]
    return parts


def megabytes(n_bytes: int) -> str:
    """A size in MB (10^6 bytes), as a person reads it."""
    size = n_bytes / 1e6
    return f"{size:,.0f} MB" if size >= 100 else f"{size:.2g} MB"


def _info_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    source = facts["extra"].get("imported")
    budget = (
        [("imported from", f"{source['images']} and {source['texts']}")]
        if isinstance(source, Mapping)
        else [("patches", f"{facts['patches']:,}"), ("text length", f"{facts['text_length']:,} tokens")]
    )
    parts = f"{megabytes(facts['bytes_image'])} images, {megabytes(facts['bytes_text'])} captions"
    captions = f"{facts['captions']:,}, at most {facts['captions_per_image_max']} an image"
    return [
        ("store", facts["folder"]),
        ("model", facts["model"]),
        ("revision", facts["revision"]),
        *budget,
        ("embeddings", f"{facts['width']:,} wide, {facts['dtype']}, computed in {facts['compute_dtype']}"),
        ("images", f"{facts['images']:,}"),
        ("skipped", f"{facts['skipped']:,}"),
        ("captions", captions),
        ("size", f"{megabytes(facts['bytes'])} ({parts}), {facts['shards']:,} shards"),
        ("made", facts["created"]),
        ("manifest", facts["manifest_sha256"][:12]),
        ("key", facts["digest"][:12]),
    ]


def _norms(title: str, spread: Mapping[str, float], histogram: Mapping[str, Any]) -> list[RenderableType]:
    figures = ", ".join(f"{name} {spread[name]:.4g}" for name in ("min", "mean", "max", "std"))
    edges, counts = histogram["edges"], histogram["counts"]
    longest = max(counts)
    table = FittingTable(show_header=False, box=None)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    for index, count in enumerate(counts):
        bar = "#" * max(round(_BAR * count / longest), int(count > 0))
        table.add_row(f"{edges[index]:.4g} to {edges[index + 1]:.4g}", f"{count:,}", bar)
    return [Text.assemble((title, "bold"), f": {figures}"), table]


def _skipped(images: list[dict[str, Any]]) -> list[RenderableType]:
    shown = images[:_MOST_SKIPPED]
    lines = [f"  image id {image['image_id']}, {image['path'] or 'no path'}: {image['reason']}" for image in shown]
    more = [f"  and {len(images) - len(shown):,} more (all of them with --json)"] if len(images) > len(shown) else []
    return [Text("skipped images", "bold"), *lines, *more]


def _leak_parts(report: LeakReport) -> list[RenderableType]:
    counts = ", ".join(f"{count:,} {pair.replace('-', ' with ')}" for pair, count in report.n_pairs.items())
    title = f"near-duplicates across splits, cosine of {report.threshold:g} and more: {counts}"
    if not report.pairs:
        return [title]
    table = FittingTable(box=None)
    for name in ("cosine", "split", "image id", "path"):
        table.add_column(name, justify="left" if name in {"split", "path"} else "right")
    for pair in report.pairs:
        table.add_row(f"{pair.cosine:.4f}", pair.split, str(pair.image_id), Text(pair.path))
        table.add_row("", pair.other_split, str(pair.other_id), Text(pair.other_path))
    rest = sum(report.n_pairs.values()) - len(report.pairs)
    note = [Text(f"and {rest:,} more; --most lists more of them", "dim")] if rest else []
    return [title, table, *note]


def find_key(identity: "Identity", info: RunInfo) -> StoreKey | None:
    """The key of the store that a run was trained from, if this encoder can have filled that store.

    A run keeps the digest of the key, not the key, and the store may be gone. What the encoder leaves open has few
    values, so all are tried: the precision of the arithmetic and of the store, the resizer, the format's version.
    """
    return next((key for key in _keys(identity, info) if key.digest == info.store_digest), None)


def _keys(identity: "Identity", info: RunInfo) -> Iterator[StoreKey]:
    settings = json.loads(identity.processor)
    processors = [json.dumps(settings), json.dumps({**settings, "resizer": "torch"})]
    choices = itertools.product(processors, get_args(StoredDtype), get_args(ComputeDtype), range(FORMAT_VERSION, 0, -1))
    for processor, dtype, compute, version in choices:
        # The name of a local checkpoint is its folder's, which may have been moved; its revision is a hash.
        yield StoreKey(
            model=info.model,
            revision=identity.revision,
            processor=processor,
            patches=identity.patches,
            text_length=identity.text_length,
            dtype=dtype,
            manifest_sha256=info.manifest_sha256,
            compute_dtype=compute,
            format_version=version,
        )
