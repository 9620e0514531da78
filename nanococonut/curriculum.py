"""The schedule and the token layout: what each method drops, what it inserts, and when.

A row is a question, written reasoning steps and an answer. At stage s the first s steps are gone
and s * c_thought thoughts stand in their place; behind the last numbered stage all steps are gone
(paper, section 3; released code, dataset.py). Methods and stages are data: adding a method is
adding an entry to METHODS.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np


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

    drop_rule: str
    n_thoughts_rule: str
    thought_type: str
    advance_by: str
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
    final stage where they are not max_latent_stage * c_thought; up_to_stage (see sample_stages);
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

    @classmethod
    def from_config(cls, config: Any) -> "Curriculum":
        """Return the curriculum of a TrainConfig: the settings of the same names."""
        names = [f.name for f in fields(cls) if f.name != "up_to_stage"]
        return cls(
            **{name: getattr(config, name) for name in names}, up_to_stage=config.advance_at > 0
        )

    @property
    def rules(self) -> Method:
        return METHODS[self.method]

    def n_thoughts(self, stage: int) -> int:
        """BatchView a model that is at this stage has when it is asked, the same for every row."""
        if self.rules.n_thoughts_rule == "none":
            return 0
        final = self.rules.n_thoughts_rule == "all" or stage > self.max_latent_stage
        if final and self.final_thoughts is not None:
            return self.final_thoughts
        return (self.max_latent_stage if final else stage) * self.c_thought

    def plan(self, stage: int, n_steps: int) -> tuple[int, int]:
        """(steps to drop, slots to insert) in training, for a row with n_steps steps."""
        final = stage > self.max_latent_stage
        staged = n_steps if final else min(stage, n_steps)
        drop = {"stage": staged, "none": 0, "all": n_steps, "tokens": 0}[self.rules.drop_rule]
        slots = self.n_thoughts(stage)
        if (final or self.rules.n_thoughts_rule == "all") and not self.pad_latent_to_max:
            slots = min(slots, n_steps * self.c_thought)
        return drop, slots

    def sample_stages(
        self, stage: int, n_steps: Sequence[int], rng: np.random.Generator
    ) -> list[int]:
        """Each row's own stage: with probability uniform_prob uniform over 0..len(steps), as
        the released code does, or over 0..stage. up_to_stage: no stage is drawn before the
        curriculum has reached it; always so if stages do not count steps (iCoT)."""
        u, v = rng.random((2, len(n_steps)))
        to_stage = self.up_to_stage or self.rules.advance_by == "epochs"
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
    if curriculum.rules.advance_by == "never":
        return [Stage(final, epochs)]
    if curriculum.rules.advance_by == "epochs":
        return [Stage(index, 1) for index in range(epochs)]
    stages, left = [], epochs
    for index in range(final):
        first = index == 0 and first_stage_epochs is not None
        n = min(left, first_stage_epochs if first else epochs_per_stage)
        if n:
            stages.append(Stage(index, n))
        left -= n
    return [*stages, Stage(final, left)] if left else stages


def ignored_options(method: Method) -> set[str]:
    """Settings of the curriculum (TrainConfig's names) that change nothing in how this method
    trains."""
    names = set()
    if method.advance_by != "stages":
        names |= {"first_stage_epochs", "epochs_per_stage"}
        names |= {"max_latent_stage"} if method.n_thoughts_rule == "none" else set()
    if method.advance_by == "never":
        names |= {"uniform_prob", "advance_at"}
    if method.n_thoughts_rule == "none":
        names |= {"c_thought", "final_thoughts", "pad_latent_to_max"}
    if method.drop_rule != "tokens":
        names |= {"icot_tokens"}
    if method.thought_type != "soft":
        names |= {"soft_temperature", "soft_top_k"}
    return names


def extract_answer(text: str) -> str:
    """The answer in generated text: what stands behind the last "#", without commas."""
    return text.split("#")[-1].replace(",", "").strip()
