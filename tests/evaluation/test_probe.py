"""Values of nodes: equal to the plain way, one name and one sequence at a time."""

import pytest
import torch
from helpers import random_gpt

from nanococonut.config import TrainConfig
from nanococonut.curriculum import Curriculum
from nanococonut.data import prosqa
from nanococonut.data.search import reachable
from nanococonut.data.tasks import generated
from nanococonut.evaluation.probe import concept_probabilities
from nanococonut.runtime.cli import make_config
from nanococonut.runtime.errors import UserError
from nanococonut.weights import checkpoint

# zonk and imp are in no vocabulary: several tokens each, not equally many
QUESTION = "Tom is a lempus. Every lempus is a zonk. Sam is a imp. Is Tom a imp or zonk?"


@torch.no_grad()
def naive(model, prefix, n_thoughts, behind, name):
    """The whole sequence again for each thought and token."""
    e = model.embed(torch.tensor([prefix]))

    def last():
        return model.backbone(e, torch.arange(e.shape[1]))[:, -1:]

    for _ in range(n_thoughts):
        e = torch.cat([e, last()], 1)
    p = 1.0
    for i, token in enumerate([*behind, *name]):
        if i >= len(behind):
            p *= float(model.head(last())[0, 0].softmax(-1)[token])
        e = torch.cat([e, model.embed(torch.tensor([[token]]))], 1)
    return p


@pytest.mark.parametrize("smear", [False, True])
@pytest.mark.parametrize("render", ["sentences", "compact"])
@pytest.mark.parametrize("method", ["coconut", "cot"])
def test_values_are_those_of_the_plain_way(tokenizer, method, render, smear):
    seed = torch.seed() % 2**32
    model = random_gpt(seed, smear, vocab_size=tokenizer.vocab_size, block_size=128)
    text = prosqa.compact_question(QUESTION) if render == "compact" else QUESTION + "\n"
    marked = method == "coconut"
    prefix = tokenizer.encode(text) + [tokenizer.bot] * marked
    behind = [tokenizer.eot] * marked + tokenizer.encode("Every") * (render == "sentences")
    for k in (0, 2):
        found = concept_probabilities(model, tokenizer, Curriculum(method), QUESTION, render, k)
        assert list(found) == ["imp", "lempus", "zonk"]
        for name, value in found.items():
            said = tokenizer.encode(" " + name)
            wanted = naive(model, prefix, k, behind, said)
            assert value == pytest.approx(wanted, rel=1e-4), (seed, name, k)


def test_the_bundled_models_thoughts_hold_the_nodes_that_many_steps_away():
    model, tokenizer, manifest = checkpoint.load(checkpoint.BUNDLED, torch.device("cpu"))
    trained = make_config(TrainConfig, manifest["config"])
    near = {0: 0.0, 1: 0.0}
    rows = generated("prosqa", 30, torch.seed() % 2**32, trained)
    for row in rows:
        edges, entity, _ = prosqa.parse_question(row["question"])
        steps = reachable(edges, entity)
        values = concept_probabilities(
            model, tokenizer, Curriculum.from_config(trained), row["question"], trained.render, 1
        )
        assert 0 < sum(values.values()) <= 1.0001
        for node, value in values.items():
            near[node in steps and steps[node][0] == 1] += value / len(rows)
    assert near[1] > 0.5 and near[1] > 3 * near[0]


def test_what_cannot_be_asked_is_refused(tokenizer):
    model = random_gpt(vocab_size=tokenizer.vocab_size, block_size=64)
    with pytest.raises(UserError, match="not a ProsQA question"):
        concept_probabilities(model, tokenizer, Curriculum("coconut"), "Why?", "compact", 1)
    with pytest.raises(UserError, match="block_size=64"):
        concept_probabilities(model, tokenizer, Curriculum("coconut"), QUESTION, "compact", 60)
