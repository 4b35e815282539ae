"""Which runs and stores that lie on disk are what a plan asks for, and where those that are missing go."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from ...cache import Store, list_stores
from ...cache.strict_json import parse_json
from ...errors import InputError
from ..core.config import load_config
from ..core.results import SPLITS
from ..core.run import RunInfo, open_run, read_info
from ..core.run_folders import MARK, RunPaths
from .identity import FROZEN, Kind, training_key
from .plan import Training

# Folders below that of the table.
RUNS, STORES = "runs", "stores"
# What a run that is a training calls itself.
RUN_KINDS: dict[Kind, str] = {"head": "train-head", "finetune": "finetune", "zero-shot": "zero-shot"}
_TRAINED = {RUN_KINDS["head"], RUN_KINDS["finetune"]}
# What reading a run raises that is half-written, of another version, or not a run of ours.
_UNREADABLE = (InputError, OSError, ValueError, LookupError, TypeError)


def find_runs(trainings: Mapping[str, Training], places: Iterable[Path]) -> dict[str, Path]:
    """Finished runs that are trainings of a plan.

    Args:
        trainings: Trainings by key.
        places: Folders of runs; of several runs that are one training the first is taken.

    Returns:
        The run's folder by key.
    """
    runs: dict[str, Path] = {}
    stores = {training.store for training in trainings.values()}
    for place in places:
        for mark in sorted(place.glob(f"*/{MARK}")):
            try:
                key = _key_of_run(mark.parent, stores)
            except _UNREADABLE:
                continue
            if key in trainings:
                runs.setdefault(key, mark.parent)
    return runs


def run_folder(out: Path, training: Training) -> Path:
    """Where a training of the plan is made; trainings that differ in the seed differ in the end of the name alone."""
    config = training.config
    label: str = training.kind
    if training.kind in {"head", "finetune"}:
        label = "mlp" if config.head == "mlp" else f"b{config.hash.bits}-{config.fusion.type}"
    towers = f"-{training.towers}" if training.kind == "finetune" else ""
    return out / RUNS / f"{training.group[:12]}-{label}{towers}-seed{training.seed}"


def resumable(folder: Path, training: Training) -> bool:
    """Whether an interrupted run of this very training lies there."""
    try:
        info = read_info(folder)
        return (
            info.kind in _TRAINED
            and info.status in {"running", "interrupted"}
            and _trained_key(folder, info) == training.key
        )
    except _UNREADABLE:
        return False


def find_stores(digests: Iterable[str], places: Iterable[Path]) -> dict[str, Path]:
    """Finished stores below some folders, by the digest of their key."""
    wanted, stores = set(digests), dict[str, Path]()
    for place in places:
        for folder in list_stores(place) if place.is_dir() else []:
            digest = Store.open(folder).key.digest
            if digest in wanted:
                stores.setdefault(digest, folder)
    return stores


def _key_of_run(folder: Path, stores: Collection[str]) -> str:
    """The key of the training that a run is; empty where it is no training, not complete, or of another store."""
    info = read_info(folder)
    _, store = _origin(folder, info)
    if info.status != "finished" or info.kind not in _TRAINED or store not in stores:
        return ""
    open_run(folder, kind=info.kind)
    return _trained_key(folder, info) if all(RunPaths(folder).codes(split).is_file() for split in SPLITS) else ""


def _trained_key(folder: Path, info: RunInfo) -> str:
    towers, store = _origin(folder, info)
    return training_key(load_config(RunPaths(folder).config), store, towers, info.lists_digest)


def _origin(folder: Path, info: RunInfo) -> tuple[str, str]:
    """Which part of the towers a run trained, and the digest of the store that it, or its towers, began with."""
    if info.kind != RUN_KINDS["finetune"]:
        return FROZEN, info.store_digest
    record = parse_json(RunPaths(folder).finetuned.read_bytes())
    return str(record["unfreeze"]), str(record["base"]["store_digest"])
