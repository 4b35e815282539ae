"""mmcli: tag an image with its caption, and show the neighbours that voted.

These names are the Python twin of the command line. Each is imported when it is first used, so that ``import mmcli``
and ``mmcli --help`` load no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .errors import InputError

if TYPE_CHECKING:
    from .cache.reader import Store
    from .pipeline.api import compare, extract, finetune, knn_eval, prepare, train_head, zero_shot
    from .pipeline.core.checkpoint import load_head
    from .pipeline.core.config import Config, load_config
    from .pipeline.tagging.tagger import Tagger

__version__ = "0.1.0"

__all__ = [
    "Config",
    "InputError",
    "Store",
    "Tagger",
    "__version__",
    "compare",
    "extract",
    "finetune",
    "knn_eval",
    "load_config",
    "load_head",
    "prepare",
    "train_head",
    "zero_shot",
]

# Where each name that is imported on first use lives.
_LAZY = {
    "Config": "pipeline.core.config",
    "Store": "cache.reader",
    "Tagger": "pipeline.tagging.tagger",
    "compare": "pipeline.api",
    "extract": "pipeline.api",
    "finetune": "pipeline.api",
    "knn_eval": "pipeline.api",
    "load_config": "pipeline.core.config",
    "load_head": "pipeline.core.checkpoint",
    "prepare": "pipeline.api",
    "train_head": "pipeline.api",
    "zero_shot": "pipeline.api",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
