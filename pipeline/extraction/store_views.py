"""What the commands of ``mmcli cache`` do beside the store itself: count progress, and lay out what was found."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from ... import InputError
from ...cache import ExportReport, LeakReport, Store, export_store, find_leaks, passes, verify
from ...cache.export import Captions, Format
from ..core.console import FittingTable
from ..core.progress import Progress

THRESHOLD, MOST = 0.98, 50
_MOST_SKIPPED = 5
_BAR = 40


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What ``mmcli cache verify`` found; leaks are findings, not damage."""

    store: Path
    problems: tuple[str, ...]
    leaks: LeakReport | None

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        leaks = None if self.leaks is None else self.leaks.to_json()
        return {"store": str(self.store), "problems": list(self.problems), "leaks": leaks}

    def summary(self) -> list[RenderableType]:
        """What a person reads."""
        if self.problems:
            return list(self.problems)
        return [f"{self.store} is whole", *(_leak_parts(self.leaks) if self.leaks else [])]


def check_store(
    folder: Path, progress: Progress, *, leaks: bool, threshold: float | None = None, most: int | None = None
) -> Checked:
    """Check a store, and look for near-duplicates across splits where it is whole and that is asked for.

    Args:
        folder: The store.
        progress: Who to tell.
        leaks: Whether to look for near-duplicates.
        threshold: Least cosine of one.
        most: Pairs to list at most.

    Raises:
        InputError: No store; a threshold without ``leaks``; an index without splits.
    """
    if not leaks and (threshold is not None or most is not None):
        got = "--threshold" if threshold is not None else "--most"
        raise InputError("an option without its use", got=got, wanted="--leaks beside it", do="add --leaks")
    report = verify(folder)
    if report.problems or not leaks:
        return Checked(store=folder, problems=report.problems, leaks=None)
    store = Store.open(folder)
    with progress.task("images compared", passes(store) * store.n_images) as task:
        found = find_leaks(
            store, THRESHOLD if threshold is None else threshold, most=MOST if most is None else most, check=False,
            tick=task.advance,
        )  # fmt: skip
    return Checked(store=folder, problems=(), leaks=found)


def export(
    folder: Path, out: Path, format: Format, progress: Progress, *, captions: Captions | None, force: bool  # noqa: A002
) -> ExportReport:  # fmt: skip
    """Export a store, counting its images; see :func:`mmcli.cache.export_store`.

    Raises:
        InputError: As there; or ``captions`` for parquet, where a row always has all of them.
    """
    if captions is not None and format == "parquet":
        raise InputError(
            "an option without its use", got="--captions", wanted="--format npy", do="parquet has all captions"
        )
    store = Store.open(folder)
    with progress.task("images exported", store.n_images) as task:
        return export_store(store, out, format, captions=captions or "first", force=force, tick=task.advance)


def export_summary(report: ExportReport) -> list[RenderableType]:
    """What a person reads after an export."""
    rows = "" if report.n_rows == report.n_images else f" in {report.n_rows:,} rows"
    files = "1 file" if len(report.files) == 1 else f"{len(report.files):,} files"
    lines: list[RenderableType] = [f"{report.n_images:,} images{rows}, {files}, {megabytes(report.n_bytes)}"]
    if report.n_skipped:
        lines.append(f"left out: {report.n_skipped:,} images without an embedding (`mmcli cache info` says why)")
    if report.format == "npy" and report.n_without_caption:
        lines.append(f"left out: {report.n_without_caption:,} images without a caption")
    return [*lines, f"wrote {report.folder}"]


def info_summary(facts: Mapping[str, Any]) -> list[RenderableType]:
    """What :func:`mmcli.cache.describe` found, for a person."""
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
        ("store", facts["folder"]), ("model", facts["model"]), ("revision", facts["revision"]), *budget,
        ("embeddings", f"{facts['width']:,} wide, {facts['dtype']}, computed in {facts['compute_dtype']}"),
        ("images", f"{facts['images']:,}"), ("skipped", f"{facts['skipped']:,}"), ("captions", captions),
        ("size", f"{megabytes(facts['bytes'])} ({parts}), {facts['shards']:,} shards"), ("made", facts["created"]),
        ("manifest", facts["manifest_sha256"][:12]), ("key", facts["digest"][:12]),
    ]  # fmt: skip


def _norms(title: str, spread: Mapping[str, float], histogram: Mapping[str, Any]) -> list[RenderableType]:
    figures = ", ".join(f"{name} {spread[name]:.4g}" for name in ("min", "mean", "max", "std"))
    edges, counts = histogram["edges"], histogram["counts"]
    longest = max(counts)
    table = FittingTable(show_header=False, box=None)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    for at, count in enumerate(counts):
        bar = "#" * max(round(_BAR * count / longest), int(count > 0))
        table.add_row(f"{edges[at]:.4g} to {edges[at + 1]:.4g}", f"{count:,}", bar)
    return [Text.assemble((title, "bold"), f": {figures}"), table]


def _skipped(images: list[dict[str, Any]]) -> list[RenderableType]:
    shown = images[:_MOST_SKIPPED]
    lines = [f"  image id {one['image_id']}, {one['path'] or 'no path'}: {one['reason']}" for one in shown]
    more = [f"  and {len(images) - len(shown):,} more (all of them with --json)"] if len(images) > len(shown) else []
    return [Text("skipped images", "bold"), *lines, *more]


def _leak_parts(report: LeakReport) -> list[RenderableType]:
    found = ", ".join(f"{count:,} {pair.replace('-', ' with ')}" for pair, count in report.n_pairs.items())
    title = f"near-duplicates across splits, cosine of {report.threshold:g} and more: {found}"
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
