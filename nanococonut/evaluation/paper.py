"""Figures 5, 7, 8 and 9 of the paper, for ProsQA, with the probability that their values share.

A node's value is the probability of its name if the model has to speak after k thoughts, divided by
that of all concepts (concept_probabilities). The values always add up to one, even if the model
would rather answer: `mass` is what was divided by.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nanococonut.data.examples import Example
from nanococonut.data.prosqa import parse_question
from nanococonut.evaluation.accuracy import score
from nanococonut.evaluation.categories import CATEGORIES, category_fractions, heights
from nanococonut.evaluation.interchange import Figure, fraction, grid, mean_figure
from nanococonut.evaluation.readout import concept_probabilities, graph
from nanococonut.inference.engine import Engine

Grid = dict[str, Any]  # columns, rows of cells, and a note
Values = dict[str, float]  # of the nodes of one graph


def paper_figures(engine: Engine, examples: Sequence[Example], n: int = 200) -> dict[str, Grid]:
    """Return figures 5, 7, 8 and 9 over n examples as in training."""
    examples = examples[:n]
    raw = [[concept_probabilities(engine, x["question"], k) for x in examples] for k in (1, 2)]
    mass = [[sum(p.values()) for p in graphs] for graphs in raw]
    values = [[{x: v / sum(p.values()) for x, v in p.items()} for p in graphs] for graphs in raw]
    about = f"{_shared(*map(np.mean, mass))} after one and two thoughts; {n} graphs."
    entity, (a, b) = parse_question(examples[0]["question"])[1:]
    note = f"Is {entity} a {a} or {b}? {_shared(mass[0][0], mass[1][0])}."
    return {
        "fig5": _categories(engine, examples),
        "fig7": _one_question(examples[0], [graphs[0] for graphs in values]) | {"note": note},
        "fig8": _parallelism(values) | {"note": about},
        "fig9": _by_height(examples, values[0]) | {"note": about},
    }


def _shared(*mass: float) -> str:
    named = " and ".join(f"{100 * m:.1f}\xa0%" for m in mass)
    return f"The concepts share {named} of the probability"


def _cells(values: Sequence[float]) -> list[Figure]:
    return [{"value": round(float(v), 3)} for v in values]


def _categories(engine: Engine, examples: Sequence[Example]) -> Grid:
    """Figure 5: kinds of answers after each number of thoughts, the model left to itself."""
    config, numbers = engine.config, range(engine.manifest["n_thoughts"] + 1)
    rows: dict[str, list[Figure]] = {name: [] for name in (*CATEGORIES, "accuracy")}
    for k in numbers:
        s = score(engine, examples, k, max_new_tokens=config.max_new_tokens)
        for name, p in category_fractions(examples, s.texts, k, config.render).items():
            rows[name].append({"value": round(p, 3), "n": s.n})
        rows["accuracy"].append(fraction(s.correct))
    return grid(numbers, rows) | {"note": f"{len(examples)} graphs."}


def _one_question(example: Example, values: Sequence[Values]) -> Grid:
    """Figure 7: the values of one graph's nodes."""
    g, height, rows = graph(example), heights(parse_question(example["question"]).edges), {}
    for node in sorted(g.nodes, key=lambda node: (g.own.get(node, 99), node)):
        at = f"step {g.own[node]}" if node in g.own else "not reached"
        side = "right" if node in g.right else "wrong"
        label = f"{node} ({side}, {at}, height {height.get(node, '-')})"
        rows[label] = _cells([v[node] for v in values])
    return grid(["after 1", "after 2"], rows)


def _parallelism(values: Sequence[Sequence[Values]]) -> Grid:
    """Figure 8: cumulative value of the best one, two and three nodes, by percentile of graphs."""
    percentiles, rows = range(0, 101, 10), {}
    for k, graphs in enumerate(values, 1):
        best = [sorted(v.values(), reverse=True) for v in graphs]
        for top in (1, 2, 3):
            sums = np.percentile([sum(v[:top]) for v in best], percentiles)
            rows[f"top {top}, after {k}"] = _cells(sums)
    return grid(percentiles, rows)


def _by_height(examples: Sequence[Example], values: Sequence[Values]) -> Grid:
    """Figure 9: value of the entity's children by their distance to the nearest, farthest leaf."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for x, v in zip(examples, values, strict=True):
        g, edges = graph(x), parse_question(x["question"]).edges
        children = [node for node in g.nodes if g.own.get(node) == 1]
        total = sum(v[node] for node in children)
        for leaf in ("nearest", "farthest"):
            height = heights(edges, longest=leaf == "farthest")
            for node in height.keys() & children:
                side = "right" if node in g.right else "wrong"
                found[f"{side}, {leaf} leaf"][height[node]].append(v[node] / total)
    columns, rows = sorted({h for heights in found.values() for h in heights}), {}
    for label, by_height in sorted(found.items()):
        cells = [torch.tensor(by_height[h]) for h in columns]
        rows[label] = [mean_figure(c) if len(c) > 1 else None for c in cells]
    return grid(columns, rows)
