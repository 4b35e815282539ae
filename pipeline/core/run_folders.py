"""Run folders taken so that no two processes hold the same one, and emptied so that nothing else is lost.

A run's ``run.json`` is made in a single step of the file system, whole, when none is there yet: so only one process can
be the first, and a folder with one can be resumed.
"""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...cache.locks import SOFT, LockHeld, locked
from ...cache.ownership import Contents, contents, remove_files
from ...cache.strict_json import parse_json
from ...errors import InputError
from .files import final_name, make_folder, one_line, remove_leftovers, unwritable, write_new, write_text

# Splits and methods whose files a run may keep; ``database`` is what a protocol searches where it has one.
_SPLITS = ("train", "val", "test", "database")
_METHODS = ("classifier", "hybrid", "knn", "zero-shot")
# Heads, and the towers below them, of an epoch, in the folder of the checkpoints.
HEAD_OF_EPOCH, TOWERS_OF_EPOCH = "epoch-{:03d}.safetensors", "towers-{:03d}.safetensors"


class _Inside:
    """A path inside a run's folder; that of a folder ends in a slash.

    Args:
        name: The path.
        stays: It outlives the run, which may be replaced by another one.
    """

    def __init__(self, name: str, *, stays: bool = False) -> None:
        self.name, self.stays = name, stays

    def __get__(self, paths: "RunPaths", _owner: type) -> Path:
        return paths.folder / self.name


@dataclass(frozen=True)
class RunPaths:
    """Where everything lies in the folder of a run; what ``--force`` may delete follows from it.

    Attributes:
        folder: The folder.
        mark: What the run is, and whether it is finished.
        lock: Held by the process that works in the folder.
        config: The resolved configuration.
        environment: Versions, device, seed and git state.
        metrics: The figures.
        knn_table: The figures of every combination of a sweep of ``knn-eval``.
        history: One record an epoch.
        state: What an interrupted training resumes from; gone at its end.
        checkpoints: The folder of the best heads.
        best: The list of these heads, the best first.
        towers: SigLIP2 as it was trained with the head; only a run of ``finetune`` has it.
        finetuned: What was trained of which checkpoint; only a run of ``finetune`` has it.
        model: The best head as a folder for the hub.
        index: The index file, which may have grown and stays when the run is replaced.
        tensorboard: What TensorBoard keeps.
        wandb: What Weights & Biases keeps.
    """

    folder: Path

    mark = _Inside("run.json")
    lock = _Inside(".lock")
    config = _Inside("config.yaml")
    environment = _Inside("environment.json")
    metrics = _Inside("metrics.json")
    knn_table = _Inside("knn_table.json")
    history = _Inside("history.jsonl")
    state = _Inside("training.safetensors")
    checkpoints = _Inside("checkpoints/")
    best = _Inside("checkpoints/checkpoints.json")
    towers = _Inside("towers/")
    finetuned = _Inside("finetune.json")
    model = _Inside("model/")
    index = _Inside("index.safetensors", stays=True)
    tensorboard = _Inside("tensorboard/")
    wandb = _Inside("wandb/")

    def codes(self, split: str) -> Path:
        """The codes of a split."""
        return self.folder / "codes" / f"{split}.safetensors"

    def scores(self, method: str, split: str) -> Path:
        """The scores that a method gave the images of a split."""
        return self.folder / "scores" / f"{method}-{split}.safetensors"

    def per_class(self, method: str, split: str) -> Path:
        """The figures of every class by one method on a split."""
        return self.folder / "per_class" / f"{method}-{split}.json"


_NAMES = RunPaths(Path())
MARK, LOCK = _NAMES.mark.name, _NAMES.lock.name
# A run that was being thrown away when its process was killed.
REPLACED = "replaced"
# Every file that stages write into a run folder, by its exact name; whatever else lies there is somebody's own.
_INSIDE = [inside for inside in vars(RunPaths).values() if isinstance(inside, _Inside) and not inside.stays]
_OF_METHODS = [(method, split) for method in _METHODS for split in _SPLITS]
_OF_SPLITS = [
    *(_NAMES.codes(split).as_posix() for split in _SPLITS),
    *(place(*of).as_posix() for place in (_NAMES.scores, _NAMES.per_class) for of in _OF_METHODS),
]
FILES = frozenset({inside.name for inside in _INSIDE if not inside.name.endswith("/")} | {LOCK + SOFT, *_OF_SPLITS})
FOLDERS = frozenset(name.partition("/")[0] for name in (*_OF_SPLITS, *(i.name for i in _INSIDE)) if "/" in name)
# Those of an epoch, and those that libraries name.
MORE_FILES = re.compile(
    r"""
    checkpoints/(epoch|towers)-[0-9]{3,}\.safetensors
    | model/(config\.json | model\.safetensors | README\.md)
    | towers/(
        config\.json | model(-[0-9]{5}-of-[0-9]{5})?\.safetensors | model\.safetensors\.index\.json
        | generation_config\.json | (pre)?processor_config\.json | tokenizer\.(json|model) | spiece\.model
        | (tokenizer_config|special_tokens_map|added_tokens)\.json | chat_template\.(json|jinja)
      )
    | tensorboard/events\.out\.tfevents\.[^/]+
    | wandb/(latest-run | debug(-internal)?\.log | settings | (offline-)?run-[0-9]{8}_[0-9]{6}-[^/]+/.+)
    """,
    re.VERBOSE,
)
LINKS = re.compile(r"wandb/.+")


def claim_new(folder: Path, record: str, locks: ExitStack) -> Path:
    """Make a folder that nobody has: this name, or the first free one of ``NAME-2``, ``NAME-3`` and so on.

    ``record`` is the text of its ``run.json``; ``locks`` keeps the folder's lock.

    Raises:
        InputError: It cannot be made.
    """
    make_folder(folder.parent)
    number, free = 1, folder
    while True:
        try:
            free.mkdir()
            locks.enter_context(hold(free, keep=False))
            write_new(RunPaths(free).mark, record)
        except FileExistsError:
            number += 1
            free = folder.with_name(f"{folder.name}-{number}")
        except OSError as error:
            raise unwritable(free, error) from None
        else:
            return free


def claim_named(folder: Path, record: str, locks: ExitStack, *, force: bool) -> Path:
    """Take a folder that was asked for; it is made when absent.

    Args:
        folder: The folder; a link to one, or the working folder, stays what it is.
        record: The text of its ``run.json``.
        locks: Keeps the folder's lock: what is emptied here nobody else may take before the run is done.
        force: Throw an existing run away first. What runs write goes; the folder itself and all else in it stay.

    Returns:
        The folder, with its ``run.json``.

    Raises:
        InputError: It holds something and ``force`` is not given, is no run, cannot be emptied or written, or was
            taken by another process at the same moment.
    """
    make_folder(folder)
    try:
        with one_line(folder):
            if not all(_passes(path.name) for path in folder.iterdir()):
                _check_replaceable(folder, force=force)
                locks.enter_context(hold(folder, keep=False))
                _check_replaceable(folder, force=force)  # another run may have begun and ended meanwhile
                _empty(folder)
                write_text(RunPaths(folder).mark, record)
                return folder
        try:
            locks.enter_context(locked(RunPaths(folder).lock, keep=False))
        except LockHeld:
            raise FileExistsError from None
        write_new(RunPaths(folder).mark, record)
    except (FileExistsError, FileNotFoundError):
        raise _in_use(folder, "a run that another process has just started") from None
    except OSError as error:
        raise unwritable(Path(error.filename or folder), error) from None
    return folder


@contextmanager
def hold(folder: Path, *, what: str = "trains in it", wait_s: float = 0.0, keep: bool = True) -> Iterator[None]:
    """Be the only process that works in a folder; the lock is free when the process ends, however it ends.

    Args:
        folder: A run, the folder of a table of experiments, or a demo's.
        what: What the process does, for the error.
        wait_s: Seconds to wait for who works there.
        keep: Leave the lock's empty file behind.

    Raises:
        InputError: Another process works there, or the folder cannot be written.
    """
    lock = locked(RunPaths(folder).lock, wait_s=wait_s, keep=keep)
    try:
        lock.__enter__()
    except LockHeld as error:
        raise InputError(
            "the run is under way",
            where=folder,
            got=f"another process that {what}",
            wanted="one at a time",
            do=error.do,
        ) from None
    except OSError as error:
        raise unwritable(folder, error) from None
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def clean_up(folder: Path) -> None:
    """Remove half-written files that a killed process left in a run; the caller holds it."""
    for name in ("", *FOLDERS):
        place = folder / name
        if place.is_dir() and (not name or not place.is_symlink()):
            remove_leftovers(place, partial(_is_written, f"{name}/" if name else ""), alone=True)


def is_run(folder: Path) -> bool:
    """Whether a folder's ``run.json`` is one of ours, by its content."""
    try:
        mark = RunPaths(folder).mark
        record = parse_json(mark.read_bytes()) if mark.is_file() else None
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and {"kind", "status", "config_digest", "store_digest", "version"} <= record.keys()


def _check_replaceable(folder: Path, *, force: bool) -> None:
    if not force:
        raise _in_use(folder, "a folder with files")
    inside = _contents(folder)
    # Of a process that was killed at the very start, an empty mark may be all that there is.
    others = [name for name in (*inside.ours, *inside.foreign) if name != MARK and not _passes(name)]
    mark = RunPaths(folder).mark
    begun = mark.is_file() and mark.stat().st_size == 0 and not others
    if not is_run(folder) and not begun:
        raise InputError(
            "will not replace a folder that is no run",
            where=folder,
            got=f"no {MARK} of mmcli",
            wanted="a run folder",
            do="give another --out",
        )
    if blocked := [name for name in inside.foreign if _is_ours(name) or name in FOLDERS]:
        raise InputError(
            "will not replace what mmcli did not write",
            where=folder / blocked[0],
            got="a link or a file",
            wanted="a run whose files are its own",
            do="move it away, or give another --out",
        )


def _empty(folder: Path) -> None:
    """Remove what a run wrote, but for its mark, which says first that the run is no whole one any more."""
    if is_run(folder):
        mark = RunPaths(folder).mark
        record = parse_json(mark.read_bytes())
        write_text(mark, json.dumps({**record, "status": REPLACED}, indent=1))
    clean_up(folder)
    remove_files(folder, [name for name in _contents(folder).ours if name not in {MARK, LOCK, LOCK + SOFT}])


def _contents(folder: Path) -> Contents:
    return contents(folder, _is_ours, lambda name: LINKS.fullmatch(name) is not None)


def _passes(name: str) -> bool:
    """Whether a name in a run folder is that of a lock, or of what a process writes or was killed while it did."""
    return name in {LOCK, LOCK + SOFT} or _is_written("", final_name(name.partition("/")[0]))


def _is_ours(name: str) -> bool:
    return name in FILES or MORE_FILES.fullmatch(name) is not None


def _is_written(prefix: str, name: str) -> bool:
    """Whether a run writes a file or a folder of this name."""
    return _is_ours(prefix + name) or prefix + name in FOLDERS


def _in_use(folder: Path, got: str) -> InputError:
    return InputError(
        "the folder is in use",
        where=folder,
        got=got,
        wanted="a new or empty folder",
        do="give another --out, or --force to replace the run",
    )
