"""Probabilities of concepts equal a naive loop over single names and questions."""

import pytest
import torch
from helpers import random_gpt

import nanococonut
from nanococonut.config import TrainConfig
from nanococonut.data import prosqa
from nanococonut.data.graph import reachable
from nanococonut.data.tasks import generated
from nanococonut.evaluation.readout import concept_probabilities
from nanococonut.inference.engine import Engine
from nanococonut.runtime.errors import UserError

# zonk and imp are not in the vocabulary: each has several tokens, a different number
QUESTION = "Tom is a lempus. Every lempus is a zonk. Sam is a imp. Is Tom a imp or zonk?"


@torch.no_grad()
def naive(model, prefix, n_thoughts, forced_tokens, name):
    """Return the probability of a name; recompute the sequence for each thought and token."""
    emb = model.wte(torch.tensor([prefix]))

    def last():
        return model.backbone(emb, torch.arange(emb.shape[1]))[:, -1:]

    for _ in range(n_thoughts):
        emb = torch.cat([emb, last()], 1)
    p = 1.0
    for i, token in enumerate([*forced_tokens, *name]):
        if i >= len(forced_tokens):
            p *= float(model.head(last())[0, 0].softmax(-1)[token])
        emb = torch.cat([emb, model.wte(torch.tensor([[token]]))], 1)
    return p


def random_engine(tokenizer, seed=0, smear=False, block_size=128, **settings) -> Engine:
    model = random_gpt(seed, smear, vocab_size=tokenizer.vocab_size, block_size=block_size)
    return Engine.from_config(model, tokenizer, TrainConfig(tokenizer="words", **settings))


@pytest.mark.parametrize("smear", [False, True])
@pytest.mark.parametrize("render", ["sentences", "compact"])
@pytest.mark.parametrize("method", ["coconut", "cot"])
def test_probabilities_equal_a_naive_loop(tokenizer, method, render, smear, seed):
    """Names of several tokens, markers or padding could be handled wrongly."""
    engine = random_engine(tokenizer, seed, smear, method=method, render=render)
    text = prosqa.compact_question(QUESTION) if render == "compact" else QUESTION + "\n"
    has_markers = method == "coconut"
    prefix = tokenizer.encode(text) + [tokenizer.bot] * has_markers
    forced = [tokenizer.eot] * has_markers + tokenizer.encode("Every") * (render == "sentences")
    for k in (0, 2):
        values = concept_probabilities(engine, QUESTION, k)
        assert list(values) == ["imp", "lempus", "zonk"]
        for name, value in values.items():
            expected = naive(engine.model, prefix, k, forced, tokenizer.encode(" " + name))
            assert value == pytest.approx(expected, rel=1e-4), (name, k)


def test_bundled_thoughts_encode_the_nodes_one_step_away(seed):
    """The first thought of the bundled model must name the entity's children, as in the paper."""
    engine = nanococonut.load(device="cpu")
    total = {True: 0.0, False: 0.0}  # is the node one step away? -> summed probability
    examples = generated("prosqa", 30, seed, engine.config)
    for example in examples:
        edges, entity, _ = prosqa.parse_question(example["question"])
        steps = reachable(edges, entity)
        values = concept_probabilities(engine, example["question"], 1)
        assert 0 < sum(values.values()) <= 1.0001
        for node, value in values.items():
            total[node in steps and steps[node] == 1] += value / len(examples)
    assert total[True] > 0.5 and total[True] > 3 * total[False]


def test_other_questions_are_refused(tokenizer):
    """A question that is not ProsQA, or exceeds block_size, would end in an index error."""
    engine = random_engine(tokenizer, block_size=64, render="compact")
    with pytest.raises(UserError, match="not a ProsQA question"):
        concept_probabilities(engine, "Why?", 1)
    with pytest.raises(UserError, match="block_size=64"):
        concept_probabilities(engine, QUESTION, 60)
