"""Figures 5, 7, 8 and 9 of the paper, for ProsQA, with the probability that their values share.

A node's value is the probability of its name if the model has to speak after k thoughts, divided by
that of all concepts (probe.py). The values always add up to one, even if the model would rather
answer: `mass` is what was divided by.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nanococonut.data.examples import Example
from nanococonut.data.prosqa import parse_question, parse_sentence
from nanococonut.data.search import reachable
from nanococonut.evaluation.accuracy import score
from nanococonut.evaluation.categories import CATEGORIES, category_fractions, heights
from nanococonut.evaluation.interchange import fraction, mean_figure
from nanococonut.evaluation.probe import concept_probabilities
from nanococonut.inference.engine import Engine

Grid = dict[str, Any]  # columns, rows of cells, and a note


def paper_figures(engine: Engine, examples: Sequence[Example], n: int = 200) -> dict[str, Grid]:
    """Return figures 5, 7, 8 and 9 over n examples as in training."""
    examples, numbers = examples[:n], range(engine.manifest["n_thoughts"] + 1)
    values: dict[int, list[dict[str, float]]] = {}
    mass: dict[int, list[float]] = {}
    for k in (1, 2):
        raw = [concept_probabilities(engine, x["question"], k) for x in examples]
        mass[k] = [sum(p.values()) for p in raw]
        values[k] = [{node: v / sum(p.values()) for node, v in p.items()} for p in raw]
    about = f"{_shared(*map(np.mean, mass.values()))} after one and two thoughts; {n} graphs."
    first = [graphs[0] for graphs in values.values()]
    entity, (a, b) = parse_question(examples[0]["question"])[1:]
    note = f"Is {entity} a {a} or {b}? {_shared(mass[1][0], mass[2][0])}."
    return {
        "fig5": _categories(engine, examples, numbers),
        "fig7": _one_question(examples[0], first) | {"note": note},
        "fig8": _parallelism(values) | {"note": about},
        "fig9": _by_height(examples, values[1]) | {"note": about},
    }


def _shared(*mass: float) -> str:
    named = " and ".join(f"{100 * m:.1f}\xa0%" for m in mass)
    return f"The concepts share {named} of the probability"


def _categories(engine: Engine, examples: Sequence[Example], numbers: Sequence[int]) -> Grid:
    """Figure 5: kinds of answers after each number of thoughts, the model left to itself."""
    config = engine.config
    rows: dict[str, list[Any]] = {name: [] for name in (*CATEGORIES, "accuracy")}
    for k in numbers:
        s = score(engine, examples, k, max_new_tokens=config.max_new_tokens)
        for name, p in category_fractions(examples, s.texts, k, config.render).items():
            rows[name].append({"value": round(p, 3), "n": s.n})
        rows["accuracy"].append(fraction(torch.tensor(s.correct)))
    cells = [{"label": name, "cells": row} for name, row in rows.items()]
    return {"columns": list(numbers), "rows": cells, "note": f"{len(examples)} graphs."}


def _one_question(example: Example, values: list[dict[str, float]]) -> Grid:
    """Figure 7: the values of one graph's nodes."""
    edges, entity, _ = parse_question(example["question"])
    target, height = parse_sentence(example["answer"])[1], heights(edges)
    steps, rows = reachable(edges, entity), []
    for node in sorted(values[0], key=lambda node: (steps.get(node, 99), node)):
        at = f"step {steps[node]}" if node in steps else "not reached"
        side = "right" if target in reachable(edges, node) else "wrong"
        label = f"{node} ({side}, {at}, height {height.get(node, '-')})"
        rows.append({"label": label, "cells": [{"value": round(v[node], 3)} for v in values]})
    return {"columns": ["after 1", "after 2"], "rows": rows}


def _parallelism(values: dict[int, list[dict[str, float]]]) -> Grid:
    """Figure 8: cumulative value of the best one, two and three nodes, by percentile of graphs."""
    percentiles, rows = list(range(0, 101, 10)), []
    for k, graphs in values.items():
        best = [sorted(v.values(), reverse=True)[:3] for v in graphs]
        for top in (1, 2, 3):
            sums = np.percentile([sum(v[:top]) for v in best], percentiles)
            cells = [{"value": round(float(x), 3)} for x in sums]
            rows.append({"label": f"top {top}, after {k}", "cells": cells})
    return {"columns": percentiles, "rows": rows}


def _by_height(examples: Sequence[Example], values: Sequence[dict[str, float]]) -> Grid:
    """Figure 9: value of the entity's children by their distance to the nearest, farthest leaf."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for x, v in zip(examples, values, strict=True):
        edges, entity, _ = parse_question(x["question"])
        target = parse_sentence(x["answer"])[1]
        children = {b for a, b in edges if a == entity}
        total = sum(v[node] for node in children)
        for leaf, longest in (("nearest", False), ("farthest", True)):
            height = heights(edges, longest)
            for node in children & height.keys():
                side = "right" if target in reachable(edges, node) else "wrong"
                found[f"{side}, {leaf} leaf", height[node]].append(v[node] / total)
    columns = sorted({h for _, h in found})
    rows = []
    for label in sorted({name for name, _ in found}):
        cells = [found.get((label, h)) for h in columns]
        cells = [mean_figure(torch.tensor(c)) if c and len(c) > 1 else None for c in cells]
        rows.append({"label": label, "cells": cells})
    return {"columns": columns, "rows": rows}
