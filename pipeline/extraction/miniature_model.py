"""A small SigLIP2 NaFlex checkpoint of the miniature's own, in ``save_pretrained`` form, trained from scratch.

Everything downstream loads it as it loads a checkpoint of the hub: config, safetensors, image processor, tokenizer.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from ..core.device import seed_everything
from ..core.files import write_folder
from .images import load_image

WIDTH = 64
PATCH, PATCHES = 16, 64
TEXT_LENGTH = 64
VOCABULARY = 1024
BATCH = 64
STEPS = 550
LEARNING_RATE = 3e-3
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")

Progress = Callable[[int, int, float], None]
Pixels = dict[str, Tensor]


def make_checkpoint(
    data: Path, out: Path, *, seed: int = 42, steps: int = STEPS, device: str = "cpu", progress: Progress | None = None
) -> Path:
    """Train a small SigLIP2 on the train and restval images of a data set in COCO's form.

    The loss is SigLIP's: every image with every caption of the batch, a sigmoid each, with a learned scale and bias
    (Zhai et al. 2023, eq. 1). The number of steps is fixed, so a seed gives one checkpoint on one machine.

    Args:
        data: The data folder, with ``dataset_coco.json``.
        out: The folder to write.
        seed: Seed of initial weights, batches and captions.
        steps: Optimiser steps.
        device: Where to train.
        progress: Called with the steps done, the steps in all and the loss.

    Returns:
        ``out``.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    seed_everything(seed)
    images = json.loads((data / "dataset_coco.json").read_text(encoding="utf-8"))["images"]
    trained = [image for image in images if image["split"] in {"train", "restval"}]
    captions = [[sentence["raw"] for sentence in image["sentences"]][:5] for image in trained]
    tokenizer = make_tokenizer([text for texts in captions for text in texts])
    processor = transformers.Siglip2ImageProcessorPil()
    model = transformers.Siglip2Model(_config(len(tokenizer)))
    with torch.no_grad():
        # SigLIP starts with all pairs thought unlike: with one positive in a batch of N the bias is near -log N.
        model.logit_scale.fill_(math.log(10.0))
        model.logit_bias.fill_(-math.log(BATCH))
    pixels = _pixels(processor, [data / image["filepath"] / image["filename"] for image in trained])
    tokens = torch.stack([_tokenize(tokenizer, texts) for texts in captions])
    _centre(model, pixels, tokens)
    _train(model.to(device), pixels, tokens, steps, seed, progress)
    _save(model, processor, tokenizer, out)
    return out


def make_tokenizer(captions: list[str]) -> transformers.Siglip2Tokenizer:
    """A byte-pair tokenizer in Gemma's form: lower case, no bos, eos kept, right-padded, bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))  # noqa: S106
    lower, mark = normalizers.Lowercase(), normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([lower, mark])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[*SPECIAL, *letters], show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    eos = SPECIAL.index("<eos>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", eos)])
    return transformers.Siglip2Tokenizer(
        tokenizer_object=tokenizer,
        pad_token="<pad>",  # noqa: S106
        eos_token="<eos>",  # noqa: S106
        bos_token="<bos>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        mask_token="<mask>",  # noqa: S106
        padding_side="right",
        model_max_length=TEXT_LENGTH,
        add_bos_token=False,
        add_eos_token=True,
    )


def _config(vocabulary: int) -> transformers.Siglip2Config:
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "attention_dropout": 0.0,
    }
    text = {
        "vocab_size": vocabulary,
        "max_position_embeddings": TEXT_LENGTH,
        "projection_size": WIDTH,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    vision = {"patch_size": PATCH, "num_patches": PATCHES, "num_channels": 3}
    return transformers.Siglip2Config(text_config={**tower, **text}, vision_config={**tower, **vision})


def _pixels(processor: transformers.Siglip2ImageProcessorPil, paths: list[Path]) -> Pixels:
    parts = [
        processor(
            images=[load_image(path)], max_num_patches=PATCHES, return_tensors="pt", input_data_format="channels_last"
        )
        for path in paths
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _tokenize(tokenizer: transformers.Siglip2Tokenizer, texts: list[str]) -> Tensor:
    """Five captions' ids ``(5, 64)``; the first ones again where there are fewer."""
    five = [texts[k % len(texts)].lower() for k in range(5)]
    ids: Tensor = tokenizer(
        five, padding="max_length", padding_side="right", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
    ).input_ids
    return ids


@torch.no_grad()
def _centre(model: transformers.Siglip2Model, pixels: Pixels, tokens: Tensor) -> None:
    """Take the mean out of both towers' outputs through their last biases.

    Fresh towers give nearly one vector for everything; the loss would spend most of a minute on leaving it.
    """
    rows = slice(0, BATCH)
    model.eval()
    image = model.get_image_features(**{name: value[rows] for name, value in pixels.items()}).pooler_output
    model.vision_model.head.mlp.fc2.bias -= image.mean(0)
    text = model.get_text_features(input_ids=tokens[rows, 0]).pooler_output
    model.text_model.head.bias -= text.mean(0)


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """``-sum_ij log sigmoid(z_ij (s x_i . y_j + b)) / N`` with z +1 on the diagonal, else -1 (Zhai et al. 2023, eq. 1).

    Args:
        image: Unit vectors x ``(N, D)``.
        text: Unit vectors y ``(N, D)``.
        scale: Log of s.
        bias: b.
    """
    logits = image @ text.T * scale.exp() + bias
    sign = 2 * torch.eye(len(image), device=image.device) - 1
    return -nn.functional.logsigmoid(sign * logits).sum() / len(image)


def _train(
    model: transformers.Siglip2Model, pixels: Pixels, tokens: Tensor, steps: int, seed: int, progress: Progress | None
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    device = model.logit_scale.device
    model.train()
    for step, (rows, caption) in enumerate(_batches(len(tokens), tokens.shape[1], steps, seed), start=1):
        image = model.get_image_features(**{name: value[rows].to(device) for name, value in pixels.items()})
        text = model.get_text_features(input_ids=tokens[rows, caption].to(device))
        x, y = (nn.functional.normalize(output.pooler_output, dim=-1) for output in (image, text))
        loss = siglip_loss(x, y, model.logit_scale, model.logit_bias)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step, steps, float(loss.detach()))


def _rate(step: int, steps: int) -> float:
    """Linear warm-up over a fifteenth of the steps, then cosine, as a share of the peak."""
    rise = (step + 1) / max(1, steps // 15)
    return min(rise, 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))) + 1e-3


def _batches(n: int, n_captions: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of a batch and which caption of each, epoch after epoch without the odd rest."""
    generator = torch.Generator().manual_seed(seed)
    size = min(BATCH, n)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(n, generator=generator)
        rows, order = order[:size], order[size:]
        yield rows, torch.randint(n_captions, (size,), generator=generator)


def _save(
    model: transformers.Siglip2Model,
    processor: transformers.Siglip2ImageProcessorPil,
    tokenizer: transformers.Siglip2Tokenizer,
    out: Path,
) -> None:
    """All four parts in ``save_pretrained`` form."""

    def save(scratch: Path) -> None:
        for part in (model.cpu().eval(), processor, tokenizer):
            part.save_pretrained(scratch)

    write_folder(out, save)
