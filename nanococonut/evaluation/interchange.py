"""Interchange interventions (activation patching) on what lies between question and answer.

Slots are the positions of the thoughts, the pauses or the written chain. An intervention keeps the
tokens of a question and fills its slots with those of another question, the donor. A question and
its twin are a counterfactual pair: they differ in one thing, which makes another answer correct.
If the answer becomes the donor's, the slots carry it; if half of the answers change, replacing the
slots only destroys them. Answers are forced: the model chooses among candidates right after the
slots, since in free generation it can write the steps that the thoughts should hold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from nanococonut.evaluation.accuracy import in_batches, wilson
from nanococonut.inference.branch import Slots
from nanococonut.inference.engine import Engine

Outcomes = dict[str, Tensor]  # intervention -> log-probability of each candidate, (N, m)
Content = Slots | list[list[int]]  # what fills the slots of B questions: states, or chain tokens
# value, its 95 % interval lo to hi, n; of answers also mass, the probability of all candidates
Figure = dict[str, Any]
EXTRA = 2  # thoughts beyond the number in training, to see whether more thoughts help
MEAN_QUESTIONS = 200  # the mean of the slots is over this many questions, evenly spaced

NOUNS = {"thought": "thoughts", "pause": "pauses", "chain": "written chain", "none": "thoughts"}


def kind_of(engine: Engine) -> str:
    """Return what lies between question and answer: thought, pause, chain or none."""
    rules = engine.curriculum.rules
    if rules.n_thoughts_rule != "none":
        if not engine.manifest["n_thoughts"]:  # a run that is still in stage 0
            return "none"
        return "pause" if rules.thought_type in ("pause", "fixed") else "thought"
    return "chain" if rules.drop_rule == "none" else "none"


def n_slots(engine: Engine) -> int:
    """Return the number of thoughts as trained, or the most tokens of a written chain."""
    is_chain = kind_of(engine) == "chain"
    return engine.config.max_new_tokens if is_chain else engine.manifest["n_thoughts"]


def take(content: Content, index: list[int]) -> Content:
    """Return the content of these questions of a batch."""
    if isinstance(content, Slots):
        return content.map(lambda x: x[index])
    return [content[i] for i in index]


class QuestionBatch:
    """Questions that are read once and answered under many interventions.

    content   content of the slots without intervention (None: the method has no slots)
    outcomes  outcomes without intervention: k0, k1, ..., own, thoughts; see interchange
    """

    def __init__(
        self, engine: Engine, questions: Sequence[str], candidates: Sequence[Sequence[str]],
        n: int,
    ) -> None:  # fmt: skip
        self.n, self.content, self.kind = n, None, kind_of(engine)
        self.questions = list(questions)
        self.branch = b = engine.branch(questions, candidates, n + EXTRA)
        self.outcomes = {"k0": b.answer()}
        if self.kind == "chain":
            mark, out = engine.tokenizer.encode("###")[0], engine.generate(questions, 0, n)
            self.content = [t[: t.index(mark)] if mark in t else t for t in out.tokens]
            self.outcomes["own"] = self.answer(self.content)
            return
        if n:
            for k in range(1, n + EXTRA + 1):
                b.think(1)
                self.outcomes[f"k{k}"] = b.answer()
                if k == n:
                    self.content = b.slots(n)
            self.outcomes["thoughts"] = torch.stack(b.thoughts, 1)  # (B, n + EXTRA, C)
        self.outcomes["own"] = self.outcomes[f"k{n}"]

    def needs_inputs_of(self, donor: "QuestionBatch") -> bool:
        """Return whether the donor's inputs must replace the slots instead of its keys and values.

        Keys depend on positions, so they do not fit if the donor has another length. The inputs of
        pauses are all the same, so replacing them would do nothing.
        """
        same_length = torch.equal(self.branch.start, donor.branch.start)
        return self.kind == "thought" and not same_length

    def answer_with(self, donor: "QuestionBatch", only: Sequence[int] | None = None) -> Tensor:
        """Return the answers with the donor's content in the slots `only` (None: in all slots).

        They are NaN for pauses if the donor has another length.
        """
        answers = self.answer(donor.content, only, self.needs_inputs_of(donor))
        if self.kind == "pause":
            answers[self.branch.start != donor.branch.start] = torch.nan
        return answers

    def answer(
        self, content: Content, only: Sequence[int] | None = None, by_inputs: bool = False
    ) -> Tensor:
        """Return the answers (B, m) with this content in the slots `only` (None: in all slots)."""
        b, only = self.branch.restart(), range(self.n) if only is None else only
        if not isinstance(content, Slots):
            b.write(content)
        elif by_inputs:
            b.think(self.n, lambda i, _: (content if i in only else self.content).inputs[i])
        else:
            b.put(self.content)
            b.put(content, only)
        return b.answer()

    def intervene(self, twin: "QuestionBatch", mean: Content, n_per_step: int) -> Outcomes:
        """Return the answers under each intervention, see interchange.

        n_per_step: thoughts per step; the last step may have fewer
        """
        B, start = len(self.branch), self.branch.start.tolist()
        by_inputs = self.needs_inputs_of(twin)

        def following(i: int) -> int:  # the next one with as many tokens; i if there is none
            after = [*range(i + 1, B), *range(i)]
            same = self.questions[i], twin.questions[i]
            fit = (j for j in after if start[j] == start[i] and self.questions[j] not in same)
            return next(fit, i)

        donors = [following(i) for i in range(B)]
        unrelated = self.answer(take(self.content, donors), by_inputs=by_inputs)
        unrelated[[i == j for i, j in enumerate(donors)]] = torch.nan
        outcomes = {
            "by_inputs": torch.full((B, 1), float(by_inputs)),
            "mean": self.answer(take(mean, [0] * B)),
            "unrelated": unrelated,
            "twin": self.answer_with(twin),
        }
        if self.kind == "chain":
            half = [tokens[: len(tokens) // 2] for tokens in twin.content]
            return outcomes | {"half": self.answer(half)}
        steps = [range(self.n)[i:][:n_per_step] for i in range(0, self.n, n_per_step)]
        for i, step in enumerate(steps, 1):
            outcomes[f"slot{i}"] = self.answer_with(twin, step)
        return outcomes


def interchange(
    engine: Engine,
    questions: Sequence[str],
    twins: Sequence[str],
    candidates: Sequence[Sequence[str]],
    donors: Mapping[str, Sequence[str | None]] | None = None,
    groups: Sequence[int] = (),
) -> Outcomes:
    """Answer questions under each intervention. Return name -> log-probabilities (N, m):

    own, k0, k1, ...   no intervention; after 0, 1, ... thoughts
    twin_own           the twin, no intervention
    mean               slots replaced by their mean over questions; of a chain: nothing written
    twin, unrelated    slots replaced by the twin's, by those of another question in the group with
                       as many tokens (NaN if there is none)
    slot1, slot2, ...  only the slots of one step replaced by the twin's
    half               of a chain: replaced by the first half of the twin's
    twin_inputs        only the inputs replaced by the twin's, if a further donor has another length

    The result also has "thoughts", the hidden states fed back (N, n + EXTRA, C), and "by_inputs"
    (N, 1): 1 if the twin replaces the inputs of the slots, 0 if it replaces their keys and values.
    For pauses, an outcome is NaN if the donor has another length, because pauses have no inputs to
    replace.

    candidates  answers of each question: its own, then its twin's, then any others
    donors      name -> a further donor of each question, or None; the outcome has this name and is
                NaN without a donor
    groups      a number per question; an unrelated donor has the same number
    """
    config, N, n, out = engine.model.config, len(questions), n_slots(engine), {}
    groups, kind = groups or [0] * N, kind_of(engine)
    texts = [engine.render(q) if engine.render else q for q in questions]
    n_tokens = [len(engine.tokenizer.encode(text)) for text in texts]
    order = sorted(range(N), key=lambda i: (groups[i], n_tokens[i]))
    bytes_per_question = 32 * config.n_layer * config.n_embd * (max(n_tokens) + n)
    size = max(8, min(200, 10**9 // bytes_per_question))

    def batch(index: list[int], texts: Sequence[str | None]) -> QuestionBatch:
        texts = [texts[i] or questions[i] for i in index]
        return QuestionBatch(engine, texts, [candidates[i] for i in index], n)

    mean: Content = [[]]
    if kind in ("thought", "pause"):
        index = order[:: -(-N // MEAN_QUESTIONS)]
        batches = (index[i : i + size] for i in range(0, len(index), size))
        first, *rest = (batch(part, questions).content for part in batches)
        mean = first.map(lambda *x: torch.cat(x).mean(0, keepdim=True), *rest)
    stderr = Console(stderr=True)
    for index in track(in_batches(order, groups, size), "interchange", console=stderr):
        own, twin = batch(index, questions), batch(index, twins)
        outcomes = own.outcomes | {"twin_own": twin.outcomes["own"]}
        if kind != "none":
            outcomes |= own.intervene(twin, mean, max(1, engine.curriculum.c_thought))
        for name, others in (donors or {}).items():
            if known := [j for j, i in enumerate(index) if others[i] is not None]:
                donor = batch(index, others)
                answers = own.answer_with(donor)
                if own.needs_inputs_of(donor) and "twin_inputs" not in outcomes:
                    outcomes["twin_inputs"] = own.answer(twin.content, by_inputs=True)
                outcomes[name] = torch.full_like(answers, torch.nan)
                outcomes[name][known] = answers[known]
        for name, value in outcomes.items():
            value = value.float().cpu()
            out.setdefault(name, torch.full((N, *value.shape[1:]), torch.nan))[index] = value
    return out


# ---- statistics of the outcomes


def _figure(value: float, lo: float, hi: float, n: int) -> Figure:
    return {"value": round(value, 3), "lo": round(lo, 3), "hi": round(hi, 3), "n": n}


def fraction(hits: Tensor | Sequence[bool]) -> Figure | None:
    """Return the fraction of N hits and its 95 % interval; None if N is 0."""
    n = len(hits)
    p = torch.as_tensor(hits).sum().item() / max(1, n)
    return _figure(p, *wilson(p, n), n) if n else None


def mean_figure(x: Tensor) -> Figure:
    """Return the mean of fractions (N,) and its 95 % interval."""
    value, half = x.mean().item(), 1.96 * x.std().item() / len(x) ** 0.5
    return _figure(value, max(0.0, value - half), min(1.0, value + half), len(x))


def chosen(log_p: Tensor | None, candidate: int, mask: Tensor) -> Figure | None:
    """Return how often a candidate has the highest log_p (N, m) within mask (N,), without NaN."""
    if log_p is None:
        return None
    log_p = log_p[mask & ~log_p[:, 0].isnan()]
    result = fraction(log_p.argmax(1) == candidate)
    return result and result | {"mass": round(log_p.exp().sum(1).mean().item(), 3)}


def grid(columns: Sequence[Any], rows: Mapping[str, list[Figure | None]]) -> dict[str, Any]:
    """Return a table of figures as page.py draws it. rows: label -> a figure for each column."""
    lines = [{"label": label, "cells": cells} for label, cells in rows.items()]
    return {"columns": list(columns), "rows": lines}


@dataclass
class Figures:
    """Statistics of the outcomes of an interchange of N questions.

    groups      (N,)       number of steps
    deep        (N,) bool  question and twin have two steps or more, since one step may need no
                           thought (if there are no such questions: all)
    both_right  (N,) bool  question and twin are answered correctly without intervention
    which       str        what `deep` contains, in words
    """

    outcomes: Outcomes
    groups: Tensor
    deep: Tensor

    def __post_init__(self) -> None:
        own, twin = self.outcomes["own"].argmax(1), self.outcomes["twin_own"].argmax(1)
        self.right, self.twin_right = own == 0, twin == 1
        self.both_right = self.right & self.twin_right
        self.every = torch.ones_like(self.right)
        self.which = "questions of two or more steps" if self.deep.any() else "questions"
        self.deep = self.deep if self.deep.any() else self.every
        self.steps = sorted(set(self.groups.tolist()))
        self.chance = 1 / self.outcomes["own"].shape[1]

    def accuracy(self, name: str, mask: Tensor | None = None) -> Figure | None:
        return chosen(self.outcomes.get(name), 0, self.deep if mask is None else mask)

    def ablated(self, name: str) -> Figure | None:
        """Return the accuracy under an intervention. "fall" is how much lower it is than without
        one, with the interval for paired answers (Agresti and Min, 2005)."""
        if (accuracy := self.accuracy(name)) is None:
            return None
        mask = self.deep & ~self.outcomes[name][:, 0].isnan()
        own, other = (self.outcomes[k][mask].argmax(1) == 0 for k in ("own", name))
        lost, won, n = (own & ~other).sum().item(), (other & ~own).sum().item(), len(own)
        center = (lost - won) / (n + 2)
        half = 1.96 * (lost + won + 1 - (n + 2) * center**2) ** 0.5 / (n + 2)
        return accuracy | {"fall": _figure((lost - won) / n, center - half, center + half, n)}

    def flips(self, name: str, mask: Tensor | None = None, candidate: int = 1) -> Figure | None:
        """Return how often a candidate (1: the twin's answer, 0: own) is chosen in both_right."""
        mask = self.deep if mask is None else mask
        return chosen(self.outcomes.get(name), candidate, mask & self.both_right)
