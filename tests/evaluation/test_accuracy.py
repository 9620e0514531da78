"""Scores are of exact matches, by batched generation that equals one question at a time."""

from pathlib import Path

import pytest
import torch
from helpers import random_gpt

from nanococonut.curriculum import METHODS, Curriculum
from nanococonut.evaluation import accuracy as evaluate
from nanococonut.inference.engine import Engine, Generation
from nanococonut.runtime.errors import UserError

QUESTIONS = ["Tom is a lempus.", "Every lempus is a wumpus. Tom is a lempus.", "?"] * 5


@pytest.fixture
def model(tokenizer):
    return random_gpt(vocab_size=tokenizer.vocab_size, block_size=64)


@pytest.mark.parametrize("method", METHODS)
def test_batched_equals_one_by_one(model, tokenizer, method):
    rows = [{"question": q, "steps": [], "answer": "x"} for q in QUESTIONS]
    engine = Engine(model, tokenizer, Curriculum(method))
    n = 3 if METHODS[method].n_thoughts_rule != "none" else 0
    batched = evaluate.score(engine, rows, n, batch_size=4, max_new_tokens=9)
    alone = evaluate.score(engine, rows, n, batch_size=1, max_new_tokens=9)
    assert batched == alone and len(set(batched.texts)) > 1


def scripted(monkeypatch, tokenizer, texts=()):
    """The engine says these texts, whatever it is asked -> what it is asked."""
    asked, texts = [], list(texts)

    def fake(self, prefixes, n_thoughts, opening, *_):
        asked.append((prefixes, n_thoughts, opening))
        tokens = [tokenizer.encode(texts.pop(0) if texts else "") for _ in prefixes]
        return Generation(tokens, torch.zeros(1), [n_thoughts] * len(tokens), 0, 0, 0, 0)

    monkeypatch.setattr(Engine, "run", fake)
    return asked


def test_markers_stand_where_the_method_was_trained_with_them(model, tokenizer, monkeypatch):
    asked = scripted(monkeypatch, tokenizer)
    question = tokenizer.encode("Tom?")
    Engine(model, tokenizer).generate(["Tom?"], 2)
    Engine(model, tokenizer, Curriculum("no_cot")).generate(["Tom?"], 0)
    Engine(model, tokenizer, Curriculum("pause")).generate(["Tom?"], 2)
    assert asked == [
        ([question + [tokenizer.bot]], 2, [tokenizer.eot]),
        ([question], 0, []),
        ([question + [tokenizer.bot] + [tokenizer.latent] * 2], 0, [tokenizer.eot]),
    ]


def test_what_counts_as_right_and_as_generated(model, tokenizer, monkeypatch):
    texts = ["### Tom is", "Tom is", "### Tom a", "a\n### 2,125"]
    answers = ["Tom is", "Tom is", "Tom is", "2125"]
    scripted(monkeypatch, tokenizer, texts)
    rows = [{"question": "?", "steps": [], "answer": a} for a in answers]
    s = evaluate.score(Engine(model, tokenizer), rows, 6, batch_size=3)
    assert (s.right, s.texts) == (
        [True, False, False, True],
        texts,
    )  # without "###" there is no answer
    words = sum(len(tokenizer.encode(t)) for t in texts)
    assert s.generated_tokens == 6 + words / 4 and s.thoughts == 6


def test_the_interval_is_wilsons():
    """Values of the closed form, computed by hand: 95 of 100 and 10 of 10."""
    low, high = evaluate.Score([True] * 95 + [False] * 5, 0, 0, []).interval
    assert (round(low, 4), round(high, 4)) == (0.8882, 0.9785)
    low, high = evaluate.Score([True] * 10, 0, 0, []).interval
    assert (round(low, 4), round(high, 12)) == (0.7225, 1.0)


def test_training_mode_is_left_as_it_was(model, tokenizer):
    rows = [{"question": "Tom", "steps": [], "answer": "x"}]
    model.train()
    evaluate.score(Engine(model, tokenizer), rows, 1, max_new_tokens=2)
    assert model.training


def test_a_question_that_does_not_fit_is_refused(model, tokenizer):
    engine = Engine(model, tokenizer)
    with pytest.raises(UserError, match="block_size=64"):
        engine.generate(["Tom is a lempus. " * 20], 3)
    assert len(engine.generate(["Tom"], 60).tokens[0]) <= 1  # one token of room
    for none in ([], "Tom"):  # a text is no list of its letters
        with pytest.raises(ValueError, match="at least one question"):
            engine.generate(none, 3)
    with pytest.raises(ValueError, match="tokenizer"):
        Engine(model).generate(["Tom"], 3)


def test_the_readmes_python_answers(capsys):
    """As it stands there, on the bundled model: the right answer, six thoughts."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = [b for b in text.split("```python\n")[1:] if "Engine(" in b.split("```")[0]]
    exec(block.split("```")[0], {})
    out = capsys.readouterr().out
    assert "### lempus 6 torch.Size([1, 6, " in out and out.rstrip().endswith("ms")
