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
from torch.nn import functional as F

from nanococonut.data import Row
from nanococonut.tokenizer import Tokenizer

IGNORE = -100  # cross_entropy's ignore_index


@dataclass(frozen=True)
class Method:
    """What a training method does to a row, and when it moves on. A table row, not code.

    drop      what is left out of the written chain: "none", "stage" (the first s steps at stage s),
              "all", or "tokens" (its first s * icot_tokens tokens)
    insert    how many slots stand in its place: "none", "stage" (s * c_thought), or "all" (those of
              the final stage)
    slot      what a slot is: "hidden" (the last hidden state), "soft" (the mean of the token
              embeddings by their probability), "projected" (a learned map of the hidden state):
              fed back, one pass each; or "pause": a learned token, read along with the question
    moves     "stages" (through the numbered ones), "epochs" (a stage is an epoch), or "never" (it
              trains the final stage throughout)
    markers   <bot> and <eot> stand around the slots, also when there are none
    paper     its row in the paper's Table 1 ("": not there)
    """

    drop: str
    insert: str
    slot: str
    moves: str
    markers: bool
    paper: str = ""


METHODS: dict[str, Method] = {
    "coconut": Method("stage", "stage", "hidden", "stages", True, "Coconut"),
    "cot": Method("none", "none", "", "never", False, "CoT"),
    "no_cot": Method("all", "none", "", "never", False, "No-CoT"),
    "icot": Method("tokens", "none", "", "epochs", False, "iCoT"),
    "pause": Method("all", "all", "pause", "never", True, "Pause token"),
    "coconut_no_curriculum": Method("all", "all", "hidden", "never", True, "w/o curriculum"),
    "coconut_no_thought": Method("stage", "none", "", "stages", False, "w/o thought"),
    "pause_as_thought": Method("stage", "stage", "pause", "stages", True, "pause as thought"),
    "soft_thought": Method("stage", "stage", "soft", "stages", True),
    "projected": Method("stage", "stage", "projected", "stages", True),
}


@dataclass(frozen=True)
class Curriculum:
    """The paper's knobs, by the released names. Three are ours: final_thoughts, the slots of the
    final stage where they are not max_latent_stage * c_thought; up_to_stage (see draw_stages);
    icot_tokens, what iCoT removes at each of its stages (Deng et al. 2024: 8; may be a fraction).
    """

    method: str
    c_thought: int = 1
    max_latent_stage: int = 6
    pad_latent_to_max: bool = True
    uniform_prob: float = 0.0
    final_thoughts: int | None = None
    up_to_stage: bool = False
    icot_tokens: float = 8.0

    @property
    def entry(self) -> Method:
        return METHODS[self.method]

    def thoughts_at(self, stage: int) -> int:
        """Slots a model that is at this stage has when it is asked, the same for every row."""
        if self.entry.insert == "none":
            return 0
        final = self.entry.insert == "all" or stage > self.max_latent_stage
        if final and self.final_thoughts is not None:
            return self.final_thoughts
        return (self.max_latent_stage if final else stage) * self.c_thought

    def plan(self, stage: int, n_steps: int) -> tuple[int, int]:
        """(steps to drop, slots to insert) in training, for a row with n_steps steps."""
        final = stage > self.max_latent_stage
        staged = n_steps if final else min(stage, n_steps)
        drop = {"stage": staged, "none": 0, "all": n_steps, "tokens": 0}[self.entry.drop]
        slots = self.thoughts_at(stage)
        if (final or self.entry.insert == "all") and not self.pad_latent_to_max:
            slots = min(slots, n_steps * self.c_thought)
        return drop, slots

    def draw_stages(
        self, stage: int, n_steps: Sequence[int], rng: np.random.Generator
    ) -> list[int]:
        """Each row's own stage: with probability uniform_prob uniform over 0..len(steps), as
        the released code does, or over 0..stage. up_to_stage: no stage is drawn before the
        curriculum has reached it; always so if stages do not count steps (iCoT)."""
        u, v = rng.random((2, len(n_steps)))
        to_stage = self.up_to_stage or self.entry.moves == "epochs"
        tops = [stage] * len(n_steps) if to_stage else n_steps
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
    first_stage_epochs: int | None = None,
) -> list[Stage]:
    """Stages in order: 0 .. max_latent_stage, then all that is left in the final one.

    epochs counts all of training. first_stage_epochs: of stage 0 (None: as the others; 0: it
    is skipped). A method that never moves trains the final stage throughout; one that moves by
    epochs has as many stages.
    """
    final = curriculum.max_latent_stage + 1
    if curriculum.entry.moves == "never":
        return [Stage(final, epochs)]
    if curriculum.entry.moves == "epochs":
        return [Stage(index, 1) for index in range(epochs)]
    stages, left = [], epochs
    for index in range(final):
        first = index == 0 and first_stage_epochs is not None
        n = min(left, first_stage_epochs if first else epochs_per_stage)
        if n:
            stages.append(Stage(index, n))
        left -= n
    return [*stages, Stage(final, left)] if left else stages


def unused(method: Method) -> set[str]:
    """Settings of the curriculum (TrainConfig's names) that change nothing in how this method
    trains."""
    names = set()
    if method.moves != "stages":
        names |= {"first_stage_epochs", "epochs_per_stage"}
        names |= {"max_latent_stage"} if method.insert == "none" else set()
    if method.moves == "never":
        names |= {"uniform_prob", "advance_at"}
    if method.insert == "none":
        names |= {"c_thought", "final_thoughts", "pad_latent_to_max"}
    if method.drop != "tokens":
        names |= {"icot_tokens"}
    if method.slot != "soft":
        names |= {"soft_temperature", "soft_top_k"}
    return names


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


def asking(
    curriculum: Curriculum, question: list[int], slots: int, tokenizer: Tokenizer
) -> tuple[list[int], int, list[int]]:
    """A question with its slots, as it is asked: (prefix, thoughts to feed back, what opens the
    words). Pauses are tokens like others: they are read with the question and cost no pass."""
    if not curriculum.entry.markers:
        return question, slots, []
    pauses = slots if curriculum.entry.slot == "pause" else 0
    prefix = [*question, tokenizer.bot, *[tokenizer.latent] * pauses]
    return prefix, slots - pauses, [tokenizer.eot]


def layout(
    curriculum: Curriculum, stage: int, row: EncodedRow, tokenizer: Tokenizer
) -> tuple[list[int], int, list[int], int]:
    """One row at one stage -> (prefix, number of thoughts, suffix, labels not supervised first)."""
    drop, slots = curriculum.plan(stage, len(row.steps))
    prefix, thoughts, opening = asking(curriculum, row.question, slots, tokenizer)
    chain = [t for step in row.steps[drop:] for t in step]
    if curriculum.entry.drop == "tokens":
        chain = chain[int(stage * curriculum.icot_tokens) :]
    return prefix, thoughts, [*opening, *chain, *row.answer, tokenizer.eos], len(opening)


def n_labels(
    curriculum: Curriculum, stages: Sequence[int], rows: Sequence[EncodedRow], tokenizer: Tokenizer
) -> int:
    """Supervised labels of rows, each at its own stage: what a batch's loss is a mean over."""
    parts = (
        layout(curriculum, stage, row, tokenizer) for stage, row in zip(stages, rows, strict=True)
    )
    return sum(len(suffix) - skipped for _, _, suffix, skipped in parts)


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
        needed=torch.tensor([len(row.steps) * curriculum.c_thought for row in rows]),
        suffix=_padded(suffixes),
        targets=_padded(labels, IGNORE),
        max_thoughts=max(thoughts),
        n_labels=sum(len(s) - n for s, n in zip(suffixes, skipped, strict=True)),
    )
