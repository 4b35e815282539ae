"""Stores of other patch budgets that an ablation needs: images alone are encoded, captions are those of its store."""

from pathlib import Path
from typing import Protocol

from ... import InputError
from ...cache import Store, is_remote
from ..core.config import Config
from ..core.progress import Progress
from ..extraction.extract import ExtractPlan
from ..extraction.fleet import extract_here
from .base import model_of
from .runs import STORES


class Places(Protocol):
    """Where to write, and where the images are."""

    @property
    def out(self) -> Path:
        """Folder of the table."""

    @property
    def data(self) -> Path:
        """Folder of the images."""


def extract_at(patches: int, digest: str, store: Path, places: Places, config: Config, progress: Progress) -> Path:
    """Extract a store like another one at another patch budget, below the folder of the table.

    Args:
        patches: The budget.
        digest: Of the key that the new store must have.
        store: The other one; its caption embeddings are taken over.
        places: Where to write, and where the images are.
        config: Hardware and data sections are used, and the model where it was given.
        progress: Who to tell.

    Raises:
        InputError: No images, no checkpoint, or one that is not the store's.
    """
    opened = Store.open(store)
    key = opened.key
    folder = places.out / STORES / f"{key.model.rsplit('/', 1)[-1]}-p{patches}-{digest[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not is_remote(store):
        # Captions are taken over from stores that lie beside the new one.
        beside = folder.parent / f"base-{key.digest[:12]}"
        if not beside.exists():
            beside.unlink(missing_ok=True)
            beside.symlink_to(store.resolve(), target_is_directory=True)
    model = model_of(opened, config, patches)
    # Shards of captions are taken over where they are of the same rows.
    rows = opened.columns(["shard"])["shard"].to_pylist().count(0)
    plan = ExtractPlan(data=places.data, out=folder, dtype=key.dtype, shard_rows=rows)
    result = extract_here(config.model_copy(update={"model": model}), plan, progress=progress)
    if result.digest != digest:
        raise InputError(
            "another store than was planned", where=folder, got=f"key {result.digest[:12]}", wanted=digest[:12],
            do="name the checkpoint, the data and the device that made the store",
        )  # fmt: skip
    progress.say(
        f"  {result.n_encoded:,} images encoded, {result.reused_text_shards} shards of captions taken over: {folder}"
    )
    return folder.absolute()
