"""Round trips on every data set, single tokens for a task's words, nothing unencodable."""

import json
import os
import re

import pytest

from nanococonut.data import prosqa
from nanococonut.runtime.errors import UserError
from nanococonut.tokenizer import BOT, EOS, Tokenizer


@pytest.fixture
def gpt2():
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set: no GPT-2 vocabulary on this machine")
    return Tokenizer.gpt2()


def texts_of(folder):
    """Every text of the released rows: ProsQA and ProntoQA as JSON, GSM8k as lines."""
    for name in ("prosqa_valid.json", "prontoqa_valid.json"):
        for row in json.loads((folder / name).read_text()):
            yield from [row["question"], *row["steps"], row["answer"]]
    yield from (folder / "gsm8k_valid.txt").read_text().splitlines()


STRANGE = ["", " ", "\n\n", "Zoë ate 3.5 ☃.", "tab\there", "  two  spaces ", "\x00\x7f", "xlempusx"]


@pytest.mark.parametrize("text", STRANGE)
def test_word_level_round_trip_of_anything(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_round_trip_of_the_released_rows(released, gpt2):
    words = Tokenizer.words(prosqa.VOCABULARY)
    texts = list(texts_of(released))
    assert len(texts) > 4000
    for text in texts:
        assert words.decode(words.encode(text)) == text
        assert gpt2.decode(gpt2.encode(text)) == text


def test_released_prosqa_words_are_single_tokens(released):
    words = Tokenizer.words(prosqa.VOCABULARY)
    for row in json.loads((released / "prosqa_valid.json").read_text()):
        for text in [row["question"], *row["steps"], "### " + row["answer"] + "\n"]:
            assert words.unknown_words(text) == []
            assert len(words.encode(text)) == len(re.findall(r" ?(?:[A-Za-z]+|#+|[.?])|\n", text))


def test_generated_rows_round_trip_in_both_renderings():
    words = Tokenizer.words(prosqa.VOCABULARY)
    for row in prosqa.generate(50, 0):
        for r in (row, prosqa.compact_example(row)):
            for text in [r["question"], *r["steps"], r["answer"]]:
                ids = words.encode(text)
                assert words.decode(ids) == text
                assert len(ids) == len(re.findall(r" ?(?:[A-Za-z]+|[.?])", text))


def test_gpt2_is_gpt2_with_three_more(gpt2):
    assert gpt2.vocab_size == 50260
    assert (gpt2.eos, gpt2.bot, gpt2.eot, gpt2.latent) == (50256, 50257, 50258, 50259)
    assert gpt2.encode("Every lempus") == [6109, 443, 3149, 385]


def test_special_tokens_in_text_are_refused(tokenizer):
    for name in (EOS, BOT):
        with pytest.raises(UserError, match="special token"):
            tokenizer.encode(f"Tom is {name} a lempus.")


def test_unknown_words_are_named_once(tokenizer):
    text = "Tom is a zonkus. Every zonkus is a lempus or Zoë."
    assert tokenizer.unknown_words(text) == ["zonkus", "Zo", "ë"]


def test_a_spec_rebuilds_the_same_tokenizer(tokenizer):
    again = Tokenizer.from_spec(json.loads(json.dumps(tokenizer.spec)))
    text = "Tom is a lempus or a unicorn."
    assert again.encode(text) == tokenizer.encode(text)
    assert again.vocab_size == tokenizer.vocab_size


def test_only_words_can_be_in_a_vocabulary():
    with pytest.raises(ValueError, match="single words"):
        Tokenizer.words(["two words"])
