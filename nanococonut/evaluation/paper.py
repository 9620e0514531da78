"""The paper's figures 5, 7, 8 and 9, for ProsQA.

Figure 5 counts six categories of answers (section 5.1). Figures 7 to 9 show the values of nodes
(5.3, 5.4): the probability that the model names a node after k thoughts, normalized over all
concepts (concept_probabilities). So the values add up to one even if the model would more likely
answer; the notes give the probability of all concepts before normalization.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import count, pairwise
from typing import Any

import numpy as np
import torch

from nanococonut.data.examples import Example, split_answer
from nanococonut.data.graph import children_of, reachable
from nanococonut.data.prosqa import parse_question, parse_sentence
from nanococonut.data.tasks import TASKS
from nanococonut.evaluation.accuracy import score
from nanococonut.evaluation.interchange import Figure, fraction, grid, mean_figure
from nanococonut.evaluation.readout import concept_probabilities, graph
from nanococonut.inference.engine import Engine
from nanococonut.runtime.errors import UserError

Grid = dict[str, Any]  # see interchange.grid; also a note
Values = dict[str, float]  # node -> value, of one graph
CATEGORIES = (
    "Correct Path",
    "Longer Path",
    "Hallucination",
    "Wrong Target",
    "Correct Label",
    "Incorrect Label",
)


def paper_figures(engine: Engine, examples: Sequence[Example], n: int = 200) -> dict[str, Grid]:
    """Return figures 5, 7, 8 and 9 for n examples as in training."""
    examples = examples[:n]
    raw = [[concept_probabilities(engine, x["question"], k) for x in examples] for k in (1, 2)]
    mass = [[sum(p.values()) for p in graphs] for graphs in raw]
    values = [[{x: v / sum(p.values()) for x, v in p.items()} for p in graphs] for graphs in raw]
    all_graphs = f"{_mass_note(*map(np.mean, mass))}; {n} graphs."
    entity, (a, b) = parse_question(examples[0]["question"])[1:]
    one_graph = f"Is {entity} a {a} or {b}? {_mass_note(mass[0][0], mass[1][0])}."
    return {
        "fig5": _categories(engine, examples),
        "fig7": _one_question(examples[0], [graphs[0] for graphs in values]) | {"note": one_graph},
        "fig8": _parallelism(values) | {"note": all_graphs},
        "fig9": _by_height(examples, values[0]) | {"note": all_graphs},
    }


def _mass_note(one: float, two: float) -> str:
    p = f"{100 * one:.1f}\xa0% and {100 * two:.1f}\xa0%"
    return f"After one and two thoughts, all concepts together have {p} of the probability"


def _values(values: Sequence[float]) -> list[Figure]:
    return [{"value": round(float(v), 3)} for v in values]


def _categories(engine: Engine, examples: Sequence[Example]) -> Grid:
    """Return figure 5: categories of freely generated answers after each number of thoughts."""
    config, numbers = engine.config, range(engine.manifest["n_thoughts"] + 1)
    rows: dict[str, list[Figure]] = {name: [] for name in (*CATEGORIES, "accuracy")}
    for k in numbers:
        s = score(engine, examples, k, max_new_tokens=config.max_new_tokens)
        for name, p in category_fractions(examples, s.texts, k, config.render).items():
            rows[name].append({"value": round(p, 3), "n": s.n})
        rows["accuracy"].append(fraction(s.correct))
    return grid(numbers, rows) | {"note": f"{len(examples)} graphs."}


def _one_question(example: Example, values: Sequence[Values]) -> Grid:
    """Return figure 7: the values of one graph's nodes."""
    g, height, rows = graph(example), heights(parse_question(example["question"]).edges), {}
    for node in sorted(g.nodes, key=lambda node: (g.own.get(node, 99), node)):
        distance = f"step {g.own[node]}" if node in g.own else "not reached"
        side = "right" if node in g.correct else "wrong"
        label = f"{node} ({side}, {distance}, height {height.get(node, '-')})"
        rows[label] = _values([v[node] for v in values])
    return grid(["after 1", "after 2"], rows)


def _parallelism(values: Sequence[Sequence[Values]]) -> Grid:
    """Return figure 8: total value of the one to three best nodes, by percentile of the graphs."""
    percentiles, rows = range(0, 101, 10), {}
    for k, graphs in enumerate(values, 1):
        best = [sorted(v.values(), reverse=True) for v in graphs]
        for top in (1, 2, 3):
            sums = np.percentile([sum(v[:top]) for v in best], percentiles)
            rows[f"top {top}, after {k}"] = _values(sums)
    return grid(percentiles, rows)


def _by_height(examples: Sequence[Example], values: Sequence[Values]) -> Grid:
    """Return figure 9: values of the entity's children by their distance to a leaf."""
    shares: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for x, v in zip(examples, values, strict=True):
        g, edges = graph(x), parse_question(x["question"]).edges
        children = [node for node in g.nodes if g.own.get(node) == 1]
        total = sum(v[node] for node in children)
        for leaf in ("nearest", "farthest"):
            height = heights(edges, longest=leaf == "farthest")
            for node in height.keys() & children:
                side = "right" if node in g.correct else "wrong"
                shares[f"{side}, {leaf} leaf"][height[node]].append(v[node] / total)
    columns, rows = sorted({h for by_height in shares.values() for h in by_height}), {}
    for label, by_height in sorted(shares.items()):
        cells = [torch.tensor(by_height[h]) for h in columns]
        rows[label] = [mean_figure(c) if len(c) > 1 else None for c in cells]
    return grid(columns, rows)


def classify(question: str, answer: str, text: str, n_thoughts: int = 0) -> str:
    """Return the category (section 5.1) of a text that was generated after n_thoughts thoughts.

    The chain is the text before the first "#". If it is empty, the answer after the mark decides:

    Correct Label     the known answer
    Incorrect Label   any other answer, or none

    Otherwise only the chain counts. Without thoughts, it has to start at the entity. With thoughts,
    its first steps were latent, so it may start at any node reachable from the entity. A shortest
    path from the entity to that node completes it, whatever the number of thoughts.

    Hallucination     a sentence is not ProsQA or not an edge of the graph, two sentences do not
                      connect, or the chain starts at an unreachable node
    Wrong Target      the chain does not end at the answer
    Correct Path      it ends at the answer and is a shortest path once completed
    Longer Path       it ends at the answer and is longer than that

    Raise UserError if the question or the known answer is not ProsQA.
    """
    edges, entity, _ = parse_question(question)
    target = parse_sentence(answer)[1]
    try:
        sentences = text.partition("#")[0].split(".")
        chain = [parse_sentence(sentence) for sentence in sentences if sentence.strip()]
    except UserError:
        return "Hallucination"
    if not chain:
        is_correct = split_answer(text, answer)[1] == answer.strip()
        return "Correct Label" if is_correct else "Incorrect Label"
    start, end = chain[0][0], chain[-1][1]
    steps = reachable(edges, entity)  # node -> fewest steps
    is_broken = any(step[1] != next_step[0] for step, next_step in pairwise(chain))
    starts_well = start in steps if n_thoughts else start == entity
    if is_broken or not set(chain) <= set(edges) or not starts_well:
        return "Hallucination"
    if end != target:
        return "Wrong Target"
    is_shortest = steps[start] + len(chain) == steps[target]
    return "Correct Path" if is_shortest else "Longer Path"


def category_fractions(
    examples: Sequence[Example],
    texts: Sequence[str],
    n_thoughts: int = 0,
    style: str = "sentences",
) -> dict[str, float]:
    """Return the fraction of texts in each category, see classify. style: that of the texts."""
    counts, expand = Counter(), TASKS["prosqa"].expand
    for x, text in zip(examples, texts, strict=True):
        text = expand(text, x["question"], style)
        counts[classify(x["question"], x["answer"], text, n_thoughts)] += 1
    return {name: counts[name] / len(examples) for name in CATEGORIES}


def heights(edges: Sequence[tuple[str, str]], longest: bool = False) -> dict[str, int]:
    """Map each node to the fewest steps down to a leaf (section 5.4), or the most (figure 7).

    A node has no height if all its paths end in a cycle; with `longest`, if any of them does.
    """
    children = children_of(edges)
    condition = all if longest else any
    result = {child: 0 for _, child in edges if child not in children}
    for height in count(1):
        level = [
            node
            for node, below in children.items()
            if node not in result and condition(child in result for child in below)
        ]
        if not level:
            return result
        result |= dict.fromkeys(level, height)
