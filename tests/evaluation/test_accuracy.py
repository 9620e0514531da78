"""Scores count exact matches; batched generation equals one question at a time."""

from pathlib import Path

import pytest
import torch
from helpers import random_gpt

from nanococonut.config import TrainConfig
from nanococonut.curriculum import METHODS, Curriculum
from nanococonut.evaluation import accuracy as evaluate
from nanococonut.evaluation.accuracy import evaluate_splits
from nanococonut.inference.engine import Engine, Generation
from nanococonut.runtime.distributed import Distributed
from nanococonut.runtime.errors import UserError

QUESTIONS = ["Tom is a lempus.", "Every lempus is a wumpus. Tom is a lempus.", "?"] * 5


@pytest.fixture
def model(tokenizer):
    return random_gpt(vocab_size=tokenizer.vocab_size, block_size=64)


@pytest.mark.parametrize("method", METHODS)
def test_batched_equals_one_by_one(model, tokenizer, method):
    """Sorting by length could assign texts to the wrong examples."""
    examples = [{"question": q, "steps": [], "answer": "x"} for q in QUESTIONS]
    engine = Engine(model, tokenizer, Curriculum(method))
    n = 3 if METHODS[method].n_thoughts_rule != "none" else 0
    batched = evaluate.score(engine, examples, n, batch_size=4, max_new_tokens=9)
    alone = evaluate.score(engine, examples, n, batch_size=1, max_new_tokens=9)
    assert batched == alone and len(set(batched.texts)) > 1


def test_an_edit_sees_the_examples_in_order(model, tokenizer):
    """They were sorted by length, so an edit for each example changed the wrong ones."""
    examples = [{"question": q, "steps": [], "answer": "x"} for q in QUESTIONS]
    engine, seen = Engine(model, tokenizer), []
    own = engine.generate(QUESTIONS, 2, 3).thoughts
    evaluate.score(engine, examples, 2, edit=lambda i, fed: (seen.append(fed), fed)[1])
    torch.testing.assert_close(torch.stack(seen, 1), own)


@pytest.mark.parametrize("n", [2, 4])
def test_numbers_of_thoughts_fit_the_examples(model, tokenizer, n):
    """A list for other, more examples was taken without an error."""
    examples = [{"question": q, "steps": [], "answer": "x"} for q in QUESTIONS[:3]]
    with pytest.raises(ValueError, match=f"n_thoughts: expected 3 numbers, got {n}"):
        evaluate.score(Engine(model, tokenizer), examples, [1] * n)


def scripted(monkeypatch, tokenizer, texts=()):
    """Make Engine.run return these texts. Return the list of its requests."""
    requests, texts = [], list(texts)

    def fake(self, request):
        requests.append((request.prefixes, request.n_thoughts, request.forced_tokens))
        tokens = [tokenizer.encode(texts.pop(0) if texts else "") for _ in request.prefixes]
        nothing, n_thoughts = torch.zeros(1, 0, 1), [request.n_thoughts] * len(tokens)
        return Generation(tokens, nothing, n_thoughts, 0, 0, 0, 0)

    monkeypatch.setattr(Engine, "run", fake)
    return requests


def test_prompts_have_the_markers_of_training(model, tokenizer, monkeypatch):
    """A prompt without the markers of its method gives worse answers but no error."""
    requests = scripted(monkeypatch, tokenizer)
    question = tokenizer.encode("Tom?")
    Engine(model, tokenizer).generate(["Tom?"], 2)
    Engine(model, tokenizer, Curriculum("no_cot")).generate(["Tom?"], 0)
    Engine(model, tokenizer, Curriculum("pause")).generate(["Tom?"], 2)
    assert requests == [
        ([question + [tokenizer.bot]], 2, [tokenizer.eot]),
        ([question], 0, []),
        ([question + [tokenizer.bot] + [tokenizer.latent] * 2], 0, [tokenizer.eot]),
    ]


def test_what_counts_as_correct_and_as_generated(model, tokenizer, monkeypatch):
    """An answer needs its "###"; commas in numbers are ignored."""
    texts = ["### Tom is", "Tom is", "### Tom a", "a\n### 2,125"]
    answers = ["Tom is", "Tom is", "Tom is", "2125"]
    scripted(monkeypatch, tokenizer, texts)
    examples = [{"question": "?", "steps": [], "answer": a} for a in answers]
    s = evaluate.score(Engine(model, tokenizer), examples, 6, batch_size=3)
    assert (s.correct, s.texts) == ([True, False, False, True], texts)
    n_tokens = sum(len(tokenizer.encode(t)) for t in texts)
    assert s.generated_tokens == 6 + n_tokens / 4 and s.thoughts == 6


def test_unpadded_thoughts_are_asked_as_trained(model, tokenizer, monkeypatch):
    """Training caps thoughts by the number of steps; evaluation always used the maximum."""
    settings = dict(tokenizer="words", max_latent_stage=3, c_thought=2, pad_latent_to_max=False)
    config = TrainConfig(**settings)
    engine = Engine.from_config(model, tokenizer, config)
    n_steps, dist = [1, 5, 0, 1, 2], Distributed()
    examples = [
        {"question": "Tom? " * (i + 1), "steps": ["a"] * n, "answer": str(i)}
        for i, n in enumerate(n_steps)
    ]
    for stage, expected in (4, [2, 6, 0, 2, 4]), (1, [2] * 5):  # a numbered stage has no cap
        requests = scripted(monkeypatch, tokenizer)
        metrics = evaluate_splits(engine, {"valid": examples}, stage, dist)
        asked = {prefix.count(tokenizer.encode("?")[0]): n for p, n, _ in requests for prefix in p}
        assert [asked[i + 1] for i in range(5)] == expected
        assert metrics["valid_tokens"] == sum(expected) / 5


def test_own_thoughts_do_not_mix_up_the_texts(model, tokenizer):
    """Examples are grouped by their number of thoughts; each must keep its own text."""
    examples = [{"question": q, "steps": [], "answer": "x"} for q in QUESTIONS]
    counts = [i % 4 for i in range(len(examples))]
    engine = Engine(model, tokenizer)
    got = evaluate.score(engine, examples, counts, batch_size=2, max_new_tokens=9)
    alone = [
        evaluate.score(engine, [x], n, max_new_tokens=9)
        for x, n in zip(examples, counts, strict=True)
    ]
    assert got.texts == [s.texts[0] for s in alone]
    assert got.thoughts == sum(counts) / len(counts)


def test_a_sharp_is_part_of_the_answer(model, tokenizer, monkeypatch):
    """Both answers were cut at "#", so F# counted as C#; by the released rule both are wrong."""
    examples = [{"question": f"note {i}?", "steps": [], "answer": "C#"} for i in range(2)]
    scripted(monkeypatch, tokenizer, ["key\n### C#", "### F#"])
    s = evaluate.score(Engine(model, tokenizer), examples, 0)
    assert s.correct == [True, False] and s.released_accuracy == 0


def test_answers_are_rendered_as_questions_are(model, tokenizer, monkeypatch):
    """A compact answer never equals a sentence, so every one would count as wrong."""
    question = "Tom is a lempus. Is Tom a lempus or wumpus?"
    example = {"question": question, "steps": [], "answer": "Tom is a lempus."}
    compact = tokenizer.encode(" Tom lempus.? Tom? lempus? wumpus")
    for render, text in ("compact", "### lempus"), ("sentences", "### Tom is a lempus."):
        requests = scripted(monkeypatch, tokenizer, [text, "### wumpus"])
        config = TrainConfig(render=render, tokenizer="words")
        engine = Engine.from_config(model, tokenizer, config)
        assert evaluate.score(engine, [example] * 2, 0).correct == [True, False]
        prompt = compact if render == "compact" else tokenizer.encode(question + "\n")
        assert requests[0][0] == [prompt + [tokenizer.bot]] * 2
    with pytest.raises(ValueError, match="from_config"):
        evaluate.score(Engine(model, tokenizer, render=str.strip), [example], 0)


def test_the_interval_is_wilsons():
    """The normal approximation has width 0 at 10 of 10. Expected values are computed by hand."""
    low, high = evaluate.wilson(0.95, 100)
    assert (round(low, 4), round(high, 4)) == (0.8882, 0.9785)
    low, high = evaluate.wilson(1.0, 10)
    assert (round(low, 4), round(high, 12)) == (0.7225, 1.0)


def test_thought_geometry_equals_a_loop(model, tokenizer):
    """A mean over the wrong axis, or with self-pairs, would hide a collapse."""
    engine = Engine(model, tokenizer)
    examples = [{"question": q, "steps": [], "answer": "x"} for q in QUESTIONS[:3]]
    thoughts = engine.generate(QUESTIONS[:3], 4, 2).thoughts
    got = evaluate.score(engine, examples, 4, max_new_tokens=2).geometry
    for i in range(4):
        a, b, c = thoughts[:, i]
        pairs = [torch.cosine_similarity(x, y, 0) for x, y in ((a, b), (a, c), (b, c))]
        assert got["thought_similarity"][i] == pytest.approx(sum(pairs).item() / 3, abs=1e-4)
        norm = sum(x.norm() for x in (a, b, c)).item() / 3
        assert got["thought_norm"][i] == pytest.approx(norm, abs=1e-4)
    cosines = torch.cosine_similarity(thoughts[:, 1:], thoughts[:, :-1], -1).mean(0)
    assert got["thought_cosine"] == pytest.approx(cosines.tolist(), abs=1e-4)
    same = evaluate.thought_geometry(thoughts[:1].expand(5, -1, -1))
    assert same["thought_similarity"] == [1.0] * 4
    assert (
        evaluate.thought_geometry(thoughts[:1]) == evaluate.thought_geometry(thoughts[:, :0]) == {}
    )


def test_thoughts_stop_once_the_readout_repeats(model, tokenizer):
    """Compare with a loop over single questions and thoughts."""
    engine = Engine(model, tokenizer, Curriculum("coconut"))
    examples = [{"question": q, "steps": [], "answer": "x"} for q in QUESTIONS]
    expected = []
    for question in QUESTIONS:
        thoughts = engine.generate([question], 5, max_new_tokens=1).thoughts[0]
        tokens = [int(model.head(h).argmax()) for h in thoughts]
        repeats = [i for i in range(1, 5) if tokens[i] == tokens[i - 1]]
        expected.append(repeats[0] if repeats else 5)
    assert evaluate.thoughts_until_repeat(engine, examples, 5, batch_size=2) == expected


def test_training_mode_is_left_as_it_was(model, tokenizer):
    """Validation could leave dropout off for the rest of the run."""
    examples = [{"question": "Tom", "steps": [], "answer": "x"}]
    model.train()
    evaluate.score(Engine(model, tokenizer), examples, 1, max_new_tokens=2)
    assert model.training


def test_a_question_that_does_not_fit_is_refused(model, tokenizer):
    """Positions past block_size do not exist."""
    engine = Engine(model, tokenizer)
    with pytest.raises(UserError, match="block_size=64"):
        engine.generate(["Tom is a lempus. " * 20], 3)
    assert len(engine.generate(["Tom"], 60).tokens[0]) <= 1  # one token fits
    for questions in ([], "Tom"):  # a text would be read as a list of letters
        with pytest.raises(ValueError, match="at least one question"):
            engine.generate(questions, 3)
    with pytest.raises(ValueError, match="tokenizer"):
        Engine(model).generate(["Tom"], 3)


def test_readme_python_block_runs(capsys):
    """The README's Python block, on the bundled model: a correct answer after six thoughts."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = [b for b in text.split("```python\n")[1:] if "nanococonut.load" in b.split("```")[0]]
    exec(block.split("```")[0], {})
    assert capsys.readouterr().out.startswith("### lempus torch.Size([1, 6, ")
