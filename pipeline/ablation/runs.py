"""Runs that trainings of a plan are: found where they were made already, by hand too, and named where they are not.

A run that somebody made with ``mmcli train-head`` is used in the place of a new one where its saved configuration and
the digest of its store give the same key. Nothing here imports torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ... import InputError
from ...cache import Store, list_stores
from ...cache.strict_json import parse_json
from ..core.config import load_config
from ..core.metrics_file import read_metrics
from ..core.results import SPLITS, codes_path
from ..core.run import Run, RunInfo, open_run, read_info
from ..core.run_folders import MARK
from ..data.protocols import lists_digest
from ..evaluation.prompts import TEMPLATES
from .ablate_plan import Training, training_key
from .identity import FROZEN

OWN, STORES = "runs", "stores"
KINDS = {"head": "train-head", "finetune": "finetune", "zero-shot": "zero-shot"}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Keys of trainings that a search looks for, and the digests of their stores."""

    trainings: Mapping[str, Training]

    @property
    def stores(self) -> set[str]:
        """Digests of the stores that any of them is of."""
        return {one.store for one in self.trainings.values()}


def find_runs(plan: Mapping[str, Training], places: Iterable[Path]) -> dict[str, Path]:
    """Finished runs that are trainings of a plan.

    Args:
        plan: Trainings by key.
        places: Folders of runs; of several that are one training the first is taken.

    Returns:
        The run's folder by key.
    """
    wanted = Wanted(trainings=plan)
    found: dict[str, Path] = {}
    for place in places:
        for mark in sorted(place.glob(f"*/{MARK}")):
            key = _key_of_run(mark.parent, wanted)
            if key is not None:
                found.setdefault(key, mark.parent)
    return found


def own_folder(out: Path, training: Training) -> Path:
    """Where a training of the plan is made. Replicas of one configuration differ in the end of the name alone."""
    config = training.config
    name = "mlp" if config.head == "mlp" else f"b{config.hash.bits}-{config.fusion.type}"
    towers = "" if training.kind != "finetune" else f"-{training.towers}"
    label = name if training.kind in {"head", "finetune"} else training.kind
    return out / OWN / f"{training.group[:12]}-{label}{towers}-seed{training.seed}"


def is_finished(folder: Path) -> bool:
    """Whether a run that ended lies there."""
    try:
        return read_info(folder).status == "finished"
    except InputError:
        return False


def resumable(folder: Path, training: Training) -> bool:
    """Whether an interrupted run of this very training lies there."""
    try:
        info = read_info(folder)
        config = load_config(folder / "config.yaml")
        towers, store = _began_with(folder, info)
    except (InputError, OSError, ValueError, LookupError, TypeError):
        return False
    if info.kind not in {KINDS["head"], KINDS["finetune"]} or info.status not in {"running", "interrupted"}:
        return False
    return training_key(config, store, towers, info.lists_digest) == training.key


def find_stores(digests: Iterable[str], places: Iterable[Path]) -> dict[str, Path]:
    """Finished stores below some folders, by the digest of their key."""
    wanted, found = set(digests), dict[str, Path]()
    for place in places:
        for folder in list_stores(place) if place.is_dir() else []:
            digest = Store.open(folder).key.digest
            if digest in wanted:
                found.setdefault(digest, folder)
    return found


def _key_of_run(folder: Path, wanted: Wanted) -> str | None:
    """The training that a run is, if it is finished, whole and one of those wanted."""
    try:
        info = read_info(folder)
        towers, store = _began_with(folder, info)
        if info.status != "finished" or store not in wanted.stores:
            return None
        run = open_run(folder, kind=info.kind)
        if info.kind == "zero-shot":
            return _zero_shot(run, wanted)
        if info.kind not in {KINDS["head"], KINDS["finetune"]} or not all(
            codes_path(folder, s).is_file() for s in SPLITS
        ):
            return None
        key = training_key(load_config(folder / "config.yaml"), store, towers, info.lists_digest)
    except (InputError, OSError, ValueError, LookupError, TypeError):
        return None  # half-written, of another version, or somebody's own
    return key if key in wanted.trainings else None


def _began_with(folder: Path, info: RunInfo) -> tuple[str, str]:
    """What of the towers a run trained, and the digest of the store that it, or its towers, began with."""
    if info.kind != KINDS["finetune"]:
        return FROZEN, info.store_digest
    record = parse_json((folder / "finetune.json").read_bytes())
    return str(record["unfreeze"]), str(record["base"]["store_digest"])


def _zero_shot(run: Run, wanted: Wanted) -> str | None:
    """A run of zero-shot with the default prompts, on the images alone, is the baseline of every seed."""
    rows = [row for row in read_metrics(run.folder) if row["split"] == "test"]
    if not rows or rows[0].get("inputs") != "image" or tuple(rows[0].get("prompts", ())) != TEMPLATES:
        return None
    data = load_config(run.folder / "config.yaml").data
    own = (run.info.store_digest, data.split_type, run.info.lists_digest or lists_digest(data))
    for one in wanted.trainings.values():
        read = one.config.data
        if one.kind == "zero-shot" and (one.store, read.split_type, lists_digest(read)) == own:
            return one.key
    return None
