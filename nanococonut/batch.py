"""Tokenized examples into the three padded blocks of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nanococonut.curriculum import Curriculum
from nanococonut.data.examples import Example
from nanococonut.tokenizer import Tokenizer

IGNORE = -100  # cross_entropy's ignore_index


@dataclass(frozen=True)
class TokenizedExample:
    """A row in tokens: question, each step, "### " + answer (no eos)."""

    question: list[int]
    steps: list[list[int]]
    answer: list[int]


def tokenize(tokenizer: Tokenizer, row: Example) -> TokenizedExample:
    """A rendered row (its questions and steps end in what parts them from the next, a newline for
    sentences). Parts are tokenised on their own and only then joined, as the released code does."""
    return TokenizedExample(
        tokenizer.encode(row["question"]),
        [tokenizer.encode(step) for step in row["steps"]],
        tokenizer.encode("### " + row["answer"]),
    )


@dataclass(frozen=True)
class Batch:
    """Rows in three blocks (see coconut.py). All int64 and on one device.

    prefix      (B, Tp)  right-padded with 0
    length      (B,)     real tokens of the prefix
    n_thoughts  (B,)
    needed      (B,)     thoughts after which all of the row's steps would be replaced
    suffix      (B, Ts)  right-padded with 0
    targets     (B, Ts)  the suffix where it is supervised, else -100 (<eot>, padding)
    max_thoughts, n_labels: host integers, so that the loop asks no device
    """

    prefix: Tensor
    length: Tensor
    n_thoughts: Tensor
    needed: Tensor
    suffix: Tensor
    targets: Tensor
    max_thoughts: int
    n_labels: int

    @property
    def blocks(self) -> tuple[Tensor, ...]:
        return (
            self.prefix,
            self.length,
            self.n_thoughts,
            self.needed,
            self.suffix,
            self.targets,
        )

    def to(self, device: torch.device) -> "Batch":
        # pinned memory is kept until it was read; MPS may read what is gone already
        later = torch.device(device).type == "cuda"
        moved = (t.to(device, non_blocking=later) for t in self.blocks)
        return Batch(*moved, self.max_thoughts, self.n_labels)

    def pinned(self) -> "Batch":
        """In memory from which a GPU copies by itself."""
        return Batch(*(t.pin_memory() for t in self.blocks), self.max_thoughts, self.n_labels)

    def copy_(self, other: "Batch") -> None:
        """Take over the other's rows, of the same shape, in place."""
        for mine, theirs in zip(self.blocks, other.blocks, strict=True):
            mine.copy_(theirs, non_blocking=True)

    def padded(
        self, rows: int, prefix: int, suffix: int, max_thoughts: int, n_labels: int
    ) -> "Batch":
        """The same rows in a batch of this shape, never a smaller one. Rows that fill it up have
        a prefix of one token and nothing else; n_labels is then no more than a bound."""
        more = rows - len(self.length)

        def wide(t: Tensor, width: int, fill: int) -> Tensor:
            return F.pad(t, (0, width - t.shape[1], 0, more), value=fill)

        return Batch(
            prefix=wide(self.prefix, prefix, 0),
            length=F.pad(self.length, (0, more), value=1),
            n_thoughts=F.pad(self.n_thoughts, (0, more)),
            needed=F.pad(self.needed, (0, more)),
            suffix=wide(self.suffix, suffix, 0),
            targets=wide(self.targets, suffix, IGNORE),
            max_thoughts=max_thoughts,
            n_labels=n_labels,
        )


def build_prompt(
    curriculum: Curriculum, question: list[int], slots: int, tokenizer: Tokenizer
) -> tuple[list[int], int, list[int]]:
    """A question with its slots, as it is asked: (prefix, thoughts to feed back, what opens the
    words). Pauses are tokens like others: they are read with the question and cost no pass."""
    if not curriculum.rules.markers:
        return question, slots, []
    pauses = slots if curriculum.rules.thought_type == "pause" else 0
    prefix = [*question, tokenizer.bot, *[tokenizer.latent] * pauses]
    return prefix, slots - pauses, [tokenizer.eot]


def build_sequence(
    curriculum: Curriculum, stage: int, row: TokenizedExample, tokenizer: Tokenizer
) -> tuple[list[int], int, list[int], int]:
    """One row at one stage -> (prefix, number of thoughts, suffix, labels not supervised first)."""
    drop, slots = curriculum.plan(stage, len(row.steps))
    prefix, thoughts, opening = build_prompt(curriculum, row.question, slots, tokenizer)
    chain = [t for step in row.steps[drop:] for t in step]
    if curriculum.rules.drop_rule == "tokens":
        chain = chain[int(stage * curriculum.icot_tokens) :]
    return prefix, thoughts, [*opening, *chain, *row.answer, tokenizer.eos], len(opening)


def count_labels(
    curriculum: Curriculum,
    stages: Sequence[int],
    rows: Sequence[TokenizedExample],
    tokenizer: Tokenizer,
) -> int:
    """Supervised labels of rows, each at its own stage: what a batch's loss is a mean over."""
    parts = (
        build_sequence(curriculum, stage, row, tokenizer)
        for stage, row in zip(stages, rows, strict=True)
    )
    return sum(len(suffix) - skipped for _, _, suffix, skipped in parts)


def max_length(curriculum: Curriculum, row: TokenizedExample, tokenizer: Tokenizer) -> int:
    """The most positions this row takes at any stage: what block_size has to hold."""
    stages = range(curriculum.max_latent_stage + 2)
    parts = [build_sequence(curriculum, stage, row, tokenizer) for stage in stages]
    return max(len(prefix) + n + len(suffix) for prefix, n, suffix, _ in parts)


def _padded(rows: list[list[int]], fill: int = 0) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def collate(
    curriculum: Curriculum,
    stages: Sequence[int],
    rows: Sequence[TokenizedExample],
    tokenizer: Tokenizer,
) -> Batch:
    """Rows, each at its own stage -> the three blocks, on the CPU."""
    parts = [
        build_sequence(curriculum, stage, row, tokenizer)
        for stage, row in zip(stages, rows, strict=True)
    ]
    prefixes, thoughts, suffixes, skipped = (list(part) for part in zip(*parts, strict=True))
    labels = [[IGNORE] * n + s[n:] for s, n in zip(suffixes, skipped, strict=True)]
    return Batch(
        prefix=_padded(prefixes),
        length=torch.tensor([len(p) for p in prefixes]),
        n_thoughts=torch.tensor(thoughts),
        needed=torch.tensor([len(row.steps) * curriculum.c_thought for row in rows]),
        suffix=_padded(suffixes),
        targets=_padded(labels, IGNORE),
        max_thoughts=max(thoughts),
        n_labels=sum(len(s) - n for s, n in zip(suffixes, skipped, strict=True)),
    )
