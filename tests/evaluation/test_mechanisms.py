"""Verdicts on models whose mechanism is known: symbols in place of a transformer's thoughts."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

import nanococonut
from nanococonut.data import prosqa
from nanococonut.data.graph import reachable
from nanococonut.evaluation import insight
from nanococonut.evaluation.pairs import generated_pairs
from nanococonut.inference.branch import Slots
from nanococonut.inference.engine import Engine
from nanococonut.inference.steps import DecodeState

NOTHING = "no thoughts yet"  # content of a question's slots before the first thought
BROKEN = 0.01  # probability of all candidates if the output is destroyed


def number(x) -> float:
    """Return a number for a symbol, the same in every process."""
    return float(zlib.crc32(repr(x).encode()))


class Question:
    def __init__(self, text):
        self.text, self.facts = text, text.rpartition(" Is ")[0]
        self.edges, self.entity, self.options = prosqa.parse_question(text)

    def solve(self, entity=None):
        """Return the option that follows from a name in these facts, the first if none does."""
        steps = reachable(self.edges, entity or self.entity)
        return next((option for option in self.options if option in steps), self.options[0])

    def guess(self):
        return self.options[number(self.text) % 2 < 1]


@dataclass
class Mechanism:
    """What the thoughts hold, how the answer follows from it, and the verdicts of tests 2 to 4."""

    hold: Callable  # Question -> symbol
    answer: (
        Callable  # (Question, symbol, NOTHING, or None for no symbol) -> option, or None: broken
    )
    verdicts: tuple[str, str, str]
    symbols: dict = field(default_factory=dict)  # number -> symbol


def concepts(q):
    return sorted(node for node in reachable(q.edges, q.entity) if node != q.entity)


MECHANISMS = {
    "search": Mechanism(
        concepts,
        lambda q, x: next((o for o in q.options if o in (x or ())), q.guess()),
        ("needed", "carried", "the search, not the answer"),
    ),
    "a copy of the name": Mechanism(
        lambda q: q.entity,
        lambda q, x: q.guess() if x in (None, NOTHING) else q.solve(x),
        ("needed", "carried", "what is asked, perhaps no search"),
    ),
    "the first step": Mechanism(
        lambda q: next(
            child
            for parent, child in q.edges
            if parent == q.entity and q.solve() in reachable(q.edges, child)
        ),
        lambda q, x: q.guess() if x in (None, NOTHING) else q.solve(x),
        ("needed", "carried", "what is asked, perhaps no search"),
    ),
    "number of the option": Mechanism(
        lambda q: q.options.index(q.solve()),
        lambda q, x: q.options[x] if x in (0, 1) else q.guess(),
        ("needed", "carried", "the answer itself"),
    ),
    "the answer's word": Mechanism(
        lambda q: q.solve(),
        lambda q, x: x if x in q.options else q.guess(),
        ("needed", "carried", "the answer itself"),
    ),
    "known before the thoughts": Mechanism(
        lambda q: q.entity,
        lambda q, x: q.solve() if x == NOTHING else q.solve(x) if x else q.guess(),
        ("not needed", "carried", "what is asked, perhaps no search"),
    ),
    "the facts, the same for twins": Mechanism(
        lambda q: q.facts,
        lambda q, x: q.solve() if x == q.facts else q.guess(),
        ("needed", "undecided", "undecided"),
    ),
    "unused": Mechanism(
        lambda q: q.text,
        lambda q, x: q.solve(),
        ("not needed", "ignored", "undecided"),
    ),
    "a gate that a mean breaks": Mechanism(
        lambda q: number(q.text) % 2,
        lambda q, x: None if x in (None, NOTHING) else q.solve(),
        ("not needed", "ignored", "undecided"),  # other thoughts do not break it
    ),
    "a gate that needs any thought": Mechanism(
        lambda q: number(q.text) % 2,
        lambda q, x: q.guess() if x in (None, NOTHING) else q.solve(),
        ("not needed", "ignored", "undecided"),
    ),
}


class SymbolicBranch:
    """A Branch (see inference/branch.py) of such a model. A slot holds the number of a symbol."""

    def __init__(self, mechanism, engine, texts, candidates, n_slots):
        self.mechanism, self.candidates = mechanism, candidates
        self.questions, self.B = list(map(Question, texts)), len(texts)
        self.start = torch.tensor([len(engine.tokenizer.encode(engine.render(t))) for t in texts])
        symbols = list(map(mechanism.hold, self.questions))
        mechanism.symbols |= {number(x): x for x in symbols}
        self.numbers = torch.tensor(list(map(number, symbols)), dtype=torch.float64)
        self.kv = torch.zeros(self.B, n_slots, 1, 2, 1, 1, dtype=torch.float64)
        self.restart()

    def __len__(self):
        return self.B

    def restart(self):
        self.n, self.inputs, self.thoughts = 0, [], []
        return self

    def think(self, n, edit=None):
        self.kv[:, self.n : self.n + n] = self.numbers.view(-1, 1, 1, 1, 1, 1)
        self.n += n
        self.thoughts += [torch.zeros(self.B, 1)] * n

    def slots(self, n):
        zeros = torch.zeros(self.B, 1)
        return Slots(self.kv[:, :n].clone(), [zeros] * n, DecodeState(zeros, zeros, 0))

    def put(self, slots, only=None):
        index = range(slots.kv.shape[1]) if only is None else list(only)
        self.kv[:, index], self.n = slots.kv[:, index], slots.kv.shape[1]

    def answer(self):
        rows = []
        for q, slots, candidates in zip(self.questions, self.kv, self.candidates, strict=True):
            x = self.mechanism.symbols.get(slots[self.n - 1].flatten()[0].item())
            chosen = self.mechanism.answer(q, x if self.n else NOTHING)
            p, chosen = (0.98, chosen) if chosen else (BROKEN, q.guess())
            rows.append([p * (0.95 if c.split()[-1] == chosen else 0.05) for c in candidates])
        return torch.tensor(rows).log()


@pytest.mark.parametrize("name", MECHANISMS)
def test_verdicts_fit_the_mechanism(name, monkeypatch):
    """Guards against verdicts that another mechanism than the one they name can cause."""
    mechanism, engine = MECHANISMS[name], nanococonut.load(kernels="torch", graph="off")

    def branch(self, questions, candidates, n_slots, mark="###", is_answer=True):
        return SymbolicBranch(mechanism, self, questions, candidates, n_slots)

    monkeypatch.setattr(Engine, "branch", branch)
    _, pairs = generated_pairs(engine.config, rows=150, seed=0)
    f = pairs.figures(engine)
    own, mean = f.accuracy("own"), f.ablated("mean")
    others = {"none": f.ablated("k0"), "unrelated": f.ablated("unrelated")}
    twin, unrelated = f.flips("twin"), f.flips("unrelated")
    stays, kept = (f.flips(x, candidate=0) for x in ("twin", "unrelated"))
    other, same, *controls = map(f.flips, "other_other same_other renamed retargeted".split())
    assert own["value"] > 0.99 and twin["n"] >= 100
    findings = (
        insight.judge_needed(own, mean, f.chance, "thoughts", **others),
        insight.judge_carried(twin, unrelated, stays, kept, "thoughts"),
        insight.judge_search(twin, other, same, "thoughts", "", *controls),
    )
    assert tuple(x["verdict"] for x in findings) == mechanism.verdicts
