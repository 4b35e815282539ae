"""A training that is captured into a graph and replayed, on a CPU: what was captured is done again, operation by operation.

A capture runs nothing, so here what it has changed is put back. A replay knows the tensors that were there when it was
captured and nothing else: a number that was fetched then, or a tensor that was swapped since, shows in the weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmcli.heads.model import make_head
from mmcli.pipeline.core.config import load_config
from mmcli.pipeline.core.progress import Progress
from mmcli.pipeline.training.data import Split
from mmcli.pipeline.training.loop import Hooks, fit
from mmcli.pipeline.training.step import Step


class Graph(TorchDispatchMode):
    """Stands in for ``torch.cuda.CUDAGraph``."""

    n_replayed = 0

    def __init__(self) -> None:
        super().__init__()
        self._tape: list[tuple[Any, tuple, dict, list[torch.Tensor]]] = []
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._own: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        for tensor in changed_by(func, args, kwargs):
            memory = tensor.untyped_storage().data_ptr()
            if memory not in self._own and memory not in self._before:
                whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                self._before[memory] = whole, whole.clone()
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        read = {
            leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        self._own |= {tensor.untyped_storage().data_ptr() for tensor in made} - read
        self._tape.append((func, args, kwargs, made))
        return result

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Write down what is done, and undo it."""
        drawn = torch.get_rng_state()
        with self:
            yield
        torch.set_rng_state(drawn)
        for tensor, value in self._before.values():
            tensor.copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        Graph.n_replayed += 1
        for func, args, kwargs, made in self._tape:
            again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
            for tensor, value in zip(made, again, strict=True):
                if tensor.data_ptr() != value.data_ptr():
                    tensor.detach().copy_(value)

    def pool(self) -> None: ...


def changed_by(func: Any, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """Tensors that an operation changes in place."""
    arguments = func._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
    names = [
        argument.name for argument in arguments if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if func._schema.name == "aten::native_batch_norm":  # its schema keeps quiet about them
        names = ["running_mean", "running_var"]
    return [leaf for name in names for leaf in tree_leaves(given.get(name)) if isinstance(leaf, torch.Tensor)]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps run as on a GPU: three by themselves, then captured and replayed."""
    stream = type("Stream", (), {"__init__": lambda *_: None, "wait_stream": lambda *_: None})
    for name, value in {
        "Stream": stream,
        "stream": lambda _: nullcontext(),
        "current_stream": lambda *_: stream(),
        "CUDAGraph": Graph,
        "graph": lambda graph, **_: graph.capture(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(Step, "_uses_graphs", lambda _: True)
    monkeypatch.setattr(Graph, "n_replayed", 0)


def train(**options: Any) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of all epochs, and parameters and statistics at the end, of a head on made data."""
    width, n, rng = 24, 111, np.random.default_rng(0)
    labels = rng.integers(0, 2, (n, 6)).astype(np.uint8)
    v = (labels @ rng.normal(size=(6, width)) + 0.3 * rng.normal(size=(n, width))).astype(np.float32)
    split = Split.place(v, np.repeat(v[:, None], 5, 1), np.full(n, 5), labels, torch.device("cpu"))
    config = load_config(
        options={
            "fusion.mlp_dims": [32, 16],
            "hash.bits": 40,
            "classifier.num_classes": 6,
            "training.num_epochs": 4,
            "training.batch_size": 25,
            "training.mixed_precision": False,
            **options,
        }
    )
    torch.manual_seed(1)
    head = make_head(config.head, config.fusion, config.hash, config.classifier, width=width)
    head.fit_log_norms(split.log_norms())
    hooks = Hooks(monitor=lambda _: {"val_mAP": 0.5}, on_epoch=lambda *_: None)
    with Progress().task("", 1) as task:
        result = fit(head, split, config, hooks, task=task)
    return [record["loss"] for record in result.history], [value.clone() for value in head.state_dict().values()]


CASES = [
    *({"preset": preset} for preset in ("recommended", "small", "plan")),
    {"head": "mlp", "hash.bits": 0},
    {"training.ema_decay": 0.9, "training.accumulation_steps": 2},
    {"fusion.adapter": "linear", "hash.beta": 5.0},
    {"loss.focal_loss": True, "loss.asymmetric_loss": False, "loss.class_weights": "balanced"},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(map(str, case.values())))
def test_replayed_steps_are_the_steps_to_the_bit(case: dict[str, Any], request) -> None:
    eager = train(**case)
    request.getfixturevalue("graphs")
    replayed = train(**case)
    assert Graph.n_replayed > 2
    assert replayed[0] == eager[0]
    assert all(torch.equal(one, other) for one, other in zip(replayed[1], eager[1], strict=True))


def test_a_number_that_a_graph_keeps_shows(graphs: None, monkeypatch) -> None:
    """The check above is one: a rate that is fetched when a graph is captured stays what it was."""

    def fetched(step: Step) -> None:
        for group in step.optimizer.param_groups:
            group["lr"] = step._rate(step._n_steps, group)

    right = train()
    monkeypatch.setattr(Step, "_set_rates", fetched)
    assert train()[0] != right[0]
