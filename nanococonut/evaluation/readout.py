"""What a thought says: what the model names after it, what the LM head reads in it, and what is
written into it by hand. All but words_by_step is for ProsQA."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nanococonut.data.examples import Example
from nanococonut.data.prosqa import parse_question, parse_sentence
from nanococonut.data.search import reachable
from nanococonut.data.tasks import TASKS
from nanococonut.evaluation.accuracy import in_batches
from nanococonut.evaluation.interchange import Figures, chosen, mean_figure
from nanococonut.evaluation.pairs import MIN_PAIRS, Pairs
from nanococonut.inference.engine import Engine
from nanococonut.runtime.errors import UserError

DISTANCES = ["1", "2", "3", "4", "5+", "no path"]
FACTORS = (4, 8, 12, 16)  # of embeddings that are written; the best on the first half is taken
ERASE = 1.5  # 1 is a plain projection
BATCH_SIZE = 200
MIN_MASS = 0.1  # thoughts with less probability on concepts name none
WRITTEN = {
    "other": "concepts of the twin's entity",
    "own": "its own concepts",
    "control": "other concepts",
}
ERASED = {"right": "the right branch erased", "wrong": "a wrong branch erased"}


def concepts_of(edges: Sequence[tuple[str, str]]) -> list[str]:
    return sorted({node for edge in edges for node in edge if node[0].islower()})


def concept_probabilities(engine: Engine, question: str, n_thoughts: int) -> dict[str, float]:
    """Map each concept to the probability that it is named first after n_thoughts (section 5.3).

    This is the node that the search has reached. The name follows the thoughts, <eot> (if the
    method has it) and the word "Every" (unless the model reads compact examples). Its probability
    is the product over its tokens. Raise UserError if the text is not a ProsQA question or does
    not fit in block_size.
    """
    names = concepts_of(parse_question(question).edges)
    mark = "Every" if engine.config.render == "sentences" else ""
    [log_p] = engine.choose([question], [names], n_thoughts, mark=mark)
    return dict(zip(names, log_p.exp().tolist(), strict=True))


class Graph(NamedTuple):
    """The concepts of a ProsQA question and their distances from its entity and its twin's."""

    nodes: list[str]
    own: dict[str, int]
    other: dict[str, int]
    right: set[str]  # concepts that lead to the answer

    def chosen(self, d: int) -> dict[str, list[str]]:
        """Return the concepts at distance d for each key of WRITTEN and ERASED; {} if none fit."""
        own, other = ([x for x in self.nodes if steps.get(x) == d] for steps in self[1:3])
        if not own or not other:
            return {}
        control = [x for x in self.nodes if x not in own + other]
        right = [node for node in own if node in self.right]
        wrong = [node for node in own if node not in self.right]
        written = {"own": own, "other": other, "control": control}
        is_branching = len(right) == 1 and bool(wrong)  # one right branch, and a wrong one
        return written | ({"right": right, "wrong": wrong[:1]} if is_branching else {})


def graph(example: Example, twin: Example | None = None) -> Graph:
    """Return the graph of a question. UserError if it is not ProsQA."""
    edges, entity, _ = parse_question(example["question"])
    target, nodes = parse_sentence(example["answer"])[1], concepts_of(edges)
    right = {node for node in nodes if target in reachable(edges, node)}
    other = parse_question(twin["question"]).entity if twin else entity
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
    tokens, D, w = name_tokens(engine, graphs), len(DISTANCES), engine.model.wte.weight
    found = defaultdict(list)
    for g, hidden in zip(graphs, thoughts, strict=True):
        p = engine.model.head(hidden.to(w)).float().softmax(-1)
        p = p[:, [tokens[node] for node in g.nodes]].cpu()  # (K, nodes)
        found["mass"].append(p.sum(1))
        for name, steps in (("own", g.own), ("other", g.other)):
            columns = [min(steps[x], D - 1) - 1 if x in steps else D - 1 for x in g.nodes]
            is_column = F.one_hot(torch.tensor(columns), D).float()  # (nodes, D)
            found[name].append(p / p.sum(1, keepdim=True) @ is_column)
            found[f"base_{name}"].append(is_column.mean(0))
    return {name: torch.stack(x) for name, x in found.items()}


def write_by_hand(
    engine: Engine, graphs: Sequence[Graph], pairs: Pairs, thoughts: Tensor, t: int, d: int
) -> dict[str, Any]:
    """Write concepts into a thought, or erase one; all that follows is computed from it.

    thoughts  (N, n, C) of the questions as they are
    t         thought that is changed, from 1
    d         distance of the concepts
    Return name -> answers (N, m), NaN if the graph has no such concepts: other, own, control
    (concepts that are written), right, wrong (branches that are erased); and "factor".
    """
    concepts, (N, n, _) = [g.chosen(d) for g in graphs], thoughts.shape
    tokens = name_tokens(engine, graphs)
    w = engine.model.wte.weight.detach()
    mean = engine.model.thought_embedding(thoughts[: N // 2, t - 1].to(w)).mean(0).detach()

    def answers(name: str, rows: Sequence[int], factor: float) -> Tensor:
        result = torch.full((N, 2), torch.nan)
        rows = [i for i in rows if concepts[i].get(name)]
        for part in in_batches(rows, [0] * N, BATCH_SIZE):
            ids = [[tokens[node] for node in concepts[i][name]] for i in part]
            direction = torch.stack([w[x].mean(0) for x in ids])  # (B, C)
            unit = F.normalize(direction)

            def edit(i: int, fed: Tensor, direction: Tensor = direction, unit: Tensor = unit):
                if i != t - 1:
                    return fed
                if name in ERASED:
                    return fed - ERASE * (fed * unit).sum(1, keepdim=True) * unit
                return mean + factor * direction

            some = pairs.take(part)
            questions, candidates = some.questions()[0], some.candidates(engine)
            result[part] = engine.choose(questions, candidates, n, edit).cpu()
        return result

    first, second = range(N // 2), range(N // 2, N)
    flips = {f: (answers("other", first, f).argmax(1) == 1).sum() for f in FACTORS}
    factor = max(flips, key=flips.get)
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
    pairs, thoughts = pairs.take(index.tolist()), f.cells["thoughts"][index]  # (M, K, C)
    graphs = [graph(x, t) for x, t in zip(pairs.examples, pairs.twins, strict=True)]
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
        about = {"thought": k + 1, "mass": float(mean["mass"][k])}
        about |= {name: mean_figure(names[name][:, k, d - 1]) for name in ("own", "other")}
        best[d] = about | {"base": float(mean["base_own"][d - 1])}
    half = slice(len(index) // 2)
    d = max((1, 2), key=lambda d: lift(d, half).max())
    t = int(lift(d, half).argmax()) + 1
    answers = write_by_hand(engine, graphs, pairs, thoughts[:, :n], t, d)

    def points(labels: dict[str, str], candidate: int) -> list[dict[str, Any]]:
        figures = {name: chosen(answers[name], candidate, f.both_right[index]) for name in labels}
        return [{"id": name, "label": labels[name]} | x for name, x in figures.items() if x]

    write = {"thought": t, "distance": d, "factor": answers["factor"]}
    return row, best, write | {"points": points(WRITTEN, 1), "erase": points(ERASED, 0)}


@torch.no_grad()
def words_by_step(
    engine: Engine, f: Figures, pairs: Pairs, n: int
) -> dict[int, dict[str, dict[str, Any]]]:
    """Read thought i for the words of step i. Return step -> own, other: probability of them all.

    other  the words of step i of another question
    """
    task, c, found = TASKS[engine.config.task], engine.curriculum.c_thought, {}
    rendered = task.render(pairs.examples, engine.config.render)
    words = [[set(engine.tokenizer.encode(step)) for step in x["steps"]] for x in rendered]
    for i in range(n // c):
        rows = [row for row, steps in enumerate(words) if len(steps) > i]
        if len(rows) < MIN_PAIRS:
            break
        hidden = f.cells["thoughts"][rows, (i + 1) * c - 1]  # the last thought of the step
        p = engine.model.head(hidden.to(engine.model.wte.weight)).float().softmax(-1).cpu()
        own = [list(words[row][i]) for row in rows]
        sides = {"own": own, "other": [*own[1:], *own[:1]]}
        found[i + 1] = {
            name: mean_figure(torch.stack([p[k, ids].sum() for k, ids in enumerate(side)]))
            for name, side in sides.items()
        }
    return found
