"""Text to tokens and back: always a tiktoken.Encoding.

Either GPT-2's byte-pair encoding with the released code's three special tokens appended, or a
word-level one made from a task's vocabulary: each word is a single token, with its leading space
and without, and 256 byte tokens stand behind it so that nothing is unencodable. The word-level one
needs no download, so it is what models trained from scratch use.
"""

import re
from collections.abc import Iterable
from typing import Any

import tiktoken

from nanococonut.runtime.errors import UserError

EOS, BOT, EOT, LATENT = "<|endoftext|>", "<|start-latent|>", "<|end-latent|>", "<|latent|>"
# a word, number, run of #, one sign, or white space; the space in front belongs to the word
WORD_PATTERN = r" ?[A-Za-z]+| ?[0-9]+| ?#+| ?[^\sA-Za-z0-9]|\s+"


class Tokenizer:
    """A tiktoken.Encoding and the ids of its special tokens.

    encoding   the tiktoken.Encoding
    spec       plain data that `Tokenizer.from_spec` rebuilds it from (kept in the manifest)
    eos, bot, eot, latent   ids of the special tokens
    """

    def __init__(self, encoding: tiktoken.Encoding, spec: dict[str, Any]) -> None:
        self.encoding, self.spec = encoding, spec
        self.vocab_size = encoding.n_vocab
        self.eos, self.bot, self.eot, self.latent = (
            encoding.encode_single_token(name) for name in (EOS, BOT, EOT, LATENT)
        )

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """GPT-2's encoding (50,257) + <bot>, <eot>, <latent>. UserError where it cannot be had."""
        try:
            base = tiktoken.get_encoding("gpt2")
        except Exception as e:  # tiktoken lets through whatever its HTTP client raises
            raise UserError(
                f"the GPT-2 vocabulary is not cached and could not be downloaded "
                f"({type(e).__name__}).\nPut tiktoken's cache folder of a machine with internet "
                "in TIKTOKEN_CACHE_DIR, or train with --tokenizer=words."
            ) from None
        special = {EOS: 50256, BOT: 50257, EOT: 50258, LATENT: 50259}
        encoding = tiktoken.Encoding(
            "gpt2_coconut",
            pat_str=base._pat_str,
            mergeable_ranks=base._mergeable_ranks,
            special_tokens=special,
        )
        return cls(encoding, {"kind": "gpt2"})

    @classmethod
    def words(cls, words: Iterable[str]) -> "Tokenizer":
        """Word-level: bytes 0..255, then each word with and without a leading space, specials."""
        words = sorted(set(words))
        bad = [w for w in words if not re.fullmatch(WORD_PATTERN, w) or w != w.strip()]
        if bad:
            raise ValueError(f"not single words: {bad[:5]}")
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
        """Text -> ids. A special token written out in the text is refused (UserError)."""
        try:
            return self.encoding.encode(text, disallowed_special="all")
        except ValueError:
            found = next(s for s in self.encoding.special_tokens_set if s in text)
            raise UserError(
                f"the text holds the special token {found!r}, which only the program may write.\n"
                "Take it out of the question or the data."
            ) from None

    def decode(self, ids: list[int]) -> str:
        """Ids -> text, special tokens by their names."""
        return self.encoding.decode(ids)

    def unknown_words(self, text: str) -> list[str]:
        """Words of the text that a word-level vocabulary spells in bytes: never trained on."""
        if self.spec["kind"] == "gpt2":
            return []
        pieces = re.findall(WORD_PATTERN, text)
        known = self.encoding._mergeable_ranks
        unknown = [p.strip() for p in pieces if p.strip() and p.encode() not in known]
        return list(dict.fromkeys(unknown))
