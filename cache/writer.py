"""Writes a store, or what is missing of one: after a kill at any moment it resumes where it was."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Required, Self, TypedDict, Unpack

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .claim import Claim, Stripe
from .encode import image_arrays, text_arrays
from .errors import StoreError, StoreMismatch, StoreUnfinished
from .files import adopt, make_folder, remove, remove_temporaries, write_whole
from .folder import (
    DamagedShard,
    FolderState,
    WholeShard,
    check_layout,
    check_shard,
    discard,
    identify,
    index_is,
    key_digest,
    sort_shards,
)
from .index import check_index, index_bytes, place_rows
from .key import StoreKey
from .layout import FORMAT_VERSION, INDEX, KEY, MANIFEST, Layout, Part, Shard
from .metadata import FileEntry, StoreManifest, key_bytes, manifest_bytes, read_key
from .places import is_remote, place
from .shards import Arrays, ShardBroken, decode_shard, encode_shard, same_content

_log = logging.getLogger(__name__)


class Sizes(TypedDict, total=False):
    """The sizes of a new store; see :class:`StoreWriter`."""

    width: Required[int]
    n_captions_max: int
    shard_rows: int
    batch_tokens: int


class StoreWriter:
    """Fills one store, or a stripe of it; a context manager that holds the store's lock while it is open.

    Entering it makes the folder, refuses one that is not this key's, removes half-written files, and keeps every
    shard that is whole. Then write what :meth:`missing` lists and call :meth:`finish`.

    Args:
        folder: The store's folder, made when absent; :func:`~mmcli.cache.places.place` makes one of a URL.
        key: What the numbers depend on.
        index: One row per image, in order, with a column ``image_id`` int64, every value once.
        sizes: ``width``, the embedding width D, is needed; ``n_captions_max`` captions of an image are kept (5);
            ``shard_rows`` rows are one shard (1024), and ``batch_tokens`` one forward pass, of a new store. A store
            that is resumed keeps its own.
        extra: Anything JSON to keep in the manifest: library versions, device and the like.
        overwrite: Throw the store in ``folder`` away first, whatever its key.
        stripe: Fill these shards alone, beside the writers of other stripes; whoever ends last finishes the store.

    Attributes:
        folder: The store's folder.
        layout: The store's shape; with the rows per shard and tokens per pass of the store that is resumed.
        damaged: Files that were there and were not whole; their shards are among the missing.

    Raises:
        StoreError: The index, the sizes or ``extra`` are not as wanted (when made); the folder cannot be used (when
            entered, as for all below).
        StoreBusy: Another writer holds the folder.
        StoreMismatch: The folder holds another store or something else.
    """

    def __init__(
        self,
        folder: Path,
        key: StoreKey,
        index: pa.Table,
        *,
        extra: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        stripe: Stripe | None = None,
        **sizes: Unpack[Sizes],
    ) -> None:
        self.folder, self.key, self._table = place(folder), key, index
        if key.format_version != FORMAT_VERSION:
            raise StoreMismatch("a key of another format", got=key.format_version, wanted=FORMAT_VERSION)
        self._ids = check_index(index)
        try:
            usual: Sizes = {"n_captions_max": 5, "shard_rows": 1024, **sizes}
            self.layout = Layout(n_images=len(self._ids), dtype=key.dtype, **usual)
            # Through JSON and back, so that what is kept is what will be read.
            self._extra: dict[str, Any] = json.loads(json.dumps(dict(extra or {}), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise StoreError("bad store", where=folder, got=error) from error
        if stripe is not None and overwrite:
            raise StoreError("a stripe cannot replace a store", where=folder, do="remove the store first")
        self._overwrite, self._claim = overwrite, Claim(self.folder, stripe)
        self.damaged: list[DamagedShard] = []
        self._whole: dict[Shard, WholeShard] = {}
        self._finished = False

    def __enter__(self) -> Self:
        try:
            make_folder(self.folder)
            self._claim.take()
            with self._claim.alone():
                remove_temporaries(self.folder, alone=self._claim.stripe is None)
                self._open()
        except OSError as error:
            self.close()
            raise StoreError("cannot use the folder", where=self.folder, got=error.strerror or error) from error
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the folder for other writers. What was written stays."""
        self._claim.release()

    @property
    def finished(self) -> bool:
        """Whether the store has its manifest."""
        return self._finished

    def missing(self, part: Part) -> list[Shard]:
        """Shards of a part that this writer has still to write, in order."""
        return [shard for shard in self._claim.select(self.layout.shards(part)) if shard not in self._whole]

    def write_image(self, shard: Shard, *, v_img: NDArray[np.float32], skipped: Collection[int] = ()) -> None:
        """Write one missing image shard; norms are taken here, before the cast.

        Args:
            shard: One of :meth:`missing`.
            v_img: Raw embeddings, ``(n, D)`` float32; rows of skipped images are zero.
            skipped: Rows of the shard whose images could not be read; :meth:`finish` asks why.

        Raises:
            StoreError: A wrong shape or dtype, a value that is not finite or too large for the stored dtype, or a
                disk that does not take it.
        """
        self._put(shard, "image", image_arrays(shard, self.layout, self._ids, v_img, skipped))

    def write_text(self, shard: Shard, *, v_txt: NDArray[np.float32], n_captions: NDArray[np.integer[Any]]) -> None:
        """Write one missing text shard; norms are taken here, before the cast.

        Args:
            shard: One of :meth:`missing`.
            v_txt: Raw embeddings, ``(n, n_captions_max, D)`` float32; rows of missing captions are zero.
            n_captions: Real captions of each image, ``(n,)`` integers; they come first.

        Raises:
            StoreError: See :meth:`write_image`.
        """
        self._put(shard, "text", text_arrays(shard, self.layout, self._ids, v_txt, n_captions))

    def reuse_text(self, other: Path) -> int:
        """Take missing text shards from a store whose captions were embedded in the same way.

        Args:
            other: Any folder; one that has nothing to give is no error.

        Returns:
            How many shards were taken. A shard that is damaged, or of other rows, is not.
        """
        self._check_open()
        try:
            # The key tells that captions are the same; no shard is opened to learn that they are not.
            if read_key(place(other))[0].text_digest != self.key.text_digest:
                return 0
        except (OSError, StoreError):
            return 0
        missing = self.missing("text")
        for shard in missing:
            path = place(other) / shard.name
            try:
                self._whole[shard] = adopt(
                    path,
                    self.folder / shard.name,
                    partial(check_shard, shard=shard, layout=self.layout, key=self.key, ids=self._ids),
                )
            except (ShardBroken, OSError) as error:
                _log.debug("not taken: %s: %s", path, error)
        return len(missing) - len(self.missing("text"))

    @property
    def skipped(self) -> dict[Shard, tuple[int, ...]]:
        """Whole image shards with skipped rows, and these rows of the store."""
        return {shard: whole.skipped for shard, whole in self._whole.items() if whole.skipped}

    def redo(self, shard: Shard) -> None:
        """Take a whole shard back among the missing; the store is unfinished from here on."""
        self._check_open()
        if self._whole.pop(shard, None) is None:
            return
        with self._claim.alone():
            # The shard too: a writer of another stripe must not take it for the last word and finish the store.
            remove(self.folder / MANIFEST)
            remove(self.folder / shard.name)
        self._finished = False

    def finish(self, why: Callable[[int], str | None] = lambda _row: None) -> Path:
        """Write the index, then the manifest, which makes the store readable; nothing to do for a finished one.

        A stripe's writer does so only where the other stripes are whole as well; see :attr:`finished`.

        Args:
            why: Says for a row of the store why its image was skipped.

        Returns:
            The store's folder.

        Raises:
            StoreUnfinished: Shards of this writer are missing.
            StoreError: The disk does not take it, or a row was skipped and nobody says why.
        """
        self._check_open()
        missing = [shard.name for shard in self._claim.select(self.layout.all_shards()) if shard not in self._whole]
        if missing:
            raise StoreUnfinished(
                "shards are missing", where=self.folder, got=f"{missing[0]} and {len(missing) - 1} more"
            )
        with self._claim.alone():
            if self._finished and (self.folder / MANIFEST).is_file():
                if not is_remote(self.folder):
                    os.utime(self.folder / MANIFEST)  # the newest store is the one that was asked for last
            elif self._all_whole():
                self._write_manifest(why)
            else:
                self._finished = False  # another stripe makes a shard again
        return self.folder

    def _all_whole(self) -> bool:
        """Whether every shard is there, those of other stripes too; the caller is alone."""
        every = self.layout.all_shards()
        if self._claim.stripe is not None:
            if not all((self.folder / shard.name).is_file() for shard in every):
                return False
            # All of them again: where stripes were cut differently, another writer may own one of ours.
            state = FolderState(manifest=None, identity=(self.key, self.layout))
            self._whole, _ = sort_shards(self.folder, self.key, self.layout, self._ids, state, every)
        return len(self._whole) == len(every)

    def _write_manifest(self, why: Callable[[int], str | None]) -> None:
        rows = sorted(row for skipped in self.skipped.values() for row in skipped)
        reasons = {row: reason for row in rows if (reason := why(row))}
        if len(reasons) < len(rows):
            unknown = next(row for row in rows if row not in reasons)
            raise StoreError("a skipped row without a reason", where=self.folder, got=f"row {unknown}")
        data = index_bytes(place_rows(self._table, self.layout))
        write_whole(self.folder / INDEX, data)
        manifest = StoreManifest(
            key=self.key,
            layout=self.layout,
            extra=self._extra,
            index=FileEntry(
                file=INDEX, rows=self.layout.n_images, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
            ),
            shards=tuple(self._whole[shard].entry for shard in self.layout.all_shards()),
            skipped=reasons,
            created=datetime.now(UTC).isoformat(timespec="microseconds"),
        )
        write_whole(self.folder / MANIFEST, manifest_bytes(manifest))
        self._finished = True

    def _open(self) -> None:
        state = identify(self.folder, self.key, cleared=self._overwrite and discard(self.folder))
        if state.identity is not None:
            check_layout(self.folder, state.identity[1], self.layout)
            self.layout = state.identity[1]
        selected = self._claim.select(self.layout.all_shards())
        self._whole, damaged = sort_shards(self.folder, self.key, self.layout, self._ids, state, selected)
        self.damaged = [*state.damaged, *damaged]
        try:
            index_ok = index_is(self.folder, state.manifest, place_rows(self._table, self.layout))
        except ShardBroken as error:
            self.damaged.append(DamagedShard(INDEX, str(error)))
            index_ok = False
        self._finished = bool(state.manifest) and index_ok and len(self._whole) == len(selected)
        if not self._finished:
            remove(self.folder / MANIFEST)
        text = key_bytes(self.key, self.layout)
        path = self.folder / KEY
        if not path.is_file() or path.read_bytes() != text:
            write_whole(path, text)

    def _put(self, shard: Shard, part: Part, arrays: Arrays) -> None:
        self._check_open()
        if shard.part != part or shard not in self.missing(part):
            raise StoreError(
                "not a missing shard", where=self.folder, got=shard.name, wanted=f"one of missing({part!r})"
            )
        digest = key_digest(self.key, shard)
        data = encode_shard(shard, self.layout, digest, arrays)
        path = self.folder / shard.name

        def check(written: bytes) -> None:
            try:
                same = same_content(arrays, decode_shard(written, shard, self.layout, digest))
            except ShardBroken as error:
                raise StoreError("cannot read what was written", where=path, got=error, do="check the disk") from error
            if not same:
                raise StoreError("the disk gave back something else", where=path, do="check the disk")

        write_whole(path, data, check)
        self._whole[shard] = WholeShard.of(data, shard, arrays)

    def _check_open(self) -> None:
        if not self._claim.held:
            raise StoreMismatch("the writer is not open", where=self.folder, do="use it in a with block")
