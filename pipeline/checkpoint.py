"""Checkpoints of a head: safetensors for numbers, JSON for the rest, never a pickle."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import InputError
from ..heads.config import ClassifierConfig, FusionConfig, HashConfig
from ..heads.model import Head
from .config import Config
from .files import write_text, write_whole

INDEX = "checkpoints.json"


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One kept checkpoint: its file name, epoch and val mAP."""

    file: str
    epoch: int
    val_mAP: float


class CheckpointKeeper:
    """Keeps the best few checkpoints of a training, and a readable list of them, the best first."""

    def __init__(self, folder: Path, config: Config, *, width: int) -> None:
        self._folder, self._config, self._width = folder, config, width
        self.kept: list[Kept] = []

    def offer(self, head: Head, *, epoch: int, val_mAP: float) -> bool:
        """Write the head if it is among the best ``save_top_k``; the worst of the kept ones goes."""
        keep = self._config.training.save_top_k
        if len(self.kept) >= keep and val_mAP <= self.kept[-1].val_mAP:
            return False
        new = Kept(file=f"epoch-{epoch:03d}.safetensors", epoch=epoch, val_mAP=val_mAP)
        save_head(self._folder / new.file, head, self._config, width=self._width, epoch=epoch, val_mAP=val_mAP)
        # A later epoch that is no better than an earlier one stays behind it.
        self.kept = sorted([*self.kept, new], key=lambda one: (-one.val_mAP, one.epoch))
        gone = self.kept[keep:]
        self.kept = self.kept[:keep]
        write_text(self._folder / INDEX, json.dumps([vars(one) for one in self.kept], indent=1))
        for one in gone:
            (self._folder / one.file).unlink(missing_ok=True)
        return True

    @property
    def best(self) -> Path:
        """The best checkpoint's file."""
        return self._folder / self.kept[0].file


def save_head(path: Path, head: Head, config: Config, *, width: int, epoch: int, val_mAP: float) -> None:
    """Write a head's parameters, buffers and what is needed to build it again."""
    build = {name: getattr(config, name).model_dump(mode="json") for name in ("fusion", "hash", "classifier")}
    note = {"build": json.dumps({**build, "width": width}), "epoch": str(epoch), "val_mAP": repr(val_mAP)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=note))


def load_head(path: Path, device: torch.device) -> Head:
    """Build the head of a checkpoint and fill it.

    Raises:
        InputError: The file is missing, damaged, or does not describe a head.
    """
    wanted, do = "a checkpoint of mmcli", "train the head again with `mmcli train-head`"
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            build: dict[str, Any] = json.loads((file.metadata() or {})["build"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        head = Head(
            FusionConfig(**build["fusion"]), HashConfig(**build["hash"]), ClassifierConfig(**build["classifier"]),
            width=build["width"],
        )  # fmt: skip
        head.load_state_dict(state)
    except OSError:
        raise InputError("no checkpoint", where=path, got="no file", wanted=wanted, do=do) from None
    except (SafetensorError, KeyError, TypeError, ValueError, ValidationError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError("damaged checkpoint", where=path, got=reason, wanted=wanted, do=do) from None
    return head.to(device).eval()


def best_checkpoint(run: Path) -> Path:
    """The best checkpoint of a run.

    Raises:
        InputError: The run keeps none.
    """
    path = run / "checkpoints" / INDEX
    try:
        file = str(json.loads(path.read_text(encoding="utf-8"))[0]["file"])
    except (OSError, ValueError, LookupError, TypeError):
        raise InputError(
            "no checkpoint", where=path, got="no list of checkpoints", wanted="at least one",
            do="train the head again with `mmcli train-head`",
        ) from None  # fmt: skip
    return path.parent / Path(file).name
