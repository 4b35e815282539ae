"""A frozen SigLIP2 behind two calls: images to raw embeddings, texts to raw embeddings.

Raw means the pooled outputs of the towers before L2 normalisation: the norm is an input of the head. The text tower
gets ``input_ids`` alone, lower-cased and right-padded to a fixed length, because SigLIP is trained without an
attention mask and pools the last position (Tschannen et al. 2025, arXiv 2502.14786; Zhai et al. 2023).
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor

from .. import InputError
from .config import DEFAULT_MODEL
from .device import autocast

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]
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


class Encoder:
    """The towers of one checkpoint on one device.

    Attributes:
        identity: Names for the key of a store.
        width: Embedding width D.
        logit_scale: SigLIP's learned scale, already exponentiated.
        logit_bias: SigLIP's learned bias.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401
        image_processor: Any,  # noqa: ANN401
        tokenizer: Any,  # noqa: ANN401
        identity: Identity,
        device: torch.device,
    ) -> None:
        self._model, self._processor, self._tokenizer = model, image_processor, tokenizer
        self.identity, self.device = identity, device
        self.width = int(model.config.text_config.projection_size or model.config.text_config.hidden_size)
        self.logit_scale = float(model.logit_scale.detach().float().exp())
        self.logit_bias = float(model.logit_bias.detach().float())
        self._naflex = model.config.model_type == "siglip2"
        self._check_tokenizer()

    @classmethod
    def load(
        cls,
        name: str = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        patches: int = 256,
        text_length: int = 64,
        device: torch.device,
    ) -> "Encoder":
        """Load a checkpoint through the Auto classes of ``transformers``.

        Args:
            name: A local folder in ``save_pretrained`` form, or a hub id.
            revision: Branch, tag or commit of a hub checkpoint.
            patches: Patch budget (``max_num_patches``); a fixed-resolution checkpoint admits only its own.
            text_length: Tokens per caption.
            device: Where to compute; float32 on a CPU, bfloat16 or float16 autocast on a GPU.

        Raises:
            InputError: No such checkpoint, not a SigLIP, pickled weights only, or an impossible patch budget.
        """
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        # The hub's client writes a line a retry; the error at the end says it all.
        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
        config = _load("the configuration", transformers.AutoConfig, name, revision)
        if config.model_type not in MODEL_TYPES:
            raise InputError(
                "not a SigLIP checkpoint", where=name, got=f"model type {config.model_type}",
                wanted=" or ".join(MODEL_TYPES), do=f"use a SigLIP2 checkpoint such as {DEFAULT_MODEL}",
            )  # fmt: skip
        _check_patches(name, config, patches)
        if text_length > config.text_config.max_position_embeddings:
            raise InputError(
                "text length too long", where=name, got=text_length,
                wanted=f"at most {config.text_config.max_position_embeddings}", do="lower model.text_max_length",
            )  # fmt: skip
        model = _load("the weights", transformers.AutoModel, name, revision, use_safetensors=True, dtype=torch.float32)
        processor = _load("the image processor", transformers.AutoImageProcessor, name, revision)
        tokenizer = _load("the tokenizer", transformers.AutoTokenizer, name, revision)
        settings = {key: value for key, value in processor.to_dict().items() if key in PROCESSOR_KEYS}
        identity = Identity(
            model=Path(name).name if Path(name).is_dir() else name,
            revision=_local_digest(Path(name)) if Path(name).is_dir() else str(config._commit_hash or revision),  # noqa: SLF001
            processor=json.dumps(settings, sort_keys=True, default=str),
            patches=patches,
            text_length=text_length,
            compute_dtype=autocast(device).name,
        )
        return cls(model.eval().requires_grad_(False).to(device), processor, tokenizer, identity, device)

    def prepare_images(self, images: Sequence[Pixels]) -> dict[str, Tensor]:
        """The checkpoint's own processor: resized, scaled patches on the host, padded to the budget.

        Args:
            images: RGB pixels, each ``(height, width, 3)`` uint8.

        Returns:
            The arguments of the image tower, on the CPU.
        """
        budget = {"max_num_patches": self.identity.patches} if self._naflex else {}
        batch = self._processor(images=list(images), return_tensors="pt", input_data_format="channels_last", **budget)
        return dict(batch)

    @torch.inference_mode()
    def encode_pixels(self, inputs: dict[str, Tensor]) -> Floats:
        """Run the image tower.

        Args:
            inputs: What :meth:`prepare_images` returned for N images.

        Returns:
            Raw embeddings, ``(N, D)`` float32.
        """
        moved = {key: value.to(self.device, non_blocking=True) for key, value in inputs.items()}
        with autocast(self.device):
            pooled = _pooled(self._model.get_image_features(**moved))
        return pooled.float().cpu().numpy()

    def encode_images(self, images: Sequence[Pixels]) -> Floats:
        """Raw embeddings of RGB images, ``(N, D)`` float32."""
        return self.encode_pixels(self.prepare_images(images))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids, ``(N, text_length)`` int64: lower case, no bos, right-padded, truncated."""
        # Lower-casing twice changes nothing, and older tokenizer classes forget it.
        batch = self._tokenizer(
            [text.lower() for text in texts],
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.identity.text_length,
            return_attention_mask=False,
            return_tensors="pt",
        )
        ids: Tensor = batch["input_ids"]
        return ids

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], *, batch_size: int = 256) -> Floats:
        """Raw embeddings of texts.

        Args:
            texts: N texts.
            batch_size: Texts per forward pass.

        Returns:
            Raw embeddings, ``(N, D)`` float32.
        """
        out = np.empty((len(texts), self.width), np.float32)
        for start in range(0, len(texts), batch_size):
            ids = self.tokenize(texts[start : start + batch_size]).to(self.device)
            with autocast(self.device):
                # No attention mask: SigLIP is trained without one and pools the last position, padding or not.
                pooled = _pooled(self._model.get_text_features(input_ids=ids))
            out[start : start + len(ids)] = pooled.float().cpu().numpy()
        return out

    def _check_tokenizer(self) -> None:
        """Refuse a tokenizer that would feed the tower what it was not trained on."""
        upper, lower = self.tokenize(["A CAT", "a cat"]).tolist()
        pad, bos = self._tokenizer.pad_token_id, self._tokenizer.bos_token_id
        wrong = [
            ("upper case kept", upper != lower),
            ("no padding on the right", pad is not None and lower[-1] != pad),
            ("a bos token in front", bos is not None and bos != pad and lower[0] == bos),
            (f"{len(lower)} tokens", len(lower) != self.identity.text_length),
        ]
        for got, is_wrong in wrong:
            if is_wrong:
                raise InputError(
                    "the tokenizer is not SigLIP's", where=self.identity.model, got=got,
                    wanted=f"lower case, no bos, right padding to {self.identity.text_length}",
                    do="use the checkpoint's own tokenizer files",
                )  # fmt: skip


def _pooled(output: Any) -> Tensor:  # noqa: ANN401
    """The pooled tower output; transformers 5 wraps it, version 4 returned it bare."""
    pooled: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return pooled


def _load(what: str, auto: Any, name: str, revision: str | None, **options: object) -> Any:  # noqa: ANN401
    """One Auto class, with its failures turned into one line."""
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") != 1):
        raise InputError(
            "no checkpoint", where=name, got="no such folder", wanted="a folder or a hub id like owner/name",
            do=f"give --model a folder or a hub id such as {DEFAULT_MODEL}",
        )  # fmt: skip
    try:
        return auto.from_pretrained(name, revision=revision or "main", **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"cannot load {what} of the checkpoint", where=name, got=reason.rstrip("."),
            wanted="a SigLIP2 checkpoint with safetensors weights",
            do="check the folder or the hub id (--model, --revision) and the network",
        ) from error  # fmt: skip


def _check_patches(name: str, config: Any, patches: int) -> None:  # noqa: ANN401
    if config.model_type == "siglip2":
        return
    only = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    if patches != only:
        raise InputError(
            "this checkpoint has a fixed resolution", where=name, got=f"--patches {patches}",
            wanted=f"--patches {only}", do=f"use {DEFAULT_MODEL} for other budgets",
        )  # fmt: skip


def _local_digest(folder: Path) -> str:
    """A hash of all files of a local checkpoint that can change a number."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in {".json", ".safetensors", ".model", ".txt"}:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"
