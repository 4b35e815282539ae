"""From an image and its caption to a code, as a run made the codes of its splits: towers, store's precision, head.

Symbols: N pairs, D embedding width, F features of a soft code, B bits.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image

from ...cache import StoreKey
from ...cache.key import digest_of
from ...errors import InputError
from ...heads.hashing import binarise, pack_codes
from ...heads.model import BaseHead, Head, MlpBaseline
from ..core.checkpoint import load_head
from ..core.config import load_config
from ..core.device import pick_device
from ..core.progress import Progress
from ..core.run import Run, RunInfo
from ..data.manifest import Manifest, resolve_image
from ..extraction.encoder import Encoder
from ..extraction.images import UnreadableImage, cut, open_rgb, resize, upright_rgb
from ..extraction.reader import plan
from ..extraction.stores import find_key
from ..training.data import all_finite
from .index_file import Origin, TagIndex, digest_arrays

Picture = str | PathLike[str] | Image.Image | npt.NDArray[Any]
BATCH = 64  # pairs from pixels to codes at a time: 12 MiB of patches at 256 patches
HEAD_ROWS = 4096


def read_rgb(picture: Picture) -> Image.Image:
    """Decode a picture to an upright RGB image.

    Args:
        picture: A path, an image of Pillow, or an array ``(height, width)`` or ``(height, width, 3 or 4)`` uint8.

    Raises:
        InputError: It cannot be read, or is none of these.
    """
    if isinstance(picture, np.ndarray):
        shape = picture.shape
        fits = picture.ndim == 2 or (picture.ndim == 3 and shape[2] in {3, 4})
        if picture.dtype != np.uint8 or not fits or not picture.size:
            raise InputError(
                "not an image",
                got=f"an array {shape} of {picture.dtype}",
                wanted="(height, width) or (height, width, 3 or 4) of uint8",
                do="scale it to 0..255, channels last",
            )
        return upright_rgb(Image.fromarray(np.ascontiguousarray(picture)))
    if isinstance(picture, Image.Image):
        return upright_rgb(picture)
    if not isinstance(picture, str | PathLike):
        raise InputError(
            "not an image", got=type(picture).__name__, wanted="a path, an array of uint8, or an image of Pillow"
        )
    return open_rgb(Path(picture))


class Coded(NamedTuple):
    """Codes of N pairs.

    Attributes:
        soft: h ``(N, F)`` float32, or z without hash layer.
        packed: ``(N, B / 8)`` uint8; ``None`` without hash layer.
    """

    soft: npt.NDArray[np.float32]
    packed: npt.NDArray[np.uint8] | None

    def without(self, rows: Collection[int]) -> "Coded":
        """All codes but those of some rows."""
        kept = [row for row in range(len(self.soft)) if row not in rows]
        return Coded(self.soft[kept], None if self.packed is None else self.packed[kept])


class RunEncoder:
    """The encoder and the head of a run on one device; loaded once, used for any number of pairs.

    Attributes:
        head: The run's head, in ``eval()`` mode.
        encoder: The towers.
        origin: The digests of the head and the encoder, which an index keeps beside its codes.
        notes: Remarks for the user, a line each.
    """

    def __init__(self, head: Head | MlpBaseline, encoder: Encoder, info: RunInfo, key: StoreKey | None) -> None:
        self.head, self.encoder, self._dtype = head, encoder, np.dtype("float16" if key is None else key.dtype)
        self.inputs: str = head.build["fusion"]["inputs"]
        self.notes: tuple[str, ...] = ()
        if key is None:
            self.notes = (f"cannot tell whether {encoder.identity.model} is the {info.model} of the run's store",)
        self.origin = Origin(
            head=head_digest(head),
            store=info.store_digest,
            model=info.model,
            patches=info.patches,
            encoder="" if key is None else encoder_digest(key),
        )

    @classmethod
    def load(cls, run: Run, *, device: str = "auto", model: str | None = None) -> "RunEncoder":
        """Load the encoder and the head that made the codes of a run.

        Args:
            run: A finished run of ``train-head`` or ``finetune``; towers that it trained are read from the run.
            device: The device to compute on.
            model: The folder or hub id of the checkpoint, if it is no longer where the run says.

        Raises:
            InputError: No checkpoint, or another one than the run's store was made with; a damaged head.
        """
        config = load_config(run.paths.config)
        if config.model.text_max_length == 1:
            raise InputError(
                "embeddings from elsewhere",
                where=run.folder,
                got="a run of a store that `mmcli cache import` made",
                wanted="a run of a store that `mmcli extract` made",
                do="extract the data set, then train again",
            )
        torch_device = pick_device(device)
        head = load_head(run.folder, torch_device)
        trained = run.paths.towers
        name = model or (str(trained) if trained.is_dir() else config.model.siglip2_variant)
        encoder = Encoder.load(
            name,
            # A checkpoint that is named otherwise than in the configuration has no revision of the hub.
            revision=config.model.revision if name == config.model.siglip2_variant else None,
            patches=config.model.max_num_patches,
            text_length=config.model.text_max_length,
            device=torch_device,
        )
        key = find_key(encoder.identity, run.info)
        if key is None and name == str(trained):
            raise InputError(
                "damaged towers",
                where=trained,
                got="weights, settings or a tokenizer that changed",
                wanted="those that the run was finished with",
                do="copy the run again, or finetune again",
            )
        # A folder that the user named may be a copy of the hub's checkpoint: then no hash can tell.
        if key is None and not (model is not None and Path(model).is_dir() and "/" in run.info.model):
            raise InputError(
                "another checkpoint than the run's",
                where=name,
                got=f"{encoder.identity.model}, {encoder.identity.revision[:19]}",
                wanted=f"the {run.info.model} whose embeddings {run.folder} was trained on",
                do="give --model with that checkpoint, or extract and train again with this one",
            )
        if key is not None and "resizer" in json.loads(key.processor):
            encoder.spec = replace(encoder.spec, resizer="torch")
        return cls(head, encoder, run.info, key)

    @property
    def reads_captions(self) -> bool:
        """Whether the head reads captions; one of ``inputs`` image does not."""
        return self.inputs != "image"

    def encode(
        self,
        images: Sequence[Picture],
        captions: Sequence[str | None],
        *,
        unreadable: dict[int, str] | None = None,
        progress: Progress | None = None,
    ) -> Coded:
        """Codes of N pairs.

        Args:
            images: Paths, arrays ``(height, width, 3)`` uint8, or images of Pillow.
            captions: One an image; ``None`` or blank where the head reads images alone.
            unreadable: Where given, a row whose image cannot be read is noted here with the reason, and its code is
                meaningless.
            progress: Progress bars; none are shown when not given.

        Raises:
            InputError: An image cannot be read and ``unreadable`` is not given, a caption is missing, or the numbers
                of both differ.
        """
        texts = self.check_captions(images, captions)
        v_img = np.zeros((len(images), self.encoder.width), self._dtype)
        v_txt = np.zeros_like(v_img)
        # A store keeps float16 where nothing else was asked for, and that is what the head was trained on.
        with (progress or Progress()).task("images", len(images)) as task:
            for start in range(0, len(images), BATCH):
                rows = range(start, min(start + BATCH, len(images)))
                self._embed_images(images, rows, v_img, unreadable)
                if self.reads_captions:
                    v_txt[rows.start : rows.stop] = self.encoder.encode_texts(texts[rows.start : rows.stop])
                task.advance(len(rows))
        return self.code(v_img, v_txt)

    def _embed_images(
        self, images: Sequence[Picture], rows: range, out: npt.NDArray[Any], unreadable: dict[int, str] | None
    ) -> None:
        """Write raw embeddings of some images, made as an extraction makes them, into their rows ``(N, D)``."""
        spec, cuts = self.encoder.spec, {}
        for row in rows:
            try:
                image = read_rgb(images[row])
                grid = spec.grid(image.height, image.width)
                cuts[row] = grid, cut(resize(np.asarray(image), grid, spec), grid, spec.side)
            except UnreadableImage as error:
                if unreadable is None:
                    raise
                unreadable[row] = str(error)
        grids = [cuts[row][0] if row in cuts else None for row in rows]
        for batch in plan(grids, tokens=self.encoder.batch_tokens):
            chosen = [rows[place] for place in batch.rows]
            pixels = np.stack([cuts[row][1] for row in chosen])
            with torch.inference_mode():
                out[chosen] = self.encoder.image_features(pixels, batch.grid).cpu().numpy()

    def check_captions(self, images: Sequence[Picture], captions: Sequence[str | None]) -> list[str]:
        """The captions as texts.

        Raises:
            InputError: See :meth:`encode`.
        """
        if len(images) != len(captions):
            raise InputError("one caption an image", got=f"{len(images)} images, {len(captions)} captions")
        for image, caption in zip(images, captions, strict=True):
            if self.reads_captions and not (caption or "").strip():
                raise InputError(
                    "no caption",
                    where=image if isinstance(image, str | Path) else None,
                    got=f"a head that reads {'image and caption' if self.inputs == 'both' else 'captions'}",
                    wanted="a caption of every image",
                    do="give --caption or --captions, or train a head with `mmcli train-head --inputs image`",
                )
        return [caption or "" for caption in captions]

    @torch.inference_mode()
    def code(self, v_img: npt.NDArray[Any], v_txt: npt.NDArray[Any]) -> Coded:
        """Codes of raw embeddings ``(N, D)`` and ``(N, D)``.

        Raises:
            InputError: A code has a value that is not finite.
        """
        parts = []
        for start in range(0, len(v_img), HEAD_ROWS):
            pair = [torch.from_numpy(v[start : start + HEAD_ROWS]).to(self.encoder.device) for v in (v_img, v_txt)]
            parts.append(self.head(*(v.float() for v in pair)).features.float())
        soft = torch.cat(parts)
        if not all_finite(soft):
            raise InputError("the head gives no numbers", got="NaN or inf in codes", do="train the head again")
        codes = soft.cpu().numpy()
        hashed = getattr(self.head, "hash", None) is not None
        return Coded(codes, pack_codes(binarise(codes)) if hashed else None)


def head_digest(head: BaseHead) -> str:
    """SHA-256, in hex, of a head: its configuration, and every tensor by name, dtype, shape and bytes."""
    return digest_arrays(head.build, {name: value.detach().cpu().numpy() for name, value in head.state_dict().items()})


def encoder_digest(key: StoreKey) -> str:
    """SHA-256, in hex, of what an encoder's numbers depend on, but for the rounding of the device."""
    return digest_of(
        {name: getattr(key, name) for name in ("revision", "processor", "patches", "text_length", "dtype")}
    )


def keep_readable(n: int, unreadable: Mapping[int, str] | None) -> npt.NDArray[np.int64]:
    """The rows of n images that could be read.

    Raises:
        InputError: None of them could.
    """
    kept = np.array([row for row in range(n) if row not in (unreadable or {})], np.int64)
    if n and not len(kept):
        assert unreadable is not None
        raise InputError(f"no image that can be read, and this is the first: {unreadable[0]}")
    return kept


def encode_samples(
    listing: Manifest, data: Path, encoder: RunEncoder, on_error: Literal["stop", "skip"], progress: Progress
) -> tuple[TagIndex, tuple[str, ...]]:
    """The samples of a manifest as an index.

    Args:
        listing: The samples; the first caption of each counts.
        data: The folder that their paths are relative to.
        encoder: The encoder of the run whose index they are for.
        on_error: Whether an image that cannot be read stops everything, or is left out.
        progress: Progress bars.

    Returns:
        The index, and why the images that are not in it cannot be read.

    Raises:
        InputError: An image cannot be read, or none can, or a path or a link leaves the data folder.
    """
    unreadable: dict[int, str] | None = None if on_error == "stop" else {}
    captions = list(listing.first_captions)
    files = [resolve_image(data, path) for path in listing.paths]
    coded = encoder.encode(files, captions, unreadable=unreadable, progress=progress)
    kept = keep_readable(len(files), unreadable)
    coded = coded.without(unreadable or {})
    index = TagIndex(
        image_id=listing.image_ids[kept],
        soft=coded.soft,
        packed=coded.packed,
        labels=listing.labels_matrix()[kept],
        category_names=listing.category_names,
        origin=encoder.origin,
        paths=pa.array([listing.paths[r] for r in kept], pa.string()),
        captions=pa.array([captions[r] for r in kept], pa.string()),
    )
    return index, tuple(reason for _, reason in sorted((unreadable or {}).items()))
