"""Trained towers as files: those of the best epoch while a training lasts, and a whole checkpoint at its end."""

import json
from collections.abc import Mapping, Sequence
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
from ..core.run import RunInfo
from ..core.run_folders import TOWERS_OF_EPOCH, RunPaths
from .distributed import Shards
from .towers import Towers


class TowerKeeper:
    """Keeps the trained parameters of the best epoch beside the checkpoints of the head.

    All processes go through :meth:`offer` and :meth:`restore` together.

    Args:
        folder: The folder ``checkpoints`` of a run.
        shards: What is trained.
        writes: Whether this process writes.
        history: Records of the epochs before a run is resumed.
    """

    def __init__(
        self, folder: Path, shards: Shards, *, writes: bool, history: Sequence[Mapping[str, float]] = ()
    ) -> None:
        self._folder, self._shards, self._writes = folder, shards, writes
        best = max(history, key=lambda record: record["val_mAP"], default={"epoch": 0, "val_mAP": -1.0})
        self._best_epoch, self._best_value = int(best["epoch"]), best["val_mAP"]

    def offer(self, epoch: int, val_map: float) -> None:
        """Write the trained parameters if the epoch is the best so far."""
        if val_map <= self._best_value or not self._shards.local:
            return
        tensors = self._shards.wholes()
        if self._writes:
            write_whole(
                self._path(epoch), lambda temporary: write_tensors(temporary, save_file, tensors, {"epoch": str(epoch)})
            )
        self._best_epoch, self._best_value = epoch, val_map

    def sweep(self) -> None:
        """Remove the files of other epochs than the best; not before a later epoch can be resumed from."""
        self._remove(keep=self._path(self._best_epoch))

    def remove(self) -> None:
        """Remove the files of all epochs."""
        self._remove(keep=None)

    def restore(self, epoch: int) -> dict[str, Tensor]:
        """Put the parameters of an epoch back into the towers; they are returned, whole, on the CPU.

        Raises:
            InputError: Their file is gone or damaged.
        """
        path = self._path(epoch)
        try:
            tensors = load_tensors(path, "cpu")[0]
            self._shards.restore(tensors)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise InputError(
                "cannot read trained towers",
                where=path,
                got=reason(error),
                wanted="what mmcli wrote",
                do="train again, from the start",
            ) from None
        return tensors

    def _remove(self, keep: Path | None) -> None:
        for path in self._folder.glob(TOWERS_OF_EPOCH.replace("{:03d}", "*")):
            if path != keep:
                path.unlink()

    def _path(self, epoch: int) -> Path:
        return self._folder / TOWERS_OF_EPOCH.format(epoch)


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
    folder, parts = RunPaths(run).towers, towers.parts

    def save(scratch: Path) -> None:
        parts.model.save_pretrained(scratch, state_dict={**parts.model.state_dict(), **trained})
        for part in (parts.processor, parts.tokenizer):
            part.save_pretrained(scratch)

    write_folder(folder, save)
    return folder


def read_base(run: Path, info: RunInfo) -> dict[str, Any]:
    """The checkpoint that a run began with: its ``model``, ``revision`` and ``store_digest``."""
    try:
        base: dict[str, Any] = parse_json(RunPaths(run).finetuned.read_bytes())["base"]
    except (OSError, ValueError, LookupError, TypeError):  # interrupted before it was written
        return {"model": info.model, "store_digest": info.store_digest}
    return base


def write_record(run: Path, config: Config, towers: Towers, base: Mapping[str, Any]) -> None:
    """Write ``finetune.json``: what was trained, by name, and of which checkpoint.

    Args:
        run: The run folder.
        config: The resolved configuration.
        towers: What is trained.
        base: The checkpoint that it began with: ``model``, ``revision`` and ``store_digest``.
    """
    section = config.finetune
    record = {
        "unfreeze": section.unfreeze,
        "towers": section.towers,
        "start": section.start,
        "base": dict(base),
        "trained": list(towers.trained),
        "n_trained": sum(parameter.numel() for parameter in towers.trained.values()),
    }
    write_text(RunPaths(run).finetuned, json.dumps(record, indent=1))
