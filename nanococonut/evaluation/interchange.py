"""Interchange: a question keeps its words and gets the slot contents of another question.

Slots lie between a question and its answer: thoughts, pauses, or a written chain. A question and
its twin differ in one thing, so that the other answer is right. If the answer follows the twin's
slots, they carry it; if half of the answers change, they were destroyed. Answers are forced: left
to itself, a model can write the steps that its thoughts should hold.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanococonut.evaluation.accuracy import in_batches, wilson
from nanococonut.inference.engine import Engine
from nanococonut.inference.steps import Slots

Cells = dict[str, Tensor]  # intervention -> log-probability of each candidate, (N, m)
Figure = dict[str, Any]  # value, lo, hi, n and, of answers, mass: their mean probability

NOUNS = {"thought": "thoughts", "pause": "pauses", "chain": "written chain", "none": "thoughts"}
LABELS = {
    "mean": "averaged over questions",
    "unrelated": "of an unrelated question",
    "half": "the first half of the twin's",
    "same_other": "same question, other options",
    "other_other": "the twin, other options",
    "twin": "of the twin",
}


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


@dataclass
class Content:
    """Slot contents of a batch: keys, values and inputs, or the tokens of a chain."""

    slots: Slots | None = None
    inputs: Tensor | None = None  # (B, n, C)
    tokens: list[list[int]] | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Content":
        return Content(self.slots.map(fn), fn(self.inputs)) if self.slots else self

    def take(self, index: list[int]) -> "Content":
        """Return the content of other questions of the batch."""
        tokens = [self.tokens[i] for i in index] if self.tokens else None
        return replace(self.map(lambda x: x[index]), tokens=tokens)


class Batch:
    """Questions that were read once; their slots can be filled again and again."""

    def __init__(
        self, engine: Engine, questions: Sequence[str], candidates: Sequence[Sequence[str]],
        n: int, extra: int = 0,
    ) -> None:  # fmt: skip
        """extra: thoughts to sweep after the n trained ones."""
        b = self.branch = engine.branch(questions, candidates, n + extra)
        self.n, self.content, self.cells = n, Content(), {"k0": b.answer()}
        if kind_of(engine) == "chain":
            mark, out = engine.tokenizer.encode("###")[0], engine.generate(questions, 0, n)
            chains = [t[: t.index(mark)] if mark in t else t for t in out.tokens]
            self.content = Content(tokens=chains)
            self.cells["own"] = self.answer(self.content)
            return
        for k in range(1, n + extra + 1):
            b.think(1)
            self.cells[f"k{k}"] = b.answer()
            if k == n:
                self.content = Content(b.slots(n), torch.stack(b.inputs, 1))
        if b.thoughts:
            self.cells["thoughts"] = torch.stack(b.thoughts, 1)  # (B, n + extra, C)
        self.cells["own"] = self.cells[f"k{n}"]

    def answer(self, content: Content, only: Sequence[int] | None = None) -> Tensor:
        """Return the answers (B, m) with this content in all slots, or in only some."""
        b, own = self.branch.restart(), self.content
        if content.tokens is not None:
            b.write(content.tokens)
        elif self.use_kv:
            b.put(content.slots if only is None else own.slots)
            if only is not None:
                b.put(content.slots, only)
        else:
            kept = [only is not None and i not in only for i in range(self.n)]
            b.think(self.n, lambda i, fed: (own if kept[i] else content).inputs[:, i])
        return b.answer()

    use_kv = True  # exchange keys and values; else inputs, from which all else is computed

    def exchange(self, twin: "Batch", mean: Content, group: int) -> Cells:
        """Return the answers with the slots of others, see interchange. group: slots of a step."""
        B, is_chain = len(self.branch), self.content.tokens is not None
        cells = {"mean": self.answer(mean.take([0] * B)), "twin": self.answer(twin.content)}
        if B > 1:
            cells["unrelated"] = self.answer(self.content.take([*range(1, B), 0]))
        if is_chain:
            halves = [t[: len(t) // 2] for t in twin.content.tokens]
            cells["half"] = self.answer(Content(tokens=halves))
        for i in range(0, 0 if is_chain else self.n, group):
            cells[f"slot{i // group + 1}"] = self.answer(twin.content, range(i, i + group))
        return cells | {"by_inputs": torch.full((B, 1), float(not self.use_kv))}


def interchange(
    engine: Engine,
    questions: Sequence[str],
    twins: Sequence[str],
    candidates: Sequence[Sequence[str]],
    reworded: Sequence[tuple[str, str] | None] = (),
    groups: Sequence[int] = (),
    full: bool = True,
    extra: int = 0,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Cells:
    """Answer questions with other contents in their slots. Return the log-probabilities (N, m).

    own, k0, k1, ...   as they are, and after 0, 1, ... thoughts; twin_own: the twin as it is
    twin, unrelated    with the slot contents of the twin, or of another question in the group
    mean               with the mean over questions; without any written chain
    slot1, slot2, ...  with one slot of the twin (of a chain: half, its first half)
    same_other, other_other  with those of two reworded questions, for the question and its twin
    thoughts           hidden states that were fed back, (N, n, C)

    candidates  answers of each question: its own, then its twin's, then any others
    groups      a number for each question: only questions of one group are unrelated donors
    full        False: own, k and twin_own only
    """
    kind, config, N, n = kind_of(engine), engine.model.config, len(questions), n_slots(engine)
    groups, out, done = groups or [0] * N, {}, 0
    texts = [engine.render(q) if engine.render else q for q in questions]
    n_tokens = [len(engine.tokenizer.encode(text)) for text in texts]
    order = sorted(range(N), key=lambda i: (groups[i], n_tokens[i]))
    bytes_per_row = 32 * config.n_layer * config.n_embd * (max(n_tokens) + n)
    size = max(8, min(200, 10**9 // bytes_per_row))

    def batch(index: list[int], texts: Sequence[str], extra: int = 0) -> Batch:
        return Batch(engine, [texts[i] for i in index], [candidates[i] for i in index], n, extra)

    mean = Content(tokens=[[]])
    if full and kind in ("thought", "pause"):
        mean = batch(order[:: -(-N // size)], questions).content.map(lambda x: x.mean(0)[None])
    for index in in_batches(order, groups, size):
        row, twin = batch(index, questions, extra), batch(index, twins)
        part = row.cells | {"twin_own": twin.cells["own"]}
        if full and kind != "none":
            row.use_kv = kind == "pause" or torch.equal(row.branch.start, twin.branch.start)
            part |= row.exchange(twin, mean, engine.curriculum.c_thought)
            for k, name in enumerate(("same_other", "other_other")):
                if reworded and kind != "chain" and any(reworded[i] for i in index):
                    texts = {i: (reworded[i] or (questions[i],) * 2)[k] for i in index}
                    has = torch.tensor([reworded[i] is not None for i in index])
                    answers = row.answer(batch(index, texts).content)
                    part[name] = answers.masked_fill(~has.to(answers.device)[:, None], torch.nan)
        for name, value in part.items():
            value = value.float().cpu()
            out.setdefault(name, torch.full((N, *value.shape[1:]), torch.nan))[index] = value
        done += len(index)
        progress(done / N)
    return out


# ---- figures of cells


def figure(hits: Tensor, where: Tensor, log_p: Tensor | None = None) -> Figure | None:
    """Return the fraction of hits (N,) among `where` (N,); None if there are none."""
    if not where.any():
        return None
    result = fraction(hits[where].tolist())
    if log_p is not None:
        result["mass"] = round(log_p[where].exp().sum(1).mean().item(), 3)
    return result


def fraction(hits: Sequence[bool]) -> Figure:
    """Return the fraction of hits and its 95 % interval."""
    p, n = sum(hits) / len(hits), len(hits)
    lo, hi = wilson(p, n)
    return {"value": round(p, 3), "lo": round(lo, 3), "hi": round(hi, 3), "n": n}


def mean_figure(x: Tensor) -> dict[str, Any]:
    """Return the mean of fractions (N,) and its 95 % interval."""
    value, half = x.mean().item(), 1.96 * x.std().item() / len(x) ** 0.5
    lo, hi = max(0.0, value - half), min(1.0, value + half)
    return {"value": round(value, 3), "lo": round(lo, 3), "hi": round(hi, 3), "n": len(x)}


@dataclass
class Figures:
    """Fractions over the cells of an interchange of N questions.

    groups  (N,)       their numbers of steps
    deep    (N,) bool  those of two steps or more: fewer may need no thought (all, if none has two)
    base    (N,) bool  of these, those that are right as their twins are
    asked   (N,) bool  twins that both have two steps or more (None: all)
    """

    cells: Cells
    groups: Tensor
    asked: Tensor | None = None

    def __post_init__(self) -> None:
        own, twin = self.cells["own"].argmax(1), self.cells["twin_own"].argmax(1)
        self.right, self.twin_right = own == 0, twin == 1
        self.every, deep = torch.ones_like(self.right), self.groups >= 2
        self.deep = deep if deep.any() else self.every
        self.asked = self.every if self.asked is None else self.asked
        self.base = self.right & self.twin_right & self.deep
        self.steps = sorted(set(self.groups.tolist()))
        self.chance = 1 / self.cells["own"].shape[1]

    def accuracy(self, name: str, where: Tensor | None = None) -> Figure | None:
        return self._of(name, 0, self.deep if where is None else where)

    def flips(self, name: str, where: Tensor | None = None) -> Figure | None:
        """Return how often the answer is the twin's, where both are right as they are."""
        return self._of(name, 1, self.base if where is None else where)

    def stays(self, name: str) -> Figure | None:
        """Return how often the answer is still the question's own, of the same questions."""
        return self._of(name, 0, self.base)

    def _of(self, name: str, column: int, where: Tensor) -> Figure | None:
        if name not in self.cells:
            return None
        log_p = self.cells[name]
        return figure(log_p.argmax(1) == column, where & ~log_p[:, 0].isnan(), log_p)


def plateau(cells: list[Figure]) -> int:
    """Return after how many thoughts four fifths of the gain in accuracy are there."""
    values = [f["value"] for f in cells]
    gain = max(values) - values[0]
    return next(k for k, v in enumerate(values) if v - values[0] >= 0.8 * gain) if gain > 0.1 else 0


def count(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"


def tables(f: Figures, plain: Figures | None, trained: int) -> dict[str, Any]:
    """Return scale: flips by donor. Of thoughts also accuracy by their number, and flips by slot.

    plain    figures of questions as in training (None: none)
    trained  thoughts in training
    """
    flips = {name: f.flips(name) for name in LABELS}
    labels = LABELS | ({"mean": "none at all"} if "half" in f.cells else {})  # a written chain
    scale = [{"id": name, "label": labels[name]} | x for name, x in flips.items() if x]
    columns = [k for k in range(len(f.cells)) if f"k{k}" in f.cells]
    slots = [j for j in range(1, len(f.cells)) if f"slot{j}" in f.cells]
    if len(columns) < 2:
        return {"scale": scale}
    accuracy, moved = [], []
    if plain is not None:
        cells = [plain.accuracy(f"k{k}", plain.every) for k in columns]
        accuracy.append({"label": "plain", "cells": cells})
    for h in f.steps:
        same = f.groups == h
        cells = [f.accuracy(f"k{k}", same) for k in columns]
        accuracy.append({"label": count(h, "step"), "cells": cells})
        cells = [f.flips(f"slot{j}", f.right & f.twin_right & same) for j in slots]
        moved.append({"label": count(h, "step"), "cells": cells})
    return {
        "scale": scale,
        "accuracy": {"columns": columns, "trained": trained, "rows": accuracy},
        "slots": {"columns": slots, "rows": moved},
    }
