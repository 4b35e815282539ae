"""The state that resumes a training which was interrupted, as one file that is whole or absent.

It holds weights, statistics, the optimiser's moments, the random generators of dropout and the records of the epochs
so far. Orders and captions need none: those of an epoch depend on the seed and the epoch alone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...errors import InputError
from ...heads.hub import reason
from ...heads.tensor_files import load_tensors, read_about, write_tensors
from ..core.files import write_whole

if TYPE_CHECKING:
    from .step import Step

_HEAD, _OTHER, _MOMENTS, _AVERAGE, _SUM, _GENERATOR = "head.", "other.", "adam.", "average.", "sum.", "generator."


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Where a training stands.

    Attributes:
        epoch: Epochs that are done.
        batches: Batches of the next one that are done as well.
        history: The records of the epochs.
        tensors: Weights, averages, moments and generators by name, on the CPU.
        precision: Precision of the forward pass; resumed in another one, a training would give other weights.
        scaler: State of the loss scaler; empty where there is none.
    """

    epoch: int
    history: Sequence[Mapping[str, float]]
    tensors: Mapping[str, Tensor]
    precision: str
    scaler: Mapping[str, Any]
    batches: int = 0


def gather_state(
    step: "Step", epoch: int, history: Sequence[Mapping[str, float]], *, batches: int = 0
) -> TrainingState:
    """The state of a training after an epoch and so many batches of the next."""
    tensors = _named(_HEAD, step.head.state_dict())
    tensors |= _named(_OTHER, {name: step.whole(name, value.detach()) for name, value in step.others.items()})
    for index, moments in step.optimizer.state_dict()["state"].items():
        name = step.names[index]
        whole = {
            kind: step.whole(name, value) if value.dim() and name in step.others else value
            for kind, value in moments.items()
        }
        tensors |= {f"{_MOMENTS}{kind}.{name}": value for kind, value in whole.items()}
    if step.averages is not None:
        tensors |= _named(_AVERAGE, step.averages.state_dict())
    tensors |= _named(_SUM, step.sums if batches else {})
    tensors[f"{_GENERATOR}cpu"] = torch.get_rng_state()
    device = step.device
    if device.type == "cuda":
        tensors[f"{_GENERATOR}cuda"] = torch.cuda.get_rng_state(device)
    return TrainingState(
        epoch=epoch,
        history=tuple(dict(record) for record in history),
        tensors={name: value.detach().cpu().clone() for name, value in tensors.items()},
        precision=step.precision,
        scaler=step.scaler.state_dict(),
        batches=batches,
    )


@torch.no_grad()
def restore_state(step: "Step", state: TrainingState) -> None:
    """Put a state back.

    Raises:
        InputError: It is of another head, or was computed in another precision.
    """
    check_precision(state.precision, step.precision)
    try:
        step.head.load_state_dict(_of(_HEAD, state.tensors))
        for name, parameter in step.others.items():
            parameter.copy_(step.part(name, state.tensors[_OTHER + name]))
        _restore_moments(step, state.tensors)
        if step.averages is not None:
            step.averages.load_state_dict(_of(_AVERAGE, state.tensors))
        torch.set_rng_state(state.tensors[f"{_GENERATOR}cpu"])
        if step.device.type == "cuda":
            torch.cuda.set_rng_state(state.tensors[f"{_GENERATOR}cuda"], step.device)
    except (KeyError, ValueError, RuntimeError):
        raise InputError(
            "cannot resume", got="the state of another head", wanted="this one's", do="train again"
        ) from None
    step.sums |= {name: value.to(step.device) for name, value in _of(_SUM, state.tensors).items()}
    if state.scaler:
        step.scaler.load_state_dict(dict(state.scaler))


def _restore_moments(step: "Step", tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in _of(_MOMENTS, tensors).items():
        kind, _, parameter = name.partition(".")
        is_part = value.dim() and parameter in step.others
        state.setdefault(step.names.index(parameter), {})[kind] = step.part(parameter, value) if is_part else value
    step.optimizer.load_state_dict({**step.optimizer.state_dict(), "state": state})


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def _of(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one kind, by their names without the prefix."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def check_precision(begun: str, now: str) -> None:
    """Refuse to resume a training in another precision than it was begun in.

    Args:
        begun: The precision that it was begun in; empty where an earlier version did not write it down.
        now: The precision of this machine.

    Raises:
        InputError: They differ.
    """
    if begun and begun != now:
        raise InputError(
            "cannot resume",
            got=f"a training in {begun}",
            wanted=f"one in {now}, as this machine computes",
            do="resume it where it was begun, or train again",
        )


def write_state(path: Path, state: TrainingState) -> None:
    """Write a state, whole or not at all."""
    note = {
        "epoch": str(state.epoch),
        "history": json.dumps(state.history),
        "precision": state.precision,
        "scaler": json.dumps(state.scaler),
        "batches": str(state.batches),
    }
    write_whole(path, lambda temporary: write_tensors(temporary, save_file, state.tensors, note))


def read_state(path: Path) -> TrainingState | None:
    """Read a state; None where there is no file.

    Raises:
        InputError: It is damaged.
    """
    if not path.is_file():
        return None
    try:
        tensors, note = load_tensors(path, "cpu")
        return TrainingState(
            epoch=int(note["epoch"]),
            history=tuple(json.loads(note["history"])),
            precision=note["precision"],
            scaler=json.loads(note["scaler"]),
            batches=int(note.get("batches", 0)),
            tensors=tensors,
        )
    except (OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise InputError(
            "damaged training state",
            where=path,
            got=reason(error),
            wanted="what mmcli wrote",
            do="remove it to train from the start, with `mmcli train-head --resume`",
        ) from None


def kept_epoch(path: Path) -> int:
    """The last epoch that a state was kept of; 0 where there is none that can be read."""
    try:
        return int(read_about(path)["epoch"])
    except (OSError, KeyError, ValueError):
        return 0
