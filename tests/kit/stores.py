"""Small stores for tests, and what is in them. Also imported by kill_writer.py, which runs in a process of its own."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmcli.cache import StoreKey, StoreWriter
from mmcli.cache.layout import MANIFEST

N, D, ROWS = 10, 6, 4


def key(**changes: Any) -> StoreKey:
    values: dict[str, Any] = {
        "model": "google/siglip2-base-patch16-naflex",
        "revision": "c0ffee",
        "processor": '{"mean": 0.5, "resample": 2}',
        "patches": 256,
        "text_length": 64,
        "dtype": "float16",
        "manifest_sha256": "ab" * 32,
        "compute_dtype": "float32",
    }
    return StoreKey(**values | changes)


class Data:
    """Index and embeddings of a store, made from a seed."""

    def __init__(self, n: int = N, d: int = D, c: int = 5, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.ids = rng.permutation(10 * n)[:n].astype(np.int64)
        captions = [[f"caption {i} of {j}" for i in range(j % 3)] for j in range(n)]
        columns = {"image_id": self.ids, "path": [f"{i}.jpg" for i in self.ids], "captions": captions}
        self.index = pa.table(columns).replace_schema_metadata({"category_names": '["cat", "dog"]'})
        self.v_img = rng.standard_normal((n, d)).astype(np.float32) * 7
        self.counts = rng.integers(0, c + 1, n).astype(np.uint8)
        self.v_txt = rng.standard_normal((n, c, d)).astype(np.float32) * 3
        self.v_txt[np.arange(c) >= self.counts[:, None]] = 0

    def writer(self, folder: Path, key: StoreKey, *, shard_rows: int = ROWS, **options: Any) -> StoreWriter:
        sizes = {"width": self.v_img.shape[1], "n_captions_max": self.v_txt.shape[1], "shard_rows": shard_rows}
        return StoreWriter(folder, key, self.index, **sizes | {"extra": {"torch": "2.13", "bias": -16.5}} | options)

    def fill(self, writer: StoreWriter, skipped: Collection[int] = ()) -> None:
        for shard in writer.missing("image"):
            v_img = self.v_img[shard.start : shard.stop].copy()
            rows = [row - shard.start for row in skipped if shard.start <= row < shard.stop]
            v_img[rows] = 0
            writer.write_image(shard, v_img=v_img, skipped=rows)
        for shard in writer.missing("text"):
            rows = slice(shard.start, shard.stop)
            writer.write_text(shard, v_txt=self.v_txt[rows], n_captions=self.counts[rows])

    def write(self, folder: Path, key: StoreKey, **options: Any) -> Path:
        with self.writer(folder, key, **options) as writer:
            self.fill(writer)
            return writer.finish()


def content(folder: Path) -> dict[str, Any]:
    """Everything in a finished store but the time: every dataset of every shard, the index, the manifest."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["created"], manifest["checksum"]
    found: dict[str, Any] = {"manifest": manifest, "index": pq.read_table(folder / "index.parquet")}
    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path) as file:
            for name, dataset in file.items():
                values = dataset[()]
                found[f"{path.name}/{name}"] = (values.dtype.str, values.shape, values.tobytes())
            found[f"{path.name} attributes"] = sorted((name, str(value)) for name, value in file.attrs.items())
    return found


def reseal(folder: Path, edit: Any) -> None:
    """Change manifest.json as someone would who knows the format: hashes of files and its own checksum are right."""
    path = folder / MANIFEST
    document = json.loads(path.read_text())
    edit(document)
    for entry in [document["index"], *document["shards"]]:
        file = folder / entry["file"]
        if file.is_file():
            data = file.read_bytes()
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    document.pop("checksum")
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    path.write_text(json.dumps(document | {"checksum": hashlib.sha256(text.encode()).hexdigest()}))
