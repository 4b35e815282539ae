"""Named sets of defaults. A new one is a name in ``Preset`` and a tree in ``PRESETS``; docs/method.md says why.

Nothing is imported here, so that the command line can name them.
"""

from typing import Any, Literal, get_args

Preset = Literal["recommended", "small", "plan", "direction-only"]

# The plan to the letter; `recommended` is what the sections default to, but for what is stated here.
PLAN: dict[str, Any] = {
    "fusion": {"block_norm": "none", "dropout": 0.1, "input_dropout": 0.0},
    "hash": {"batch_norm": False, "code_classifier": False, "fused_classifier": False, "nested": ()},
    "loss": {
        "hash_weight": 0.1,
        "hash_reg": {"lambda_quant": 1.0, "lambda_balance": 0.1, "lambda_decorr": 0.01},
        "asymmetric_loss": False,
    },
    "optimizer": {"lr_fusion": 3e-4, "lr_hash": 3e-4, "lr_classifier": 3e-4},
    "training": {"batch_size": 64, "mixup": False},
}
RECOMMENDED: dict[str, Any] = {
    "fusion": {"block_norm": "rms", "dropout": 0.0, "input_dropout": 0.2},
    "hash": {"batch_norm": True, "code_classifier": True, "fused_classifier": True, "nested": (32,)},
    "loss": {
        "hash_weight": 1.0,
        "hash_reg": {"lambda_quant": 0.0, "lambda_balance": 1.0, "lambda_decorr": 10.0},
        "asymmetric_loss": True,
    },
    "optimizer": {"lr_fusion": 1e-3, "lr_hash": 1e-3, "lr_classifier": 3e-3},
    "training": {"batch_size": 256, "mixup": True},
}
# A few thousand images or less: many small steps, and nothing that needs statistics of a large batch.
SMALL: dict[str, Any] = {
    "fusion": {"block_norm": "rms", "dropout": 0.1, "input_dropout": 0.0},
    "hash": {
        "activation": "ste",
        "batch_norm": True,
        "code_classifier": False,
        "fused_classifier": True,
        "nested": (),
    },
    "loss": {"hash_weight": 0.0, "asymmetric_loss": True},
    "optimizer": {"lr_fusion": 3e-4, "lr_hash": 3e-4, "lr_classifier": 3e-3},
    "training": {"batch_size": 64, "mixup": False},
}
# The baseline that leaves the magnitudes out and nothing else.
DIRECTION_ONLY: dict[str, Any] = {**RECOMMENDED, "fusion": {**RECOMMENDED["fusion"], "type": "hadamard"}}
PRESETS: dict[str, dict[str, Any]] = {
    "recommended": RECOMMENDED,
    "small": SMALL,
    "plan": PLAN,
    "direction-only": DIRECTION_ONLY,
}
assert set(PRESETS) == set(get_args(Preset))
