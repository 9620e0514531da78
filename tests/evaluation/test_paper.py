"""The paper's figures 5, 7, 8 and 9 from made-up probabilities."""

import pytest

from nanococonut.data import prosqa
from nanococonut.evaluation import paper
from nanococonut.evaluation.accuracy import Score
from nanococonut.evaluation.paper import CATEGORIES


class FakeEngine:
    config = type("Config", (), {"max_new_tokens": 9, "render": "sentences"})
    manifest = {"n_thoughts": 2}


@pytest.fixture
def examples(monkeypatch):
    """Return examples with fake answers; the right child has 0.45 of a total probability of 0.5."""
    examples = prosqa.generate(4, 5, prosqa.GraphConfig(13, 2, 3))
    answers = {x["question"]: f"### {x['answer']}" for x in examples}

    def probabilities(engine, question, k):
        edges, entity, _ = prosqa.parse_question(question)
        nodes = {word for edge in edges for word in edge if word[0].islower()}
        children = sorted(b for a, b in edges if a == entity)
        right = next(x["steps"][0] for x in examples if x["question"] == question)
        best = next(node for node in children if f"a {node}." in right)
        return {node: 0.45 if node == best else 0.05 / (len(nodes) - 1) for node in nodes}

    def score(engine, xs, k, max_new_tokens):
        texts = [answers[x["question"]] for x in xs]
        return Score([k == 2] * len(xs), 3.0, float(k), texts)

    monkeypatch.setattr(paper, "concept_probabilities", probabilities)
    monkeypatch.setattr(paper, "score", score)
    return examples


def test_paper_figures_share_and_sum(examples):
    """Values could be of another node, or fractions of another total."""
    figures = paper.paper_figures(FakeEngine(), examples, n=4)
    kinds = {
        row["label"]: [cell["value"] for cell in row["cells"]] for row in figures["fig5"]["rows"]
    }
    assert tuple(kinds) == (*CATEGORIES, "accuracy") and figures["fig5"]["columns"] == [0, 1, 2]
    assert kinds["Correct Label"] == [1, 1, 1] and kinds["accuracy"] == [0, 0, 1]
    one = figures["fig7"]["rows"]
    assert sum(row["cells"][0]["value"] for row in one) == pytest.approx(1, abs=0.01)
    assert one[0]["label"].count("step 1") and max(r["cells"][1]["value"] for r in one) == 0.9
    assert "50.0\xa0% and 50.0\xa0%" in figures["fig7"]["note"]
    tops = {
        row["label"]: [cell["value"] for cell in row["cells"]] for row in figures["fig8"]["rows"]
    }
    assert len(tops) == 6 and tops["top 1, after 2"] == [0.9] * 11
    assert tops["top 1, after 1"] < tops["top 2, after 1"] < tops["top 3, after 1"]
    by_side = {"right": [], "wrong": []}
    for row in figures["fig9"]["rows"]:
        side, leaf = row["label"].split(", ")
        assert leaf in ("nearest leaf", "farthest leaf")
        by_side[side] += [cell["value"] for cell in row["cells"] if cell]
    assert max(by_side["right"]) > 0.8 > 0.1 > max(by_side["wrong"])
    assert "50.0\xa0% and 50.0\xa0%" in figures["fig9"]["note"]
