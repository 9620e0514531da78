"""Read thoughts with the LM head (logit lens), and write concepts into them (steering).

Everything except words_by_step is for ProsQA only.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nanococonut.data.examples import Example
from nanococonut.data.graph import reachable
from nanococonut.data.prosqa import parse_question, parse_sentence
from nanococonut.data.tasks import TASKS
from nanococonut.evaluation.interchange import Figures, chosen, mean_figure
from nanococonut.evaluation.pairs import MIN_PAIRS, Pairs
from nanococonut.inference.engine import Engine
from nanococonut.runtime.errors import UserError

DISTANCES = ["1", "2", "3", "4", "5+", "no path"]
FACTORS = (4, 8, 12, 16)  # scales of a written embedding, chosen on the first half of the questions
ERASE = 1.5  # multiple of the component that is subtracted; 1 would be a projection
BATCH_SIZE = 200
MIN_MASS = 0.1  # a thought with less probability on all concepts names none
WRITTEN = {
    "other": "concepts of the twin's entity",
    "own": "its own concepts",
    "control": "other concepts",
}
ERASED = {"right": "the right branch erased", "wrong": "a wrong branch erased"}


def concepts_of(edges: Sequence[tuple[str, str]]) -> list[str]:
    return sorted({node for edge in edges for node in edge if node[0].islower()})


def concept_probabilities(engine: Engine, question: str, n_thoughts: int) -> dict[str, float]:
    """Map each concept to the probability that the model names it after n_thoughts (section 5.3).

    The paper takes this for the node that the search has reached. The name follows the thoughts,
    <eot> (if the method has it) and the word "Every" (unless the model reads compact examples). Its
    probability is the product over its tokens. Raise UserError if the text is not a ProsQA question
    or does not fit in block_size.
    """
    names = concepts_of(parse_question(question).edges)
    mark = "Every" if engine.config.render == "sentences" else ""
    [log_p] = engine.choose([question], [names], n_thoughts, mark=mark, is_answer=False)
    return dict(zip(names, log_p.exp().tolist(), strict=True))


class QuestionGraph(NamedTuple):
    """The concepts of a ProsQA question."""

    nodes: list[str]
    own: dict[str, int]  # steps from the entity; unreachable concepts are missing
    other: dict[str, int]  # steps from the twin's entity
    correct: set[str]  # concepts that lead to the answer

    def chosen(self, d: int) -> dict[str, list[str]]:
        """Map the keys of WRITTEN and ERASED to concepts at distance d; {} if there are none."""
        own, other = ([x for x in self.nodes if steps.get(x) == d] for steps in self[1:3])
        if not own or not other:
            return {}
        # as many as in `other`, since the mean of more embeddings is shorter
        control = [x for x in self.nodes if x not in own + other][: len(other)]
        correct = [node for node in own if node in self.correct]
        wrong = [node for node in own if node not in self.correct]
        written = {"own": own, "other": other, "control": control}
        if len(correct) == 1 and wrong:
            return written | {"right": correct, "wrong": wrong[:1]}
        return written


def graph(example: Example, twin: Example | None = None) -> QuestionGraph:
    """Return the graph of a question. Raise UserError if it is not ProsQA."""
    edges, entity, _ = parse_question(example["question"])
    target, nodes = parse_sentence(example["answer"])[1], concepts_of(edges)
    correct = {node for node in nodes if target in reachable(edges, node)}
    other = parse_question(twin["question"]).entity if twin else entity
    return QuestionGraph(nodes, reachable(edges, entity), reachable(edges, other), correct)


def name_tokens(engine: Engine, graphs: Sequence[QuestionGraph]) -> dict[str, int]:
    """Map each concept to the token of its name. Raise UserError if a name has several tokens."""
    tokens = {}
    for node in {node for g in graphs for node in g.nodes}:
        ids = engine.tokenizer.encode(" " + node)
        if len(ids) != 1:
            raise UserError(
                f"the name {node!r} has {len(ids)} tokens; the LM head predicts one at a time."
            )
        tokens[node] = ids[0]
    return tokens


@torch.no_grad()
def names_by_distance(
    engine: Engine, graphs: Sequence[QuestionGraph], thoughts: Tensor
) -> dict[str, Tensor]:
    """Apply the LM head to thoughts (N, K, C). Return, for the D columns of DISTANCES:

    own, other            (N, K, D)  fraction of the probability on concepts, by distance from the
                                     entity, from the twin's entity
    base_own, base_other  (N, D)     fraction of the concepts
    mass                  (N, K)     probability on all concepts
    """
    tokens, D, w = name_tokens(engine, graphs), len(DISTANCES), engine.model.wte.weight
    results = defaultdict(list)
    for g, hidden in zip(graphs, thoughts, strict=True):
        p = engine.model.head(hidden.to(w)).float().softmax(-1)
        p = p[:, [tokens[node] for node in g.nodes]].cpu()  # (K, nodes)
        results["mass"].append(p.sum(1))
        for name, steps in (("own", g.own), ("other", g.other)):
            columns = [min(steps[x], D - 1) - 1 if x in steps else D - 1 for x in g.nodes]
            is_column = F.one_hot(torch.tensor(columns), D).float()  # (nodes, D)
            results[name].append(p / p.sum(1, keepdim=True) @ is_column)
            results[f"base_{name}"].append(is_column.mean(0))
    return {name: torch.stack(x) for name, x in results.items()}


def steer(
    engine: Engine, graphs: Sequence[QuestionGraph], pairs: Pairs, thoughts: Tensor, t: int, d: int
) -> tuple[int, dict[str, Tensor]]:
    """Answer with one thought changed: concepts are written into it, or a branch is erased.

    thoughts  (N, n, C) without intervention
    t         number of the thought that is changed, from 1
    d         distance of the concepts from an entity

    Return (factor, answers). The factor is the one of FACTORS that changes the most answers in the
    first half of the questions. The answers map each key of WRITTEN and ERASED to log-probabilities
    (N, 2) on the second half; they are NaN on the first half and if a graph has no such concepts.
    """
    concepts, (N, n, _) = [g.chosen(d) for g in graphs], thoughts.shape
    tokens = name_tokens(engine, graphs)
    w = engine.model.wte.weight.detach()
    mean = engine.model.thought_embedding(thoughts[: N // 2, t - 1].to(w)).mean(0).detach()

    def answers(name: str, rows: Sequence[int], factor: float) -> Tensor:
        result = torch.full((N, 2), torch.nan)
        rows = [i for i in rows if concepts[i].get(name)]
        for start in range(0, len(rows), BATCH_SIZE):
            index = rows[start : start + BATCH_SIZE]
            ids = [[tokens[node] for node in concepts[i][name]] for i in index]
            direction = torch.stack([w[x].mean(0) for x in ids])  # (B, C)
            unit = F.normalize(direction)

            def edit(i: int, fed: Tensor, direction: Tensor = direction, unit: Tensor = unit):
                if i != t - 1:
                    return fed
                if name in ERASED:
                    return fed - ERASE * (fed * unit).sum(1, keepdim=True) * unit
                return mean + factor * direction

            batch = pairs.take(index)
            questions, candidates = batch.questions()[0], batch.candidates(engine)
            result[index] = engine.choose(questions, candidates, n, edit).cpu()
        return result

    first, second = range(N // 2), range(N // 2, N)
    flips = {f: (answers("other", first, f).argmax(1) == 1).sum() for f in FACTORS}
    factor = max(flips, key=flips.get)
    return factor, {name: answers(name, second, factor) for name in WRITTEN | ERASED}


def readout(
    engine: Engine, f: Figures, pairs: Pairs, n: int
) -> tuple[dict[str, Any], dict[int, dict[str, Any]], dict[str, Any]]:
    """Read the thoughts with the LM head, then steer the one that names concepts most clearly.

    Return (means of names_by_distance, distance -> the thought that names it most, results of
    steering). The thought is chosen on one half of the questions and steered on the other half.
    """
    index = f.deep.nonzero()[:, 0]
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
    pairs, thoughts = pairs.take(index.tolist()), f.outcomes["thoughts"][index]  # (M, K, C)
    graphs = [graph(x, t) for x, t in zip(pairs.examples, pairs.twins, strict=True)]
    names = names_by_distance(engine, graphs, thoughts)
    mean = {k: v.mean(0) for k, v in names.items()}
    row = {"distances": DISTANCES, "n": len(index)}
    row |= {name: v.double().numpy().round(3).tolist() for name, v in mean.items()}

    def margin(d: int, rows: slice) -> Tensor:  # (n,), own - other; 0 if a thought names nothing
        above = (names["own"] - names["other"])[rows, :n, d - 1].mean(0)
        return above * (names["mass"][rows, :n].mean(0) >= MIN_MASS)

    best = {}
    for d in (1, 2):
        k = int(margin(d, slice(None)).argmax())
        best[d] = {
            "thought": k + 1,
            "mass": float(mean["mass"][k]),
            "own": mean_figure(names["own"][:, k, d - 1]),
            "other": mean_figure(names["other"][:, k, d - 1]),
            "base": float(mean["base_own"][d - 1]),
        }
    half = slice(len(index) // 2)
    d = max((1, 2), key=lambda d: margin(d, half).max())
    t = int(margin(d, half).argmax()) + 1
    factor, answers = steer(engine, graphs, pairs, thoughts[:, :n], t, d)

    def points(labels: dict[str, str], candidate: int) -> list[dict[str, Any]]:
        figures = {name: chosen(answers[name], candidate, f.both_correct[index]) for name in labels}
        return [{"id": name, "label": labels[name]} | x for name, x in figures.items() if x]

    write = {"thought": t, "distance": d, "factor": factor}
    return row, best, write | {"points": points(WRITTEN, 1), "erase": points(ERASED, 0)}


@torch.no_grad()
def words_by_step(
    engine: Engine, f: Figures, pairs: Pairs, n: int
) -> dict[int, dict[str, dict[str, Any]]]:
    """Apply the LM head to the last thought of step i. Return i -> total probability of words:

    own    of step i
    other  of step i of another question
    """
    task, c, result = TASKS[engine.config.task], max(1, engine.curriculum.c_thought), {}
    rendered = task.render(pairs.examples, engine.config.render)
    words = [[set(engine.tokenizer.encode(step)) for step in x["steps"]] for x in rendered]
    for i in range(n // c):
        rows = [row for row, steps in enumerate(words) if len(steps) > i]
        if len(rows) < MIN_PAIRS:
            break
        hidden = f.outcomes["thoughts"][rows, (i + 1) * c - 1]
        p = engine.model.head(hidden.to(engine.model.wte.weight)).float().softmax(-1).cpu()
        own = [list(words[row][i]) for row in rows]
        sides = {"own": own, "other": [*own[1:], *own[:1]]}
        result[i + 1] = {
            name: mean_figure(torch.stack([p[k, ids].sum() for k, ids in enumerate(side)]))
            for name, side in sides.items()
        }
    return result
