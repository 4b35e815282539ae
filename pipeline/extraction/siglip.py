"""A SigLIP checkpoint's settings: whether towers and image processor fit each other, and what identifies them."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ...errors import InputError
from ..core.config import DEFAULT_MODEL
from .images import TORCH_MODES, Grid, PatchSpec, Resizer
from .model_source import ModelSource
from .towers import PixelScale

MODEL_TYPES = ("siglip2", "siglip")
# What changes a number in the pixels that reach the tower; the patch budget is a part of the key by itself.
PROCESSOR_KEYS = (
    "do_convert_rgb",
    "do_normalize",
    "do_rescale",
    "do_resize",
    "image_mean",
    "image_std",
    "patch_size",
    "resample",
    "rescale_factor",
    "size",
)
CHANNELS = 3


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Names for the key of a store: all that the numbers of an encoder depend on."""

    model: str
    revision: str
    processor: str
    patches: int
    text_length: int
    compute_dtype: str


def _three(value: object) -> object:
    """One number for all channels is as good as one for each."""
    return [value] * CHANNELS if isinstance(value, int | float) else value


Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ProcessorSettings(BaseModel):
    """The settings of an image processor that change a number, with their kinds checked."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    do_resize: bool
    do_rescale: bool
    do_normalize: bool
    image_mean: Annotated[tuple[Finite, Finite, Finite], BeforeValidator(_three)]
    image_std: Annotated[tuple[Positive, Positive, Positive], BeforeValidator(_three)]
    rescale_factor: Positive
    resample: Image.Resampling
    patch_size: Annotated[int, Field(gt=0)] | None = None
    size: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, source: ModelSource, settings: Mapping[str, Any]) -> Self:
        """Check the settings as ``transformers`` gives them.

        Args:
            source: The checkpoint, for messages.
            settings: Those of :data:`PROCESSOR_KEYS` that its processor has.

        Raises:
            InputError: A setting is missing or of a wrong kind, or one of SigLIP's steps is off.
        """
        try:
            read = cls.model_validate(dict(settings))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise _bad_processor(source, f"{key} {str(first['input'])[:60]}: {first['msg']}") from None
        off = [key for key in ("do_resize", "do_rescale", "do_normalize") if not getattr(read, key)]
        if off:
            raise _bad_processor(source, f"{off[0]} off", "on")
        return read

    @property
    def scale(self) -> PixelScale:
        """The scale and shift that normalise pixels."""
        return PixelScale(factor=self.rescale_factor, mean=self.image_mean, std=self.image_std)


def check_config(source: ModelSource, config: Any, patches: int, text_length: int) -> None:  # noqa: ANN401
    """Refuse a checkpoint, a patch budget or a text length that the towers were not made for.

    Args:
        source: The checkpoint.
        config: Its configuration.
        patches: Patch budget; a fixed-resolution checkpoint admits only its own.
        text_length: Tokens of a caption; the length that the text tower was trained with.

    Raises:
        InputError: One of these.
    """
    if config.model_type not in MODEL_TYPES:
        raise InputError(
            "not a SigLIP checkpoint",
            where=source,
            got=f"model type {config.model_type}",
            wanted=" or ".join(MODEL_TYPES),
            do=f"use a SigLIP2 checkpoint such as {DEFAULT_MODEL}",
        )
    text, vision = config.text_config, config.vision_config
    width, side = text.projection_size or text.hidden_size, vision.patch_size
    faults: list[tuple[bool, str, str]] = [
        (not getattr(vision, "vision_use_head", True), "no pooling head", "a SigLIP with both towers"),
        (type(side) is not int or side < 1, f"patch_size {side}", "a whole number"),
        (vision.num_channels != CHANNELS, f"{vision.num_channels} channels", f"{CHANNELS}"),
        (width != vision.hidden_size, f"embeddings {vision.hidden_size} and {width} wide", "one width of both towers"),
    ]
    if config.model_type == "siglip2":
        n = vision.num_patches
        faults.append((n < 1 or math.isqrt(max(0, n)) ** 2 != n, f"num_patches {n}", "a square number"))
    else:
        size = vision.image_size
        faults.append((type(size) is not int or size < 1, f"image_size {size}", "a whole number"))
    for is_wrong, got, wanted in faults:
        if is_wrong:
            raise source.refusal("not SigLIP's towers", got=got, wanted=wanted)
    if config.model_type == "siglip" and patches != fixed_patches(config):
        raise InputError(
            "this checkpoint has a fixed resolution",
            where=source,
            got=f"--patches {patches}",
            wanted=f"--patches {fixed_patches(config)}",
            do=f"use {DEFAULT_MODEL} for other budgets",
        )
    trained = text.max_position_embeddings
    if text_length != trained:
        what = "text length too long" if text_length > trained else "text length below the trained one"
        raise InputError(
            what,
            where=source,
            got=text_length,
            do=f"set model.text_max_length to {trained}",
            wanted=f"{trained}: the text tower pools the last of {trained} positions",
        )


def fixed_patches(config: Any) -> int:  # noqa: ANN401
    """The only patch budget of a fixed-resolution checkpoint."""
    return int(config.vision_config.image_size // config.vision_config.patch_size) ** 2


def patch_spec(
    source: ModelSource,
    config: Any,  # noqa: ANN401
    settings: ProcessorSettings,
    patches: int,
    resizer: Resizer,
) -> PatchSpec:
    """The settings by which an image becomes patches, from the checkpoint's image processor.

    Raises:
        InputError: The processor is not the towers', or the resizer lacks its filter.
    """
    resample = int(settings.resample)
    if resizer == "torch" and resample not in TORCH_MODES:
        raise InputError(
            "a filter that the torch resizer has not",
            where="--resizer",
            got=settings.resample.name.lower(),
            wanted=" or ".join(TORCH_MODES.values()),
            do="use --resizer pillow",
        )
    side, fixed, edges = config.vision_config.patch_size, None, None
    if config.model_type == "siglip2":
        if settings.patch_size != side:
            raise _bad_processor(source, f"patch_size {settings.patch_size}", f"{side}, as in config.json")
    else:
        edge, size = config.vision_config.image_size, settings.size or {}
        if any(size.get(name) != edge for name in ("height", "width")):
            raise _bad_processor(source, f"size {dict(size)}"[:100], f"{edge} x {edge}, as in config.json")
        fixed, edges = Grid(edge // side, edge // side), (edge, edge)
    return PatchSpec(side=side, budget=patches, fixed=fixed, resample=resample, resizer=resizer, size=edges)


def local_digest(folder: Path) -> str:
    """A hash of all files of a local checkpoint that can change a number.

    Raises:
        InputError: One of them cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for file in sorted(folder.iterdir()):
            # Hidden files are no settings: macOS leaves one beside every file that it copies to other disks.
            if file.name.startswith(".") or file.suffix not in {".json", ".safetensors", ".model", ".txt"}:
                continue
            if file.is_file():
                digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
    except OSError as error:
        raise InputError(
            "cannot read the checkpoint",
            where=error.filename or folder,
            got=error.strerror or error,
            wanted="files that may be read",
            do="check the folder and its permissions",
        ) from error
    return f"sha256:{digest.hexdigest()}"


def model_path(name: str) -> str:
    """A name that finds the checkpoint from any working folder: a hub id as it is, the absolute path of a folder."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _bad_processor(source: ModelSource, got: str, wanted: str = "SigLIP's settings") -> InputError:
    return source.refusal(
        "not SigLIP's image processor", got=got, wanted=wanted, do="use the checkpoint's own preprocessor_config.json"
    )
