"""ProsQA: which of two concepts does a chain of facts lead to? Graphs as in the released rows.

The paper's printed Algorithm 1, read literally, does not give the released statistics. This
generator was fitted to the 800 released validation and test rows instead (GraphConfig holds the
fitted values; a search around them found none that fit better beyond noise). A thousand graphs are
drawn at a time: the loop goes over the nodes, parents first.

The released rows can be answered by shortcuts: ignore the entity, take the option that lies farther
from its nearest parentless node, and be right in 92 % (from its farthest one: 94 %). `heuristics`
measures such shortcuts on any rows. On those of GraphConfig(matched=True) the first is worth
nothing (50 %) and the second little (56 %); on those of GraphConfig(balanced=True) no rule that
ignores the entity is worth anything: which of the two roots is asked about is a coin's toss.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np

from nanococonut.data import Row
from nanococonut.errors import UserError

NAMES = (
    "Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom Wren"
).split()
CONCEPTS = (
    "bompus boompus brimpus chorpus dumpus felpus fompus gerpus gorpus grimpus gwompus hilpus "
    "impus jelpus jompus kerpus lempus lorpus numpus quimpus rempus rompus rorpus scrompus "
    "shumpus sterpus storpus terpus timpus tumpus vumpus worpus wumpus yerpus yimpus yumpus "
    "zhorpus zumpus"
).split()
# every word and sign of both renderings, and the answer's mark
VOCABULARY = [*NAMES, *CONCEPTS, "Every", "is", "a", "Is", "or", ".", "?", "###"]

# "w is a v." for every pair of words, at 55 * w + v: looked up faster than put together
SENTENCES = [
    f"{w} is a {v}." if w in NAMES else f"Every {w} is a {v}."
    for w in NAMES + CONCEPTS
    for v in NAMES + CONCEPTS
]
BATCH = 1024  # graphs drawn at once: fixed, so that more rows begin with the same rows
PATIENCE = 100_000  # graphs drawn for one row before giving up
PUBLIC = 5  # the stream of a seed given as one number; the loader's own are others
FAR = 10_000  # distance of what cannot be reached

Node = TypeVar("Node", bound=Hashable)  # a number, or a name


@dataclass(frozen=True)
class GraphConfig:
    """The fitted generator's values. UserError where one cannot be.

    n_nodes       before those without any edge are taken out
    min_hops, max_hops   steps from the entity to the answer
    parent_rate   mean of the Poisson number of parents a node asks for
    first_share   nodes whose parents all descend from root 0 only (label 1)
    second_share  ... from root 1 only (label 2); the rest takes parents anywhere
    depth_weight  parents are drawn with weight (depth_weight * depth + 1) ** depth_power
    depth_power   1 fits the released rows; more makes longer chains
    matched       both options equally far from their nearest parentless node
    balanced      both options the deepest of their own root, and these equally deep: the same graph
                  and options are as likely with the other answer, so that no rule which ignores the
                  entity is right in more than half of the rows
    """

    n_nodes: int = 28
    min_hops: int = 3
    max_hops: int = 6
    parent_rate: float = 1.5
    first_share: float = 0.35
    second_share: float = 0.455
    depth_weight: float = 1.5
    depth_power: float = 1.0
    matched: bool = False
    balanced: bool = False

    def __post_init__(self) -> None:
        words = len(NAMES) + len(CONCEPTS)
        self._check("n_nodes", 4, words, f"there are words for {words} nodes")
        most = self.n_nodes - 3
        self._check("min_hops", 1, most, "the other root and its leaf need nodes, too")
        self._check("max_hops", self.min_hops, self.n_nodes, "no less than min_hops")
        self._check("parent_rate", 0.01, 20, "a mean number of parents")
        self._check("first_share", 0, 1, "a share of the nodes")
        self._check(
            "second_share", 0, 1 - self.first_share + 1e-9, "no more than first_share leaves"
        )
        self._check("depth_weight", 0, 1000, "0 draws parents regardless of depth")
        self._check("depth_power", 0, 20, "more makes longer chains")
        if self.matched and self.balanced:  # the coin would not be fair any more
            raise UserError("matched=True and balanced=True are two splits.\nChoose one.")

    def _check(self, field: str, low: float, high: float, why: str) -> None:
        value = getattr(self, field)
        kind = int if field in ("n_nodes", "min_hops", "max_hops") else int | float
        number = isinstance(value, kind) and not isinstance(value, bool)
        if not (number and low <= value <= high):
            raise UserError(
                f"{field}={value!r}: wanted is a number from {low:g} to {high:g} ({why}).\n"
                f"Change {field}."
            )


SPLITS = ("prosqa", "prosqa_matched", "prosqa_balanced", "prosqa_long", "prosqa_dense")


def split(name: str, base: GraphConfig) -> GraphConfig:
    """The graphs of a named split, for a model that is trained on those of base.

    prosqa            as trained, with all the shortcuts (see heuristics)
    prosqa_matched    both options equally far from their nearest parentless node
    prosqa_balanced   no rule that ignores the entity is right in more than half of the rows
    prosqa_long       balanced, and one or two hops more than any in training. Such graphs are
                      hardly ever drawn as trained (and where they are, "farthest" is right in
                      100 %), so a seventh more nodes hang in longer chains
    prosqa_dense      balanced, and one parent more for each node
    UserError for another name.
    """
    changes: dict[str, dict[str, float]] = {
        "prosqa": {},
        "prosqa_matched": {"matched": True},
        "prosqa_balanced": {"balanced": True},
        "prosqa_long": {
            "balanced": True,
            "min_hops": base.max_hops + 1,
            "max_hops": base.max_hops + 2,
            "n_nodes": min(round(base.n_nodes * 8 / 7), len(NAMES) + len(CONCEPTS)),
            "depth_power": 6,
        },
        "prosqa_dense": {"balanced": True, "parent_rate": base.parent_rate + 1},
    }
    if name not in changes:
        raise UserError(f"{name!r} is no split.\nChoose one of {', '.join(SPLITS)}.")
    return replace(base, **({"matched": False, "balanced": False} | changes[name]))


class Question(NamedTuple):
    """A question taken apart: edges (parent, child) by name, in the order of the text."""

    edges: list[tuple[str, str]]
    entity: str
    options: tuple[str, str]


def generate(
    n: int,
    seed: int | Sequence[int],
    config: GraphConfig | None = None,
    exclude: Collection[bytes] = frozenset(),
) -> list[Row]:
    """n rows with the released keys; none whose signature is in exclude.

    The same seed gives the same rows, and the first rows do not depend on n. UserError where the
    config asks for graphs that are hardly ever drawn.
    """
    config = config or GraphConfig()
    # numpy pads seeds with zeros: a bare S would be the same stream as (S, 0, 0), a training one
    rng = np.random.default_rng((seed, PUBLIC) if isinstance(seed, int) else seed)
    rows: list[Row] = []
    drawn = 0
    while len(rows) < n:
        batch = _render(rng, _choose(rng, _draw(rng, BATCH, config), config))
        rows += [row for row in batch if signature(row) not in exclude] if exclude else batch
        drawn += BATCH
        if len(rows) < n and drawn >= PATIENCE * (len(rows) + 1):
            raise UserError(
                f"{drawn:,} graphs gave {len(rows)} rows with n_nodes={config.n_nodes}, "
                f"min_hops={config.min_hops}, max_hops={config.max_hops}, "
                f"matched={config.matched}, balanced={config.balanced}.\n"
                "Ask for fewer hops or another number of nodes."
            )
    return rows[:n]


class _Graphs(NamedTuple):
    """G graphs of N nodes; nodes 0 and 1 are the roots."""

    parent: np.ndarray  # (G, N, K) parents in the order they were drawn, then -1
    label: np.ndarray  # (G, N) 1: root 0 leads here, 2: root 1 does, 3: both
    depth: np.ndarray  # (G, N) steps to the nearest parentless node
    hops: np.ndarray  # (G, 2, N) steps from root 0 and from root 1, FAR where there is no path
    leaf: np.ndarray  # (G, N) no children

    def take(self, which: np.ndarray) -> "_Graphs":
        return _Graphs(*(array[which] for array in self))


def _draw(rng: np.random.Generator, size: int, c: GraphConfig) -> _Graphs:
    """`size` graphs, none refused yet."""
    n = c.n_nodes
    asked = rng.poisson(c.parent_rate, (size, n))
    u = rng.random((size, n))
    only = np.where(u < c.first_share, 1, np.where(u < c.first_share + c.second_share, 2, 0))
    parent = np.full((size, n, max(1, asked.max())), -1, np.int16)
    label = np.zeros((size, n), np.int8)
    label[:, 0], label[:, 1] = 1, 2
    depth = np.zeros((size, n), np.int16)
    hops = np.full((size, 2, n), FAR, np.int16)
    hops[:, 0, 0] = hops[:, 1, 1] = 0
    leaf = np.ones((size, n), bool)
    for node in range(2, n):
        fits = (only[:, node, None] == 0) | (label[:, :node] == only[:, node, None])
        n_in = np.minimum(asked[:, node], fits.sum(1))
        # least Exponential(1) / weight first is drawing by weight without replacement
        weight = (c.depth_weight * depth[:, :node] + 1) ** c.depth_power
        race = rng.standard_exponential((size, node)) / weight
        order = np.where(fits, race, np.inf).argsort(1)
        depth[:, node] = np.where(n_in > 0, FAR, 0)
        for slot in range(n_in.max()):
            g = np.flatnonzero(n_in > slot)
            p = order[g, slot]
            parent[g, node, slot] = p
            label[g, node] |= label[g, p]
            depth[g, node] = np.minimum(depth[g, node], depth[g, p] + 1)
            hops[g, :, node] = np.minimum(hops[g, :, node], hops[g, :, p] + 1)
            leaf[g, p] = False
    return _Graphs(parent, label, depth, hops, leaf)


class _Questions(NamedTuple):
    """Accepted graphs and what is asked of each, (G) nodes."""

    graphs: _Graphs
    root: np.ndarray  # the entity: 0 or 1
    target: np.ndarray  # its deepest leaf that the other root does not lead to
    neg_target: np.ndarray  # a leaf that only the other root leads to


def _choose(rng: np.random.Generator, graphs: _Graphs, c: GraphConfig) -> _Questions:
    """Entity and options; graphs in which they cannot be chosen are left out."""
    # (G, 2, N) steps from a root to its exclusive leaves, -1 for all other nodes
    exclusive = graphs.leaf[:, None] & (graphs.label[:, None] == np.array([[1], [2]]))
    reach = np.where(exclusive, graphs.hops, -1)
    deepest = reach.max(2)  # (G, 2)
    coin = rng.random(len(deepest)) < 0.5
    root = np.where(deepest[:, 0] == deepest[:, 1], coin, deepest[:, 1] > deepest[:, 0]).astype(int)
    top = deepest.max(1)
    orphan = graphs.parent[:, :, 0] < 0
    # a root that is a leaf itself has no exclusive leaf to ask for
    ok = (deepest.min(1) >= 1) & (c.min_hops <= top) & (top <= c.max_hops)
    ok &= (orphan & ~graphs.leaf).sum(1) <= len(NAMES)
    ok &= (~orphan).sum(1) <= len(CONCEPTS)

    g = np.flatnonzero(ok)
    graphs, root = graphs.take(g), root[g]
    target = _one_of(rng, reach[g, root] == top[g, None])
    others = reach[g, 1 - root] >= 1
    if c.balanced:
        others = reach[g, 1 - root] == top[g, None]
    if c.matched:
        others &= graphs.depth == graphs.depth[np.arange(len(g)), target][:, None]
    neg_target = _one_of(rng, others)
    ok = others.any(1)
    return _Questions(graphs.take(ok), root[ok], target[ok], neg_target[ok])


def _one_of(rng: np.random.Generator, allowed: np.ndarray) -> np.ndarray:
    """(G, N) bool -> (G) one allowed node of each graph, each as likely."""
    return np.where(allowed, rng.random(allowed.shape), -1).argmax(1)


def _shortest_paths(
    rng: np.random.Generator, q: _Questions, g: np.ndarray, above: np.ndarray, below: np.ndarray
) -> np.ndarray:
    """One shortest path of each graph: (G, most steps + 1) nodes, target first, entity repeated.

    The edges above -> below of graph g are sorted by graph and lower node. All shortest paths
    are as likely, which fits the released rows (131 of 300 have several; of the 96 with two,
    46 state the first).
    """
    size, n = q.graphs.leaf.shape
    first_node = np.arange(size) * n  # node i of graph g is g * n + i from here on
    steps = q.graphs.hops[np.arange(size), q.root].ravel()
    above, below = g * n + above, g * n + below
    on_way = steps[above] + 1 == steps[below]
    above, below = above[on_way], below[on_way]
    ways = np.zeros(size * n)  # number of shortest paths from the entity
    ways[first_node + q.root] = 1
    longest = steps[first_node + q.target].max(initial=0)
    for step in range(1, longest + 1):
        at = steps[below] == step
        ways += np.bincount(below[at], ways[above[at]], minlength=len(ways))
    # upward from the target; an edge is taken with probability ways[above] / ways[below]
    upto = np.concatenate([[0], ways[above].cumsum()]).astype(np.int64)
    path = np.tile(first_node + q.target, (longest + 1, 1))
    for step in range(longest):
        go = np.flatnonzero(steps[path[step]] > 0)
        low = upto[np.searchsorted(below, path[step, go], "left")]
        high = upto[np.searchsorted(below, path[step, go], "right")]
        edge = np.searchsorted(upto, rng.integers(low, high), "right") - 1
        path[step + 1 :, go] = above[edge]
    return path.T % n


def _render(rng: np.random.Generator, q: _Questions) -> list[Row]:
    """Rows in the released wording; names, sentence order and option order are drawn."""
    parent, leaf = q.graphs.parent, q.graphs.leaf
    each = np.arange(len(parent))
    orphan = parent[:, :, 0] < 0
    keep = ~(orphan & leaf)
    number = keep.cumsum(1) - 1  # (G, N) nodes without edges are taken out
    # (G, N) each person's and each concept's word
    names = rng.random((len(each), len(NAMES))).argsort(1)
    concepts = rng.random((len(each), len(CONCEPTS))).argsort(1) + len(NAMES)
    nth_person = np.minimum((keep & orphan).cumsum(1) - 1, len(NAMES) - 1)
    nth_concept = np.maximum((~orphan).cumsum(1) - 1, 0)
    name, concept = (
        np.take_along_axis(w, nth, 1) for w, nth in ((names, nth_person), (concepts, nth_concept))
    )
    word = np.where(orphan, name, concept)
    words = NAMES + CONCEPTS

    g, below, slot = np.nonzero(parent >= 0)
    above = parent[g, below, slot]
    edges = [
        list(e) for e in zip(number[g, above].tolist(), number[g, below].tolist(), strict=True)
    ]
    n_edges = np.bincount(g, minlength=len(each))
    real = np.arange(n_edges.max(initial=0)) < n_edges[:, None]  # (G, most edges)
    shuffled = np.where(real, rng.random(real.shape), 2).argsort(1)
    shuffled = (shuffled + (n_edges.cumsum() - n_edges)[:, None])[real]
    said = (word[g, above] * len(words) + word[g, below])[shuffled].tolist()
    path = np.take_along_axis(word, _shortest_paths(rng, q, g, above, below), 1)
    steps = (path[:, 1:] * len(words) + path[:, :-1]).tolist()  # last one first
    hops = q.graphs.hops[each, q.root, q.target].tolist()
    target_first = (rng.random(len(each)) < 0.5).tolist()
    symbols = [words[w] for w in word[keep].tolist()]
    edge_ends, symbol_ends = n_edges.cumsum().tolist(), keep.sum(1).cumsum().tolist()
    asked = [number[each, node].tolist() for node in (q.root, q.target, q.neg_target)]
    rows: list[Row] = []
    edge = symbol = 0
    for i, (root, target, neg_target) in enumerate(zip(*asked, strict=True)):
        own = symbols[symbol : symbol_ends[i]]
        facts = " ".join([SENTENCES[s] for s in said[edge : edge_ends[i]]])
        first, second = (target, neg_target) if target_first[i] else (neg_target, target)
        row = {
            "question": f"{facts} Is {own[root]} a {own[first]} or {own[second]}?",
            "answer": f"{own[root]} is a {own[target]}.",
            "steps": [SENTENCES[s] for s in steps[i][hops[i] - 1 :: -1]],
            "idx_to_symbol": own,
            "edges": edges[edge : edge_ends[i]],
            "root": root,
            "target": target,
            "neg_target": neg_target,
        }
        rows.append(row)  # type: ignore[arg-type]  # a Row with the graph's keys
        edge, symbol = edge_ends[i], symbol_ends[i]
    return rows


def signature(row: Row) -> bytes:
    """Which graph and question it is: the same for any names, sentence order and option order.

    UserError where the row does not hold its graph.
    """
    edges, root, target, neg_target = _graph(row)
    whole = (sorted(edges), root, target, neg_target)
    return hashlib.blake2b(repr(whole).encode(), digest_size=16).digest()


def _graph(row: Row) -> tuple[list[tuple[int, int]], int, int, int]:
    """A row's edges, root, target and neg_target. UserError where it does not hold them."""
    try:
        edges = [(parent, child) for parent, child in row["edges"]]  # type: ignore
        asked = [row["root"], row["target"], row["neg_target"]]  # type: ignore
        if edges and all(type(node) is int for edge in (*edges, asked) for node in edge):
            return edges, *asked
    except (KeyError, TypeError, ValueError):
        pass
    raise UserError(
        f"a row does not hold its graph: {row['question'][:40]!r}...\n"
        "Give rows with edges (pairs of node numbers), root, target and neg_target."
    )


ASKED = re.compile(r"Is ([A-Z]\w*) an? ([a-z]\w*) or (?:an? )?([a-z]\w*)\?")


def parse_question(question: str) -> Question:
    """The graph and what is asked, by name. Any words will do, and any white space between them.

    UserError for a text that is not a ProsQA question.
    """
    *facts, last = " ".join(question.split()).split(".")
    asked = ASKED.fullmatch(last.strip())
    if not asked or not facts:
        raise UserError(
            f"not a ProsQA question: {question[-60:]!r}.\nWrite facts and a question: "
            '"Tom is a lempus. Every lempus is a dumpus. Is Tom a dumpus or yimpus?"'
        )
    return Question([_edge(fact) for fact in facts], asked[1], (asked[2], asked[3]))


def parse_sentence(sentence: str) -> tuple[str, str]:
    """(parent, child) of a fact, step or answer, with or without its full stop. UserError else."""
    return _edge(sentence.strip().removesuffix("."))


def _edge(sentence: str) -> tuple[str, str]:
    """parse_sentence where there is no full stop."""
    match sentence.split():
        case ["Every", parent, "is", "a" | "an", child] if parent.islower() and child.islower():
            return parent, child
        case [person, "is", "a" | "an", child] if person[0].isupper() and child.islower():
            return person, child
    raise UserError(
        f"not a ProsQA sentence: {sentence.strip()[:60]!r}.\n"
        'Write "Tom is a lempus." (a capital for a person) or "Every lempus is a dumpus."'
    )


def solve(question: str) -> str | None:
    """The answer found by search. None where the text is no ProsQA question, or where not exactly
    one of the options follows from the entity."""
    try:
        edges, entity, options = parse_question(question)
    except UserError:
        return None
    parents = _parents(edges)
    right = [option for option in options if entity in _above(parents, option)]
    return f"{entity} is a {right[0]}." if len(set(right)) == 1 else None


# -- the compact rendering: "Every p is a c." is " p c.", the question "? Tom? A? B", a step " p c",
# the answer "A", as the question says who is asked about. Each symbol has exactly one space
# in front, so that a word-level vocabulary sees one token for it wherever it is. A sign stands
# before the entity and each option: a model that looks at the word before (the smear) would take
# them for edges else (measured: docs/LOG.md).


def compact_sentence(sentence: str) -> str:
    """A fact or step: "Every p is a c." -> " p c" UserError for anything else."""
    parent, child = parse_sentence(sentence)
    return f" {parent} {child}"


def compact_question(question: str) -> str:
    """The edges, then "? Tom? A? B". UserError as parse_question."""
    edges, entity, (first, second) = parse_question(question)
    facts = "".join([f" {parent} {child}." for parent, child in edges])
    return f"{facts}? {entity}? {first}? {second}"


def compact_row(row: Row) -> Row:
    """The row in compact words, other keys as they are."""
    return {
        **row,
        "question": compact_question(row["question"]),
        "steps": [compact_sentence(step) for step in row["steps"]],
        "answer": parse_sentence(row["answer"])[1],
    }


def expand_steps(text: str, question: str = "") -> list[str]:
    """Compact steps, one behind the other, as sentences, whatever the question; a word left over
    as it is."""
    words = text.split()
    pairs = [words[i : i + 2] for i in range(0, len(words), 2)]
    return [_sentence(*pair) if len(pair) == 2 else pair[0] for pair in pairs]


def expand_answer(text: str, question: str) -> str:
    """A compact answer to a question in sentences -> the sentence; several words as they are."""
    words = text.split()
    return _sentence(parse_question(question).entity, text.strip()) if len(words) == 1 else text


def expand_question(text: str) -> str:
    """A compact question in sentences. UserError if it is none."""
    match = re.fullmatch(r"((?: \S+ [^\s.?]+\.)+)\? (\S+)\? (\S+)\? (\S+)", text)
    if not match:
        raise UserError(
            f"not a compact ProsQA question: {text[-60:]!r}.\n"
            'Write pairs and the question: " Tom lempus. lempus dumpus.? Tom? dumpus? yimpus"'
        )
    facts = expand_steps(match[1].replace(".", " "))
    return f"{' '.join(facts)} Is {match[2]} a {match[3]} or {match[4]}?"


def _sentence(parent: str, child: str) -> str:
    return f"{parent} is a {child}." if parent[0].isupper() else f"Every {parent} is a {child}."


# -- what rows are like


def statistics(rows: Sequence[Row]) -> dict[str, float]:
    """Means and shares of rows that hold their graph (the released keys); UserError else.

    "labels" and "in-degree" are shares of the nodes from 2 on; label 1 (2) is what only node 0 (1)
    leads to, 3 what both do.
    """
    total: Counter[str] = Counter()
    for row in rows:
        edges, root, target, _ = _graph(row)
        n = 1 + max(map(max, edges))
        parents = _parents(edges)
        below = [reachable(edges, 0), reachable(edges, 1)]
        if root not in (0, 1) or target not in below[root] or n < 3:
            raise UserError(
                f"a row's target does not follow from its root: {row['question'][:40]!r}...\n"
                "Give rows as generated or released: node 0 or 1 is the root."
            )
        hops, ways = below[root][target]
        total["nodes"] += n
        total["edges"] += len(edges)
        total["persons"] += sum(node not in parents for node in range(n))
        total["hops"] += hops
        total[f"hops {hops}"] += 1
        total["shortest paths"] += ways
        total["entity is node 1"] += root == 1
        for node in range(2, n):
            label = (node in below[0]) + 2 * (node in below[1])
            total[f"label {label}"] += 1 / (n - 2)
            total[f"in-degree {len(parents.get(node, ()))}"] += 1 / (n - 2)
    return {key: total[key] / len(rows) for key in sorted(total)}


def heuristics(rows: Sequence[Row]) -> dict[str, float]:
    """Share of rows that a rule answers right which ignores the entity; ties count half.

    Computed from the text alone. deeper: the option farther from its nearest parentless node;
    farthest: from its farthest one; more ancestors, fewer parents: the option that has them.
    """
    right = dict.fromkeys(("deeper", "farthest", "more ancestors", "fewer parents", "random"), 0.0)
    for row in rows:
        edges, _, options = parse_question(row["question"])
        parents = _parents(edges)
        scores = []
        for option in options:
            above = _above(parents, option)
            # a user's graph may have cycles, above which nothing is parentless
            depths = [d for node, d in above.items() if node not in parents] or [0]
            n_parents = len(parents.get(option, ()))
            scores.append((min(depths), max(depths), len(above), -n_parents, 0))
        right_option = row["answer"].split()[-1].removesuffix(".")
        if right_option not in options:
            raise UserError(
                f"the answer {row['answer']!r} is none of the options: {', '.join(options)}.\n"
                "Give rows as generated or released."
            )
        if right_option == options[1]:
            scores.reverse()
        for rule, good, bad in zip(right, *scores, strict=True):
            right[rule] += (good > bad) + 0.5 * (good == bad)
    return {rule: n / len(rows) for rule, n in right.items()}


def _parents(edges: Iterable[Sequence[Node]]) -> dict[Node, list[Node]]:
    """Child -> its parents."""
    parents: dict[Node, list[Node]] = {}
    for parent, child in edges:
        parents.setdefault(child, []).append(parent)
    return parents


def _above(parents: dict[Node, list[Node]], node: Node) -> dict[Node, int]:
    """The node and all its ancestors -> fewest steps up to them."""
    steps = {node: 0}
    queue = [node]
    for at in queue:  # grows while it is read
        for parent in parents.get(at, ()):
            if parent not in steps:
                steps[parent] = steps[at] + 1
                queue.append(parent)
    return steps


def reachable(edges: Iterable[Sequence[Node]], root: Node) -> dict[Node, tuple[int, int]]:
    """All that the root leads to -> (fewest steps down, number of shortest paths)."""
    children = _parents((child, parent) for parent, child in edges)
    found: dict[Node, tuple[int, int]] = {}
    level, steps = Counter({root: 1}), 0
    while level:
        found |= {node: (steps, ways) for node, ways in level.items()}
        after: Counter[Node] = Counter()
        for node, ways in level.items():
            for child in children.get(node, ()):
                if child not in found:
                    after[child] += ways
        level, steps = after, steps + 1
    return found
