"""ProsQA: which of two concepts does a chain of facts lead to? Graphs like the released ones.

The paper's Algorithm 1, read literally, does not reproduce the released statistics. This generator
was fitted to the 800 released validation and test examples instead (GraphConfig has the fitted
values; a search near them gave nothing better beyond noise). It draws a thousand graphs at a
time and loops over the nodes, parents first.

The released examples can be answered by shortcuts: ignore the entity, choose the option farther
from its nearest parentless node (92 % correct) or from its farthest one (94 %); see shortcuts.py.
With GraphConfig(matched=True) these give 50 % and 56 %. With GraphConfig(balanced=True) a fair coin
decides which root is the entity, so no rule that ignores the entity beats 50 %.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from nanococonut.data import isomorphism
from nanococonut.data.examples import Example
from nanococonut.data.generator import BATCH, draw
from nanococonut.data.search import children_of, distances, parents_of, reachable
from nanococonut.runtime.cli import option, validate
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
# every word and sign of both styles, and the mark before the answer
VOCABULARY = [*NAMES, *CONCEPTS, "Every", "is", "a", "Is", "or", ".", "?", "###"]

WORDS = NAMES + CONCEPTS
# "w is a v." for every pair of words, at 55 * w + v: a lookup is faster than formatting
SENTENCES = [
    f"{w} is a {v}." if w in NAMES else f"Every {w} is a {v}." for w in WORDS for v in WORDS
]
FAR = 10_000  # distance of an unreachable node
# fitted: the fractions of nodes whose parents all descend from root 0, and from root 1; all other
# nodes take parents anywhere, drawn with weight (DEPTH_WEIGHT * depth + 1) ** depth_power
SHARES, DEPTH_WEIGHT = (0.35, 0.455), 1.5


@dataclass(frozen=True)
class GraphConfig:
    """Settings of the graphs. The defaults fit the released examples."""

    n_nodes: int = option(28, "nodes before those without edges go", ge=4, le=len(WORDS))
    min_hops: int = option(3, "fewest steps from the entity to the answer", ge=1)
    max_hops: int = option(6, "most steps from the entity to the answer")
    parent_rate: float = option(1.5, "mean of the Poisson number of parents", ge=0.01, le=20)
    depth_power: float = option(1.0, "higher values give longer chains", ge=0, le=20)
    matched: bool = option(False, "options equally far from their nearest parentless node")
    # the same graph with the other answer is equally likely
    balanced: bool = option(False, "options the deepest of their own root, and equally deep")

    def __post_init__(self) -> None:
        validate(self)


# split -> what it changes in the settings of training
SPLITS: dict[str, Callable[[GraphConfig], dict[str, Any]]] = {
    "prosqa": lambda base: {},  # as in training, with all shortcuts
    "prosqa_matched": lambda base: {"matched": True},
    "prosqa_balanced": lambda base: {"balanced": True},
    # one or two hops more than any in training
    "prosqa_long": lambda base: {
        "balanced": True,
        "min_hops": base.max_hops + 1,
        "max_hops": base.max_hops + 2,
        # such chains are very rare otherwise, and "farthest" solves them all
        "n_nodes": min(round(base.n_nodes * 8 / 7), len(WORDS)),
        "depth_power": 6,
    },
    # one more parent per node
    "prosqa_dense": lambda base: {"balanced": True, "parent_rate": base.parent_rate + 1},
}


def split_config(name: str, base: GraphConfig) -> GraphConfig:
    """Return the settings of a split for a model trained on the graphs of `base`."""
    return replace(replace(base, matched=False, balanced=False), **SPLITS[name](base))


class Graphs(NamedTuple):
    """G graphs of N nodes; nodes 0 and 1 are the roots."""

    parent: np.ndarray  # (G, N, K) parents in the order they were drawn, then -1
    label: np.ndarray  # (G, N) 1: root 0 leads here, 2: root 1 does, 3: both
    depth: np.ndarray  # (G, N) steps to the nearest parentless node
    hops: np.ndarray  # (G, 2, N) steps from root 0 and from root 1, FAR if there is no path
    leaf: np.ndarray  # (G, N) no children

    def take(self, index: np.ndarray) -> "Graphs":
        return Graphs(*(array[index] for array in self))


def sample_graphs(rng: np.random.Generator, size: int, c: GraphConfig) -> Graphs:
    """Draw `size` graphs; pick_question rejects some of them later."""
    n = c.n_nodes
    n_requested = rng.poisson(c.parent_rate, (size, n))
    u = rng.random((size, n))
    only = np.where(u < SHARES[0], 1, np.where(u < sum(SHARES), 2, 0))
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
        # the smallest Exponential(1) / weight first: weighted sampling without replacement
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


class GraphQuestions(NamedTuple):
    """Accepted graphs and the question about each, (G) nodes."""

    graphs: Graphs
    root: np.ndarray  # the entity: 0 or 1
    target: np.ndarray  # the entity's deepest leaf among those the other root does not lead to
    neg_target: np.ndarray  # a leaf that only the other root leads to


def pick_question(rng: np.random.Generator, graphs: Graphs, c: GraphConfig) -> GraphQuestions:
    """Draw entity and options. Drop graphs that allow none, or not within the limits."""
    # (G, 2, N) steps from a root to its exclusive leaves, -1 for all other nodes
    exclusive = graphs.leaf[:, None] & (graphs.label[:, None] == np.array([[1], [2]]))
    reach = np.where(exclusive, graphs.hops, -1)
    deepest = reach.max(2)  # (G, 2)
    coin = rng.random(len(deepest)) < 0.5
    root = np.where(deepest[:, 0] == deepest[:, 1], coin, deepest[:, 1] > deepest[:, 0]).astype(int)
    n_hops = deepest.max(1)
    orphan = graphs.parent[:, :, 0] < 0
    # a root that is a leaf has no exclusive leaf
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
    return GraphQuestions(graphs.take(ok), root[ok], target[ok], neg_target[ok])


def random_true(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """Draw the index of one True in each row of `mask`, uniformly: (G, N) -> (G)."""
    return np.where(mask, rng.random(mask.shape), -1).argmax(1)


def _shortest_paths(
    rng: np.random.Generator, q: GraphQuestions, g: np.ndarray, above: np.ndarray, below: np.ndarray
) -> np.ndarray:
    """Draw one shortest path per graph: (G, longest + 1) nodes, target first, entity repeated.

    The edges above -> below of graph g are sorted by graph and lower node. All shortest paths
    are equally likely, as in the released examples (131 of 300 have several; of the 96 with two,
    46 state the first).
    """
    size, n = q.graphs.leaf.shape
    first_node = np.arange(size) * n  # node i of graph g is g * n + i from here on
    steps = q.graphs.hops[np.arange(size), q.root].ravel()  # (G * N)
    above, below = g * n + above, g * n + below
    on_path = steps[above] + 1 == steps[below]
    above, below = above[on_path], below[on_path]
    n_paths = np.zeros(size * n)  # shortest paths from the entity
    n_paths[first_node + q.root] = 1
    longest = steps[first_node + q.target].max(initial=0)
    for step in range(1, longest + 1):
        level = steps[below] == step
        n_paths += np.bincount(below[level], n_paths[above[level]], minlength=len(n_paths))
    # upward from the target: take an edge with probability n_paths[above] / n_paths[below]
    cumulative = np.concatenate([[0], n_paths[above].cumsum()]).astype(np.int64)
    path = np.tile(first_node + q.target, (longest + 1, 1))  # (longest + 1, G)
    for step in range(longest):
        unfinished = np.flatnonzero(steps[path[step]] > 0)
        low = cumulative[np.searchsorted(below, path[step, unfinished], "left")]
        high = cumulative[np.searchsorted(below, path[step, unfinished], "right")]
        edge = np.searchsorted(cumulative, rng.integers(low, high), "right") - 1
        path[step + 1 :, unfinished] = above[edge]
    return path.T % n


def _draw_words(rng: np.random.Generator, graphs: Graphs) -> np.ndarray:
    """Draw a word for every node, persons for parentless ones: (G, N) indices into WORDS."""
    size = len(graphs.leaf)
    orphan = graphs.parent[:, :, 0] < 0
    names = rng.random((size, len(NAMES))).argsort(1)
    concepts = rng.random((size, len(CONCEPTS))).argsort(1) + len(NAMES)
    nth_person = np.minimum((orphan & ~graphs.leaf).cumsum(1) - 1, len(NAMES) - 1)
    nth_concept = np.maximum((~orphan).cumsum(1) - 1, 0)
    name = np.take_along_axis(names, nth_person, 1)
    concept = np.take_along_axis(concepts, nth_concept, 1)
    return np.where(orphan, name, concept)


def sample_batch(rng: np.random.Generator, config: GraphConfig) -> list[Example]:
    """Return the examples of BATCH graphs, with the released keys and wording."""
    return _render(rng, pick_question(rng, sample_graphs(rng, BATCH, config), config))


def _render(rng: np.random.Generator, q: GraphQuestions) -> list[Example]:
    """Write examples in the released wording; draw words, sentence order and option order."""
    parent = q.graphs.parent
    index = np.arange(len(parent))
    keep = ~((parent[:, :, 0] < 0) & q.graphs.leaf)  # nodes without edges are removed
    number = keep.cumsum(1) - 1  # (G, N)
    word = _draw_words(rng, q.graphs)

    g, below, k = np.nonzero(parent >= 0)  # (E) all edges of all graphs
    above = parent[g, below, k]
    edges = np.stack([number[g, above], number[g, below]], 1).tolist()
    n_edges = np.bincount(g, minlength=len(index))
    is_edge = np.arange(n_edges.max(initial=0)) < n_edges[:, None]  # (G, most edges)
    order = np.where(is_edge, rng.random(is_edge.shape), 2).argsort(1)
    order = (order + (n_edges.cumsum() - n_edges)[:, None])[is_edge]  # (E)
    facts = (word[g, above] * len(WORDS) + word[g, below])[order].tolist()
    path = np.take_along_axis(word, _shortest_paths(rng, q, g, above, below), 1)
    steps = (path[:, 1:] * len(WORDS) + path[:, :-1]).tolist()  # last step first
    hops = q.graphs.hops[index, q.root, q.target].tolist()
    target_first = (rng.random(len(index)) < 0.5).tolist()
    all_symbols = [WORDS[w] for w in word[keep].tolist()]
    edge_ends, symbol_ends = n_edges.cumsum().tolist(), keep.sum(1).cumsum().tolist()
    nodes = [number[index, node].tolist() for node in (q.root, q.target, q.neg_target)]
    examples: list[Example] = []
    edge = symbol = 0
    for i, (root, target, neg_target) in enumerate(zip(*nodes, strict=True)):
        symbols = all_symbols[symbol : symbol_ends[i]]
        text = " ".join([SENTENCES[s] for s in facts[edge : edge_ends[i]]])
        first, second = (target, neg_target) if target_first[i] else (neg_target, target)
        examples.append(
            {  # type: ignore[typeddict-unknown-key]
                "question": f"{text} Is {symbols[root]} a {symbols[first]} or {symbols[second]}?",
                "answer": f"{symbols[root]} is a {symbols[target]}.",
                "steps": [SENTENCES[s] for s in steps[i][hops[i] - 1 :: -1]],
                "idx_to_symbol": symbols,
                "edges": edges[edge : edge_ends[i]],
                "root": root,
                "target": target,
                "neg_target": neg_target,
            }
        )
        edge, symbol = edge_ends[i], symbol_ends[i]
    return examples


def marked_graph(example: Example) -> isomorphism.Graph:
    """Return the graph with entity, target and distractor marked, for isomorphism.graph_keys.

    Words, node numbers, sentence order and option order do not count. UserError as graph_of.
    """
    edges, *query = graph_of(example)
    marks = {v: sum(1 << bit for bit, w in enumerate(query) if w == v) for v in query}
    return isomorphism.marked_graph(edges, marks)


def graph_of(example: Example) -> tuple[list[tuple[int, int]], int, int, int]:
    """Return (edges, root, target, neg_target). UserError if the example does not store them."""
    try:
        edges = [(int(parent), int(child)) for parent, child in example["edges"]]  # type: ignore
        return edges, *(int(example[key]) for key in ("root", "target", "neg_target"))  # type: ignore
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"an example does not store its graph: {example['question'][:40]!r}...\n"
            "Give examples with edges (pairs of node numbers), root, target and neg_target."
        ) from None


generate = partial(draw, sample_batch, marked_graph, GraphConfig())


# ---- sentences


class Question(NamedTuple):
    """A parsed question: edges (parent, child) by name, in the order of the text."""

    edges: list[tuple[str, str]]
    entity: str
    options: tuple[str, str]


QUESTION_RE = re.compile(r"Is ([A-Z]\w*) an? ([a-z]\w*) or (?:an? )?([a-z]\w*)\?")


def parse_question(question: str) -> Question:
    """Parse a question; any words and white space will do. UserError if it is not ProsQA."""
    *facts, query = " ".join(question.split()).split(".")
    match = QUESTION_RE.fullmatch(query.strip())
    if not match or not facts:
        raise UserError(
            f"not a ProsQA question: {question[-60:]!r}.\nWrite facts and a question: "
            '"Tom is a lempus. Every lempus is a dumpus. Is Tom a dumpus or yimpus?"'
        )
    return Question([parse_sentence(fact) for fact in facts], match[1], (match[2], match[3]))


def parse_sentence(sentence: str) -> tuple[str, str]:
    """Return (parent, child) of a fact, step or answer; the full stop is optional. UserError."""
    match sentence.strip().removesuffix(".").split():
        case ["Every", parent, "is", "a" | "an", child] if parent.islower() and child.islower():
            return parent, child
        case [person, "is", "a" | "an", child] if person[0].isupper() and child.islower():
            return person, child
    raise UserError(
        f"not a ProsQA sentence: {sentence.strip().removesuffix('.')[:60]!r}.\n"
        'Write "Tom is a lempus." (a capital for a person) or "Every lempus is a dumpus."'
    )


def solve(question: str) -> str | None:
    """Return the answer found by search, or None if not exactly one option follows."""
    try:
        edges, entity, options = parse_question(question)
    except UserError:
        return None
    parents = parents_of(edges)
    correct = {option for option in options if entity in distances(parents, option)}
    return f"{entity} is a {correct.pop()}." if len(correct) == 1 else None


def twin(example: Example) -> Example | None:
    """Return the same facts and options asked about the other root; the other option is right.

    One word of the question differs. None if no other name leads to the other option alone.
    """
    edges, entity, options = parse_question(example["question"])
    target = parse_sentence(example["answer"])[1]
    option = options[options[0] == target]
    steps = {name: reachable(edges, name) for name, _ in edges if name[0].isupper()}
    others = [name for name in steps if option in steps[name] and target not in steps[name]]
    if not others or entity in others:
        return None
    # a third name can lead there too: the generator's root, else the one farthest away
    symbols, root = example.get("idx_to_symbol", []), example.get("root")
    other = max(others, key=lambda name: steps[name][option])
    if root in (0, 1) and symbols[1 - root] in others:  # type: ignore
        other = symbols[1 - root]  # type: ignore
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
    """Return the question with two other options, of which the entity leads to one.

    The search is the same, the answer another word. A twin of the example gets the same options;
    None if the graph has none.
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
    return f"{facts} Is {entity} a {new[0]} or {new[1]}?"


# ---- compact style: "Every p is a c." is " p c.", the question "? Tom? A? B", a step " p c", the
# answer "A". Each word follows exactly one space, so a word-level vocabulary has one token for it
# everywhere. A sign precedes the entity and each option: else the smear, which sees the previous
# word, would take them for edges (measured: docs/LOG.md).


def compact_question(question: str) -> str:
    """Return the edges, then "? Tom? A? B". UserError as in parse_question."""
    edges, entity, (first, second) = parse_question(question)
    facts = "".join([f" {parent} {child}." for parent, child in edges])
    return f"{facts}? {entity}? {first}? {second}"


def frontiers(question: str) -> list[str]:
    """Return the words at 1, 2, ... steps from the entity, in compact style: " a b", " c", ..."""
    edges, entity, _ = parse_question(question)
    steps = distances(children_of(edges), entity)
    words = [""] * max(steps.values())
    for word, n in steps.items():
        if n:
            words[n - 1] += f" {word}"
    return words


def compact_example(example: Example) -> Example:
    """Return the example in compact style, with its further keys unchanged."""
    return {
        **example,
        "question": compact_question(example["question"]),
        "steps": [" {} {}".format(*parse_sentence(step)) for step in example["steps"]],
        "answer": parse_sentence(example["answer"])[1],
    }


def expand_steps(text: str, question: str = "") -> list[str]:
    """Return concatenated compact steps as sentences; a single last word is kept as it is."""
    words = text.split()
    pairs = [words[i : i + 2] for i in range(0, len(words), 2)]
    return [_sentence(*pair) if len(pair) == 2 else pair[0] for pair in pairs]


def expand_answer(text: str, question: str) -> str:
    """Return a compact answer as a sentence; anything but one word is kept as it is."""
    words = text.split()
    return _sentence(parse_question(question).entity, words[0]) if len(words) == 1 else text


def _sentence(parent: str, child: str) -> str:
    return f"{parent} is a {child}." if parent[0].isupper() else f"Every {parent} is a {child}."
