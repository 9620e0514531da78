"""Interchange: a question keeps its words and gets the slot contents of another question.

Slots lie between a question and its answer: thoughts, pauses, or a written chain. A question and
its twin differ in one thing, so that the other answer is right. If the answer follows the twin's
slots, they carry it; if half of the answers change, they were destroyed. Answers are forced: left
to itself, a model can write the steps that its thoughts should hold.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanococonut.evaluation.accuracy import in_batches, wilson
from nanococonut.inference.branch import Slots
from nanococonut.inference.engine import Engine

Cells = dict[str, Tensor]  # intervention -> log-probability of each candidate, (N, m)
Content = Slots | list[list[int]]  # of the slots of B questions: thoughts, or written tokens
Figure = dict[str, Any]  # value, lo, hi, n and, of answers, mass: their mean probability
EXTRA = 2  # thoughts to try after as many as in training

NOUNS = {"thought": "thoughts", "pause": "pauses", "chain": "written chain", "none": "thoughts"}


def kind_of(engine: Engine) -> str:
    """Return what lies between question and answer: thought, pause, chain (written) or none."""
    rules = engine.curriculum.rules
    if rules.n_thoughts_rule != "none":
        return "pause" if rules.thought_type in ("pause", "fixed") else "thought"
    return "chain" if rules.drop_rule == "none" else "none"


def n_slots(engine: Engine) -> int:
    """Return the thoughts of a question as trained, or the most tokens of a written chain."""
    is_chain = kind_of(engine) == "chain"
    return engine.config.max_new_tokens if is_chain else engine.manifest["n_thoughts"]


def take(content: Content, index: list[int]) -> Content:
    """Return the slot contents of other questions of the batch."""
    if isinstance(content, Slots):
        return content.map(lambda x: x[index])
    return [content[i] for i in index]


class Batch:
    """Questions that were read once; their slots can be filled again and again.

    content  of their own slots (None: the method has none)
    cells    answers as they are, see interchange
    use_kv   exchange keys and values; else inputs, from which all else is computed
    """

    def __init__(
        self, engine: Engine, questions: Sequence[str], candidates: Sequence[Sequence[str]],
        n: int,
    ) -> None:  # fmt: skip
        self.n, self.content, self.use_kv = n, None, True
        self.branch = b = engine.branch(questions, candidates, n + EXTRA)
        self.cells = {"k0": b.answer()}
        if kind_of(engine) == "chain":
            mark, out = engine.tokenizer.encode("###")[0], engine.generate(questions, 0, n)
            self.content = [t[: t.index(mark)] if mark in t else t for t in out.tokens]
            self.cells["own"] = self.answer(self.content)
            return
        for k in range(1, n + EXTRA + 1) if n else ():
            b.think(1)
            self.cells[f"k{k}"] = b.answer()
            if k == n:
                self.content = b.slots(n)
        if b.thoughts:
            self.cells["thoughts"] = torch.stack(b.thoughts, 1)  # (B, n + EXTRA, C)
        self.cells["own"] = self.cells[f"k{n}"]

    def answer(self, content: Content, only: Sequence[int] | None = None) -> Tensor:
        """Return the answers (B, m) with this content in all slots, or in only some."""
        b, only = self.branch.restart(), range(self.n) if only is None else only
        if not isinstance(content, Slots):
            b.write(content)
        elif self.use_kv:
            b.put(self.content)
            b.put(content, only)
        else:
            b.think(self.n, lambda i, _: (content if i in only else self.content).inputs[i])
        return b.answer()

    def exchange(self, twin: "Batch", mean: Content, c_thought: int) -> Cells:
        """Return the answers with the slots of others, see interchange."""
        B = len(self.branch)
        cells = {"by_inputs": torch.full((B, 1), float(not self.use_kv))}
        contents = {"mean": take(mean, [0] * B), "twin": twin.content}
        if B > 1:
            contents["unrelated"] = take(self.content, [*range(1, B), 0])
        if isinstance(twin.content, Slots):
            for i in range(0, self.n, c_thought):
                step = range(i, i + c_thought)
                cells[f"slot{i // c_thought + 1}"] = self.answer(twin.content, step)
        else:
            contents["half"] = [tokens[: len(tokens) // 2] for tokens in twin.content]
        return cells | {name: self.answer(content) for name, content in contents.items()}


def interchange(
    engine: Engine,
    questions: Sequence[str],
    twins: Sequence[str],
    candidates: Sequence[Sequence[str]],
    donors: Mapping[str, Sequence[str | None]] | None = None,
    groups: Sequence[int] = (),
    progress: Callable[[float], None] = lambda fraction: None,
) -> Cells:
    """Answer questions with other contents in their slots. Return the log-probabilities (N, m).

    own, k0, k1, ...   as they are, and after 0, 1, ... thoughts; twin_own: the twin as it is
    twin, unrelated    with the slot contents of the twin, or of another question in the group
    mean               with the mean over questions; without any written chain
    slot1, slot2, ...  with those of one step of the twin (of a chain: half, its first half)
    thoughts           hidden states that were fed back, (N, n, C)

    candidates  answers of each question: its own, then its twin's, then any others
    donors      name -> further questions whose slots are tried (None: NaN), each under its name
    groups      a number for each question: only questions of one group are unrelated donors
    """
    config, N, n, out = engine.model.config, len(questions), n_slots(engine), {}
    groups, kind = groups or [0] * N, kind_of(engine)
    texts = [engine.render(q) if engine.render else q for q in questions]
    n_tokens = [len(engine.tokenizer.encode(text)) for text in texts]
    order = sorted(range(N), key=lambda i: (groups[i], n_tokens[i]))
    bytes_per_row = 32 * config.n_layer * config.n_embd * (max(n_tokens) + n)
    size = max(8, min(200, 10**9 // bytes_per_row))

    def batch(index: list[int], texts: Sequence[str | None]) -> Batch:
        texts = [texts[i] or questions[i] for i in index]
        return Batch(engine, texts, [candidates[i] for i in index], n)

    mean: Content = [[]]
    if kind in ("thought", "pause"):
        some = batch(order[:: -(-N // size)], questions)
        mean = some.content.map(lambda x: x.mean(0, keepdim=True))
    batches = in_batches(order, groups, size)
    for i_batch, index in enumerate(batches):
        row, twin = batch(index, questions), batch(index, twins)
        part = row.cells | {"twin_own": twin.cells["own"]}
        if kind != "none":
            row.use_kv = kind == "pause" or torch.equal(row.branch.start, twin.branch.start)
            part |= row.exchange(twin, mean, engine.curriculum.c_thought)
        for name, others in (donors or {}).items():
            if known := [j for j, i in enumerate(index) if others[i] is not None]:
                answers = row.answer(batch(index, others).content)
                part[name] = torch.full_like(answers, torch.nan)
                part[name][known] = answers[known]
        for name, value in part.items():
            value = value.float().cpu()
            out.setdefault(name, torch.full((N, *value.shape[1:]), torch.nan))[index] = value
        progress((i_batch + 1) / len(batches))
    return out


# ---- figures of cells


def _rounded(value: float, lo: float, hi: float, n: int) -> Figure:
    return {"value": round(value, 3), "lo": round(lo, 3), "hi": round(hi, 3), "n": n}


def fraction(hits: Tensor | Sequence[bool]) -> Figure | None:
    """Return the fraction of N hits and its 95 % interval; None if N is 0."""
    n = len(hits)
    p = torch.as_tensor(hits).sum().item() / max(1, n)
    return _rounded(p, *wilson(p, n), n) if n else None


def mean_figure(x: Tensor) -> Figure:
    """Return the mean of fractions (N,) and its 95 % interval."""
    value, half = x.mean().item(), 1.96 * x.std().item() / len(x) ** 0.5
    return _rounded(value, max(0.0, value - half), min(1.0, value + half), len(x))


def chosen(log_p: Tensor | None, candidate: int, where: Tensor) -> Figure | None:
    """Return how often a candidate is the best of log_p (N, m) among `where` (N,), NaN left out."""
    if log_p is None:
        return None
    log_p = log_p[where & ~log_p[:, 0].isnan()]
    result = fraction(log_p.argmax(1) == candidate) if len(log_p) else None
    return result and result | {"mass": round(log_p.exp().sum(1).mean().item(), 3)}


def grid(columns: Sequence[Any], rows: Mapping[str, list[Figure | None]]) -> dict[str, Any]:
    """Return a table of figures as page.py draws it. rows: label -> a figure for each column."""
    lines = [{"label": label, "cells": cells} for label, cells in rows.items()]
    return {"columns": list(columns), "rows": lines}


@dataclass
class Figures:
    """Fractions over the cells of an interchange of N questions.

    groups      (N,)       their numbers of steps
    asked       (N,) bool  twins that both have two steps or more (None: all)
    deep        (N,) bool  two steps or more: fewer may need no thought (all, if none has two)
    both_right  (N,) bool  the answers of question and twin are right as they are
    """

    cells: Cells
    groups: Tensor
    asked: Tensor | None = None

    def __post_init__(self) -> None:
        own, twin = self.cells["own"].argmax(1), self.cells["twin_own"].argmax(1)
        self.right, self.twin_right = own == 0, twin == 1
        self.both_right = self.right & self.twin_right
        self.every, deep = torch.ones_like(self.right), self.groups >= 2
        self.deep = deep if deep.any() else self.every
        self.asked = self.every if self.asked is None else self.asked
        self.steps = sorted(set(self.groups.tolist()))
        self.chance = 1 / self.cells["own"].shape[1]

    def accuracy(self, name: str, where: Tensor | None = None) -> Figure | None:
        return chosen(self.cells.get(name), 0, self.deep if where is None else where)

    def flips(self, name: str, where: Tensor | None = None, candidate: int = 1) -> Figure | None:
        """Return how often the answer becomes the twin's, if both are right as they are."""
        where = self.deep if where is None else where
        return chosen(self.cells.get(name), candidate, where & self.both_right)

    def stays(self, name: str) -> Figure | None:
        """Return how often the answer is still the question's own, of the same questions."""
        return self.flips(name, candidate=0)
