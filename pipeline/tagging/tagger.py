"""Tag images with their captions, from Python: a run's encoder and head, and an index whose samples vote."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ...cache import Store, StoreError, place
from ...errors import InputError
from ...heads.config import KnnConfig
from ..core.checkpoint import load_head
from ..core.config import load_config
from ..core.progress import Progress
from ..core.results import read_codes
from ..core.run import Run, open_run
from ..data.manifest import read_manifest
from ..evaluation.search import rows_of
from .encode import Picture, RunEncoder, encoder_digest, head_digest
from .index_file import Origin, TagIndex, check_origin, read_index
from .voting import Query, Tagging, Voters


class Tagger:
    """Tags images with their captions; the encoder, the head and the index are loaded once.

    Attributes:
        run: The run whose encoder and head are used.
        encoder: From image and caption to code.
        voters: From code to tags.
        notes: Remarks for the user, a line each: such as captions that are not known any more.
    """

    def __init__(self, run: Run, encoder: RunEncoder, voters: Voters) -> None:
        self.run, self.encoder, self.voters = run, encoder, voters
        self.notes = encoder.notes
        if not any(pc.any(pc.not_equal(column, "")).as_py() for column in (voters.index.paths, voters.index.captions)):
            where = run.info.store
            self.notes += (f"neighbours are shown by their ids: the store {where} was moved or changed",)

    @classmethod
    def load(
        cls,
        run: str | PathLike[str],
        *,
        index: str | PathLike[str] | None = None,
        device: str = "auto",
        model: str | None = None,
        knn: KnnConfig | None = None,
    ) -> Self:
        """Load a run's checkpoint, head and train codes, or the samples of an index file.

        Args:
            run: A finished run of ``train-head``.
            index: A file of ``mmcli index build``; the run's train codes vote when not given.
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
            model: The folder or hub id of the SigLIP2 checkpoint, if it is no longer where the run says.
            knn: How to search and vote; as the run is configured when not given.

        Raises:
            InputError: Something is missing or damaged; the checkpoint is not the one that the run's store was made
                with; the index holds codes of another head.
        """
        opened = open_run(Path(run))
        # What is quick comes first: an index that is not there is refused before towers are loaded.
        samples = run_index(opened) if index is None else read_index(Path(index))[0]
        voters = Voters(samples, knn or run_knn(opened, samples))
        encoder = RunEncoder.load(opened, device=device, model=model)
        check_origin(samples.origin, encoder.origin, where=index or opened.folder)
        return cls(opened, encoder, voters)

    @property
    def category_names(self) -> tuple[str, ...]:
        """C names, in the order of scores."""
        return self.voters.index.category_names

    def predict(
        self,
        images: Sequence[Picture],
        captions: Sequence[str | None] | None = None,
        k: int | None = None,
        top: int = 5,
        *,
        image_ids: Sequence[int | None] | None = None,
        unreadable: dict[int, str] | None = None,
        progress: Progress | None = None,
    ) -> list[Tagging]:
        """Tag images.

        Args:
            images: Q paths, arrays ``(height, width, 3)`` uint8, or images of Pillow.
            captions: Q captions; not needed by a head that reads images alone.
            k: Neighbours that vote; as configured when not given.
            top: Tags of an image at most.
            image_ids: Ids of images that may be in the index; their own samples do not vote.
            unreadable: Where given, an image that cannot be read is noted here by its place in ``images``, with the
                reason, and left out of what is returned.
            progress: Progress bars; none are shown when not given.

        Returns:
            Q taggings, in order. What an image gets does not depend on the others.

        Raises:
            InputError: An image cannot be read, a caption is missing, or k is larger than the index.
        """
        if isinstance(images, str | PathLike) or isinstance(captions, str):
            raise InputError("one image", got="text", wanted="lists", do='predict(["a.jpg"], ["a caption"])')
        texts = [None] * len(images) if captions is None else list(captions)
        self.encoder.check_captions(images, texts)
        self.voters.check_k(k)
        ids = [None] * len(images) if image_ids is None else list(image_ids)
        if len(ids) != len(images):
            raise InputError("one image id an image", got=f"{len(images)} images, {len(ids)} ids")
        if not images:
            return []
        unread: dict[int, str] = {} if unreadable is None else unreadable
        coded = self.encoder.encode(
            images, texts, unreadable=None if unreadable is None else unread, progress=progress
        ).without(unread)
        names = [str(image) if isinstance(image, str | PathLike) else None for image in images]
        queries = [Query(*query) for row, query in enumerate(zip(names, texts, ids, strict=True)) if row not in unread]
        return self.voters.tag(coded, queries, k=k, top=top)


def run_knn(run: Run, index: TagIndex) -> KnnConfig:
    """The knn section of a run's configuration; without hash layer the metric is cosine."""
    knn = load_config(run.paths.config).knn
    return knn if index.bits else knn.model_copy(update={"distance_metric": "cosine"})


def run_index(run: Run) -> TagIndex:
    """The train codes of a run as an index, with captions and paths if what the run was trained from is still there.

    Raises:
        InputError: The run has no codes or no head.
    """
    codes, info = read_codes(run.folder, "train"), run.info
    store = None if info.kind == "finetune" else run_store(run)
    encoder = "" if store is None else encoder_digest(store.key)
    head = head_digest(load_head(run.folder))
    origin = Origin(head=head, store=info.store_digest, model=info.model, patches=info.patches, encoder=encoder)
    paths, captions = (None, None)
    if info.kind == "finetune":
        paths, captions = _texts_of_manifest(run, codes.image_id)
    elif store is not None:
        paths, captions = _texts_of_store(store, codes.image_id)
    return TagIndex.from_codes(codes, info.category_names, origin, paths=paths, captions=captions)


def run_store(run: Run) -> Store | None:
    """The store that a run was trained from, if it is there and still the same."""
    where = place(run.info.store)
    candidates = [where]
    if isinstance(where, Path) and not where.is_absolute():
        candidates.append(run.folder.resolve().parent.parent / where)  # a run's usual place is runs/NAME beside data
    for folder in candidates:
        try:
            store = Store.open(folder)
        except (StoreError, OSError):
            continue
        if store.digest == run.info.store_digest:
            return store
    return None


Texts = tuple[pa.StringArray | None, pa.StringArray | None]


def _texts_of_store(store: Store, image_id: npt.NDArray[np.int64]) -> Texts:
    """Paths and first captions of some images of a store; nothing where it has none of those columns."""
    rows = rows_of(store.ids, image_id)
    if (rows < 0).any():
        return None, None
    try:
        table = store.columns(["path", "captions"]).take(pa.array(rows))
        paths = pc.fill_null(table.column("path").combine_chunks().cast(pa.string()), "")
        texts = table.column("captions").to_pylist()
        captions = pa.array([captions[0] if captions else "" for captions in texts], pa.string())
    except (StoreError, KeyError, pa.ArrowException):
        return None, None
    return paths, captions


def _texts_of_manifest(run: Run, image_id: npt.NDArray[np.int64]) -> Texts:
    """Paths and first captions of some images of the manifest that a run was finetuned on, if it is still the same."""
    try:
        listing = read_manifest(Path(run.info.store))
    except InputError:
        return None, None
    if listing.sha256 != run.info.manifest_sha256:
        return None, None
    rows = rows_of(listing.image_ids, image_id).tolist()
    paths, captions = [listing.paths[row] for row in rows], [listing.first_captions[row] for row in rows]
    return pa.array(paths, pa.string()), pa.array(captions, pa.string())
