"""Runs parts of the project on a GPU that is not there, and prints what it would have been asked to do as JSON.

Usage: ``python cases.py LIBRARY GROUP [DATA MODEL]``.
"""

import ctypes
import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# The CUDA backend without a device; nothing may have imported torch before.
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)

import fake_cuda  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from mmcli.heads.model import make_head  # noqa: E402
from mmcli.pipeline.core.config import load_config  # noqa: E402
from mmcli.pipeline.core.progress import Progress  # noqa: E402
from mmcli.pipeline.training.data import Split  # noqa: E402
from mmcli.pipeline.training.loop import Hooks, fit  # noqa: E402
from mmcli.pipeline.training.monitor import Monitor  # noqa: E402

GPU = torch.device("cuda")
Result = dict[str, Any]


def train_head(
    *,
    n: int = 384,
    epochs: int = 2,
    looks: bool = False,
    bfloat16: bool = True,
    **options: Any,
) -> Result:
    """Train a head on a store's arrays."""
    options = {"preset": "recommended", "training.num_epochs": epochs, "training.batch_size": 64, "knn.K": 5, **options}
    config = load_config(options=options)
    width, classes, rng = 768, 80, np.random.default_rng(0)
    v = rng.normal(size=(n, width)).astype(np.float16)
    labels = rng.integers(0, 2, (n, classes)).astype(np.uint8)
    with fake_cuda.fake_cuda(bfloat16=bfloat16) as ledger:
        split = Split.place(v, np.repeat(v[:, None], 5, 1), np.full(n, 5), labels, GPU)
        head = make_head(config.head, config.fusion, config.hash, config.classifier, width=width).to(GPU)
        head.fit_log_norms(split.log_norms())
        monitor = Monitor(config, split, split) if looks else (lambda _: {"val_mAP": 0.5})
        hooks = Hooks(monitor=monitor, on_epoch=lambda *_: None)
        with fake_cuda.steps_of(ledger) as steps, Progress().task("", 1) as task:
            fit(head, split, config, hooks, task=task)
    return {"steps": steps, "faults": ledger.faults, "graphs": ledger.captured, "waits": dict(ledger.waits)}


FOCAL = {"loss.focal_loss": True, "loss.asymmetric_loss": False}
HEADS: dict[str, Callable[[], Result]] = {
    **{preset: partial(train_head, preset=preset) for preset in ("recommended", "plan", "small", "direction-only")},
    **{f"{bits} bits": partial(train_head, **{"hash.bits": bits}) for bits in (0, 32, 128)},
    "mlp": partial(train_head, head="mlp", **{"hash.bits": 0}),
    **{f"fusion {kind}": partial(train_head, **{"fusion.type": kind}) for kind in ("concat", "hadamard")},
    **{f"{side} alone": partial(train_head, **{"fusion.inputs": side}) for side in ("image", "text")},
    "adapter": partial(train_head, **{"fusion.adapter": "linear"}),
    "focal": partial(train_head, **FOCAL),
    "balanced": partial(train_head, **{"loss.class_weights": "balanced"}),
    "average": partial(train_head, **{"training.ema_decay": 0.9}),
    "accumulation": partial(train_head, **{"training.accumulation_steps": 2, "training.ema_decay": 0.9}),
    "two sizes": partial(train_head, n=333, epochs=3),
    "float32": partial(train_head, **{"training.mixed_precision": False}),
    "float16": partial(train_head, bfloat16=False),
    "beta": partial(train_head, **{"hash.beta": 5.0}),
    "straight-through": partial(train_head, **{"hash.activation": "ste"}),
    "no mixtures": partial(train_head, **{"training.mixup": False}),
    "unclipped": partial(train_head, **{"training.gradient_clip_norm": None}),
    "deterministic": partial(fake_cuda.deterministic, partial(train_head, **{"hardware.deterministic": True})),
    "monitor": partial(train_head, n=900, epochs=1, looks=True),
    "monitor of the classifier": partial(train_head, epochs=1, looks=True, **{"training.monitor": "classifier"}),
}


def main() -> None:
    """Run the cases of a group; one that raises is a fault."""
    group, where = sys.argv[2], [Path(word) for word in sys.argv[3:]]
    cases = HEADS
    if group != "heads":
        import tower_cases

        cases = {"towers": tower_cases.towers, "base": tower_cases.base}[group](*where)
    results = {}
    for name, run in cases.items():
        try:
            results[name] = run()
        except Exception:  # noqa: BLE001 - whatever a case raises is what is looked for
            results[name] = {"faults": [traceback.format_exc()], "steps": []}
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
