"""``model/`` in a finished run: the head in the form of the Hugging Face hub, with a card that says what it is."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...heads.card import FIGURES
from ...heads.model import BaseHead
from .checkpoint import describe_head
from .config import Config
from .files import write_folder

FOLDER = "model"


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
    folder = run / FOLDER
    write_folder(folder, lambda scratch: head.save_pretrained(scratch, config=about))
    return folder


def _plain(value: object) -> object:
    """JSON's null where a figure is undefined: JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
