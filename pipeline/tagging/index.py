"""``mmcli index``: an index file is built from a run, grows by new samples and tags without training, and shrinks.

Modules that load torch are imported where they are needed, because removing samples needs none of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from rich.console import RenderableType
from rich.text import Text

from ..core.console import FittingTable
from ..core.files import command, refuse_existing
from ..core.json_result import JsonResult
from ..core.progress import Progress
from ..core.run import Run
from ..data.manifest import read_manifest
from .index_file import TagIndex, check_origin, is_index, read_index, write_index, writing

SHOWN_CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class IndexResult(JsonResult):
    """An index file that was written.

    Attributes:
        path: The file.
        did: ``built``, ``added to`` or ``removed from``.
        changed: Samples built, added or removed.
        n: Samples now.
        n_classes: Categories now.
        n_bytes: Size of the file.
        sha256: The checksum that the file carries.
        new_names: Categories that were not there before.
        skipped: A reason for each sample whose image cannot be read.
        notes: Remarks for the user, a line each.
        run: The run whose head made the codes, where the call named it.
    """

    path: Path
    did: Literal["built", "added to", "removed from"]
    changed: int
    n: int
    n_classes: int
    n_bytes: int
    sha256: str
    new_names: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    run: Path | None = None

    def summary(self) -> list[RenderableType]:
        """The notes, the new tags, the size and how to use the file, as they are printed."""
        lines = [f"note: {note}" for note in self.notes]
        if self.skipped:
            lines += [f"{len(self.skipped):,} images could not be read:", *(f"  {why}" for why in self.skipped)]
        if self.new_names:
            lines.append(f"new tags: {', '.join(self.new_names)}")
        what = f"{self.changed:,} samples {self.did} the index; " if self.did != "built" else ""
        lines.append(f"{what}{self.n:,} samples, {self.n_classes} tags, {self.n_bytes / 2**20:.1f} MiB")
        use = command("predict", "IMAGE", "--run", self.run or "RUN", "--index", self.path)
        return [*lines, f"use it with `{use}`", f"wrote {self.path}"]


def build(run: Run, out: Path | None = None, *, force: bool = False) -> IndexResult:
    """Write the train codes of a run, their labels, captions and paths to an index file.

    Args:
        run: A finished run of ``train-head``; neither towers nor images are read.
        out: The file; ``index.safetensors`` in the run when not given.
        force: Replace a file that is there.

    Raises:
        InputError: The file is there, or the run's codes are not.
    """
    from .tagger import run_index

    path = out or run.paths.index
    index = run_index(run)
    with writing(path):
        refuse_existing(path, is_index, force=force, what="an index, which may have grown", option="--out")
        checksum = write_index(path, index)
    lost = f"images are shown by their ids: the store {run.info.store} was moved or changed"
    notes = () if _count(index.captions) or _count(index.paths) else (lost,)
    return _result(path, "built", index, checksum, changed=len(index), notes=notes, run=run.folder)


@dataclass(frozen=True, kw_only=True)
class AddOptions:
    """Options of :func:`add`.

    Attributes:
        device: The device to compute on.
        model: The SigLIP2 checkpoint, if it is no longer where the run says.
        on_error: Whether an image that cannot be read stops everything, or is left out.
        force: Replace samples whose image id is there already.
    """

    device: str = "auto"
    model: str | None = None
    on_error: Literal["stop", "skip"] = "stop"
    force: bool = False


def add(
    path: Path,
    run: Run,
    *,
    manifest: Path,
    data: Path,
    options: AddOptions | None = None,
    progress: Progress | None = None,
) -> IndexResult:
    """Embed and encode new samples and add them with their tags; the next query finds them.

    Args:
        path: An index file.
        run: The run that it was built from.
        manifest: The samples, of any split; their category names may be new ones.
        data: The folder that their paths are relative to.
        options: See :class:`AddOptions`.
        progress: Progress bars; none are shown when not given.

    Raises:
        InputError: A bad manifest or image, ids that are there already, another head than the index's, or another
            process that writes the file.
    """
    options, listing = options or AddOptions(), read_manifest(manifest)
    from .encode import RunEncoder, encode_samples

    with writing(path):
        old, _ = read_index(path)
        if not options.force:
            old.check_new(listing.image_ids)  # before anything is embedded
        encoder = RunEncoder.load(run, device=options.device, model=options.model)
        check_origin(old.origin, encoder.origin, where=run.folder)
        new, skipped = encode_samples(listing, data, encoder, options.on_error, progress or Progress())
        index = old.added(new, replacing=options.force)
        checksum = write_index(path, index)
    more: dict[str, Any] = {
        "changed": len(new),
        "new_names": index.category_names[len(old.category_names) :],
        "skipped": skipped,
        "notes": encoder.notes,
        "run": run.folder,
    }
    return _result(path, "added to", index, checksum, **more)


def remove(path: Path, image_ids: Sequence[int]) -> IndexResult:
    """Take samples out of an index file.

    Raises:
        InputError: An id is not there, nothing would be left, or another process writes the file.
    """
    ids = np.unique(np.array(image_ids, np.int64))
    with writing(path):
        index = read_index(path)[0].without(ids)
        checksum = write_index(path, index)
    return _result(path, "removed from", index, checksum, changed=len(ids))


def _result(path: Path, did: Any, index: TagIndex, checksum: str, **more: Any) -> IndexResult:  # noqa: ANN401
    return IndexResult(
        path=path,
        did=did,
        n=len(index),
        n_classes=len(index.category_names),
        n_bytes=path.stat().st_size,
        sha256=checksum,
        **more,
    )


def describe(path: Path) -> dict[str, Any]:
    """The facts of an index file, its checksum compared.

    Raises:
        InputError: No index, a damaged one, or one of a newer format.
    """
    index, about = read_index(path)
    counts = index.labels.sum(0, dtype=np.int64)
    return {
        "path": str(path),
        "format_version": about["version"],
        "mmcli": about["mmcli"],
        "created": about["created"],
        "n": len(index),
        "bits": index.bits,
        "width": index.soft.shape[1],
        "n_classes": len(index.category_names),
        "n_unlabelled": int((index.labels.sum(1) == 0).sum()),
        "n_bytes": path.stat().st_size,
        "binary_code_bytes": 0 if index.packed is None else index.packed.nbytes,
        "float_code_bytes": index.soft.nbytes,
        "n_captions": _count(index.captions),
        "n_paths": _count(index.paths),
        **vars(index.origin),
        "encoder": index.origin.encoder or None,
        "sha256": about["sha256"],
        "checksum": "fits",
        "classes": dict(zip(index.category_names, counts.tolist(), strict=True)),
    }


def info_summary(facts: dict[str, Any]) -> list[RenderableType]:
    """The facts of :func:`describe` as a table."""
    table = FittingTable(show_header=False, box=None)
    kind = f"{facts['bits']} bits" if facts["bits"] else f"no bits, z of {facts['width']}"
    largest = sorted(facts["classes"].items(), key=lambda item: (-item[1], item[0]))[:SHOWN_CLASSES]
    rows = {
        "samples": f"{facts['n']:,} ({facts['n_unlabelled']:,} without a tag)",
        "tags": f"{facts['n_classes']}; most: " + ", ".join(f"{name} {count:,}" for name, count in largest),
        "codes": f"{kind}; {facts['binary_code_bytes']:,} bytes packed, {facts['float_code_bytes']:,} soft",
        "texts": f"{facts['n_captions']:,} captions, {facts['n_paths']:,} paths",
        "file": f"{facts['n_bytes']:,} bytes, format {facts['format_version']}, mmcli {facts['mmcli']}",
        "written": facts["created"],
        "encoder": f"{facts['model']}, {facts['patches']} patches, {(facts['encoder'] or 'digest not known')[:16]}",
        "head": facts["head"][:16],
        "checksum": f"{facts['sha256'][:16]}, fits",
    }
    for name, value in rows.items():
        table.add_row(Text(name, "bold"), Text(value))
    return [Text(facts["path"]), table]


def _count(texts: pa.StringArray) -> int:
    """How many of the texts are not empty."""
    return sum(map(bool, texts.to_pylist()))
