"""Named sets of defaults. A new one is a name in ``Preset`` and a tree in ``PRESETS``; docs/method.md says why.

Nothing is imported here, so that the command line can name them.
"""

from typing import Any, Literal, get_args

Preset = Literal["recommended", "plan", "direction-only"]

# The plan to the letter; `recommended` is what the sections default to, but for what is stated here.
PLAN: dict[str, Any] = {
    "fusion": {"block_norm": "none"},
    "hash": {"activation": "tanh", "batch_norm": False},
    "loss": {"hash_weight": 0.1},
    "optimizer": {"lr_classifier": 3e-4},
}
RECOMMENDED: dict[str, Any] = {
    "fusion": {"block_norm": "rms"},
    "hash": {"activation": "ste", "batch_norm": True},
    "loss": {"hash_weight": 0.0},
    "optimizer": {"lr_classifier": 3e-3},
}
# The baseline that leaves the magnitudes out and nothing else.
DIRECTION_ONLY: dict[str, Any] = {**RECOMMENDED, "fusion": {**RECOMMENDED["fusion"], "type": "hadamard"}}
PRESETS: dict[str, dict[str, Any]] = {"recommended": RECOMMENDED, "plan": PLAN, "direction-only": DIRECTION_ONLY}
assert set(PRESETS) == set(get_args(Preset))
