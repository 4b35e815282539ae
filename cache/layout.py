"""Names, shapes and dtypes of a store's files: what stands where, with no file touched.

Symbols: ``N`` images, ``D`` embedding width, ``n`` rows of one shard.
"""

import contextlib
import functools
import math
import os
import platform
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

FORMAT = "mmcli-store"
FORMAT_VERSION = 2

MANIFEST, KEY, INDEX = "manifest.json", "key.json", "index.parquet"
# Held by whoever writes the whole store; each stripe holds one of its own, which it takes while it holds this one.
LOCK = ".lock"
# A note that version 0.1.0 left beside the shards; it is no part of the store, and nothing reads it.
CHECKED = ".checked.json"
STRIPE_LOCK = re.compile(r"\.lock-[0-9]+-of-[0-9]+")
LOCK_NAME = re.compile(rf"(\.lock|\.lock-ends|{STRIPE_LOCK.pattern})(\.holder)?")

Part = Literal["image", "text"]
StoredDtype = Literal["float16", "float32"]
PARTS: tuple[Part, ...] = ("image", "text")
# Nothing that is stored comes near; a count beyond is damage, and is refused before anything is allocated for it.
MOST_SHARDS = 2**20
_BOUNDS = {
    "n_images": (1, 10**10),
    "width": (1, 2**20),
    "n_captions_max": (1, 255),
    "shard_rows": (1, 10**10),
    "batch_tokens": (0, 10**10),
}
SHARD_NAME = re.compile(r"(image|text)-([0-9]{5,9})\.h5")
STORE_FILE = re.compile(rf"{SHARD_NAME.pattern}|{'|'.join(map(re.escape, (MANIFEST, KEY, INDEX, CHECKED)))}")
# The name of a file or folder while a process writes it: the final name, digits where the process may write it twice
# at a time, and which process of which machine it is.
TEMPORARY = re.compile(r"\.(?P<name>.+?)(\.[0-9a-f]{8})?\.(?P<host>[0-9a-z-]+)-(?P<pid>[0-9]+)\.tmp")


@dataclass(frozen=True)
class Shard:
    """One file of a store: the rows ``start`` to ``stop`` (exclusive) of one part, in index order."""

    part: Part
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The file's name, such as ``image-00003.h5``."""
        return f"{self.part}-{self.number:05d}.h5"

    @property
    def n_rows(self) -> int:
        """How many rows the shard holds."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The shape of a store.

    Attributes:
        n_images: N.
        width: D.
        n_captions_max: Captions kept per image.
        shard_rows: Rows of every shard but the last, which may have fewer.
        dtype: How embeddings are stored.
        batch_tokens: Tokens that went through a tower at once, 0 where nobody says. The last bit of a number may
            depend on it, so a store that is resumed keeps its own.
    """

    n_images: int
    width: int
    n_captions_max: int
    shard_rows: int
    dtype: StoredDtype
    batch_tokens: int = 0

    def __post_init__(self) -> None:
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                shown = repr(value) if type(value) is not int or abs(value) < 2**64 else "a number of many digits"
                raise ValueError(f"{name} is {shown}, it must be a whole number from {least} to {most}")
        if self.n_shards > MOST_SHARDS:
            raise ValueError(f"{self.n_shards} shards of {self.shard_rows} rows, there may be {MOST_SHARDS}")

    @property
    def n_shards(self) -> int:
        """How many shards each part has."""
        return -(-self.n_images // self.shard_rows)

    def shards(self, part: Part) -> list[Shard]:
        """Every shard of a part, in order."""
        starts = range(0, self.n_images, self.shard_rows)
        return [Shard(part, i, start, min(start + self.shard_rows, self.n_images)) for i, start in enumerate(starts)]

    def all_shards(self) -> list[Shard]:
        """Every shard of the store: image shards, then text shards."""
        return [shard for part in PARTS for shard in self.shards(part)]

    def datasets(self, part: Part, n_rows: int) -> dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]]:
        """Dtype (little-endian) and shape of each dataset of a shard with ``n_rows`` rows, in the order of the file."""
        n, d, c = n_rows, self.width, self.n_captions_max
        floats = np.dtype("<f2" if self.dtype == "float16" else "<f4")
        ids: dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]] = {"image_id": (np.dtype("<i8"), (n,))}
        if part == "image":
            return ids | {"v_img": (floats, (n, d)), "norm_img": (np.dtype("<f4"), (n,))}
        return ids | {
            "v_txt": (floats, (n, c, d)),
            "norm_txt": (np.dtype("<f4"), (n, c)),
            "n_captions": (np.dtype("u1"), (n,)),
        }

    def n_bytes(self, part: Part, n_rows: int) -> int:
        """Bytes of the datasets of a shard with ``n_rows`` rows."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.datasets(part, n_rows).values())


def temporary_name(name: str) -> str:
    """The name a file has while this process writes it."""
    return f".{name}.{this_host()}-{os.getpid()}.tmp"


def final_name(name: str) -> str:
    """The name that a temporary file or folder is going to have; empty for one that is no temporary."""
    temporary = TEMPORARY.fullmatch(name)
    return "" if temporary is None else temporary["name"]


@functools.cache
def this_host() -> str:
    """This machine's name, as it stands in file names, with what tells its boots and its containers apart.

    A process number means something only beside these: two containers may share their machine's name and folders.
    """
    name = re.sub("[^0-9a-z-]", "-", platform.node().lower())[:40] or "host"
    marks = []
    with contextlib.suppress(OSError):
        marks.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        marks.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return f"{name}-{zlib.crc32(' '.join(marks).encode()):08x}"
