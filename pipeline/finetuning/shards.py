"""Trained blocks spread over the processes of a team (FSDP: Rajbhandari et al. 2020; Zhao et al. 2023).

Every process keeps a part of each trained block, of its gradient and of its moments, and has the whole block only while
it computes with it. What else is trained (norms, heads, positions) stays whole everywhere. ``accelerate launch
--use_fsdp`` asks for it, or ``finetune.fsdp``; the sharding is PyTorch's ``fully_shard``, as Accelerate's is.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .distributed import Team
from .towers import Towers


class Shards:
    """What of trained parameters a process has; all of each where nothing is sharded.

    Args:
        towers: What is trained; its blocks are sharded here.
        team: The processes.
        sharded: Whether blocks are.

    Attributes:
        local: By name, what the optimiser of this process steps on.
    """

    def __init__(self, towers: Towers, team: Team, *, sharded: bool) -> None:
        self._towers, self._team = towers, team
        self._units: list[Any] = _shard(towers, team) if sharded else []
        self.local: dict[str, Tensor] = {
            name: parameter.detach().to_local() if self.is_part(name) else parameter  # type: ignore[attr-defined]
            for name, parameter in towers.trained.items()
        }

    @property
    def sharded(self) -> bool:
        """Whether anything is."""
        return bool(self._units)

    def is_part(self, name: str) -> bool:
        """Whether this process has a part of a parameter only."""
        return hasattr(self._towers.trained[name], "to_local")

    def take_gradients(self) -> None:
        """Give what the optimiser steps on its gradients."""
        for name, parameter in self._towers.trained.items():
            if self.is_part(name):
                grad: Any = parameter.grad
                self.local[name].grad = None if grad is None else grad.to_local()
                parameter.grad = None

    def whole(self, name: str, part: Tensor) -> Tensor:
        """All of what is shaped like a parameter, from everybody's part of it; all processes ask together."""
        like: Any = self._towers.trained[name]
        if not self.is_part(name) or part.dim() == 0:
            return part
        from torch.distributed.tensor import DTensor

        made = DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        return made.full_tensor()

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of it."""
        like: Any = self._towers.trained[name]
        if not self.is_part(name) or whole.dim() == 0:
            return whole
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole.to(self._team.device), like.device_mesh, like.placements).to_local()

    def wholes(self) -> dict[str, Tensor]:
        """All trained parameters on the CPU, whole; all processes ask together."""
        return {name: self.whole(name, value.detach()).cpu().contiguous() for name, value in self.local.items()}

    @torch.no_grad()
    def restore(self, found: Mapping[str, Tensor]) -> None:
        """Put whole values back."""
        for name, value in self.local.items():
            value.copy_(self.part(name, found[name]))

    def gather(self) -> None:
        """Have every block whole, until :meth:`scatter`."""
        for unit in self._units:
            unit.unshard()

    def scatter(self) -> None:
        """Keep a part of every block again."""
        for unit in self._units:
            unit.reshard()


def _shard(towers: Towers, team: Team) -> list[Any]:
    """Shard every trained block, and the embeddings of tokens: half of a base checkpoint's parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(team.device.type, (team.size,))
    units: list[Any] = []
    for side in towers.sides.values():
        units += list(side.blocks)  # type: ignore[arg-type]
        tokens = getattr(side.embeddings, "token_embedding", None)
        units += [] if tokens is None else [tokens]
    for unit in units:
        # Each block is a root of its own, and a root stays whole after its forward pass unless it is told otherwise.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    towers.find_trained()
    return units
