"""The two tokenizers, both a tiktoken.Encoding.

"gpt2" is GPT-2's byte-pair encoding with the released code's three special tokens appended. "words"
is built from a task's vocabulary without a download, for small models. Each word is one token with
a leading space and one without; 256 byte tokens encode everything else.
"""

import re
from collections.abc import Iterable
from typing import Any

import tiktoken

from nanococonut.runtime.errors import UserError

EOS, BOT, EOT, LATENT = "<|endoftext|>", "<|start-latent|>", "<|end-latent|>", "<|latent|>"
# a word, number, run of # or other single character, each with its leading space; or white space
WORD_PATTERN = r" ?[A-Za-z]+| ?[0-9]+| ?#+| ?[^\sA-Za-z0-9]|\s+"


class Tokenizer:
    """A tiktoken.Encoding and the ids of its special tokens: eos, bot, eot, latent.

    spec  JSON data for `Tokenizer.from_spec`, saved in the manifest of a checkpoint
    """

    def __init__(self, encoding: tiktoken.Encoding, spec: dict[str, Any]) -> None:
        self.encoding, self.spec = encoding, spec
        self.vocab_size = encoding.n_vocab
        self.eos, self.bot, self.eot, self.latent = (
            encoding.encode_single_token(name) for name in (EOS, BOT, EOT, LATENT)
        )

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """Return GPT-2's encoding (50,257 tokens) with <bot>, <eot> and <latent> appended.

        Raise UserError if the vocabulary is neither cached nor downloadable.
        """
        try:
            base = tiktoken.get_encoding("gpt2")
        except Exception as e:  # tiktoken does not wrap the errors of its HTTP client
            raise UserError(
                f"the GPT-2 vocabulary is not cached and the download failed ({type(e).__name__})."
                "\nSet TIKTOKEN_CACHE_DIR to a copy of tiktoken's cache, or use --tokenizer=words."
            ) from None
        encoding = tiktoken.Encoding(
            "gpt2_coconut",
            pat_str=base._pat_str,
            mergeable_ranks=base._mergeable_ranks,
            special_tokens={EOS: 50256, BOT: 50257, EOT: 50258, LATENT: 50259},
        )
        return cls(encoding, {"kind": "gpt2"})

    @classmethod
    def words(cls, words: Iterable[str]) -> "Tokenizer":
        """Return a word-level tokenizer: 256 bytes, two tokens per word, the special tokens."""
        words = sorted(set(words))
        bad = [w for w in words if not re.fullmatch(WORD_PATTERN, w) or w != w.strip()]
        if bad:
            raise ValueError(f"vocabulary: expected single words, got {bad[:5]}")
        ranks = {bytes([b]): b for b in range(256)}
        for word in words:
            for token in (word.encode(), b" " + word.encode()):
                ranks.setdefault(token, len(ranks))
        special = {name: len(ranks) + i for i, name in enumerate((EOS, BOT, EOT, LATENT))}
        encoding = tiktoken.Encoding(
            "words", pat_str=WORD_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        return cls(encoding, {"kind": "words", "words": words})

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> "Tokenizer":
        return cls.gpt2() if spec["kind"] == "gpt2" else cls.words(spec["words"])

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text. Raise UserError if it contains a special token."""
        try:
            return self.encoding.encode(text, disallowed_special="all")
        except ValueError:
            name = next(s for s in self.encoding.special_tokens_set if s in text)
            raise UserError(
                f"the text contains the special token {name!r}, which is reserved.\n"
                "Remove it from the question or the data."
            ) from None

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids. Special tokens appear by name."""
        return self.encoding.decode(ids)

    def unknown_words(self, text: str) -> list[str]:
        """Return the words that a word-level vocabulary lacks and encodes as bytes."""
        if self.spec["kind"] == "gpt2":
            return []
        known = self.encoding._mergeable_ranks
        pieces = re.findall(WORD_PATTERN, text)
        unknown = [p.strip() for p in pieces if p.strip() and p.encode() not in known]
        return list(dict.fromkeys(unknown))  # without duplicates, in order
