"""Captions to token ids as SigLIP was trained: lower case, no bos, eos at the end, right-padded, truncated, no mask.

Tokenizer files that are missing or of another model raise nothing by themselves: every word may become the one unknown
token. So each tokenizer is tried on a few words before it is used.
"""

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...errors import InputError
from .model_source import ModelSource, reason
from .native_output import without_native_output

_log = logging.getLogger(__name__)

# What pads after which eos: the vocabularies of SigLIP 2 (Gemma's) and of SigLIP (T5's).
_TRAINED_PAD = {"<eos>": "<pad>", "</s>": "</s>"}
_WORDS = ("cat", "dog", "person", "a red car", "two people on a beach")
_UPPER, _LOWER = ("A CAT ON A MAT", "a cat on a mat")


class CaptionTokenizer:
    """The tokenizer of a checkpoint, called as the text tower was trained.

    Args:
        tokenizer: The tokenizer of ``transformers``.
        length: Tokens of a caption.
    """

    def __init__(self, tokenizer: Any, length: int) -> None:  # noqa: ANN401
        self._tokenizer, self.length = tokenizer, length
        upper, lower = self._ids([_UPPER, _LOWER]).tolist()
        # A tokenizer that lower-cases knows better than Python what its own training did (a final sigma, say).
        self._lowers = upper == lower

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids, ``(N, length)`` int64."""
        return self._ids(list(texts) if self._lowers else [text.lower() for text in texts])

    def _ids(self, texts: list[str]) -> Tensor:
        # Defaults differ between versions of the classes: some pad on the left, some ask for a mask.
        batch = self._tokenizer(
            texts,
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.length,
            return_attention_mask=False,
            return_tensors="pt",
        )
        ids: Tensor = batch["input_ids"]
        return ids


def load_tokenizer(source: ModelSource, tokenizer: Any, config: Any, length: int) -> CaptionTokenizer:  # noqa: ANN401
    """Try a tokenizer on a few words, and compare it with the text tower.

    Args:
        source: The checkpoint, for messages.
        tokenizer: Its tokenizer.
        config: Its configuration.
        length: Tokens of a caption.

    Raises:
        InputError: It would feed the tower what it was not trained on.
    """
    try:
        with without_native_output():
            captions = CaptionTokenizer(tokenizer, length)
            fault = _find_fault(captions, tokenizer, config)
    except (KeyboardInterrupt, SystemExit):
        raise
    # Whatever its files made of it: parsers in Rust panic outside Exception.
    except BaseException as error:
        raise _refusal(source, reason(error), length) from error
    if fault is not None:
        raise _refusal(source, fault, length)
    return captions


def compare_vocabulary(source: ModelSource, tokenizer: Any, config: Any) -> None:  # noqa: ANN401
    """Warn of a tokenizer that knows much less than the text tower: all its ids are valid, and may all be wrong."""
    n_tokens, n_embeddings = len(tokenizer), config.text_config.vocab_size
    if 2 * n_tokens < n_embeddings:
        _log.warning(
            "the tokenizer of %s knows %s tokens, the text tower %s: are its files the checkpoint's own?",
            source,
            f"{n_tokens:,}",
            f"{n_embeddings:,}",
        )


def _refusal(source: ModelSource, got: str, length: int) -> InputError:
    return source.refusal(
        "the tokenizer is not the checkpoint's",
        got=got,
        wanted=f"distinct words to distinct ids, lower case, no bos, eos, right padding to {length}",
        do="use the checkpoint's own tokenizer files (tokenizer.json, tokenizer_config.json)",
    )


def _find_fault(captions: CaptionTokenizer, tokenizer: Any, config: Any) -> str | None:  # noqa: ANN401
    """The first fault of a tokenizer, in a few words; None where it is the text tower's."""
    text = config.text_config
    if len(tokenizer) > text.vocab_size:
        return f"{len(tokenizer):,} tokens, where the text tower has {text.vocab_size:,} embeddings"
    upper, lower, *words, long = captions([_UPPER, _LOWER, *_WORDS, " ".join(_WORDS * captions.length)]).tolist()
    pad, eos, bos = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id
    wanted_pad = _pad_id(tokenizer, text)
    faults = (
        (len(lower) != captions.length, f"{len(lower)} tokens"),
        (upper != lower, "upper case kept"),
        (len({tuple(ids) for ids in (lower, *words)}) <= len(_WORDS), "the same ids for different words"),
        (tokenizer.unk_token_id in _content(words[0], pad), "no token for a common word"),
        (max(map(max, (lower, long, *words))) >= text.vocab_size, "ids that the text tower has no embedding for"),
        (pad is None or lower[-1] != pad, "no padding on the right"),
        (wanted_pad is not None and pad != wanted_pad, f"padding with id {pad}, where the text tower has {wanted_pad}"),
        (bos is not None and bos != pad and lower[0] == bos, "a bos token in front"),
        (eos is None or long[-1] != eos or eos not in lower, "no eos token at the end"),
        (eos is not None and eos != pad and _content(lower, pad)[-1] != eos, "no eos token before the padding"),
    )
    return next((fault for is_wrong, fault in faults if is_wrong), None)


def _pad_id(tokenizer: Any, text: Any) -> int | None:  # noqa: ANN401
    """The id that the text tower was trained to see after a caption, where anything says so.

    The published configurations leave it out, and what the class then says (1) is wrong for SigLIP 2. So the
    configuration counts where it differs from its class, and otherwise the vocabulary tells which of the two it is.
    """
    stated: int | None = text.pad_token_id
    if stated is not None and stated != type(text)().pad_token_id:
        return stated
    token = _TRAINED_PAD.get(str(tokenizer.eos_token))
    token_id: int | None = None if token is None else tokenizer.convert_tokens_to_ids(token)
    return None if token_id == tokenizer.unk_token_id else token_id


def _content(ids: Sequence[int], pad: int | None) -> list[int]:
    """Ids before the padding; at least one."""
    return [token for token in ids if token != pad] or [-1]
