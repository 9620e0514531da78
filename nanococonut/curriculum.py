"""The schedule and the token layout: what each method drops, what it inserts, and when.

A row is a question, written reasoning steps and an answer. At stage s the first s steps are gone
and s * c_thought thoughts stand in their place; behind the last numbered stage all steps are gone
(paper, section 3; released code, dataset.py). Methods and stages are data: adding a method is
adding an entry to METHODS.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanococonut.data import Row
from nanococonut.tokenizer import Tokenizer

IGNORE = -100  # cross_entropy's ignore_index


@dataclass(frozen=True)
class Method:
    """What a training method does to a row.

    staged    it moves through the curriculum's stages (else it trains one stage throughout)
    drop      steps left out: "stage" (as the stage says), "none" or "all"
    insert    thoughts put in: "stage" or "none"
    markers   <bot> and <eot> stand around the thoughts, also when there are none
    """

    staged: bool
    drop: str
    insert: str
    markers: bool


METHODS: dict[str, Method] = {
    "coconut": Method(staged=True, drop="stage", insert="stage", markers=True),
    "cot": Method(staged=False, drop="none", insert="none", markers=False),
    "no_cot": Method(staged=False, drop="all", insert="none", markers=False),
}


@dataclass(frozen=True)
class Curriculum:
    """The paper's knobs, by the released names. Two are ours: final_thoughts, how many thoughts the
    final stage has where that is not max_latent_stage * c_thought; uniform_to (see draw_stages)."""

    method: str
    c_thought: int = 1
    max_latent_stage: int = 6
    pad_latent_to_max: bool = True
    uniform_prob: float = 0.0
    final_thoughts: int | None = None
    uniform_to: str = "steps"

    def thoughts_at(self, stage: int) -> int:
        """Thoughts a model that is at this stage has when it is asked, the same for every row."""
        if METHODS[self.method].insert == "none":
            return 0
        if stage > self.max_latent_stage and self.final_thoughts is not None:
            return self.final_thoughts
        return min(stage, self.max_latent_stage) * self.c_thought

    def plan(self, stage: int, n_steps: int) -> tuple[int, int]:
        """(steps to drop, thoughts to insert) in training, for a row with n_steps steps."""
        final = stage > self.max_latent_stage
        dropped = n_steps if final else min(stage, n_steps)
        drop = {"stage": dropped, "none": 0, "all": n_steps}[METHODS[self.method].drop]
        thoughts = self.thoughts_at(stage)
        if final and not self.pad_latent_to_max:
            thoughts = min(thoughts, n_steps * self.c_thought)
        return drop, thoughts

    def draw_stages(
        self, stage: int, n_steps: Sequence[int], rng: np.random.Generator
    ) -> list[int]:
        """Each row's own stage: with probability uniform_prob uniform over 0..len(steps), or over
        0..stage (uniform_to="stage": nothing the curriculum has not come to)."""
        u, v = rng.random((2, len(n_steps)))
        tops = n_steps if self.uniform_to == "steps" else [stage] * len(n_steps)
        return [
            int(b * (top + 1)) if a < self.uniform_prob else stage
            for top, a, b in zip(tops, u, v, strict=True)
        ]


@dataclass(frozen=True)
class Stage:
    """One entry of the schedule: train at `index` for `epochs` epochs."""

    index: int
    epochs: int


def schedule(
    curriculum: Curriculum,
    epochs: int,
    epochs_per_stage: int,
    first_stage_epochs: int = 0,
    start_stage: int = 0,
) -> list[Stage]:
    """Stages in order: start_stage .. max_latent_stage, then all that is left in the final one.

    epochs counts all of training. first_stage_epochs: of the first stage, where it differs (0: as
    the others). A method that is not staged trains its one stage, the final one, throughout.
    """
    final = curriculum.max_latent_stage + 1
    if not METHODS[curriculum.method].staged:
        return [Stage(final, epochs)]
    stages, left = [], epochs
    for index in range(start_stage, final):
        first = index == start_stage and first_stage_epochs
        n = min(left, first_stage_epochs if first else epochs_per_stage)
        if n:
            stages.append(Stage(index, n))
        left -= n
    return [*stages, Stage(final, left)] if left else stages


@dataclass(frozen=True)
class EncodedRow:
    """A row in tokens: question, each step, "### " + answer (no eos)."""

    question: list[int]
    steps: list[list[int]]
    answer: list[int]


def encode_row(tokenizer: Tokenizer, row: Row) -> EncodedRow:
    """A rendered row (its questions and steps end in what parts them from the next, a newline for
    sentences). Parts are tokenised on their own and only then joined, as the released code does."""
    return EncodedRow(
        tokenizer.encode(row["question"]),
        [tokenizer.encode(step) for step in row["steps"]],
        tokenizer.encode("### " + row["answer"]),
    )


def answer_of(text: str) -> str:
    """The answer in generated text: what stands behind the last "#", without commas."""
    return text.split("#")[-1].replace(",", "").strip()


@dataclass(frozen=True)
class Batch:
    """Rows in three blocks (see coconut.py). All int64 and on one device.

    prefix      (B, Tp)  right-padded with 0
    length      (B,)     real tokens of the prefix
    n_thoughts  (B,)
    suffix      (B, Ts)  right-padded with 0
    targets     (B, Ts)  the suffix where it is supervised, else -100 (<eot>, padding)
    max_thoughts, n_labels: host integers, so that the loop asks no device
    """

    prefix: Tensor
    length: Tensor
    n_thoughts: Tensor
    suffix: Tensor
    targets: Tensor
    max_thoughts: int
    n_labels: int

    def to(self, device: torch.device) -> "Batch":
        moved = (
            t.to(device, non_blocking=True)
            for t in (self.prefix, self.length, self.n_thoughts, self.suffix, self.targets)
        )
        return Batch(*moved, self.max_thoughts, self.n_labels)


def layout(
    curriculum: Curriculum, stage: int, row: EncodedRow, tokenizer: Tokenizer
) -> tuple[list[int], int, list[int], int]:
    """One row at one stage -> (prefix, number of thoughts, suffix, labels not supervised first)."""
    drop, thoughts = curriculum.plan(stage, len(row.steps))
    words = [t for step in row.steps[drop:] for t in step] + row.answer + [tokenizer.eos]
    if METHODS[curriculum.method].markers:
        return row.question + [tokenizer.bot], thoughts, [tokenizer.eot, *words], 1
    return row.question, thoughts, words, 0


def longest(curriculum: Curriculum, row: EncodedRow, tokenizer: Tokenizer) -> int:
    """The most positions this row takes at any stage: what block_size has to hold."""
    stages = range(curriculum.max_latent_stage + 2)
    parts = [layout(curriculum, stage, row, tokenizer) for stage in stages]
    return max(len(prefix) + n + len(suffix) for prefix, n, suffix, _ in parts)


def _padded(rows: list[list[int]], fill: int = 0) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def collate(
    curriculum: Curriculum, stages: Sequence[int], rows: Sequence[EncodedRow], tokenizer: Tokenizer
) -> Batch:
    """Rows, each at its own stage -> the three blocks, on the CPU."""
    parts = [
        layout(curriculum, stage, row, tokenizer) for stage, row in zip(stages, rows, strict=True)
    ]
    prefixes, thoughts, suffixes, skipped = (list(part) for part in zip(*parts, strict=True))
    labels = [[IGNORE] * n + s[n:] for s, n in zip(suffixes, skipped, strict=True)]
    return Batch(
        prefix=_padded(prefixes),
        length=torch.tensor([len(p) for p in prefixes]),
        n_thoughts=torch.tensor(thoughts),
        suffix=_padded(suffixes),
        targets=_padded(labels, IGNORE),
        max_thoughts=max(thoughts),
        n_labels=sum(len(s) - n for s, n in zip(suffixes, skipped, strict=True)),
    )
