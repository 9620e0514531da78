"""One ProsQA question, thought by thought: what the LM head reads in each thought (logit lens),
which facts it attends to, and which answer would follow."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanococonut.data.examples import Example
from nanococonut.data.graph import reachable
from nanococonut.data.prosqa import parse_question, parse_sentence
from nanococonut.data.tasks import TASKS
from nanococonut.evaluation.insight import count
from nanococonut.evaluation.pairs import Pairs
from nanococonut.inference.branch import Branch, Slots
from nanococonut.inference.engine import Engine

State = dict[str, Any]


def question_views(
    engine: Engine, pairs: Pairs, correct: Sequence[bool], n: int
) -> list[dict[str, Any]]:
    """Return the views of n questions: the first of each depth, then the first wrong ones."""
    first = [pairs.groups.index(h) for h in sorted(set(pairs.groups))]
    chosen = first + [i for i, x in enumerate(correct) if not x and i not in first]
    n_thoughts = engine.manifest["n_thoughts"]
    return [question_view(engine, pairs.examples[i], n_thoughts) for i in chosen[:n]]


def question_view(engine: Engine, example: Example, n: int) -> dict[str, Any]:
    """Return the states of a question after 0, 1, ..., n thoughts, as page.py draws them.

    If it has a twin of the same length, "swapped" has the states with the twin's thoughts in the
    question's slots. Raise UserError if the text is not a ProsQA question.
    """
    edges, entity, options = parse_question(example["question"])
    nodes = list(dict.fromkeys(node for edge in edges for node in edge))
    children = {child for _, child in edges}
    steps = [reachable(edges, x) for x in nodes if x not in children] or [reachable(edges, entity)]
    answer = parse_sentence(example["answer"])[1] if example["answer"] else None
    own, twin = reachable(edges, entity), TASKS["prosqa"].twin(example) if answer else None
    depth = f"{count(own[answer], 'step')}: " if answer in own else ""
    branch, states, _ = _states(engine, example["question"], nodes, n)
    other = swapped = None
    if twin:
        other = nodes.index(parse_question(twin["question"]).entity)
        donor, donor_states, slots = _states(engine, twin["question"], nodes, n)
        if torch.equal(branch.start, donor.start):  # keys depend on positions
            swapped = donor_states
            for state, content in zip(swapped, slots, strict=True):
                branch.restart().put(content)
                state["answer"] = _answer(branch)
    return {
        "title": f"{depth}{entity}, {options[0]} or {options[1]}",
        "question": f"Is {entity} a {options[0]} or {options[1]}?",
        "nodes": nodes,
        "levels": [min(s.get(node, len(nodes)) for s in steps) for node in nodes],
        "edges": [[nodes.index(a), nodes.index(b)] for a, b in edges],
        "entity": nodes.index(entity) if entity in nodes else None,
        "other": other,
        "candidates": list(options),
        "answer": answer,
        "states": states,
        "swapped": swapped,
    }


@torch.no_grad()
def _states(
    engine: Engine, question: str, nodes: Sequence[str], n: int
) -> tuple[Branch, list[State], list[Slots]]:
    """Return (branch, states, slots) of a question, the last two after 0, 1, ... n thoughts."""
    edges, entity, options = parse_question(question)
    answers = [f"{entity} is a {option}." for option in options]
    examples = [Example(question=question, steps=[], answer=answer) for answer in answers]
    rendered = TASKS["prosqa"].render(examples, engine.config.render)
    encode = engine.tokenizer.encode
    branch = engine.branch([question], [[x["answer"] for x in rendered]], n)
    names = [encode(" " + node) for node in nodes]
    facts = rendered[0]["question"].split(".")[: len(edges)]
    n_tokens = [len(encode(fact + ".")) for fact in facts]
    queries: list[Tensor] = []
    layer = engine.model.h[0].attn
    hook = layer.c_attn.register_forward_hook(lambda _, x, qkv: queries.append(qkv.chunk(3, -1)[0]))
    states, slots = [], []
    for k in range(n + 1):
        state: State = {"p": None, "attention": None}
        if k:
            branch.think(1)
            keys = branch.cache.data[0, 0, 0, :, : int(branch.cache.lengths[0])]  # (nh, T, hs)
            q = queries[-1].view(layer.n_head, -1, 1).to(keys)  # (nh, hs, 1), of the last position
            weights = ((keys @ q)[..., 0] / keys.shape[-1] ** 0.5).softmax(-1).mean(0)  # (T,)
            of_facts = weights[: sum(n_tokens)].split(n_tokens)
            state["attention"] = [round(float(w.sum()), 3) for w in of_facts]
        if k and all(len(t) == 1 for t in names):  # the LM head predicts one token
            p = engine.model.head(branch.thoughts[-1]).float().softmax(-1)[0]
            state["p"] = [round(float(p[t[0]]), 3) for t in names]
        slots.append(branch.slots(k))
        states.append(state | {"answer": _answer(branch)})  # last, since it adds queries
    hook.remove()
    return branch, states, slots


def _answer(branch: Branch) -> list[float]:
    return [round(p, 3) for p in branch.answer()[0].exp().tolist()]
