"""A SigLIP checkpoint as files: what it is, what its processor does, and why it cannot be used."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .. import InputError
from .config import DEFAULT_MODEL
from .patches import TORCH_MODES, Grid, PatchSpec, Resizer

MODEL_TYPES = ("siglip2", "siglip")
# What changes a number in the pixels that reach the tower; the patch budget is a part of the key by itself.
PROCESSOR_KEYS = (
    "do_convert_rgb", "do_normalize", "do_rescale", "do_resize", "image_mean", "image_std", "patch_size", "resample",
    "rescale_factor", "size",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What the numbers of an encoder depend on: names for the key of a store."""

    model: str
    revision: str
    processor: str
    patches: int
    text_length: int
    compute_dtype: str


def load_part(what: str, auto: Any, name: str, revision: str | None, **options: object) -> Any:  # noqa: ANN401
    """What one Auto class loads, with its failures turned into one line.

    Args:
        what: What is loaded, for the message.
        auto: An Auto class of ``transformers``.
        name: A local folder, or a hub id.
        revision: Branch, tag or commit of a hub checkpoint.
        options: For ``from_pretrained``.

    Raises:
        InputError: No such folder, no answer from the hub, or files that cannot be loaded.
    """
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") != 1):
        raise InputError(
            "no checkpoint", where=name, got="no such folder", wanted="a folder or a hub id like owner/name",
            do=f"give --model a folder or a hub id such as {DEFAULT_MODEL}",
        )  # fmt: skip
    try:
        return auto.from_pretrained(name, revision=revision or "main", **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        source = "" if Path(name).is_dir() else "no such folder, and from the hub: "
        raise InputError(
            f"cannot load {what} of the checkpoint", where=name, got=source + reason.rstrip("."),
            wanted="a SigLIP2 checkpoint with safetensors weights",
            do="check the folder or the hub id (--model, --revision) and the network",
        ) from error  # fmt: skip


def check_patches(name: str, config: Any, patches: int) -> None:  # noqa: ANN401
    """Refuse a patch budget that a fixed-resolution checkpoint cannot have."""
    if config.model_type == "siglip2":
        return
    only = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    if patches != only:
        raise InputError(
            "this checkpoint has a fixed resolution", where=name, got=f"--patches {patches}",
            wanted=f"--patches {only}", do=f"use {DEFAULT_MODEL} for other budgets",
        )  # fmt: skip


def check_model(name: str, config: Any, settings: Mapping[str, Any]) -> None:  # noqa: ANN401
    """Refuse what the towers would compute wrongly."""
    off = [key for key in ("do_resize", "do_rescale", "do_normalize") if not settings.get(key, False)]
    if off:
        raise InputError(
            "not SigLIP's image processor", where=name, got=f"{off[0]} off", wanted="on", do="use the checkpoint's own"
        )
    if not getattr(config.vision_config, "vision_use_head", True):
        raise InputError("a checkpoint without pooling head", where=name, wanted="a SigLIP with both towers")


def patch_spec(config: Any, settings: Mapping[str, Any], patches: int, resizer: Resizer) -> PatchSpec:  # noqa: ANN401
    """What the checkpoint's image processor does to an image."""
    resample = int(settings["resample"])
    if resizer == "torch" and resample not in TORCH_MODES:
        raise InputError(
            "a filter that the torch resizer has not", where="--resizer", got=Image.Resampling(resample).name.lower(),
            wanted=" or ".join(TORCH_MODES.values()), do="use --resizer pillow",
        )  # fmt: skip
    if config.model_type == "siglip2":
        side = int(settings["patch_size"])
        return PatchSpec(side=side, budget=patches, fixed=None, resample=resample, resizer=resizer)
    side, size = config.vision_config.patch_size, (settings["size"]["height"], settings["size"]["width"])
    if set(size) != {config.vision_config.image_size}:
        raise InputError(
            "the image processor is not the towers'", where="size of the images", got=size,
            wanted=config.vision_config.image_size, do="use the checkpoint's own preprocessor_config.json",
        )  # fmt: skip
    fixed = Grid(size[0] // side, size[1] // side)
    return PatchSpec(side=side, budget=patches, fixed=fixed, resample=resample, resizer=resizer, size=size)


def local_digest(folder: Path) -> str:
    """A hash of all files of a local checkpoint that can change a number."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in {".json", ".safetensors", ".model", ".txt"}:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def model_path(name: str) -> str:
    """What finds the checkpoint again: a hub id as it is, a folder from wherever the next command runs."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name
