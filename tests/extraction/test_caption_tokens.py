"""Captions to token ids: as SigLIP was trained, and refused where a tokenizer would give something else."""

import copy
import logging
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoTokenizer

from mmcli import InputError
from mmcli.pipeline.extraction.caption_tokens import CaptionTokenizer, compare_vocabulary, load_tokenizer
from mmcli.pipeline.extraction.model_source import find_model

LENGTH = 64
WORDS = ("▁cat", "▁dog", "▁person", "▁a", "▁red", "▁car", "▁two", "▁people", "▁on", "▁beach", "▁mat")


@pytest.fixture(scope="module")
def parts(miniature):
    """Where a checkpoint is, its tokenizer and its configuration; copies may be spoilt."""
    folder = miniature.model
    return find_model(str(folder)), AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)


def siglip_1(*, pad: str = "</s>", eos: bool = True) -> tuple[object, object]:
    """A tokenizer in the form of SigLIP 1 (unigrams as T5 has them, padded with its eos), and a configuration."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -1.0) for word in WORDS)]
    inner = Tokenizer(models.Unigram(pieces, unk_id=2))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    if eos:
        inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=pad, eos_token="</s>", unk_token="<unk>"
    )
    return tokenizer, transformers.SiglipConfig(text_config={"vocab_size": len(pieces)})


def test_tokens_are_lower_case_without_bos_right_padded(parts) -> None:
    source, tokenizer, config = parts
    captions = load_tokenizer(source, tokenizer, config, LENGTH)
    upper, lower, long = captions(["A DOG", "a dog", "dog " * 100]).tolist()
    assert upper == lower
    assert lower[0] not in (tokenizer.bos_token_id, tokenizer.pad_token_id)
    real = [token for token in lower if token != tokenizer.pad_token_id]
    assert real[-1] == tokenizer.eos_token_id
    assert lower == real + [tokenizer.pad_token_id] * (LENGTH - len(real))
    assert len(long) == LENGTH
    assert tokenizer.pad_token_id not in long


def test_defaults_of_the_tokenizer_class_do_not_leak(parts) -> None:
    """Older and newer classes pad on the left by default and ask for a mask."""
    tokenizer = copy.deepcopy(parts[1])
    before = CaptionTokenizer(tokenizer, LENGTH)(["A dog"]).tolist()
    tokenizer.padding_side = "left"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    assert CaptionTokenizer(tokenizer, LENGTH)(["A dog"]).tolist() == before


def test_a_tokenizer_that_keeps_case_gets_lower_case(parts) -> None:
    """Gemma's own class forgets it; the tower never saw an upper-case letter."""
    tokenizer = copy.deepcopy(parts[1])
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    assert tokenizer("A Dog").input_ids != tokenizer("a dog").input_ids
    captions = CaptionTokenizer(tokenizer, LENGTH)
    assert captions(["A Dog"]).tolist() == captions(["a dog"]).tolist()


def test_a_tokenizer_that_lower_cases_is_left_to_it(parts) -> None:
    """Python writes the last sigma of a word otherwise than the tokenizers that the towers were trained with."""
    tokenizer = parts[1]
    captions = CaptionTokenizer(tokenizer, LENGTH)
    plain = tokenizer("ΣΟΦΟΣ", padding="max_length", padding_side="right", max_length=LENGTH).input_ids
    assert captions(["ΣΟΦΟΣ"]).tolist() == [plain]
    assert captions(["ΣΟΦΟΣ".lower()]).tolist() != [plain]


class LeftPadded:
    """A tokenizer that pads on the left, whatever it is asked."""

    def __init__(self, inner) -> None:
        self._inner = inner

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def __len__(self) -> int:
        return len(self._inner)

    def __call__(self, texts, **options):
        return self._inner(texts, **{**options, "padding_side": "left"})


def _without_eos(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])


def _with_bos(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )


def _padded_with(token: str):
    def change(tokenizer):
        tokenizer.pad_token = token

    return change


FAULTS = {
    "left": (LeftPadded, "no padding on the right"),
    "no eos": (_without_eos, "no eos token"),
    "bos": (_with_bos, "a bos token in front"),
    "another pad": (_padded_with("<unk>"), "padding with id 3, where the text tower has 0"),
    "eos as pad": (_padded_with("<eos>"), "padding with id 1, where the text tower has 0"),
    "no pad": (_padded_with(None), "pad"),
    "more tokens": (lambda t: t.add_tokens(["zebra crossing"]) and None, "embeddings"),
    "no words": (lambda _: transformers.Siglip2Tokenizer(), "the same ids for different words"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_tokenizer_of_another_kind_is_refused(parts, name: str) -> None:
    change, message = FAULTS[name]
    source, tokenizer, config = parts
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer = change(tokenizer) or tokenizer
    with pytest.raises(InputError, match=f"the tokenizer is not the checkpoint's.*{message}") as caught:
        load_tokenizer(source, tokenizer, config, LENGTH)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_raises_anything_is_refused(parts) -> None:
    """Those in Rust panic with an exception that is no Exception."""

    class Panic(BaseException):
        pass

    class Broken(LeftPadded):
        def __call__(self, texts, **options):
            raise Panic("called `Option::unwrap()` on a `None` value")

    with pytest.raises(InputError, match="unwrap"):
        load_tokenizer(parts[0], Broken(parts[1]), parts[2], LENGTH)


def test_siglip_1_pads_with_its_eos(parts) -> None:
    tokenizer, config = siglip_1()
    ids = load_tokenizer(parts[0], tokenizer, config, LENGTH)(["a DOG"]).tolist()[0]
    assert ids == [6, 4] + [1] * (LENGTH - 2)
    for changed, message in (({"pad": "<pad>"}, "padding with id 0"), ({"eos": False}, "no eos token")):
        with pytest.raises(InputError, match=message):
            load_tokenizer(parts[0], siglip_1(**changed)[0], config, LENGTH)


def test_the_tokenizer_of_real_size_passes(realdata: Path, parts) -> None:
    """With the configuration as published: it says nothing of the pad token, and its class is wrong about it."""
    tokenizer = AutoTokenizer.from_pretrained(realdata / "siglip2_tokenizer")
    config = transformers.Siglip2Config(text_config={"vocab_size": len(tokenizer)})
    assert config.text_config.pad_token_id != tokenizer.pad_token_id
    captions = load_tokenizer(parts[0], tokenizer, config, LENGTH)
    assert captions(["Two DOGS on a beach"]).tolist() == captions(["two dogs on a beach"]).tolist()
    tokenizer.pad_token = "<unk>"
    with pytest.raises(InputError, match="padding with id 3, where the text tower has 0"):
        load_tokenizer(parts[0], tokenizer, config, LENGTH)


def test_a_tower_of_a_much_larger_vocabulary_is_warned_of(parts, caplog: pytest.LogCaptureFixture) -> None:
    source, tokenizer, config = parts
    with caplog.at_level(logging.WARNING):
        compare_vocabulary(source, tokenizer, config)
        assert not caplog.records
        large = copy.deepcopy(config)
        large.text_config.vocab_size = 256_000
        compare_vocabulary(source, tokenizer, large)
    assert "256,000" in caplog.text
