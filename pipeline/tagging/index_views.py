"""What an index file holds, for a person or as facts."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import RenderableType
from rich.text import Text

from ..core.console import FittingTable
from .index_file import read_index

SHOWN_CLASSES = 10


def describe(path: Path) -> dict[str, Any]:
    """What an index file is, its checksum compared.

    Raises:
        InputError: No index, a damaged one, or one of a newer format.
    """
    index, about = read_index(path)
    counts = index.labels.sum(0, dtype=np.int64)
    soft, packed = index.soft.nbytes, 0 if index.packed is None else index.packed.nbytes
    return {
        "path": str(path), "format_version": about["version"], "mmcli": about["mmcli"], "created": about["created"],
        "n": len(index), "bits": index.bits, "width": index.soft.shape[1], "n_classes": len(index.category_names),
        "n_unlabelled": int((index.labels.sum(1) == 0).sum()), "n_bytes": path.stat().st_size,
        "binary_code_bytes": packed, "float_code_bytes": soft, "n_captions": _known(index.captions),
        "n_paths": _known(index.paths), "model": index.origin.model, "patches": index.origin.patches,
        "head": index.origin.head, "encoder": index.origin.encoder or None, "store": index.origin.store,
        "sha256": about["sha256"], "checksum": "fits",
        "classes": dict(zip(index.category_names, counts.tolist(), strict=True)),
    }  # fmt: skip


def info_summary(facts: dict[str, Any]) -> list[RenderableType]:
    """What a person reads of :func:`describe`."""
    table = FittingTable(show_header=False, box=None)
    kind = f"{facts['bits']} bits" if facts["bits"] else f"no bits, z of {facts['width']}"
    largest = sorted(facts["classes"].items(), key=lambda item: (-item[1], item[0]))[:SHOWN_CLASSES]
    rows = [
        ("samples", f"{facts['n']:,} ({facts['n_unlabelled']:,} without a tag)"),
        ("tags", f"{facts['n_classes']}; most: " + ", ".join(f"{name} {count:,}" for name, count in largest)),
        ("codes", f"{kind}; {facts['binary_code_bytes']:,} bytes packed, {facts['float_code_bytes']:,} soft"),
        ("texts", f"{facts['n_captions']:,} captions, {facts['n_paths']:,} paths"),
        ("file", f"{facts['n_bytes']:,} bytes, format {facts['format_version']}, mmcli {facts['mmcli']}"),
        ("written", facts["created"]),
        ("encoder", f"{facts['model']}, {facts['patches']} patches, {(facts['encoder'] or 'digest not known')[:16]}"),
        ("head", facts["head"][:16]),
        ("checksum", f"{facts['sha256'][:16]}, fits"),
    ]
    for name, value in rows:
        table.add_row(Text(name, "bold"), Text(value))
    return [Text(facts["path"]), table]


def _known(texts: pa.StringArray) -> int:
    return sum(map(bool, texts.to_pylist()))
