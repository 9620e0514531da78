"""Tokenizers round-trip every dataset and encode each word of a task as one token."""

import json
import re

import pytest
from helpers import gpt2_tokenizer

from nanococonut.data import prosqa
from nanococonut.runtime.errors import UserError
from nanococonut.tokenizer import BOT, EOS, Tokenizer


@pytest.fixture
def gpt2():
    return gpt2_tokenizer()


def texts_of(folder):
    """Yield every text of the released examples: ProsQA and ProntoQA as JSON, GSM8k as lines."""
    for name in ("prosqa_valid.json", "prontoqa_valid.json"):
        for example in json.loads((folder / name).read_text()):
            yield from [example["question"], *example["steps"], example["answer"]]
    yield from (folder / "gsm8k_valid.txt").read_text().splitlines()


UNUSUAL = ["", " ", "\n\n", "Zoë ate 3.5 ☃.", "tab\there", "  two  spaces ", "\x00\x7f", "xlempusx"]


@pytest.mark.parametrize("text", UNUSUAL)
def test_word_level_round_trip_of_any_text(tokenizer, text):
    """Guards against characters that the word pattern drops."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_round_trip_of_released_examples(released, gpt2):
    """Guards against merged or lost white space in real data."""
    words = Tokenizer.words(prosqa.VOCABULARY)
    texts = list(texts_of(released))
    assert len(texts) > 4000
    for text in texts:
        assert words.decode(words.encode(text)) == text
        assert gpt2.decode(gpt2.encode(text)) == text


def test_released_prosqa_words_are_single_tokens(released):
    """Guards against a vocabulary that lacks a word of the released data."""
    words = Tokenizer.words(prosqa.VOCABULARY)
    for example in json.loads((released / "prosqa_valid.json").read_text()):
        for text in [example["question"], *example["steps"], "### " + example["answer"] + "\n"]:
            assert words.unknown_words(text) == []
            assert len(words.encode(text)) == len(re.findall(r" ?(?:[A-Za-z]+|#+|[.?])|\n", text))


def test_generated_examples_round_trip():
    """Guards both formats: every word is a single token."""
    words = Tokenizer.words(prosqa.VOCABULARY)
    for sentences in prosqa.generate(50, 0):
        for example in (sentences, prosqa.compact_example(sentences)):
            for text in [example["question"], *example["steps"], example["answer"]]:
                ids = words.encode(text)
                assert words.decode(ids) == text
                assert len(ids) == len(re.findall(r" ?(?:[A-Za-z]+|[.?])", text))


def test_gpt2_has_three_more_tokens(gpt2):
    """Guards the ids of the released checkpoints."""
    assert gpt2.vocab_size == 50260
    assert (gpt2.eos, gpt2.bot, gpt2.eot, gpt2.latent) == (50256, 50257, 50258, 50259)
    assert gpt2.encode("Every lempus") == [6109, 443, 3149, 385]


def test_special_tokens_in_text_are_refused(tokenizer):
    """Guards against text that ends a sequence or starts thoughts."""
    for name in (EOS, BOT):
        with pytest.raises(UserError, match="special token"):
            tokenizer.encode(f"Tom is {name} a lempus.")


def test_unknown_words_are_listed_once(tokenizer):
    """Guards the warning of sample.py against repeated and missing words."""
    text = "Tom is a zonkus. Every zonkus is a lempus or Zoë."
    assert tokenizer.unknown_words(text) == ["zonkus", "Zo", "ë"]


def test_spec_rebuilds_the_same_tokenizer(tokenizer):
    """Guards checkpoints: token ids must survive a round trip through JSON."""
    loaded = Tokenizer.from_spec(json.loads(json.dumps(tokenizer.spec)))
    text = "Tom is a lempus or a unicorn."
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.vocab_size == tokenizer.vocab_size


def test_vocabulary_takes_single_words_only():
    """Guards against an entry that the word pattern can never match."""
    with pytest.raises(ValueError, match="single words"):
        Tokenizer.words(["two words"])
