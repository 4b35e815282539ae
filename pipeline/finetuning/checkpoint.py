"""Towers that were trained as files: the best of a training while it lasts, and a whole checkpoint at its end."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ...cache.strict_json import parse_json
from ...errors import InputError
from ...heads.hub import reason
from ...heads.tensor_files import load_tensors, write_tensors
from ..core.config import Config
from ..core.files import write_folder, write_text, write_whole
from ..core.run import TOWERS, RunInfo
from .distributed import Shards
from .towers import Towers

RECORD = "finetune.json"


class TowerKeeper:
    """Keeps the trained parameters of the best epoch beside the checkpoints of the head.

    Args:
        folder: ``checkpoints`` of a run.
        shards: What is trained; all processes go through the methods together.
        writes: Whether this process writes.
    """

    def __init__(self, folder: Path, shards: Shards, *, writes: bool) -> None:
        self._folder, self._shards, self._writes = folder, shards, writes
        self._best = 0

    def take_up(self, best: int) -> None:
        """Go on where an epoch is the best so far; 0 for none."""
        self._best = best

    def offer(self, epoch: int, *, best: bool) -> None:
        """Write them if an epoch is the best so far."""
        if best:
            tensors = self._shards.wholes()
            if self._writes:
                write_whole(
                    self._path(epoch),
                    lambda temporary: write_tensors(temporary, save_file, tensors, {"epoch": str(epoch)}),
                )
            self._best = epoch

    def sweep(self) -> None:
        """Remove those of other epochs; not before a later epoch can be resumed from."""
        for path in self._folder.glob("towers-*.safetensors"):
            if path != self._path(self._best):
                path.unlink()

    def restore(self, epoch: int) -> None:
        """Put those of an epoch back into the towers.

        Raises:
            InputError: They are gone or damaged.
        """
        path = self._path(epoch)
        try:
            self._shards.restore(load_tensors(path, "cpu")[0])
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise InputError(
                "cannot read trained towers",
                where=path,
                got=reason(error),
                wanted="what mmcli wrote",
                do="train again, from the start",
            ) from None

    def remove(self) -> None:
        """Remove all of them."""
        for path in self._folder.glob("towers-*.safetensors"):
            path.unlink()

    def _path(self, epoch: int) -> Path:
        return self._folder / f"towers-{epoch:03d}.safetensors"


def save_towers(run: Path, towers: Towers, trained: Mapping[str, Tensor]) -> Path:
    """Write a checkpoint in ``save_pretrained`` form with image processor and tokenizer, every file whole.

    Args:
        run: The run folder.
        towers: The towers.
        trained: Their trained parameters, whole, on the CPU.

    Returns:
        ``run/towers``; its files replace those that are there.

    Raises:
        InputError: The folder cannot be written.
    """
    folder = run / TOWERS

    def save(scratch: Path) -> None:
        weights = {**towers.parts.model.state_dict(), **trained}
        towers.parts.model.save_pretrained(scratch, state_dict=weights)
        for part in (towers.parts.processor, towers.parts.tokenizer):
            part.save_pretrained(scratch)

    write_folder(folder, save)
    return folder


def base_of(run: Path, info: RunInfo) -> dict[str, Any]:
    """What a run began with: ``model``, ``revision`` and ``store_digest`` of its checkpoint."""
    try:
        base: dict[str, Any] = parse_json((run / RECORD).read_bytes())["base"]
    except (OSError, ValueError, LookupError, TypeError):
        return {"model": info.model, "store_digest": info.store_digest}  # killed before it was written
    return base


def write_record(run: Path, config: Config, towers: Towers, identity: Mapping[str, Any]) -> None:
    """Write ``finetune.json``: what was trained, by name, and of which checkpoint.

    Args:
        run: The run folder.
        config: The resolved configuration.
        towers: What is trained.
        identity: Of the checkpoint it began with: ``model``, ``revision``, and its ``store_digest``.
    """
    section = config.finetune
    record = {
        "unfreeze": section.unfreeze,
        "towers": section.towers,
        "start": section.start,
        "base": dict(identity),
        "trained": list(towers.trained),
        "n_trained": sum(one.numel() for one in towers.trained.values()),
    }
    write_text(run / RECORD, json.dumps(record, indent=1))
