"""ProsQA: to which of two concepts does a chain of facts lead from an entity?

The paper's Algorithm 1, taken literally, does not reproduce the statistics of the released data.
This generator was fitted to the 800 released validation and test examples instead; a search around
the defaults of GraphConfig gave no significant improvement. It draws a thousand graphs at once as
arrays and loops over the nodes, parents first.

Shortcuts that ignore the entity solve the released examples (shortcuts.py). One chooses the option
farther from its nearest parentless node (92 % correct), another the option farther from its
farthest one (94 %). With GraphConfig(matched=True) these rules get 50 % and 56 %. With
GraphConfig(balanced=True) a fair coin decides which root is the entity, so no rule that ignores the
entity gets more than 50 %.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from nanococonut.config import TrainConfig
from nanococonut.data import graph
from nanococonut.data.examples import Example
from nanococonut.data.generator import BATCH, draw
from nanococonut.data.graph import parents_of, reachable
from nanococonut.runtime.cli import Options, option
from nanococonut.runtime.errors import UserError

NAMES = (
    "Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom Wren"
).split()
CONCEPTS = (
    "bompus boompus brimpus chorpus dumpus felpus fompus gerpus gorpus grimpus gwompus hilpus "
    "impus jelpus jompus kerpus lempus lorpus numpus quimpus rempus rompus rorpus scrompus "
    "shumpus sterpus storpus terpus timpus tumpus vumpus worpus wumpus yerpus yimpus yumpus "
    "zhorpus zumpus"
).split()
WORDS = NAMES + CONCEPTS
# all words and punctuation of both styles, and the mark before the answer
VOCABULARY = [*WORDS, "Every", "is", "a", "Is", "or", ".", "?", "###"]

FAR = 10_000  # distance of an unreachable node
# fitted: probabilities that all parents of a node descend only from root 0, or only from root 1
# (otherwise any node can be one); a parent's weight is (DEPTH_WEIGHT * depth + 1) ** depth_power
ROOT_PROBABILITY, DEPTH_WEIGHT = (0.35, 0.455), 1.5


@dataclass(frozen=True)
class GraphConfig(Options):
    """Settings of the graphs. The defaults fit the released examples."""

    n_nodes: int = option(28, "nodes, before those without edges are removed", ge=4, le=len(WORDS))
    min_hops: int = option(3, "fewest steps from the entity to the answer", ge=1)
    max_hops: int = option(6, "most steps from the entity to the answer")
    parent_rate: float = option(1.5, "mean of the Poisson number of parents", ge=0.01, le=20)
    depth_power: float = option(1.0, "higher values give longer chains", ge=0, le=20)
    matched: bool = option(False, "options are equally far from their nearest parentless node")
    # each graph is equally likely with either answer
    balanced: bool = option(False, "options are the deepest nodes of their roots, equally deep")


def _graphs(trained: TrainConfig | GraphConfig, **changes: Any) -> GraphConfig:
    return GraphConfig(trained.n_nodes, trained.min_hops, trained.max_hops, **changes)


def _longer_graphs(trained: TrainConfig | GraphConfig) -> GraphConfig:
    hops = dict(min_hops=trained.max_hops + 1, max_hops=trained.max_hops + 2)
    n_nodes = min(round(trained.n_nodes * 8 / 7), len(WORDS))
    return GraphConfig(n_nodes, **hops, **LONG_CHAINS)


# without these settings long chains are very rare, and the rule "farthest" solves all of them
LONG_CHAINS: dict[str, Any] = dict(depth_power=6, balanced=True)
# split -> function from the training settings to the settings of the split
SPLITS: dict[str, Callable[[TrainConfig | GraphConfig], GraphConfig]] = {
    "prosqa": _graphs,  # as in training, with shortcuts
    "prosqa_matched": partial(_graphs, matched=True),
    "prosqa_balanced": partial(_graphs, balanced=True),
    "prosqa_long": _longer_graphs,  # one or two hops more than in training
    "prosqa_dense": partial(_graphs, balanced=True, parent_rate=2.5),  # one more parent per node
}


def easier_configs(trained: TrainConfig) -> list[GraphConfig]:
    """Return settings with fewer steps than the task, which make search easier to learn."""
    n = trained.min_hops
    return [GraphConfig(trained.n_nodes, min_hops=1, max_hops=n - 1)] if n > 1 else []


def longest_configs(trained: TrainConfig) -> list[GraphConfig]:
    """Return settings with the most steps, which are rare in the training split."""
    min_hops = max(trained.min_hops, trained.max_hops - 1)
    return [GraphConfig(trained.n_nodes, min_hops, trained.max_hops, **LONG_CHAINS)]


def configs_by_hops(trained: TrainConfig) -> dict[int, GraphConfig]:
    """Return number of steps -> settings without shortcuts, up to two steps more than trained."""
    n = trained.max_hops
    splits = {h: "prosqa_long" if h > n else "prosqa_balanced" for h in range(1, n + 3)}
    return {h: replace(SPLITS[x](trained), min_hops=h, max_hops=h) for h, x in splits.items()}


class Graphs(NamedTuple):
    """G graphs of N nodes; nodes 0 and 1 are the roots."""

    parent: np.ndarray  # (G, N, K) parents in the order in which they were drawn, then -1
    label: np.ndarray  # (G, N) 1: reachable from root 0, 2: from root 1, 3: from both, 0: neither
    depth: np.ndarray  # (G, N) steps from the nearest parentless node
    hops: np.ndarray  # (G, 2, N) steps from root 0 and from root 1, FAR if unreachable
    leaf: np.ndarray  # (G, N) True without children

    def take(self, index: np.ndarray) -> "Graphs":
        return Graphs(*(array[index] for array in self))


def sample_graphs(rng: np.random.Generator, size: int, c: GraphConfig) -> Graphs:
    """Draw `size` graphs; pick_question rejects some of them."""
    n = c.n_nodes
    n_requested = rng.poisson(c.parent_rate, (size, n))
    u = rng.random((size, n))
    only = np.where(u < ROOT_PROBABILITY[0], 1, np.where(u < sum(ROOT_PROBABILITY), 2, 0))
    parent = np.full((size, n, max(1, n_requested.max())), -1, np.int16)
    label = np.zeros((size, n), np.int8)
    label[:, 0], label[:, 1] = 1, 2
    depth = np.zeros((size, n), np.int16)
    hops = np.full((size, 2, n), FAR, np.int16)
    hops[:, 0, 0] = hops[:, 1, 1] = 0
    leaf = np.ones((size, n), bool)
    for node in range(2, n):
        allowed = (only[:, node, None] == 0) | (label[:, :node] == only[:, node, None])
        n_parents = np.minimum(n_requested[:, node], allowed.sum(1))
        # weighted sampling without replacement: sort by Exponential(1) / weight, smallest first
        weight = (DEPTH_WEIGHT * depth[:, :node] + 1) ** c.depth_power
        key = rng.standard_exponential((size, node)) / weight
        order = np.where(allowed, key, np.inf).argsort(1)
        depth[:, node] = np.where(n_parents > 0, FAR, 0)
        for k in range(n_parents.max()):
            g = np.flatnonzero(n_parents > k)
            p = order[g, k]
            parent[g, node, k] = p
            label[g, node] |= label[g, p]
            depth[g, node] = np.minimum(depth[g, node], depth[g, p] + 1)
            hops[g, :, node] = np.minimum(hops[g, :, node], hops[g, :, p] + 1)
            leaf[g, p] = False
    return Graphs(parent, label, depth, hops, leaf)


def pick_question(
    rng: np.random.Generator, graphs: Graphs, c: GraphConfig
) -> tuple[Graphs, np.ndarray, np.ndarray, np.ndarray]:
    """Draw entity and options, and drop graphs that do not fit the settings.

    Return (the other graphs, root, target, neg_target), the last three as nodes (G):
    root        the entity: 0 or 1
    target      a deepest leaf that only the entity leads to
    neg_target  a leaf that only the other root leads to
    """
    # (G, 2, N) steps from a root to the leaves that only it leads to, -1 for all other nodes
    exclusive = graphs.leaf[:, None] & (graphs.label[:, None] == np.array([[1], [2]]))
    reach = np.where(exclusive, graphs.hops, -1)
    deepest = reach.max(2)  # (G, 2)
    coin = rng.random(len(deepest)) < 0.5
    root = np.where(deepest[:, 0] == deepest[:, 1], coin, deepest[:, 1] > deepest[:, 0]).astype(int)
    n_hops = deepest.max(1)
    orphan = graphs.depth == 0
    # deepest is 0 for a root that is a leaf, and -1 for one without exclusive leaves
    ok = (deepest.min(1) >= 1) & (c.min_hops <= n_hops) & (n_hops <= c.max_hops)
    ok &= (orphan & ~graphs.leaf).sum(1) <= len(NAMES)
    ok &= (~orphan).sum(1) <= len(CONCEPTS)

    g = np.flatnonzero(ok)
    graphs, root = graphs.take(g), root[g]
    target = random_true(rng, reach[g, root] == n_hops[g, None])
    others = reach[g, 1 - root] >= 1
    if c.balanced:
        others = reach[g, 1 - root] == n_hops[g, None]
    if c.matched:
        others &= graphs.depth == graphs.depth[np.arange(len(g)), target][:, None]
    neg_target = random_true(rng, others)
    ok = others.any(1)
    return graphs.take(ok), root[ok], target[ok], neg_target[ok]


def random_true(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """Draw the index of a True in each row of `mask` (G, N), uniformly. Return (G)."""
    return np.where(mask, rng.random(mask.shape), -1).argmax(1)


def shortest_paths(
    rng: np.random.Generator, graphs: Graphs, root: np.ndarray, target: np.ndarray
) -> np.ndarray:
    """Draw one shortest path per graph: (G, longest + 1) nodes, target first, root repeated.

    All shortest paths are equally likely, as in the released examples: 131 of 300 have several
    shortest paths, and of the 96 with two, 46 state the first.
    """
    parent, g = graphs.parent, np.arange(len(root))
    hops = graphs.hops[g, root]  # (G, N)
    n_paths = np.zeros(hops.shape, int)  # (G, N) number of shortest paths from the root
    n_paths[g, root] = 1
    through = np.zeros(parent.shape, int)  # (G, N, K) n_paths through each parent
    for node in range(2, hops.shape[1]):
        above = parent[:, node]  # (G, K)
        nearer = (above >= 0) & (hops[g[:, None], above] + 1 == hops[:, node, None])
        through[:, node] = np.where(nearer, n_paths[g[:, None], above], 0)
        n_paths[:, node] += through[:, node].sum(1)
    path = [target]
    for _ in range(hops[g, target].max(initial=0)):
        node = path[-1].copy()
        unfinished = np.flatnonzero(node != root)
        below = node[unfinished]
        cumulative = through[unfinished, below].cumsum(1)  # (U, K)
        drawn = rng.integers(cumulative[:, -1])
        k = (cumulative <= drawn[:, None]).sum(1)
        node[unfinished] = parent[unfinished, below, k]
        path.append(node)
    return np.stack(path, 1)


def sample_batch(rng: np.random.Generator, config: GraphConfig) -> list[Example]:
    """Draw BATCH graphs. Return the examples of those that fit, in the released format."""
    graphs, *query = pick_question(rng, sample_graphs(rng, BATCH, config), config)
    orphan = graphs.depth == 0
    size = len(orphan)
    names = rng.random((size, len(NAMES))).argsort(1).tolist()
    concepts = rng.random((size, len(CONCEPTS))).argsort(1).tolist()
    g, child, k = np.nonzero(graphs.parent >= 0)  # (E), the edges of all graphs
    n_edges = np.bincount(g, minlength=size)
    places = rng.random((size, n_edges.max(initial=0))).tolist()  # order of the sentences
    paths = shortest_paths(rng, graphs, *query[:2])
    target_first = (rng.random(size) < 0.5).tolist()
    kept = ~(orphan & graphs.leaf)  # nodes without edges are removed
    numbers = kept.cumsum(1) - 1  # (G, N)
    # one list over all graphs, sliced for each example: faster than many small arrays
    edges = np.stack([numbers[g, graphs.parent[g, child, k]], numbers[g, child]], 1).tolist()
    is_person = orphan[kept].tolist()
    edge_ends, node_ends = n_edges.cumsum().tolist(), kept.sum(1).cumsum().tolist()
    paths = np.take_along_axis(numbers, paths, 1).tolist()
    roots, targets, neg_targets = (numbers[np.arange(size), v].tolist() for v in query)
    examples: list[Example] = []
    edge = node = 0
    for i, (edge_end, node_end) in enumerate(zip(edge_ends, node_ends, strict=True)):
        root, target, neg_target = roots[i], targets[i], neg_targets[i]
        name, concept = iter(names[i]), iter(concepts[i])
        symbols = [
            NAMES[next(name)] if person else CONCEPTS[next(concept)]
            for person in is_person[node:node_end]
        ]
        facts = [_sentence(symbols[a], symbols[b]) for a, b in edges[edge:edge_end]]
        text = " ".join([facts[j] for j in sorted(range(len(facts)), key=places[i].__getitem__)])
        first, second = (target, neg_target) if target_first[i] else (neg_target, target)
        path = paths[i][paths[i].index(root) :: -1]  # the entity first
        examples.append(
            {  # type: ignore[typeddict-unknown-key]
                "question": f"{text} Is {symbols[root]} a {symbols[first]} or {symbols[second]}?",
                "answer": _sentence(symbols[root], symbols[target]),
                "steps": [_sentence(symbols[a], symbols[b]) for a, b in pairwise(path)],
                "idx_to_symbol": symbols,
                "edges": edges[edge:edge_end],
                "root": root,
                "target": target,
                "neg_target": neg_target,
            }
        )
        edge, node = edge_end, node_end
    return examples


def marked_graph(example: Example) -> graph.Graph:
    """Return the graph with entity, target and distractor marked, for graph.graph_keys.

    Words, node numbers and the order of sentences and options make no difference. An example that
    does not store its graph is parsed. Raise UserError if it is not ProsQA.
    """
    try:
        edges = [(int(parent), int(child)) for parent, child in example["edges"]]  # type: ignore
        query = [int(example[key]) for key in ("root", "target", "neg_target")]  # type: ignore
    except (KeyError, TypeError, ValueError):
        edges, entity, options = parse_question(example["question"])
        target = parse_sentence(example["answer"])[1]
        query = [entity, target, options[options[0] == target]]
    marks = {v: sum(1 << bit for bit, w in enumerate(query) if w == v) for v in query}
    return graph.marked_graph(edges, marks)


generate = partial(draw, sample_batch, marked_graph, GraphConfig())


# ---- sentences


class Question(NamedTuple):
    """A parsed question. edges: (parent, child) names in the order of the text."""

    edges: list[tuple[str, str]]
    entity: str
    options: tuple[str, str]


QUESTION_RE = re.compile(r"Is ([A-Z]\w*) an? ([a-z]\w*) or (?:an? )?([a-z]\w*)\?")


def parse_question(question: str) -> Question:
    """Parse a question with any words and white space. Raise UserError if it is not ProsQA."""
    *facts, query = " ".join(question.split()).split(".")
    match = QUESTION_RE.fullmatch(query.strip())
    if not match or not facts:
        raise UserError(
            f"not a ProsQA question: {question[-60:]!r}.\nWrite facts and a question: "
            '"Tom is a lempus. Every lempus is a dumpus. Is Tom a dumpus or yimpus?"'
        )
    return Question([parse_sentence(fact) for fact in facts], match[1], (match[2], match[3]))


def parse_sentence(sentence: str) -> tuple[str, str]:
    """Return (parent, child) of a fact, step or answer, with or without its full stop."""
    match sentence.strip().removesuffix(".").split():
        case ["Every", parent, "is", "a" | "an", child] if parent.islower() and child.islower():
            return parent, child
        case [person, "is", "a" | "an", child] if person[0].isupper() and child.islower():
            return person, child
    raise UserError(
        f"not a ProsQA sentence: {sentence.strip().removesuffix('.')[:60]!r}.\n"
        'Write "Tom is a lempus." (capitalize names) or "Every lempus is a dumpus."'
    )


def solve(question: str) -> str | None:
    """Return the answer found by search, or None if not exactly one option follows."""
    edges, entity, options = parse_question(question)
    correct = {*options} & reachable(edges, entity).keys()
    return f"{entity} is a {correct.pop()}." if len(correct) == 1 else None


def twin(example: Example) -> Example | None:
    """Return the same question about the other root, so that the other option is correct.

    One word differs. Return None if no other name leads only to the other option.
    """
    edges, entity, options = parse_question(example["question"])
    target = parse_sentence(example["answer"])[1]
    option = options[options[0] == target]
    steps = {name: reachable(edges, name) for name, _ in edges if name[0].isupper()}
    others = [name for name in steps if option in steps[name] and target not in steps[name]]
    if not others or entity in others:
        return None
    # if there are several names, take the generator's root, else the one farthest from the option
    symbols: list[str] = example.get("idx_to_symbol", [])  # type: ignore
    other = max(others, key=lambda name: (name in symbols[:2], steps[name][option]))
    parents, path = parents_of(edges), [option]
    while path[-1] != other:
        path.append(min(parents[path[-1]], key=lambda node: steps[other].get(node, FAR)))
    facts, _, query = example["question"].rpartition(" Is ")
    changes: dict[str, Any] = {
        "question": f"{facts} Is {query.replace(entity, other, 1)}",
        "answer": _sentence(other, option),
        "steps": [_sentence(*edge) for edge in pairwise(path[::-1])],
    }
    if "root" in example:
        changes |= {"root": symbols.index(other), "target": example["neg_target"]}  # type: ignore
        changes |= {"neg_target": example["target"]}  # type: ignore
    return {**example, **changes}  # type: ignore[typeddict-item]


def reworded(example: Example) -> str | None:
    """Return the question with two other options, one of which the entity leads to.

    It needs the same search but has another answer. A twin gets the same options. Return None if
    the graph has no such options.
    """
    edges, entity, options = parse_question(example["question"])
    steps = {name: reachable(edges, name) for name, _ in edges if name[0].isupper()}
    roots = {node: {name for name in steps if node in steps[name]} for _, node in edges}
    new = []
    for old in options:
        same = [n for n in roots if n not in options and roots[n] == roots.get(old)]
        if not same:
            return None
        new.append(max(same, key=lambda n: (min(steps[name][n] for name in roots[n]), n)))
    facts = example["question"].rpartition(" Is ")[0]
    return f"{facts} Is {entity} a {new[1]} or {new[0]}?"


def renamed(example: Example, twin: Example) -> str:
    """Return the question with the names of the two entities exchanged, in the facts too.

    The search is the same, step by step; only the name that is asked about is the twin's.
    """
    a, b = (parse_question(x["question"]).entity for x in (example, twin))
    return _exchange(example["question"], a, b)


def retargeted(example: Example) -> str:
    """Return the question with the names of the two options exchanged in the facts.

    The search begins as before, but it ends at the other option.
    """
    facts, query = example["question"].rsplit(" Is ", 1)
    return f"{_exchange(facts, *parse_question(example['question']).options)} Is {query}"


def _exchange(text: str, a: str, b: str) -> str:
    names = {a: b, b: a}
    return re.sub(r"\w+", lambda m: names.get(m[0], m[0]), text)


# ---- compact style: "Every p is a c." becomes " p c.", the query "? Tom? A? B", a step " p c", the
# answer "A". Each word follows exactly one space, so it is always the same token of a word-level
# vocabulary. A "?" precedes the entity and each option; without it the smear, which adds the
# previous word, would make them look like edges (measured: docs/LOG.md).


def compact_question(question: str) -> str:
    """Return the facts, then "? Tom? A? B". Raise UserError as in parse_question."""
    edges, entity, (first, second) = parse_question(question)
    facts = "".join([f" {parent} {child}." for parent, child in edges])
    return f"{facts}? {entity}? {first}? {second}"


def frontiers(question: str) -> list[str]:
    """Return the words 1, 2, ... steps from the entity in compact style: " a b", " c", ..."""
    edges, entity, _ = parse_question(question)
    steps = reachable(edges, entity)
    words = [""] * max(steps.values())
    for word, n in steps.items():
        if n:
            words[n - 1] += f" {word}"
    return words


def compact_example(example: Example) -> Example:
    """Return the example in compact style; other keys are unchanged."""
    return {
        **example,
        "question": compact_question(example["question"]),
        "steps": [" {} {}".format(*parse_sentence(step)) for step in example["steps"]],
        "answer": parse_sentence(example["answer"])[1],
    }


def expand_steps(text: str, question: str = "") -> list[str]:
    """Return concatenated compact steps as sentences; a single last word is unchanged."""
    words = text.split()
    pairs = [words[i : i + 2] for i in range(0, len(words), 2)]
    return [_sentence(*pair) if len(pair) == 2 else pair[0] for pair in pairs]


def expand_answer(text: str, question: str) -> str:
    """Return a compact answer as a sentence; anything but a single word is unchanged."""
    words = text.split()
    return _sentence(parse_question(question).entity, words[0]) if len(words) == 1 else text


@lru_cache(len(WORDS) ** 2)  # a lookup is faster than formatting
def _sentence(parent: str, child: str) -> str:
    return f"{parent} is a {child}." if parent[0].isupper() else f"Every {parent} is a {child}."
