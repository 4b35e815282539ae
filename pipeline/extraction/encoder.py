"""A frozen SigLIP2 behind two calls: patches of images to raw embeddings, texts to raw embeddings.

Raw means the pooled outputs of the towers before L2 normalisation: the norm is an input of the head. The text tower
gets ``input_ids`` alone, lower-cased and right-padded to a fixed length, because SigLIP is trained without an
attention mask and pools the last position (Tschannen et al. 2025, arXiv 2502.14786; Zhai et al. 2023).
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor

from ...errors import InputError
from ..core.config import DEFAULT_MODEL
from ..core.device import autocast, is_memory_shortage, to_device
from .caption_tokens import CaptionTokenizer, compare_vocabulary, load_tokenizer
from .images import Grid, PatchSpec, Pixels, Resizer, cut, resize
from .model_source import ModelSource, find_model
from .native_output import without_native_output
from .siglip import PROCESSOR_KEYS, Identity, ProcessorSettings, check_config, local_digest, patch_spec
from .towers import ImageTower, PixelScale, TextTower

Floats = npt.NDArray[np.float32]
_log = logging.getLogger(__name__)

# Tokens in one forward pass. A CPU is fastest while a layer's activations stay in its caches; a GPU wants to be filled.
BATCH_TOKENS = {"cpu": 1024, "mps": 8192, "cuda": 32768}
# A core with so much second-level cache takes twice as many (docs/lab-notes.md).
LARGE_CACHE_BYTES = 2 << 20


def tokens_of_a_pass(device: torch.device) -> int:
    """Patches or text tokens that one forward pass of a device takes best."""
    caches = int(torch.cpu.get_capabilities().get("l2_cache_size", 0)) if device.type == "cpu" else 0
    return BATCH_TOKENS[device.type] * (2 if caches >= LARGE_CACHE_BYTES else 1)


@dataclass(frozen=True, kw_only=True)
class EncoderFacts:
    """The description of an encoder that a store needs, without the weights, so that it can travel between machines.

    Attributes:
        identity: Names for the key of a store.
        device: Where the encoder computes.
        spec: What is done to an image before the tower sees it.
        width: Embedding width D.
        batch_tokens: Most tokens of a forward pass.
        logit_scale: SigLIP's learned scale, already exponentiated.
        logit_bias: SigLIP's learned bias.
    """

    identity: Identity
    device: torch.device
    spec: PatchSpec
    width: int
    batch_tokens: int
    logit_scale: float
    logit_bias: float


class EncoderParts(NamedTuple):
    """The parts of an encoder; the weights may be trained, and another encoder made of them.

    Attributes:
        source: Where the files are.
        model: The model of ``transformers`` on its device, float32, in ``eval()`` mode.
        processor: Its image processor.
        scale: How the processor normalises pixels.
        tokenizer: Its tokenizer.
        captions: The same tokenizer, called as the text tower was trained.
        identity: Names for the key of a store.
        device: Where the model is.
        spec: What is done to an image before the tower sees it.
    """

    source: ModelSource
    model: Any
    processor: Any
    scale: PixelScale
    tokenizer: Any
    captions: CaptionTokenizer
    identity: Identity
    device: torch.device
    spec: PatchSpec


class Encoder:
    """The towers of one checkpoint on one device.

    Args:
        parts: What :meth:`parts` gives.
        pin_memory: Whether batches go to a GPU by way of page-locked memory.

    Attributes:
        identity: Names for the key of a store.
        device: Where it computes.
        spec: What is done to an image before the tower sees it.
        tokenize: Texts to token ids ``(N, text_length)`` int64.
        width: Embedding width D.
        logit_scale: SigLIP's learned scale, already exponentiated.
        logit_bias: SigLIP's learned bias.
        pin_memory: Whether batches go to a GPU by way of page-locked memory.
        batch_tokens: Most tokens of a forward pass; halved when the device runs out of memory.
    """

    def __init__(self, parts: EncoderParts, *, pin_memory: bool = True) -> None:
        model, device = parts.model, parts.device
        self.pin_memory = pin_memory
        self.identity, self.device = parts.identity, device
        self.spec = parts.spec
        self.width = int(model.config.text_config.projection_size or model.config.text_config.hidden_size)
        self.logit_scale = float(model.logit_scale.detach().float().exp())
        self.logit_bias = float(model.logit_bias.detach().float())
        self.batch_tokens = tokens_of_a_pass(device)
        dtype = getattr(torch, parts.identity.compute_dtype)
        self._image = ImageTower(model.vision_model, parts.scale, dtype)
        self._text = TextTower(model.text_model, dtype)
        self.tokenize = parts.captions

    @property
    def facts(self) -> EncoderFacts:
        """The description of this encoder, without the weights."""
        return EncoderFacts(**{field.name: getattr(self, field.name) for field in fields(EncoderFacts)})

    @classmethod
    def load(
        cls,
        name: str = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        patches: int = 256,
        text_length: int = 64,
        resizer: Resizer = "pillow",
        device: torch.device,
        pin_memory: bool = True,
    ) -> "Encoder":
        """Load a checkpoint; arguments and errors are those of :meth:`parts` and of the class."""
        parts = cls.parts(
            name, revision=revision, patches=patches, text_length=text_length, resizer=resizer, device=device
        )
        return cls(parts, pin_memory=pin_memory)

    @staticmethod
    def parts(
        name: str = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        patches: int = 256,
        text_length: int = 64,
        resizer: Resizer = "pillow",
        device: torch.device,
    ) -> EncoderParts:
        """Load the parts of a checkpoint through the Auto classes of ``transformers``.

        Args:
            name: A local folder in ``save_pretrained`` form, or a hub id.
            revision: Branch, tag or commit of a hub checkpoint.
            patches: Patch budget (``max_num_patches``); a fixed-resolution checkpoint admits only its own.
            text_length: Tokens per caption; the length that the text tower was trained with.
            resizer: What resizes images; see :class:`~mmcli.pipeline.extraction.images.PatchSpec`.
            device: Where to compute; float32 on a CPU, bfloat16 or float16 autocast on a GPU.

        Raises:
            InputError: No such checkpoint, not a SigLIP, parts that do not fit each other, pickled weights only, or an
                impossible patch budget or text length.
        """
        # The weights come last: they take longest, and whatever else is wrong is then known.
        source = find_model(name, revision)
        config = source.load("the configuration", transformers.AutoConfig)
        check_config(source, config, patches, text_length)
        processor = source.load("the image processor", transformers.AutoImageProcessor)
        raw = {key: value for key, value in processor.to_dict().items() if key in PROCESSOR_KEYS}
        settings = ProcessorSettings.read(source, raw)
        spec = patch_spec(source, config, settings, patches, resizer)
        with without_native_output():
            tokenizer = source.load("the tokenizer", transformers.AutoTokenizer)
        captions = load_tokenizer(source, tokenizer, config, text_length)
        model = source.load_weights(config)
        compare_vocabulary(source, tokenizer, config)
        if resizer != "pillow":
            raw["resizer"] = resizer
        identity = Identity(
            model=source.folder.resolve().name if source.commit is None else name,
            revision=source.commit or local_digest(source.folder),
            processor=json.dumps(raw, sort_keys=True, default=str),
            patches=patches,
            text_length=text_length,
            compute_dtype=autocast(device).name,
        )
        return EncoderParts(
            source,
            model.requires_grad_(False).to(device),
            processor,
            settings.scale,
            tokenizer,
            captions,
            identity,
            device,
            spec,
        )

    def image_features(self, patches: Pixels, grid: Grid) -> Tensor:
        """Run the image tower.

        Args:
            patches: ``(n, P, 3 p^2)`` uint8, all of one grid.
            grid: Their grid.

        Returns:
            Raw embeddings ``(n, D)`` float32 on the device; on a GPU they may still be under way.

        Raises:
            InputError: The device has no memory for a single image.
        """
        host = torch.from_numpy(patches)

        def run(rows: slice) -> Tensor:
            return self._image(to_device(host[rows], self.device, pin=self.pin_memory), grid)

        return self._within_memory(len(host), grid.tokens, run)

    def encode_images(self, images: Sequence[Pixels]) -> Floats:
        """Raw embeddings ``(n, D)`` float32 of RGB images, each ``(height, width, 3)`` uint8."""
        rows = []
        for image in images:
            grid = self.spec.grid(*image.shape[:2])
            patches = cut(resize(image, grid, self.spec), grid, self.spec.side)
            rows.append(self.image_features(patches[None], grid).cpu().numpy())
        return np.concatenate(rows)

    def encode_texts(self, texts: Sequence[str], *, advance: Callable[[int], None] = lambda _count: None) -> Floats:
        """Raw embeddings of texts; texts that are the same tokens are encoded once.

        Args:
            texts: N texts.
            advance: Called with the number of texts of each pass.

        Returns:
            Raw embeddings, ``(N, D)`` float32.

        Raises:
            InputError: The device has no memory for a single text.
        """
        if not texts:
            return np.empty((0, self.width), np.float32)
        ids = self.tokenize(texts).numpy()
        # By first appearance, so that the batches of a list do not depend on what the texts are.
        _, first, inverse = np.unique(ids, axis=0, return_index=True, return_inverse=True)
        order = np.argsort(first)
        unique = torch.from_numpy(ids[first[order]])
        times = np.bincount(inverse.reshape(-1))[order]

        def run(rows: slice) -> Tensor:
            advance(int(times[rows].sum()))
            return self.text_features(unique[rows])

        encoded = self._within_memory(len(unique), ids.shape[1], run)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        features: Floats = encoded.cpu().numpy()[place[inverse.reshape(-1)]]
        return features

    def text_features(self, ids: Tensor) -> Tensor:
        """Raw embeddings ``(n, D)`` float32 on the device, of token ids ``(n, text_length)`` int64, in one pass."""
        return self._text(to_device(ids, self.device, pin=self.pin_memory))

    def _within_memory(self, n: int, tokens: int, run: Callable[[slice], Tensor]) -> Tensor:
        """All n things in passes of at most ``batch_tokens`` tokens; passes are halved when memory runs out."""
        parts, start = [], 0
        while start < n:
            count = min(max(1, self.batch_tokens // tokens), n - start)
            part = _unless_short(run, slice(start, start + count))
            if part is not None:
                parts.append(part)
                start += count
                continue
            if count == 1:
                raise InputError(
                    "out of memory",
                    where=self.device,
                    got=f"no room for {tokens} tokens",
                    wanted="more memory",
                    do="lower the patch budget, or compute on another device; what was finished is kept",
                )
            self.batch_tokens = tokens * (count // 2)
            _log.warning("out of memory: %d tokens in a forward pass from here on", self.batch_tokens)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return torch.cat(parts)


def _unless_short(run: Callable[[slice], Tensor], rows: slice) -> Tensor | None:
    """The result of a pass, or None where memory ran out; then all that the pass had allocated is free again."""
    try:
        return run(rows)
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_memory_shortage(error):
            raise
        return None
