"""What a finetuning needs before its first step: manifest, checkpoint, embeddings, and a head."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...cache import StoreKey
from ...errors import InputError
from ...heads.model import BaseHead
from ..core.checkpoint import load_head
from ..core.config import Config, DataConfig, load_config
from ..core.device import autocast, device_line
from ..core.progress import Progress
from ..core.results import read_codes
from ..core.run import RunInfo, now, open_run, read_info
from ..core.run_folders import RunPaths
from ..data.manifest import Manifest, read_manifest
from ..data.protocols import lists_digest
from ..extraction.encoder import Encoder, EncoderParts
from ..extraction.images import Resizer
from ..extraction.model_source import COMMIT, find_commit
from ..extraction.shards import CAPTIONS
from ..extraction.siglip import Identity, model_path
from ..extraction.stores import find_key
from ..training.data import Split
from ..training.monitor import Monitor
from ..training.setup import check_splits, draw_head
from ..training.step import Step
from .batches import TowerStep
from .distributed import ProcessGroup, Shards, wants_shards
from .embeddings import LiveStore
from .towers import Towers

Ids = npt.NDArray[np.int64]


def refuse_seen(start: Path, data: DataConfig, manifest_sha256: str, image_ids: Mapping[str, Ids]) -> None:
    """Refuse a run that was trained on images that would tune or test the head now.

    The run's train images, and those of the runs that it began with in turn, are named in their codes. Where codes are
    missing, only a run of the same manifest and protocol is taken: its held-out images are the same.

    Args:
        start: The run to begin with.
        data: The data section of the finetuning.
        manifest_sha256: Content hash of its manifest.
        image_ids: Image ids of its splits, ``(n,)`` int64.

    Raises:
        InputError: Such images, or another manifest or protocol where nothing can be compared.
    """
    seen = _seen(start)
    if seen is None:
        _refuse_other_data(start, data, manifest_sha256)
        return
    for split in ("test", "val"):
        common = np.intersect1d(seen, image_ids[split])
        if len(common):
            raise InputError(
                f"{split} images that the run was trained on",
                where=start,
                got=f"{len(common):,} of {len(np.unique(image_ids[split])):,} in common, as image id {common[0]}",
                wanted="none",
                do="leave --protocol out with --from, or start from a run that has not seen them",
            )


def _refuse_other_data(start: Path, data: DataConfig, manifest_sha256: str) -> None:
    info, theirs = read_info(start), load_config(RunPaths(start).config).data
    digests = (info.lists_digest or lists_digest(theirs), lists_digest(data))
    protocols = [
        " of ".join(filter(None, (section.split_type, digest[:12])))
        for section, digest in zip((theirs, data), digests, strict=True)
    ]
    pairs = {"protocol": protocols, "manifest": [info.manifest_sha256[:12], manifest_sha256[:12]]}
    for name, (wanted, got) in pairs.items():
        if wanted != got:
            raise InputError(
                f"another {name} than the run's, and it does not say which images it was trained on",
                where=RunPaths(start).codes("train"),
                got=got,
                wanted=wanted,
                do="bring its codes back, or start from another run",
            )


def _seen(start: Path) -> Ids | None:
    """Ids of all images that a run, and what it began with, was trained on; None where one of them does not say."""
    ids: list[Ids] = []
    passed: set[Path] = set()
    following: Path | None = start
    while following is not None and following.resolve() not in passed:
        passed.add(following.resolve())
        if not RunPaths(following).codes("train").is_file():
            return None
        ids.append(read_codes(following, "train").image_id)
        try:
            before = load_config(RunPaths(following).config).finetune.start
        except InputError:
            return None
        following = None if before is None else Path(before)
    return np.unique(np.concatenate(ids))


MANIFEST = "manifest.parquet"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a finetuning works on.

    Attributes:
        config: The configuration, completed by what manifest and checkpoint say.
        towers: The towers, and what of them is trained.
        store: Embeddings of the towers, which may change.
        shards: What this process has of the trained parameters.
        group: The processes.
        manifest: The manifest's file.
    """

    config: Config
    towers: Towers
    store: LiveStore
    shards: Shards
    group: ProcessGroup
    manifest: Path

    @property
    def changing(self) -> list[str]:
        """Modalities whose embeddings in training are not those of the store: trained towers, augmented images."""
        return sorted({*self.towers.sides, *(["image"] if self.config.finetune.augment else [])})

    @property
    def precision(self) -> str:
        """What training computes in: the precision of the towers where they train, else that of the head."""
        step = TowerStep if self.changing else Step
        return step.autocast_of(self.group.device, self.config).name

    def embed(self, rows: Mapping[str, Ids], *, quiet: bool = False) -> None:
        """Embed with the towers as they are now.

        Args:
            rows: Rows of the manifest, ascending, of ``image`` and ``text``.
            quiet: Show no progress bar.
        """
        with self.shards.gathered():
            if self.towers.sides:
                self.store.renew()
            for side in sorted(rows):  # in one order in all processes
                self.store.embed(side, rows[side], quiet=quiet)

    def splits(self) -> dict[str, Split]:
        """The splits as the head reads them, of what is embedded."""
        if self.config.fusion.magnitude == "own":
            return self.store.splits
        seed = self.config.hardware.seed
        return {name: split.shuffle_magnitudes(seed) for name, split in self.store.splits.items()}

    def first_head(self, monitor: Monitor) -> BaseHead:
        """The head that training begins with: that of the run to start from, else drawn by the seed.

        The log-norms of a new one are those of the train images that the monitor evaluates: all of them where there
        are not many.

        Raises:
            InputError: The run's head is another one than is configured.
        """
        config = self.config
        head = draw_head(config, width=self.store.encoder.width, device=self.group.device)
        if config.finetune.start is None:
            embedded = monitor.voters if self.changing else self.splits()["train"]
            head.fit_log_norms(embedded.log_norms())
            return head
        start = Path(config.finetune.start)
        warm = load_head(start, self.group.device)
        wrong = [name for name in head.build if head.build[name] != warm.build.get(name)]
        if wrong:
            raise InputError(
                "another head than the run's",
                where=start,
                got=f"{wrong[0]} as configured now",
                wanted=f"its {wrong[0]}: {warm.build.get(wrong[0])}",
                do="leave such options out with --from",
            )
        return warm

    def digest(self, identity: Identity) -> str:
        """Digest of the key of the float32 store that an encoder would fill from this manifest on a CPU."""
        names = vars(identity) | {"model": self.towers.parts.identity.model, "compute_dtype": "float32"}
        return StoreKey(**names, dtype="float32", manifest_sha256=self.store.listing.sha256).digest

    def describe(self, kind: str) -> RunInfo:
        """The record of a run that begins, for ``run.json``."""
        config, listing, identity = self.config, self.store.listing, self.towers.parts.identity
        return RunInfo(
            kind=kind,
            status="running",
            created=now(),
            config_digest=config.digest,
            preset=config.preset,
            seed=config.hardware.seed,
            store=str(self.manifest),
            store_digest=self.digest(identity),
            model=identity.model,
            patches=config.model.max_num_patches,
            manifest_sha256=listing.sha256,
            category_names=listing.category_names,
            lists_digest=lists_digest(config.data),
            precision=self.precision,
        )


@contextmanager
def set_up(config: Config, data: Path, group: ProcessGroup, progress: Progress) -> Iterator[Setup]:
    """Read a manifest and a checkpoint, and make room for the embeddings.

    Args:
        config: A configuration of :func:`~mmcli.pipeline.finetuning.settings.resolve_finetune`.
        data: The data set's folder.
        group: The processes.
        progress: Progress bars; pass ``Progress.quiet()`` to silence them.

    Raises:
        InputError: Either cannot be used, they do not fit the run to start from, no label can be learnt, or an image
            has no header.
    """
    manifest = data / MANIFEST
    listing = read_manifest(manifest)
    config = with_classes(config, listing)
    start = None if config.finetune.start is None else Path(config.finetune.start)
    parts = _load(config, start, listing, group)
    # The run names the commit: what it begins with is found again, wherever a branch has moved to.
    source = {"siglip2_variant": model_path(parts.source.name), "revision": parts.source.commit}
    config = config.model_copy(update={"model": config.model.model_copy(update=source)})
    towers = Towers(parts, config.finetune)
    kept = 1 if "text" in towers.sides else CAPTIONS
    where = device_line(group.device, autocast(group.device, config.training.mixed_precision).name)
    progress.say(f"finetuning {parts.identity.model} on {where}, from {data}")
    with LiveStore(listing, data, parts, config, captions=kept, group=group, progress=progress) as store:
        check_splits(store.splits, config, data)
        if start is not None:
            refuse_seen(start, config.data, listing.sha256, store.image_ids)
        store.check_headers(store.used)
        sharded = bool(towers.sides) and group.size > 1 and (config.finetune.fsdp or wants_shards())
        shards = Shards(towers, group, sharded=sharded)
        yield Setup(config=config, towers=towers, store=store, shards=shards, group=group, manifest=manifest.resolve())


def with_classes(config: Config, listing: Manifest) -> Config:
    """The configuration with the manifest's number of classes.

    Raises:
        InputError: Another number is configured.
    """
    n, section = len(listing.category_names), config.classifier
    if "num_classes" in section.model_fields_set and section.num_classes != n:
        raise InputError(
            "wrong number of classes",
            where="classifier.num_classes",
            got=section.num_classes,
            wanted=f"{n}, as in the manifest",
            do="leave it out, it is read from the manifest",
        )
    return config.model_copy(update={"classifier": section.model_copy(update={"num_classes": n})})


def _load(config: Config, start: Path | None, listing: Manifest, group: ProcessGroup) -> EncoderParts:
    """The checkpoint; that of the run to start from has to be the one that its head was trained on."""
    model = config.model
    trained = None if start is None else RunPaths(start).towers
    name = str(trained) if trained is not None and trained.is_dir() else model.siglip2_variant
    revision = model.revision if name == model.siglip2_variant else None
    # A branch may move between the first process that asks for it and the last one.
    commit = group.broadcast_text(str(find_commit(name, revision)) if group.is_first else "")
    parts = Encoder.parts(
        name,
        revision=commit if COMMIT.fullmatch(commit) else revision,
        patches=model.max_num_patches,
        text_length=model.text_max_length,
        device=group.device,
    )
    if start is None:
        return parts
    info = open_run(start).info
    if info.category_names != listing.category_names:
        raise InputError(
            "a run of other categories",
            where=start,
            got=f"{len(info.category_names)} categories",
            wanted="those of the manifest, in its order",
            do="start from a run of this data set",
        )
    key = find_key(parts.identity, info)
    if key is None:
        raise InputError(
            "another checkpoint than the run's",
            where=name,
            got=f"{parts.identity.model}, {model.max_num_patches} patches",
            wanted=f"the {info.model} that the head of {start} was trained on, {info.patches} patches",
            do="leave --model and --patches out with --from, or start from another run",
        )
    resized = replace(parts.identity, processor=key.processor)
    resizer: Resizer = "torch" if '"resizer"' in key.processor else "pillow"
    return parts._replace(identity=resized, spec=replace(parts.spec, resizer=resizer))
