"""Tokenized examples, and batches of three padded blocks (see the diagram in coconut.py)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanococonut.curriculum import Curriculum
from nanococonut.data.examples import MARK, Example
from nanococonut.runtime.graphs import round_up
from nanococonut.tokenizer import Tokenizer

IGNORE = -100  # cross_entropy's ignore_index, for targets that are not supervised


@dataclass(frozen=True)
class TokenizedExample:
    """The token ids of an example."""

    question: list[int]
    steps: list[list[int]]  # one list per reasoning step
    answer: list[int]  # starts with "### "; without eos
    thought_labels: list[list[int]] = field(default_factory=list)  # labels of each step's thought


Examples = Sequence[TokenizedExample]


def tokenize(
    tokenizer: Tokenizer, example: Example, thought_labels: Sequence[str] | None = None
) -> TokenizedExample:
    """Return the tokens of a rendered example, whose texts include their separators.

    thought_labels: for each step, the one-token words that its thought should name with equal
    probability (None: the step's last token; in compact style, the node it reaches).
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
    """Return (prefix, number of latent steps, tokens forced after them) for one question."""
    if not curriculum.rules.markers:
        return question, n_thoughts, []
    # pauses are ordinary tokens: part of the prefix, no latent steps
    n_pauses = n_thoughts if curriculum.rules.thought_type == "pause" else 0
    prefix = [*question, tokenizer.bot, *[tokenizer.latent] * n_pauses]
    return prefix, n_thoughts - n_pauses, [tokenizer.eot]


def build_sequence(
    curriculum: Curriculum, stage: int, example: TokenizedExample, tokenizer: Tokenizer
) -> tuple[list[int], int, list[int], int]:
    """Return (prefix, number of latent steps, suffix, number of forced tokens in the suffix)."""
    n_dropped, n_thoughts = curriculum.plan(stage, len(example.steps))
    prefix, n, forced = build_prompt(curriculum, example.question, n_thoughts, tokenizer)
    chain = [token for step in example.steps[n_dropped:] for token in step]
    if curriculum.rules.drop_rule == "tokens":  # iCoT drops tokens, not steps
        chain = chain[int(stage * curriculum.icot_tokens) :]
    return prefix, n, [*forced, *chain, *example.answer, tokenizer.eos], len(forced)


def count_labels(
    curriculum: Curriculum, stages: Sequence[int], examples: Examples, tokenizer: Tokenizer
) -> int:
    """Return the number of supervised labels of examples, each at its own stage."""
    pairs = zip(stages, examples, strict=True)
    sequences = (build_sequence(curriculum, stage, x, tokenizer) for stage, x in pairs)
    return sum(len(suffix) - n_forced for _, _, suffix, n_forced in sequences)


def thought_targets(
    curriculum: Curriculum, stage: int, example: TokenizedExample
) -> list[list[int]]:
    """Return the labels of each latent step; [] if it comes after the example's last step."""
    _, n = curriculum.plan(stage, len(example.steps))
    n = 0 if curriculum.rules.thought_type == "pause" else n  # pauses are not latent steps
    labels = [ids for ids in example.thought_labels for _ in range(curriculum.c_thought)][:n]
    return labels + [[]] * (n - len(labels))


def max_length(curriculum: Curriculum, example: TokenizedExample, tokenizer: Tokenizer) -> int:
    """Return the block_size that the example needs: its maximum length over all stages."""
    stages = range(curriculum.max_latent_stage + 2)  # the last one is the final stage
    sequences = [build_sequence(curriculum, stage, example, tokenizer) for stage in stages]
    return max(len(prefix) + n + len(suffix) for prefix, n, suffix, _ in sequences)


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
    n_labels: int  # upper bound of the number of supervised targets

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in vars(self).values() if isinstance(x, Tensor)]

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with fn applied to every tensor."""
        return Batch(*map(fn, self.tensors), self.max_thoughts, self.n_labels)

    def padded(self, B: int, Tp: int, Ts: int, max_thoughts: int, n_labels: int) -> "Batch":
        """Return this batch padded to a larger shape, to capture fewer CUDA graphs."""
        K = self.thought_targets.shape[2]

        def pad(t: Tensor, *shape: int, fill: int = 0) -> Tensor:
            padded = t.new_full((B, *shape), fill)
            padded[tuple(map(slice, t.shape))] = t
            return padded

        # a padding sequence has a prefix of one token, no thoughts and no labels
        return Batch(
            prefix=pad(self.prefix, Tp),
            length=pad(self.length, fill=1),
            n_thoughts=pad(self.n_thoughts),
            n_needed=pad(self.n_needed),
            suffix=pad(self.suffix, Ts),
            targets=pad(self.targets, Ts, fill=IGNORE),
            thought_targets=pad(self.thought_targets, max_thoughts, round_up(K, 8), fill=IGNORE),
            max_thoughts=max_thoughts,
            n_labels=n_labels,
        )


def pad_lists(lists: Sequence[list[int]], fill: int = 0) -> Tensor:
    """Return the lists of token ids as one right-padded tensor."""
    width = max(map(len, lists), default=0)
    padded = [ids + [fill] * (width - len(ids)) for ids in lists]
    return torch.tensor(padded, dtype=torch.int64)


def pad_thought_labels(labels: Sequence[list[list[int]]]) -> Tensor:
    """Return the labels of the thoughts of each sequence as one padded tensor (B, n, K)."""
    n = max(map(len, labels))
    flat = pad_lists([ids for x in labels for ids in x + [[]] * (n - len(x))], IGNORE)  # (B * n, K)
    return flat.view(len(labels), n, flat.shape[-1])


def collate(
    curriculum: Curriculum, stages: Sequence[int], examples: Examples, tokenizer: Tokenizer
) -> Batch:
    """Return the batch of examples, each at its own stage, on the CPU."""
    pairs = list(zip(stages, examples, strict=True))
    sequences = [build_sequence(curriculum, stage, x, tokenizer) for stage, x in pairs]
    prefixes, n_thoughts, suffixes, n_forced = zip(*sequences, strict=True)  # tuples of length B
    # the model does not learn to generate forced tokens
    targets = [[IGNORE] * n + s[n:] for s, n in zip(suffixes, n_forced, strict=True)]
    return Batch(
        prefix=pad_lists(prefixes),
        length=torch.tensor([len(prefix) for prefix in prefixes]),
        n_thoughts=torch.tensor(n_thoughts),
        n_needed=torch.tensor([len(x.steps) * curriculum.c_thought for x in examples]),
        suffix=pad_lists(suffixes),
        targets=pad_lists(targets, IGNORE),
        thought_targets=pad_thought_labels([thought_targets(curriculum, *x) for x in pairs]),
        max_thoughts=max(n_thoughts),
        n_labels=sum(map(len, suffixes)) - sum(n_forced),
    )
