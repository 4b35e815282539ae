"""Writes a store's embeddings in forms that other tools read: numbered ``.npy`` parts with metadata, or parquet.

``npy`` is the layout of clip-retrieval's folders, which embedding-reader and autofaiss read: the files of
``img_emb``, ``text_emb`` and ``metadata`` with one number hold the same rows. ``parquet`` is one folder of files.
Shard by shard; a file is whole or absent, and ``_export.json`` is written last, in the place of
``_export_unfinished.json``.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .errors import StoreError
from .export_files import MARK, Parts, put, taken_folder
from .index import PLACE
from .reader import Store
from .shards import Arrays

Format = Literal["npy", "parquet"]
Captions = Literal["first", "all"]


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """The files of an export.

    Attributes:
        folder: Where.
        format: ``npy`` or ``parquet``.
        n_images: Images written.
        n_rows: Rows written; more than images where every caption has its own.
        n_skipped: Images of the store that have no embedding, and are left out.
        n_without_caption: Images without a caption; in ``npy`` they are left out, for a row needs one.
        files: Files written, relative to the folder, in order.
        n_bytes: Their size.
    """

    folder: Path
    format: Format
    n_images: int
    n_rows: int
    n_skipped: int
    n_without_caption: int
    files: tuple[str, ...]
    n_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The report as one JSON object, its paths as text."""
        return vars(self) | {"folder": str(self.folder), "files": list(self.files)}


def export_store(
    store: Store,
    out: Path,
    format: Format,  # noqa: A002 - as the option is called
    *,
    captions: Captions = "first",
    force: bool = False,
    tick: Callable[[int], object] = lambda _rows: None,
) -> ExportReport:
    """Write a store's embeddings for other tools; skipped images are left out.

    Args:
        store: The store; its files are checked as they are read.
        out: A new or empty folder.
        format: ``npy``: ``img_emb/img_emb_00000.npy`` and so on, ``(n, D)`` in the store's dtype, with
            ``metadata/metadata_00000.parquet``. ``parquet``: ``part-00000.parquet``, all captions of an image in one
            row, vectors in float32, which every reader knows and which holds the stored values exactly.
        captions: Of ``npy``: the first caption of each image, or a row for each caption, its image repeated.
        force: Replace an earlier export in ``out``.
        tick: Called after each shard with how many rows of the store were written.

    Raises:
        StoreError: An unknown format, a folder that is in use, a full disk, nothing to write, or as for
            :meth:`Store.load`.
    """
    for name, value, choices in (("format", format, Format), ("captions", captions, Captions)):
        if value not in get_args(choices):
            raise StoreError(f"unknown {name}", got=repr(value), wanted=" or ".join(get_args(choices)))
    out = Path(out)
    if out.resolve() == store.folder.resolve():
        raise StoreError("cannot export into the store itself", where=out, do="name another --out")
    with taken_folder(out, force=force):
        return _export(store, out, format, captions, tick)


def _export(store: Store, out: Path, kind: Format, captions: Captions, tick: Callable[[int], object]) -> ExportReport:
    written = Parts(out, len(store.manifest.layout.shards("image")))
    n_images = n_bare = 0
    for (shard, image), (_, text) in zip(store.shards("image"), store.shards("text"), strict=True):
        table = store.index.slice(shard.start, shard.n_rows).drop_columns(list(PLACE))
        real = image["norm_img"] > 0
        bare = real & (text["n_captions"] == 0)
        n_images, n_bare = n_images + int(real.sum()), n_bare + int(bare.sum())
        if kind == "parquet":
            written.parquet(_whole_rows(table, image, text, np.flatnonzero(real)))
        else:
            n_images -= int(bare.sum())
            written.npy(*_flat_rows(table, image, text, real & ~bare, captions))
        tick(shard.n_rows)
    if not written.files:
        raise StoreError("nothing to export", where=store.folder, got="no image with an embedding and a caption")
    report = ExportReport(
        folder=out,
        format=kind,
        n_images=n_images,
        n_rows=written.n_rows,
        n_skipped=len(store.skipped),
        n_without_caption=n_bare,
        files=tuple(written.files),
        n_bytes=written.n_bytes,
    )
    put(out / MARK, _mark(store, report, captions))
    return report


def _whole_rows(table: pa.Table, image: Arrays, text: Arrays, rows: NDArray[np.int64]) -> pa.Table:
    """One row an image: the index's columns, vectors as lists, norms."""
    counts = text["n_captions"][rows]
    real = np.arange(text["v_txt"].shape[1]) < counts[:, None]
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]), pa.int32())
    columns = {
        "v_img": _vectors(image["v_img"][rows]),
        "v_txt": pa.ListArray.from_arrays(offsets, _vectors(text["v_txt"][rows][real])),
        "norm_img": pa.array(image["norm_img"][rows]),
        "norm_txt": pa.ListArray.from_arrays(offsets, pa.array(text["norm_txt"][rows][real])),
    }
    return _with(table.take(rows), columns)


def _flat_rows(
    table: pa.Table, image: Arrays, text: Arrays, kept: NDArray[np.bool_], captions: Captions
) -> tuple[NDArray[Any], NDArray[Any], pa.Table]:
    """One row an image, or one a caption: image vectors, caption vectors, and what each row is."""
    counts = np.where(kept, text["n_captions"] if captions == "all" else 1, 0)
    rows, slots = np.nonzero(np.arange(text["v_txt"].shape[1]) < counts[:, None])
    metadata = table.take(rows)
    columns: dict[str, Any] = {}
    if "captions" in table.column_names:
        texts = table.column("captions").to_pylist()
        columns["caption"] = pa.array([texts[row][slot] for row, slot in zip(rows, slots, strict=True)], pa.string())
        metadata = metadata.drop_columns(["captions"])
    columns |= {
        "caption_number": pa.array(slots, pa.int32()),
        "norm_img": pa.array(image["norm_img"][rows]),
        "norm_txt": pa.array(text["norm_txt"][rows, slots]),
    }
    return image["v_img"][rows], text["v_txt"][rows, slots], _with(metadata, columns)


def _with(table: pa.Table, columns: dict[str, Any]) -> pa.Table:
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table


def _vectors(values: NDArray[Any]) -> pa.Array:
    """``(n, D)`` as n lists of D float32."""
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), values.shape[1])


def _mark(store: Store, report: ExportReport, captions: Captions) -> bytes:
    document = report.to_json() | {
        "captions": captions if report.format == "npy" else "all",
        "dtype": store.key.dtype,
        "width": store.width,
        "store": str(store.folder),
        "store_digest": store.digest,
        "key": store.key.to_dict(),
        "columns": "raw embeddings, before L2 normalisation; norms taken before the cast to the stored dtype",
    }
    del document["folder"]
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
