"""Checkpoints of a head: safetensors for numbers, JSON for the rest, never a pickle."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ... import __version__
from ...cache.strict_json import parse_json
from ...errors import NOT_THERE, InputError, cannot_read
from ...heads.card import FIGURES
from ...heads.hub import PICKLES, cannot_load, read_config, reason, refuse_pickle, restore
from ...heads.model import HEADS, BaseHead, Head, MlpBaseline
from ...heads.tensor_files import load_tensors, read_about, write_tensors
from .config import Config
from .device import pick_device
from .files import write_folder, write_text, write_whole
from .run import read_info, run_identity
from .run_folders import HEAD_OF_EPOCH, RunPaths

LIST = RunPaths(Path()).best.name
TRAIN_AGAIN = "train the head again with `mmcli train-head`"


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
        self._gone: list[Kept] = []

    def offer(self, head: BaseHead, *, epoch: int, val_mAP: float) -> bool:
        """Write the head if it is among the best ``save_top_k``; the worst of the kept ones goes."""
        keep = self._config.training.save_top_k
        if len(self.kept) >= keep and val_mAP <= self.kept[-1].val_mAP:
            return False
        new = Kept(file=HEAD_OF_EPOCH.format(epoch), epoch=epoch, val_mAP=val_mAP)
        save_head(self._folder / new.file, head, self._config, width=self._width, epoch=epoch, val_mAP=val_mAP)
        # A later epoch that is no better than an earlier one stays behind it.
        self.kept = sorted([*self.kept, new], key=_rank)
        self._gone += self.kept[keep:]
        self.kept = self.kept[:keep]
        write_text(self._folder / LIST, json.dumps([vars(kept) for kept in self.kept], indent=1))
        return True

    def sweep(self) -> None:
        """Remove the files of what is no longer kept.

        Not before a later epoch can be resumed from: a training that resumes earlier would want them again.
        """
        while self._gone:
            (self._folder / self._gone.pop().file).unlink(missing_ok=True)

    def resume(self, epoch: int) -> None:
        """Begin after an epoch, with the best checkpoints up to it; those of later epochs are removed.

        Raises:
            InputError: A checkpoint is damaged.
        """
        earlier = []
        for path in sorted(self._folder.glob(HEAD_OF_EPOCH.replace("{:03d}", "*"))):
            try:
                note = read_about(path)
                kept = Kept(file=path.name, epoch=int(note["epoch"]), val_mAP=float(note["val_mAP"]))
            except (OSError, KeyError, ValueError) as error:
                raise _unusable("damaged checkpoint", path, reason(error), "what mmcli wrote") from None
            if kept.epoch <= epoch:
                earlier.append(kept)
            else:
                path.unlink()
        earlier.sort(key=_rank)
        keep = self._config.training.save_top_k
        self.kept, self._gone = earlier[:keep], earlier[keep:]

    @property
    def best(self) -> Path:
        """The file of the best checkpoint."""
        return self._folder / self.kept[0].file


def _rank(kept: Kept) -> tuple[float, int]:
    return -kept.val_mAP, kept.epoch


def save_head(path: Path, head: BaseHead, config: Config, *, width: int, epoch: int, val_mAP: float) -> None:
    """Write a head's parameters, buffers and what is needed to build it again."""
    assert head.build["width"] == width
    assert head.kind == config.head
    note = {
        "build": json.dumps(head.build),
        "epoch": str(epoch),
        "val_mAP": repr(val_mAP),
        **run_identity(path.parent.parent),
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    write_whole(path, lambda temporary: write_tensors(temporary, save_file, tensors, note))


def load_head(path: str | Path, device: str | torch.device = "cpu") -> Head | MlpBaseline:
    """A trained head, ready to use.

    Args:
        path: A run folder (its best checkpoint), a checkpoint file, or a folder that was saved for the hub.
        device: Where its parameters go: ``cpu``, ``cuda``, ``cuda:N``, ``mps`` or ``auto``.

    Returns:
        The head in ``eval()`` mode: ``head(v_img, v_txt)`` takes raw embeddings ``(N, D)`` and gives ``h`` and
        ``logits``. ``head.about`` is what is known of it, such as ``category_names``.

    Raises:
        InputError: Nothing is there, it is damaged or a pickle, or there is no such device.
    """
    path, place = Path(path), device if isinstance(device, torch.device) else pick_device(device)
    if path.is_dir() and RunPaths(path).mark.is_file():
        head = _read_checkpoint(best_checkpoint(path), place, path)
        head.about = describe_head(path)
        return head
    if path.is_dir():
        kind = read_config(path).get("head", "fusion")
        if kind not in tuple(HEADS):
            raise cannot_load(path, ValueError(f"a head of kind {kind!r}"))
        return HEADS[kind].from_pretrained(path, map_location=place)
    if path.suffix in PICKLES:
        raise refuse_pickle(path, path.name)
    return _read_checkpoint(path, place)


def describe_head(run: Path) -> dict[str, Any]:
    """What a run says of its head: mmcli's version, preset, seed, encoder, patches, data and category names.

    Raises:
        InputError: ``run.json`` is missing or damaged.
    """
    info = read_info(run)
    # Towers that were trained with the head are another encoder than the one they were.
    is_finetuned = info.kind == "finetune" and RunPaths(run).towers.is_dir()
    return {
        "mmcli": __version__,
        "preset": info.preset,
        "seed": info.seed,
        "config_digest": info.config_digest,
        "encoder": f"{info.model}, finetuned with this head" if is_finetuned else info.model,
        "patches": info.patches,
        "data": f"manifest {info.manifest_sha256[:12]}",
        "category_names": list(info.category_names),
    }


def _read_checkpoint(path: Path, device: torch.device, run: Path | None = None) -> Head | MlpBaseline:
    wanted = "a checkpoint of mmcli"
    try:
        tensors, note = load_tensors(path, str(device))
        for name, mine in ({} if run is None else run_identity(run)).items():
            if note.get(name, mine) != mine:
                raise _unusable(f"a checkpoint of another {name}", path, note[name], mine)
        build: dict[str, Any] = parse_json(note["build"])
        # Checkpoints of 0.1.0 do not say their kind.
        return restore(HEADS[build.get("head", "fusion")], build, tensors)
    except FileNotFoundError:
        raise _unusable("no checkpoint", path, "no file", wanted) from None
    except OSError as error:
        raise cannot_read("cannot read a checkpoint", path, error, wanted=wanted, do=TRAIN_AGAIN) from None
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError, MemoryError) as error:
        raise _unusable("damaged checkpoint", path, reason(error), wanted) from None


def best_checkpoint(run: Path) -> Path:
    """The best checkpoint of a run.

    Raises:
        InputError: The run keeps none.
    """
    path = RunPaths(run).best
    try:
        kept = [Kept(**record) for record in parse_json(path.read_bytes())]
        first = kept[0]
        if first.file != HEAD_OF_EPOCH.format(first.epoch) or any(other.val_mAP > first.val_mAP for other in kept):
            raise ValueError("a list that does not begin with the best")
    except OSError as error:
        what = "no checkpoint" if error.errno in NOT_THERE else "cannot read the list of checkpoints"
        raise cannot_read(what, path, error, wanted="a list of at least one", do=TRAIN_AGAIN) from None
    except (ValueError, LookupError, TypeError, RecursionError):
        raise _unusable("no checkpoint", path, "no list of checkpoints", "at least one") from None
    return path.parent / first.file


def _unusable(what: str, path: Path, got: object, wanted: str) -> InputError:
    return InputError(what, where=path, got=got, wanted=wanted, do=TRAIN_AGAIN)


def write_model_folder(run: Path, head: BaseHead, config: Config, metrics: Mapping[str, Any] | None = None) -> Path:
    """Write ``config.json``, ``model.safetensors`` and the card ``README.md``, each whole or not at all.

    Args:
        run: The run folder; its ``run.json`` says what the head was trained on.
        head: The best one, on any device.
        config: The resolved configuration.
        metrics: A row of metrics to show on the card: ``method``, ``split`` and figures.

    Returns:
        The folder, ``run/model``; its files replace those that are there.

    Raises:
        InputError: The run does not describe itself, or the folder cannot be written.
    """
    about = {**describe_head(run), "preset": config.preset, "seed": config.hardware.seed}
    if metrics is not None:
        about["metrics"] = {key: _plain(metrics[key]) for key in ("method", "split", *FIGURES) if key in metrics}
    folder = RunPaths(run).model
    write_folder(folder, lambda scratch: head.save_pretrained(scratch, config=about))
    return folder


def _plain(value: object) -> object:
    """JSON's null where a figure is undefined: JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
