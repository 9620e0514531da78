"""What a thought says: nodes that the LM head reads in it, and nodes written into it by hand."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanococonut.data.examples import Example
from nanococonut.data.prosqa import parse_question, parse_sentence
from nanococonut.data.search import reachable
from nanococonut.data.tasks import TASKS
from nanococonut.evaluation.interchange import Figures, chosen, mean_figure
from nanococonut.evaluation.pairs import MIN_PAIRS, Pairs
from nanococonut.inference.engine import Engine
from nanococonut.runtime.errors import UserError

DISTANCES = ["1", "2", "3", "4", "5+", "no path"]
FACTORS = (4, 8, 12, 16)  # of embeddings that are written; the best on the first half is taken
ERASE = 1.5  # 1 is a plain projection
MIN_MASS = 0.1  # thoughts with less probability on concepts name none
WRITTEN = {
    "other": "concepts of the twin's entity",
    "own": "its own concepts",
    "control": "other concepts",
}
ERASED = {"right": "the right branch erased", "wrong": "a wrong branch erased"}


class Graph(NamedTuple):
    """The concepts of a ProsQA question and their distances from its entity and its twin's."""

    nodes: list[str]
    own: dict[str, int]
    other: dict[str, int]
    right: set[str]  # concepts that lead to the answer

    def chosen(self, d: int) -> dict[str, list[str]]:
        """Return the concepts at distance d for each key of WRITTEN and ERASED; [] if none fit."""
        own, other = ([x for x in self.nodes if steps.get(x) == d] for steps in self[1:3])
        right = [node for node in own if node in self.right]
        wrong = [node for node in own if node not in self.right]
        is_branching = len(right) == 1 and bool(wrong)  # one right branch, and a wrong one
        return {
            "own": own if other else [],
            "other": other if own else [],
            "control": [x for x in self.nodes if x not in own + other] if own and other else [],
            "right": right if is_branching else [],
            "wrong": wrong[:1] if is_branching else [],
        }


def graph(example: Example, twin: Example) -> Graph:
    """Return the graph of a question. UserError if it is not ProsQA."""
    edges, entity, _ = parse_question(example["question"])
    target = parse_sentence(example["answer"])[1]
    nodes = sorted({node for edge in edges for node in edge if node[0].islower()})
    right = {node for node in nodes if target in reachable(edges, node)}
    other = parse_question(twin["question"]).entity
    return Graph(nodes, reachable(edges, entity), reachable(edges, other), right)


def name_tokens(engine: Engine, graphs: Sequence[Graph]) -> dict[str, int]:
    """Return the token of each concept's name. UserError if a name has several."""
    tokens = {}
    for node in {node for g in graphs for node in g.nodes}:
        ids = engine.tokenizer.encode(" " + node)
        if len(ids) != 1:
            raise UserError(
                f"the name {node!r} has {len(ids)} tokens, so the LM head cannot name it at once."
            )
        tokens[node] = ids[0]
    return tokens


@torch.no_grad()
def names_by_distance(
    engine: Engine, graphs: Sequence[Graph], thoughts: Tensor
) -> dict[str, Tensor]:
    """Read thoughts (N, K, C) with the LM head. Return fractions by the columns of DISTANCES.

    own, other            (N, K, D)  of the probability on concepts, counted from each entity
    base_own, base_other  (N, D)     of the concepts
    mass                  (N, K)     probability on all concepts
    """
    tokens, D = name_tokens(engine, graphs), len(DISTANCES)
    (N, K, _), w = thoughts.shape, engine.model.wte.weight
    out = {name: torch.zeros(N, K, D) for name in ("own", "other")}
    out |= {name: torch.zeros(N, D) for name in ("base_own", "base_other")}
    out["mass"] = torch.zeros(N, K)
    for i, g in enumerate(graphs):
        p = engine.model.head(thoughts[i].to(w)).float().softmax(-1)
        p = p[:, [tokens[node] for node in g.nodes]].cpu()  # (K, nodes)
        out["mass"][i] = p.sum(1)
        for name, distances in (("own", g.own), ("other", g.other)):
            column = torch.tensor([min(distances.get(node, D), D - 1 + (node not in distances)) - 1
                                   for node in g.nodes])  # fmt: skip
            out[name][i].index_add_(1, column, p / p.sum(1, keepdim=True))
            out[f"base_{name}"][i] = torch.bincount(column, minlength=D) / len(column)
    return out


def write_by_hand(
    engine: Engine,
    graphs: Sequence[Graph],
    questions: Sequence[str],
    candidates: Sequence[Sequence[str]],
    thoughts: Tensor,
    place: tuple[int, int],
    batch_size: int = 200,
) -> dict[str, Any]:
    """Write concepts into a thought, or erase one; all that follows is computed from it.

    place     (thought, distance of the concepts), both counted from 1
    thoughts  (N, n, C) of the questions as they are
    Return name -> answers (N, m), NaN if the graph has no such concepts: other, own, control
    (concepts that are written), right, wrong (branches that are erased); and "factor".
    """
    t, chosen = place[0] - 1, [g.chosen(place[1]) for g in graphs]
    (N, n, _), model = thoughts.shape, engine.model
    tokens, w = name_tokens(engine, graphs), model.wte.weight.detach()
    mean = model.thought_embedding(thoughts[: N // 2, t].to(w)).mean(0)

    def answers(name: str, rows: Sequence[int], factor: float) -> Tensor:
        result = torch.full((N, len(candidates[0])), torch.nan)
        rows = [i for i in rows if chosen[i][name]]
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            ids = [[tokens[node] for node in chosen[i][name]] for i in part]
            direction = torch.stack([w[x].mean(0) for x in ids])  # (B, C)
            unit = direction / direction.norm(dim=1, keepdim=True)

            def edit(i: int, fed: Tensor, direction: Tensor = direction, unit: Tensor = unit):
                if i != t:
                    return fed
                if name in ("right", "wrong"):
                    return fed - ERASE * (fed * unit).sum(1, keepdim=True) * unit
                return mean + factor * direction

            out = engine.choose(
                [questions[i] for i in part], [candidates[i] for i in part], n, edit
            )
            result[part] = out.cpu()
        return result

    first, second = range(N // 2), range(N // 2, N)
    tried = {f: (answers("other", first, f).argmax(1)[: N // 2] == 1).sum() for f in FACTORS}
    factor = max(tried, key=tried.get)
    return {"factor": factor} | {x: answers(x, second, factor) for x in WRITTEN | ERASED}


def readout(
    engine: Engine, f: Figures, pairs: Pairs, n: int
) -> tuple[dict[str, Any], dict[int, dict[str, Any]], dict[str, Any]]:
    """Read the thoughts of questions with steps, then write and erase where they can be read.

    Return (fractions by distance, distance -> the thought that names it most, answers after it was
    written). The place to write is chosen on one half of the questions, measured on the other.
    """
    index = f.deep.nonzero()[:, 0]
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
    examples, twins = ([side[i] for i in index] for side in (pairs.examples, pairs.twins))
    graphs = [graph(x, t) for x, t in zip(examples, twins, strict=True)]
    thoughts, half = f.cells["thoughts"][index], len(index) // 2  # (M, K, C), in random order
    names = names_by_distance(engine, graphs, thoughts)
    mean = {k: v.mean(0) for k, v in names.items()}
    row = {"distances": DISTANCES, "n": len(index)}
    row |= {name: v.double().numpy().round(3).tolist() for name, v in mean.items()}

    def lift(d: int, rows: slice) -> Tensor:  # (n,), of thoughts that name anything at all
        above = (names["own"] - names["other"])[rows, :n, d - 1].mean(0)
        return above * (names["mass"][rows, :n].mean(0) >= MIN_MASS)

    best = {}
    for d in (1, 2):
        k = int(lift(d, slice(None)).argmax())
        best[d] = {
            "thought": k + 1,
            "base": float(mean["base_own"][d - 1]),
            "mass": float(mean["mass"][k]),
            "own": mean_figure(names["own"][:, k, d - 1]),
            "other": mean_figure(names["other"][:, k, d - 1]),
        }
    d = max((1, 2), key=lambda d: lift(d, slice(half)).max())
    t, candidates = int(lift(d, slice(half)).argmax()) + 1, pairs.candidates(engine)
    answers = write_by_hand(
        engine, graphs, [x["question"] for x in examples], [candidates[i] for i in index],
        thoughts[:, :n], (t, d),
    )  # fmt: skip
    base, write = f.base[index], {"thought": t, "distance": d, "factor": answers["factor"]}

    def points(labels: dict[str, str], column: int) -> list[dict[str, Any]]:
        figures = {name: chosen(answers[name], column, base) for name in labels}
        return [{"id": name, "label": labels[name]} | x for name, x in figures.items() if x]

    write["points"] = points(WRITTEN, 1)
    write["erase"] = points(ERASED, 0)
    return row, best, write


@torch.no_grad()
def words_by_step(
    engine: Engine, f: Figures, pairs: Pairs, n: int
) -> dict[int, dict[str, dict[str, Any]]]:
    """Read thought i for the words of step i. Return step -> own, other: probability of them all.

    other  the words of step i of another question
    """
    task, style = TASKS[engine.config.task], engine.config.render
    steps = [
        [set(engine.tokenizer.encode(step)) for step in x["steps"]]
        for x in task.render(pairs.examples, style)
    ]
    found, c, w = {}, engine.curriculum.c_thought, engine.model.wte.weight
    for i in range(n // c):
        rows = [row for row, x in enumerate(steps) if len(x) > i]
        if len(rows) < MIN_PAIRS:
            break
        hidden = f.cells["thoughts"][rows, (i + 1) * c - 1]  # the last thought of the step
        p = engine.model.head(hidden.to(w)).float().softmax(-1).cpu()
        sides = {"own": rows, "other": [*rows[1:], *rows[:1]]}
        sums = {
            name: [p[k, list(steps[row][i])].sum() for k, row in enumerate(side)]
            for name, side in sides.items()
        }
        found[i + 1] = {name: mean_figure(torch.stack(x)) for name, x in sums.items()}
    return found
