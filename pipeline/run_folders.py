"""Run folders taken so that no two processes hold the same one, and emptied so that nothing else is lost.

A folder belongs to the process that made it, or its ``run.json``: both are single steps of the file system when what is
made must not be there yet, so only one process can be the first.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import InputError
from .files import make_folder, unwritable

MARK, LOCK = "run.json", ".lock"
# What stages write into a run folder; whatever else lies there is somebody's own.
WRITTEN = frozenset({
    MARK, "config.yaml", "environment.json", "metrics.json", "history.jsonl", "training.safetensors", "checkpoints",
    "codes", "scores", "per_class", "model", "tensorboard", "wandb", "towers", "finetune.json", LOCK,
})  # fmt: skip


def claim_new(folder: Path) -> Path:
    """Make a folder that nobody has: this name, or the first free one of ``NAME-2``, ``NAME-3`` and so on.

    Raises:
        InputError: It cannot be made.
    """
    make_folder(folder.parent)
    number, free = 1, folder
    while True:
        try:
            free.mkdir()
        except FileExistsError:
            number += 1
            free = folder.with_name(f"{folder.name}-{number}")
        except OSError as error:
            raise unwritable(free, error) from None
        else:
            return free


def claim_named(folder: Path, *, force: bool) -> Path:
    """Take a folder that was asked for; it is made when absent.

    Args:
        folder: The folder; a link to one, or the working folder, stays what it is.
        force: Throw an existing run away first. What runs write goes; the folder itself and all else in it stay.

    Returns:
        The folder, with an empty ``run.json`` that marks it as taken.

    Raises:
        InputError: It holds something and ``force`` is not given, is no run, cannot be emptied or written, or was
            taken by another process at the same moment.
    """
    make_folder(folder)
    try:
        if any(folder.iterdir()):
            _check_replaceable(folder, force=force)
            with hold(folder):
                _empty(folder)
        (folder / MARK).touch(exist_ok=False)
    except (FileExistsError, FileNotFoundError):
        raise _in_use(folder, "a run that another process has just started") from None
    except OSError as error:
        raise unwritable(Path(error.filename or folder), error) from None
    return folder


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Be the only process that trains in a run folder; the kernel lets it go when the process ends, however it ends.

    Raises:
        InputError: Another process does.
    """
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(
            "the run is under way", where=folder, got="another process that trains in it", wanted="one at a time",
            do="wait until it ends, or stop it",
        ) from None  # fmt: skip
    try:
        yield
    finally:
        os.close(handle)  # the file stays: who has just opened it would lock what is gone


def _check_replaceable(folder: Path, *, force: bool) -> None:
    if not force:
        raise _in_use(folder, "a folder with files")
    if not (folder / MARK).is_file():
        raise InputError(
            "will not replace a folder that is no run", where=folder, got=f"no {MARK}", wanted="a run folder",
            do="give another --out",
        )  # fmt: skip


def _empty(folder: Path) -> None:
    """Remove what a run wrote, its mark last: until then it is still a run that may be replaced."""
    for child in sorted(folder.iterdir(), key=lambda path: path.name == MARK):
        if not _of_a_run(child.name):
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _of_a_run(name: str) -> bool:
    """Whether a run wrote this, or was killed while it did (``.codes.x1y2.tmp``)."""
    return name in WRITTEN or any(name.startswith(f".{own}.") for own in WRITTEN)


def _in_use(folder: Path, got: str) -> InputError:
    return InputError(
        "the folder is in use", where=folder, got=got, wanted="a new or empty folder",
        do="give another --out, or --force to replace the run",
    )  # fmt: skip
