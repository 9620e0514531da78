"""Training methods, stages and the schedule; plain integers, no tensors.

An example is a question, written reasoning steps and an answer. At stage s, s * c_thought thoughts
replace the first s steps. The final stage, after max_latent_stage, drops all steps (paper, section
3; released code, dataset.py). To add a method, add an entry to METHODS.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Method:
    """A training method: one entry of METHODS."""

    # which part of the reasoning steps to drop: the first s steps at stage s ("stage"), or the
    # first s * icot_tokens tokens ("tokens")
    drop_rule: Literal["none", "stage", "all", "tokens"]
    # number of thoughts: s * c_thought ("stage"), or as many as in the final stage ("all")
    n_thoughts_rule: Literal["none", "stage", "all"]
    # "hidden" (the last hidden state), "soft" (the mean token embedding), "projected" (a learned
    # map of the hidden state), or "fixed" (a learned embedding): one latent step each;
    # "pause" (a learned token, read with the question): no latent step; "": no thoughts
    thought_type: Literal["hidden", "soft", "projected", "fixed", "pause", ""]
    # "stages" (numbered stages, then the final one), "epochs" (one stage per epoch), or "never"
    # (only the final stage)
    advance_by: Literal["stages", "epochs", "never"]
    markers: bool  # put <bot> and <eot> around the thoughts, even if there are none
    paper: str = ""  # name of its row in the paper's Table 1; "" if it has none

    @property
    def feeds_back(self) -> bool:
        """Return whether a thought is a latent step, not a token of the prefix."""
        return self.thought_type not in ("", "pause")


METHODS: dict[str, Method] = {
    # name: drop_rule, n_thoughts_rule, thought_type, advance_by, markers, paper
    "coconut": Method("stage", "stage", "hidden", "stages", True, "Coconut"),
    "cot": Method("none", "none", "", "never", False, "CoT"),
    "no_cot": Method("all", "none", "", "never", False, "No-CoT"),
    "icot": Method("tokens", "none", "", "epochs", False, "iCoT"),
    "pause": Method("all", "all", "pause", "never", True, "Pause token"),
    "coconut_no_curriculum": Method("all", "all", "hidden", "never", True, "w/o curriculum"),
    "coconut_no_thought": Method("stage", "none", "", "stages", False, "w/o thought"),
    "pause_as_thought": Method("stage", "stage", "pause", "stages", True, "pause as thought"),
    "pause_multipass": Method("stage", "stage", "fixed", "stages", True),
    "soft_thought": Method("stage", "stage", "soft", "stages", True),
    "projected": Method("stage", "stage", "projected", "stages", True),
}


@dataclass(frozen=True)
class Curriculum:
    """The curriculum settings: the paper's, named as in the released code, and three of our own."""

    method: str
    c_thought: int = 1  # thoughts per dropped step
    max_latent_stage: int = 6  # last numbered stage; the final stage is the next one
    pad_latent_to_max: bool = True  # final stage: all examples have the same number of thoughts
    uniform_prob: float = 0.0  # probability that an example samples its own stage
    # ours:
    final_thoughts: int | None = None  # final stage; None: max_latent_stage * c_thought
    advance_at: float = 0.0  # accuracy that ends a stage (0: off)
    icot_tokens: float = 8.0  # tokens that iCoT drops per stage (Deng et al. 2024)

    @classmethod
    def from_config(cls, config: Any) -> "Curriculum":
        """Return the curriculum with the TrainConfig's fields of the same names."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls)})

    @property
    def rules(self) -> Method:
        return METHODS[self.method]

    def n_thoughts(self, stage: int) -> int:
        """Return the number of thoughts at a stage; fewer for short examples (see plan)."""
        if self.rules.n_thoughts_rule == "none":
            return 0
        has_all = self.rules.n_thoughts_rule == "all" or stage > self.max_latent_stage
        if has_all and self.final_thoughts is not None:
            return self.final_thoughts
        return (self.max_latent_stage if has_all else stage) * self.c_thought

    def n_latent_steps(self, n_thoughts: int) -> int:
        """Return the number of latent steps: 0 for pauses, which are tokens of the prefix."""
        return 0 if self.rules.thought_type == "pause" else n_thoughts

    def plan(self, stage: int, n_steps: int) -> tuple[range, int]:
        """Return (indices of the dropped steps, number of thoughts) for a training example.

        n_steps: number of steps of the example
        """
        is_final = stage > self.max_latent_stage
        staged = n_steps if is_final else min(stage, n_steps)
        n_dropped = {"stage": staged, "none": 0, "all": n_steps, "tokens": 0}[self.rules.drop_rule]
        n_thoughts = self.n_thoughts(stage)
        if (is_final or self.rules.n_thoughts_rule == "all") and not self.pad_latent_to_max:
            n_thoughts = min(n_thoughts, n_steps * self.c_thought)
        return range(n_dropped), n_thoughts

    def sample_stages(
        self, stage: int, n_steps: Sequence[int], rng: np.random.Generator
    ) -> list[int]:
        """Return a stage for every example. n_steps: number of steps of each.

        With probability uniform_prob the stage is uniform over 0..n_steps, as in the released code,
        or over 0..stage (with advance_at, or for iCoT). Otherwise it is `stage`.
        """
        own, draw = rng.random((2, len(n_steps)))
        # with advance_at, training may not have reached stage n_steps yet; iCoT's stages count
        # tokens, so the number of steps does not limit them
        to_stage = self.advance_at > 0 or self.rules.advance_by == "epochs"
        limits = np.full(len(n_steps), stage) if to_stage else np.asarray(n_steps)
        sampled = (draw * (limits + 1)).astype(int)
        return np.where(own < self.uniform_prob, sampled, stage).tolist()


@dataclass(frozen=True)
class Stage:
    """One entry of the schedule: train at stage `index` for `epochs` epochs."""

    index: int
    epochs: int


def list_stages(
    curriculum: Curriculum,
    epochs: int,
    epochs_per_stage: int,
    first_stage_epochs: int | None = None,
) -> list[Stage]:
    """Return the stages in order: 0..max_latent_stage, then the final stage until the last epoch.

    first_stage_epochs: epochs of stage 0 (None: epochs_per_stage; 0: skip it).
    """
    final = curriculum.max_latent_stage + 1
    n_first = epochs_per_stage if first_stage_epochs is None else first_stage_epochs
    numbered = [0] * n_first + [s for s in range(1, final) for _ in range(epochs_per_stage)]
    before_final = {"stages": numbered, "epochs": list(range(epochs)), "never": []}
    by_epoch = before_final[curriculum.rules.advance_by] + [final] * epochs  # stage of each epoch
    return [Stage(index, n) for index, n in Counter(by_epoch[:epochs]).items()]


def ignored_options(method: Method) -> set[str]:
    """Return the options of TrainConfig that have no effect on training with this method."""
    no_thoughts = method.n_thoughts_rule == "none"
    ignored = {  # option names: whether the method ignores them
        "first_stage_epochs epochs_per_stage": method.advance_by != "stages",
        "max_latent_stage": method.advance_by != "stages" and no_thoughts,
        "uniform_prob advance_at": method.advance_by == "never",
        "c_thought final_thoughts pad_latent_to_max": no_thoughts,
        "thought_labels": not method.feeds_back,
        "icot_tokens": method.drop_rule != "tokens",
        "soft_temperature soft_top_k": method.thought_type != "soft",
    }
    return {name for names, applies in ignored.items() if applies for name in names.split()}
