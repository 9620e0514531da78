"""Tokenized examples, and batches of three padded blocks (see the diagram in coconut.py)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from nanococonut.curriculum import Curriculum
from nanococonut.data.examples import MARK, Example
from nanococonut.runtime.graphs import round_up
from nanococonut.tokenizer import Tokenizer

IGNORE = -100  # cross_entropy's ignore_index, for targets that are not supervised
# a batch for a CUDA graph is padded to multiples of these sizes, to capture fewer graphs
PREFIX, SUFFIX, TARGETS, THOUGHT_LABELS = 64, 16, 512, 8


@dataclass(frozen=True)
class TokenizedExample:
    """The token ids of an example."""

    question: list[int]
    steps: list[list[int]]  # one list per reasoning step
    answer: list[int]  # starts with "### "; without eos
    thought_labels: list[list[int]] = field(default_factory=list)  # labels of each step's thought


@dataclass(frozen=True)
class TokenSequence:
    """An example at one stage, or a padding sequence: one token, no thoughts and no targets."""

    prefix: list[int]
    n_thoughts: int  # latent steps, between prefix and suffix
    suffix: list[int]
    n_forced: int = 0  # first tokens of the suffix, which are not supervised
    n_needed: int = 0  # thoughts needed to replace all steps
    thought_labels: list[list[int]] = field(default_factory=list)  # of each latent step, or []

    def __len__(self) -> int:
        """Return the number of positions."""
        return len(self.prefix) + self.n_thoughts + len(self.suffix)

    @property
    def n_targets(self) -> int:
        return len(self.suffix) - self.n_forced


def tokenize(
    tokenizer: Tokenizer, example: Example, thought_labels: Sequence[str] | None = None
) -> TokenizedExample:
    """Return the tokens of a rendered example, whose texts include their separators.

    thought_labels: for each step, the one-token words that its thought should name with equal
    probability. None: the step's last token, which in compact style is the node it reaches
    """
    # tokenize each text separately, as in the released code, so no token spans a dropped step
    steps = [tokenizer.encode(step) for step in example["steps"]]
    labels = [step[-1:] for step in steps]
    if thought_labels is not None:
        labels = [tokenizer.encode(words) for words in thought_labels]
    question = tokenizer.encode(example["question"])
    return TokenizedExample(question, steps, tokenizer.encode(MARK + example["answer"]), labels)


def build_prompt(
    curriculum: Curriculum, question: list[int], n_thoughts: int, tokenizer: Tokenizer
) -> tuple[list[int], int, list[int]]:
    """Return (prefix, number of latent steps, tokens forced after them) for one question.

    <bot> and any pauses end the prefix; <eot> is forced.
    """
    if not curriculum.rules.markers:
        return question, n_thoughts, []
    n = curriculum.n_latent_steps(n_thoughts)
    pauses = [tokenizer.latent] * (n_thoughts - n)  # all thoughts are pauses, or none
    return [*question, tokenizer.bot, *pauses], n, [tokenizer.eot]


def build_sequence(
    curriculum: Curriculum, stage: int, example: TokenizedExample, tokenizer: Tokenizer
) -> TokenSequence:
    """Return the sequence of an example at a stage."""
    c_thought, n_steps = curriculum.c_thought, len(example.steps)
    dropped, n_thoughts = curriculum.plan(stage, n_steps)
    prefix, n, forced = build_prompt(curriculum, example.question, n_thoughts, tokenizer)
    chain = [token for i, step in enumerate(example.steps) if i not in dropped for token in step]
    if curriculum.rules.drop_rule == "tokens":  # iCoT drops tokens, not steps
        chain = chain[int(stage * curriculum.icot_tokens) :]
    suffix = [*forced, *chain, *example.answer, tokenizer.eos]
    # each dropped step labels its c_thought thoughts; further thoughts have no label
    labels = example.thought_labels[dropped.start : dropped.stop]
    labels = [ids for ids in labels for _ in range(c_thought)] + [[]] * n
    return TokenSequence(prefix, n, suffix, len(forced), n_steps * c_thought, labels[:n])


def max_length(curriculum: Curriculum, example: TokenizedExample, tokenizer: Tokenizer) -> int:
    """Return the block_size that the example needs: its maximum length over all stages."""
    stages = range(curriculum.max_latent_stage + 2)  # the last one is the final stage
    return max(len(build_sequence(curriculum, stage, example, tokenizer)) for stage in stages)


@dataclass(frozen=True)
class Batch:
    """B sequences in three blocks. All tensors are int64 and on one device."""

    prefix: Tensor  # (B, Tp), right-padded with 0
    length: Tensor  # (B,), number of valid tokens in the prefix
    n_thoughts: Tensor  # (B,), number of latent steps
    n_needed: Tensor  # (B,), number of thoughts needed to replace all steps
    suffix: Tensor  # (B, Ts), right-padded with 0
    targets: Tensor  # (B, Ts), the suffix; IGNORE for <eot> and padding
    thought_targets: Tensor  # (B, max_thoughts, K), labels of the states fed back, or IGNORE
    # Python integers, so that the training loop does not sync with the GPU
    max_thoughts: int  # upper bound of n_thoughts
    n_targets: int  # upper bound of the number of supervised targets

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in vars(self).values() if isinstance(x, Tensor)]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """Return the batch with fn applied to every tensor."""
        tensors = {name: fn(x) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)


def pad_lists(lists: Sequence[list[int]], fill: int = 0, width: int = 0) -> Tensor:
    """Return lists of token ids as one right-padded tensor (n, width or the longest list)."""
    width = max(width, max(map(len, lists), default=0))
    padded = [ids + [fill] * (width - len(ids)) for ids in lists]
    return torch.tensor(padded, dtype=torch.int64)


def collate(
    sequences: Sequence[TokenSequence], block_size: int = 0, max_thoughts: int = 0
) -> Batch:
    """Return the batch of the sequences on the CPU.

    block_size    the model's, to pad the batch for a CUDA graph (0: pad as little as possible)
    max_thoughts  lower bound of Batch.max_thoughts, for a graph
    """
    n_thoughts = max(s.n_thoughts for s in sequences)
    n_targets = sum(s.n_targets for s in sequences)
    Tp = max(len(s.prefix) for s in sequences)
    Ts = max(len(s.suffix) for s in sequences)
    K = max((len(ids) for s in sequences for ids in s.thought_labels), default=0)
    if block_size:
        B = 1 << (len(sequences) - 1).bit_length()  # the next power of two
        sequences = [*sequences, *[TokenSequence([0], 0, [])] * (B - len(sequences))]
        n_thoughts = max(n_thoughts, max_thoughts)
        Tp, Ts = min(round_up(Tp, PREFIX), block_size), min(round_up(Ts, SUFFIX), block_size)
        K, n_targets = round_up(K, THOUGHT_LABELS), min(round_up(n_targets, TARGETS), B * Ts)
    targets = [[IGNORE] * s.n_forced + s.suffix[s.n_forced :] for s in sequences]
    labels = [s.thought_labels + [[]] * (n_thoughts - len(s.thought_labels)) for s in sequences]
    thought_targets = pad_lists([ids for thoughts in labels for ids in thoughts], IGNORE, K)
    return Batch(
        prefix=pad_lists([s.prefix for s in sequences], width=Tp),
        length=torch.tensor([len(s.prefix) for s in sequences]),
        n_thoughts=torch.tensor([s.n_thoughts for s in sequences]),
        n_needed=torch.tensor([s.n_needed for s in sequences]),
        suffix=pad_lists([s.suffix for s in sequences], width=Ts),
        targets=pad_lists(targets, IGNORE, Ts),
        thought_targets=thought_targets.view(len(sequences), n_thoughts, K),
        max_thoughts=n_thoughts,
        n_targets=n_targets,
    )
