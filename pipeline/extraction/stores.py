"""A store as the stages after extraction see it: embeddings with labels and splits."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ... import InputError
from ...cache import Embeddings, Store, StoreKey, StoreMismatch, newest_store
from ..core.config import Config, ModelConfig
from ..core.run import RunInfo, now
from ..data.manifest import CORE, Manifest
from ..data.manifest_checks import SCHEMA
from ..data.protocols import lists_digest

DEFAULT_CACHE = Path("data/cache")
_MOVED = 1024  # rows that are moved at a time
_DIGITS = re.compile("[0-9a-f]{7,40}")


@dataclass(frozen=True, kw_only=True)
class LabelledStore:
    """A store, its arrays and its listing, all in manifest order, without the images that could not be read."""

    store: Store
    embeddings: Embeddings
    listing: Manifest


def find_store(folder: Path | None, cache: Path = DEFAULT_CACHE) -> Path:
    """The store that was named, or the newest finished one.

    Raises:
        InputError: There is none.
    """
    return folder if folder is not None else newest_store(cache)


class Reading:
    """A store that is read by a thread while the process does something else: importing torch takes as long.

    Args:
        folder: The store.
        config: As of :func:`read_store`.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder = folder
        self._store = Store.open(folder)
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
        reading: That is under way already.

    Raises:
        InputError: The store is damaged, unfinished, or of another model than was asked for.
    """
    store, embeddings = (reading or Reading(folder, config)).result()
    kept = np.setdiff1d(np.arange(store.n_images), list(store.skipped)) if store.skipped else None
    if kept is not None:
        embeddings = Embeddings(**{name: _compacted(values, kept) for name, values in vars(embeddings).items()})
    return LabelledStore(store=store, embeddings=embeddings, listing=_listing(store, kept))


def _listing(store: Store, kept: npt.NDArray[np.int64] | None) -> Manifest:
    """The store's index as a manifest; captions, most of its bytes, wait until somebody asks for them."""

    def rows(names: Sequence[str] | None) -> pa.Table:
        table = store.columns(names).drop_columns(["shard", "row"])
        return table if kept is None else table.take(kept)

    where = str(store.folder)
    if set(store.column_names) >= set(SCHEMA.names):
        return Manifest.from_parts(rows(CORE), lambda: rows(None), where=where)
    return Manifest.from_table(rows(None), where=where)


def _compacted(values: npt.NDArray[Any], kept: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Rows ``kept`` (rising) of an array, moved up in place: a second array of a store's size would not be small."""
    for at in range(0, len(kept), _MOVED):
        rows = kept[at : at + _MOVED]
        if rows[-1] != at + len(rows) - 1:
            values[at : at + len(rows)] = values[rows]
    return values[: len(kept)]


def resolve_config(config: Config, labelled: LabelledStore) -> Config:
    """Put what the store knows into the configuration: model and its commit, budget, number of classes.

    Raises:
        InputError: ``classifier.num_classes`` was given and is not the store's.
    """
    key, n_classes = labelled.store.key, len(labelled.listing.category_names)
    if "num_classes" in config.classifier.model_fields_set and config.classifier.num_classes != n_classes:
        raise InputError(
            "wrong number of classes", where="classifier.num_classes", got=config.classifier.num_classes,
            wanted=f"{n_classes}, as in {labelled.store.folder}", do="leave it out, it is read from the store",
        )  # fmt: skip
    given = "siglip2_variant" in config.model.model_fields_set
    known = str(labelled.store.extra.get("model_path", key.model))
    name = config.model.siglip2_variant if given else known
    model = ModelConfig(
        siglip2_variant=name, revision=key.commit if name == key.model else config.model.revision,
        max_num_patches=key.patches, text_max_length=key.text_length,
    )  # fmt: skip
    classifier = config.classifier.model_copy(update={"num_classes": n_classes})
    return config.model_copy(update={"model": model, "classifier": classifier})


def describe_run(kind: str, config: Config, labelled: LabelledStore, *, precision: str) -> RunInfo:
    """What ``run.json`` says of a run that reads this store and computes in a precision."""
    key = labelled.store.key
    return RunInfo(
        kind=kind, status="running", created=now(), config_digest=config.digest, preset=config.preset,
        seed=config.hardware.seed, store=str(labelled.store.folder), store_digest=key.digest, model=key.model,
        patches=key.patches, manifest_sha256=key.manifest_sha256, category_names=labelled.listing.category_names,
        lists_digest=lists_digest(config.data), precision=precision,
    )  # fmt: skip


def _is_other_commit(asked: str | None, key: StoreKey) -> bool:
    """Whether the digits of a commit were asked for, and the store's begins with others; a branch may be any commit."""
    if asked is None or not (_DIGITS.fullmatch(asked) and _DIGITS.fullmatch(key.revision)):
        return False
    return not key.revision.startswith(asked)


def _check_model(store: Store, config: Config) -> None:
    asked, given = config.model, config.model.model_fields_set
    name = asked.siglip2_variant
    known = {store.key.model, str(store.extra.get("model_path", store.key.model))}
    wrong = [
        ("model", name, store.key.model, "siglip2_variant" in given and not {name, Path(name).name} & known),
        ("patches", asked.max_num_patches, store.key.patches,
         "max_num_patches" in given and asked.max_num_patches != store.key.patches),
        ("revision", asked.revision, store.key.revision, _is_other_commit(asked.revision, store.key)),
        ("text length", asked.text_max_length, store.key.text_length,
         "text_max_length" in given and asked.text_max_length != store.key.text_length),
    ]  # fmt: skip
    for what, wanted, got, is_wrong in wrong:
        if is_wrong:
            raise StoreMismatch(
                "a store of another model", where=store.folder, got=f"{what} {got}", wanted=f"{what} {wanted}",
                do="name another --store, or run `mmcli extract` for this model",
            )  # fmt: skip
