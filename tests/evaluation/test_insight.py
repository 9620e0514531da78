"""Interventions on thoughts change what they should and no other bit; verdicts follow rules."""

import pytest
import torch
from helpers import random_gpt

from nanococonut.curriculum import Curriculum
from nanococonut.data import prontoqa, prosqa
from nanococonut.data.tasks import TASKS
from nanococonut.inference.engine import Engine
from nanococonut.runtime.errors import UserError

QUESTIONS = ["Tom is a lempus. Is Tom a lempus or wumpus?", "Every Tom is a wumpus. Is a?"]
CANDIDATES = [["lempus", "wumpus"], ["zonk", "Tom"]]  # zonk is several tokens


def random_engine(tokenizer, method="coconut", **shape) -> Engine:
    model = random_gpt(
        3, smear=True, dtype=torch.float32, vocab_size=tokenizer.vocab_size, block_size=96, **shape
    )
    return Engine(model, tokenizer, Curriculum(method))


# ---- the engine


@pytest.mark.parametrize("thought", ["hidden", "soft", "projected", "fixed"])
def test_an_edit_that_returns_its_input_is_exact(tokenizer, thought):
    """The plain steps of an edit could differ from those without one."""
    engine = random_engine(tokenizer, thought=thought)
    plain = engine.generate(QUESTIONS, 3, 9)
    edited = engine.generate(QUESTIONS, 3, 9, edit=lambda i, fed: fed)
    assert plain.tokens == edited.tokens and torch.equal(plain.thoughts, edited.thoughts)
    torch.testing.assert_close(plain.inputs, edited.inputs)
    assert torch.equal(plain.inputs, plain.thoughts) == (thought == "hidden")
    same = engine.choose(QUESTIONS, CANDIDATES, 3, edit=lambda i, fed: fed)
    assert torch.equal(same, engine.choose(QUESTIONS, CANDIDATES, 3))


def test_an_edit_is_fed_back(tokenizer):
    """An edit could come late, keep the engine's memory, or be left out of the record."""
    engine = random_engine(tokenizer)
    seen = []

    def edit(i, fed):
        seen.append((i, fed))
        return fed.flip(0) if i == 1 else fed

    plain = engine.generate(QUESTIONS, 3, 9)
    out = engine.generate(QUESTIONS, 3, 9, edit=edit)
    assert [i for i, _ in seen] == [0, 1, 2]
    assert torch.equal(seen[0][1], plain.inputs[:, 0])  # not overwritten by later steps
    assert torch.equal(out.inputs[:, 1], plain.inputs[:, 1].flip(0))
    assert not torch.allclose(out.inputs[:, 2], plain.inputs[:, 2])
    clamped = engine.generate(QUESTIONS, 3, 9, edit=lambda i, fed: out.inputs[:, i])
    assert clamped.tokens == out.tokens


def test_bad_edits_are_refused(tokenizer):
    """A wrong shape could be broadcast, NaN would spread, pauses would ignore the edit."""
    engine = random_engine(tokenizer)
    for bad in (lambda fed: fed[0], lambda fed: fed.double(), lambda fed: fed / 0, lambda fed: 3):
        with pytest.raises(UserError, match=r"edit\(1, fed\) returned"):
            engine.generate(QUESTIONS, 3, edit=lambda i, fed, bad=bad: bad(fed) if i == 1 else fed)
    with pytest.raises(UserError, match="no thoughts"):
        engine.choose(QUESTIONS, CANDIDATES, 0, edit=lambda i, fed: fed)
    with pytest.raises(UserError, match="pauses are tokens"):
        random_engine(tokenizer, "pause").generate(QUESTIONS, 3, edit=lambda i, fed: fed)


@pytest.mark.parametrize("method", ["coconut", "pause", "cot"])
@torch.no_grad()
def test_choice_equals_a_naive_loop(tokenizer, method):
    """Candidates of several tokens, pauses, or padding could be wrong."""
    engine, n = random_engine(tokenizer, method), 0 if method == "cot" else 3
    model = engine.model
    log_p = engine.choose(QUESTIONS, CANDIDATES, n)
    for question, row, candidates in zip(QUESTIONS, log_p, CANDIDATES, strict=True):
        for value, candidate in zip(row, candidates, strict=True):
            prefix = tokenizer.encode(question) + [tokenizer.bot] * (n > 0)
            prefix += [tokenizer.latent] * n * (method == "pause")
            emb = model.embed(torch.tensor([prefix]))
            for _ in range(n * (method == "coconut")):
                emb = torch.cat([emb, model.backbone(emb, torch.arange(emb.shape[1]))[:, -1:]], 1)
            tail = [tokenizer.eot] * (n > 0) + tokenizer.encode("### " + candidate)
            emb = torch.cat([emb, model.embed(torch.tensor([tail]))], 1)
            logits = model.head(model.backbone(emb, torch.arange(emb.shape[1])))[0]
            n_tokens = len(tokenizer.encode("### " + candidate)) - 1
            expected = logits.log_softmax(-1)[-n_tokens - 1 : -1].gather(
                1, torch.tensor(tail[-n_tokens:])[:, None]
            )
            assert float(value) == pytest.approx(float(expected.sum()), abs=1e-4)


# ---- branches


@pytest.mark.parametrize("method", ["coconut", "pause"])
def test_own_slots_put_back_change_no_bit(tokenizer, method):
    """A put could miss a layer, a position, or the smear's last input."""
    engine = random_engine(tokenizer, method)
    branch = engine.branch(QUESTIONS, CANDIDATES, 4)
    branch.think(3)
    own, slots = branch.answer(), branch.slots(3)
    assert torch.equal(branch.answer(), own)  # an answer leaves nothing behind
    branch.put(slots, only=[1])
    assert torch.equal(branch.answer(), own)
    branch.restart().put(slots)
    assert torch.equal(branch.answer(), own)
    branch.think(1)
    longer = branch.answer()
    branch.restart().think(4)
    assert torch.equal(branch.answer(), longer) and not torch.equal(longer, own)


def test_only_question_and_slots_decide(tokenizer):
    """Row a with b's end of the question and its own slots is row b with a's slots."""
    engine = random_engine(tokenizer)
    a, b = "Tom is a lempus. Is Tom a lempus?", "Tom is a lempus. Is wumpus a lempus?"
    rows = [engine.branch([text], CANDIDATES[:1], 3) for text in (a, b)]
    for row in rows:
        row.think(3)
    slots = rows[0].slots(3)
    start, first = int(rows[0].start), len(tokenizer.encode("Tom is a lempus. Is"))
    rows[0].cache.data[..., first:start, :] = rows[1].cache.data[..., first:start, :]
    assert not torch.equal(rows[0].answer(), rows[1].answer())
    rows[1].put(slots)
    assert torch.equal(rows[0].answer(), rows[1].answer())


# ---- twins


@pytest.mark.parametrize("split", ["prosqa", "prosqa_balanced"])
def test_a_prosqa_twin_asks_about_the_other_root(split, seed):
    """A twin could share the answer, or lose the graph that a hash needs."""
    task, base = TASKS["prosqa"], prosqa.GraphConfig(13, 1, 3)
    for example in prosqa.generate(40, seed, prosqa.split_config(split, base)):
        twin = task.twin(example)
        words = [x["question"].replace("?", " ?").split() for x in (example, twin)]
        assert sum(a != b for a, b in zip(*words, strict=True)) == 1
        assert task.solve(twin["question"]) == twin["answer"] != example["answer"]
        prosqa.compact_example(twin)
        back = task.twin(twin)
        for key in ("question", "answer", "root", "target", "neg_target"):
            assert back[key] == example[key]
        assert len(back["steps"]) == len(example["steps"])
        if new := task.reworded(example):
            parsed = [prosqa.parse_question(q) for q in (new, task.reworded(twin))]
            assert parsed[0].options == parsed[1].options and parsed[0].entity != parsed[1].entity
            assert not set(parsed[0].options) & set(prosqa.parse_question(example["question"])[2])
            assert task.solve(new).startswith(parsed[0].entity)


def test_a_prontoqa_twin_has_the_other_answer(seed):
    """The proof of a twin is searched again: it could take a wrong turn."""
    task = TASKS["prontoqa"]
    for example in prontoqa.generate(20, seed, prontoqa.OntologyConfig(3, matched=True)):
        twin = task.twin(example)
        assert task.solve(twin["question"]) == twin["answer"] != example["answer"]
        assert task.twin(twin) == example  # so its steps are the generator's
        assert task.solve(task.reworded(example)) == twin["answer"]
    example = prontoqa.generate(1, seed, prontoqa.OntologyConfig(3))[0]
    assert task.twin(example) is None  # both facts are about one name


def test_twins_of_other_examples():
    """A user's own twin comes first; a text of no task has none."""
    example = {"question": "2 + 2?", "steps": [], "answer": "4"}
    for task in TASKS.values():
        assert task.twin(example) is None
        assert task.twin(example | {"twin": example}) == example
        with pytest.raises(ValueError, match="answer"):
            task.twin(example | {"twin": {"question": "3 + 3?", "steps": []}})
