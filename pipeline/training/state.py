"""All that a training needs to go on after it was killed, as one file that is whole or absent.

Weights, statistics, the optimiser's moments and the records of the epochs so far. Draws need no state: those of an
epoch depend on the seed and the epoch alone.
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

STATE = "training.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_SUM, _OTHER = "sum.", "other."


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Where a training of one head stands.

    Attributes:
        epoch: Epochs that are done.
        batches: Batches of the next one that are done as well.
        history: Their records.
        tensors: Weights, averages and moments by name, on the CPU.
        precision: What the forward pass computes in; a training that goes on in another gives other weights.
        scaler: State of the loss scaler; empty where there is none.
    """

    epoch: int
    history: Sequence[Mapping[str, float]]
    tensors: Mapping[str, Tensor]
    precision: str
    scaler: Mapping[str, Any]
    batches: int = 0


def gather_state(
    step: "Step", place: int, epoch: int, history: Sequence[Mapping[str, float]], *, batches: int = 0
) -> TrainingState:
    """The state of one head of a training, after an epoch and so many batches of the next."""
    views = _views(step, place) | ({f"{_SUM}{name}": value for name, value in step.sums.items()} if batches else {})
    tensors = {}
    for name, value in views.items():
        whole = step.whole(_other(name), value.detach()) if _other(name) else value
        tensors[name] = whole.detach().cpu().clone()
    return TrainingState(
        epoch=epoch,
        history=tuple(dict(record) for record in history),
        tensors=tensors,
        precision=step.precision,
        scaler=step.scaler.state_dict(),
        batches=batches,
    )


@torch.no_grad()
def restore_state(step: "Step", place: int, state: TrainingState) -> None:
    """Put the state of one head back.

    Raises:
        InputError: It is of another head, or was computed in another precision.
    """
    check_precision(state.precision, step.precision)
    views = _views(step, place)
    sums = {name: value for name, value in state.tensors.items() if name.startswith(_SUM)}
    known = {name: value for name, value in state.tensors.items() if name not in sums}
    wrong = InputError("cannot resume", got="the state of another head", wanted="this one's", do="train again")
    if views.keys() != known.keys():
        raise wrong
    for name, view in views.items():
        value = step.part(_other(name), known[name]) if _other(name) else known[name]
        if value.shape != view.shape:
            raise wrong
        view.copy_(value)
    for name, value in sums.items():  # of an epoch that is half done, which a training of several heads keeps none of
        step.sums[name.removeprefix(_SUM)] = value.to(step.members.parameters[0].device)
    if state.scaler:
        step.scaler.load_state_dict(dict(state.scaler))


def check_precision(begun: str, now: str) -> None:
    """Refuse to resume a training in another precision than it was begun in.

    Args:
        begun: What it was begun in; empty where an earlier version did not write it down.
        now: What this machine would compute in.

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


def _other(name: str) -> str:
    """The name of the parameter that a tensor of a state belongs to, where it is none of the head's; else nothing."""
    return name.partition(_OTHER)[2]


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


def _views(step: "Step", place: int) -> dict[str, Tensor]:
    """Everything of one head that a step changes, by name."""
    members = step.members
    views = {f"head.{name}": value for name, value in members.heads[place].state_dict().items()}
    others = {f"{_OTHER}{name}": value.detach() for name, value in step.others.items()}
    views |= others
    trained = [*zip(members.names, members.parameters, strict=True), *zip(others, step.others.values(), strict=True)]
    for name, parameter in trained:
        moments = step.optimizer.state[parameter]
        views[f"adam.step.{name}"] = moments["step"]
        for moment in _MOMENTS:
            views[f"adam.{moment}.{name}"] = moments[moment][place] if members.stacked else moments[moment]
    if step.averages is not None:
        views |= {f"average.{name}": value for name, value in step.averages.heads[place].state_dict().items()}
        views["average.taken"] = step.averages.taken
    return views
