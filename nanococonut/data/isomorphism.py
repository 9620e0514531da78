"""Which graphs are the same except for their node numbers? Colors find candidates, forms decide.

A graph is a pair of lists: edges (parent, child) between nodes 0 to n - 1, and the mark of each
node (the entity, an option, or 0). Two graphs are isomorphic if some renumbering of the nodes turns
one into the other, marks included.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np

Graph = tuple[list[tuple[int, int]], list[int]]  # edges, marks

ROUNDS = 4  # steps that a color looks up and down; fewer only make more candidates
COLOR_BYTES = 8  # a graph's hash starts with its color


def node_colors(graphs: Sequence[Graph]) -> tuple[np.ndarray, np.ndarray]:
    """Return (colors of all nodes, colors of the graphs), uint64, equal for isomorphic graphs.

    Weisfeiler-Lehman refinement: a node's color is mixed with the sum of its parents' colors and
    the sum of its children's, a few times.
    """
    n_nodes = np.array([len(marks) for _, marks in graphs])
    n_edges = [len(edges) for edges, _ in graphs]
    flat = np.fromiter(chain.from_iterable(chain.from_iterable(e for e, _ in graphs)), np.int64)
    first_node = n_nodes.cumsum() - n_nodes
    parent, child = (flat.reshape(-1, 2) + np.repeat(first_node, n_edges)[:, None]).T  # (E), (E)
    color = _mix(np.fromiter(chain.from_iterable(marks for _, marks in graphs), np.uint64))  # (V)
    for _ in range(ROUNDS):
        above, below = np.zeros_like(color), np.zeros_like(color)
        np.add.at(above, child, color[parent])  # wraps around, as intended
        np.add.at(below, parent, color[child])
        color = _mix(_mix(color + np.uint64(2) * _mix(above)) + below)
    return color, _mix(np.add.reduceat(color, first_node))


def _mix(x: np.ndarray) -> np.ndarray:
    """Return a well-mixed integer for each one (the finalizer of SplitMix64)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def graph_colors(graphs: Sequence[Graph]) -> list[bytes]:
    """Return the first COLOR_BYTES bytes of each graph's hash, a thousand graphs at a time."""
    return [color.tobytes() for color in node_colors(graphs)[1]] if graphs else []


def graph_hashes(graphs: Sequence[Graph]) -> list[bytes]:
    """Return each graph's color and a digest of its form: equal if and only if isomorphic."""
    if not graphs:
        return []
    colors, per_graph = node_colors(graphs)
    ends = np.cumsum([len(marks) for _, marks in graphs])
    hashes = []
    for graph, of_nodes, color in zip(graphs, np.split(colors, ends[:-1]), per_graph, strict=True):
        form = canonical_form(graph, of_nodes.tolist())
        hashes.append(color.tobytes() + hashlib.sha256(repr(form).encode()).digest())
    return hashes


def canonical_form(graph: Graph, colors: Sequence[int]) -> Graph:
    """Return the graph with its nodes numbered by `colors`, which isomorphic graphs share.

    Tied nodes are singled out in turn (individualization and refinement); the smallest form counts.
    """
    search = _FormSearch(graph)
    color = search.split_twins(colors)
    return search.smallest_form(search.refine(color) if tied_nodes(color) else color)


def tied_nodes(color: Sequence[int]) -> list[int]:
    """Return the nodes of the lowest color that several nodes have."""
    ordered = sorted(color)
    repeated = next((a for a, b in zip(ordered, ordered[1:], strict=False) if a == b), None)
    return [node for node, c in enumerate(color) if c == repeated]


class _FormSearch:
    """The search tree of canonical_form. A `color` is a list: the rank of each node."""

    def __init__(self, graph: Graph) -> None:
        self.edges, self.marks = graph
        self.parents: list[list[int]] = [[] for _ in self.marks]
        self.children: list[list[int]] = [[] for _ in self.marks]
        for parent, child in sorted(self.edges):
            self.parents[child].append(parent)
            self.children[parent].append(child)

    def split_twins(self, colors: Sequence[int]) -> list[int]:
        """Return ranks of the colors that tell apart twins: same mark, parents and children.

        Swapping twins changes nothing, so any order of them gives the same form.
        """
        n_twins: Counter[str] = Counter()
        keys = []
        for color, *twin in zip(colors, self.marks, self.parents, self.children, strict=True):
            n_twins[repr(twin)] += 1
            keys.append((color, n_twins[repr(twin)]))
        rank = {key: i for i, key in enumerate(sorted(set(keys)))}
        return [rank[key] for key in keys]

    def refine(self, color: list[int]) -> list[int]:
        """Split colors until nodes of one color have parents, and children, of the same colors."""
        n_colors = 0
        while n_colors < len(set(color)):
            n_colors = len(set(color))
            keys = [
                (c, sorted([color[p] for p in parents]), sorted([color[b] for b in children]))
                for c, parents, children in zip(color, self.parents, self.children, strict=True)
            ]
            rank = {repr(key): i for i, key in enumerate(sorted(keys))}
            color = [rank[repr(key)] for key in keys]
        return color

    def single_out(self, color: list[int], node: int) -> list[int]:
        """Return the colors after `node` comes before the others of its color."""
        return self.refine([2 * c + (other != node) for other, c in enumerate(color)])

    def first_form(self, color: list[int]) -> Graph:
        """Return the form after ties are broken by whichever node is first."""
        while nodes := tied_nodes(color):
            color = self.single_out(color, nodes[0])
        order = sorted(range(len(color)), key=color.__getitem__)
        number = {node: i for i, node in enumerate(order)}
        edges = sorted((number[parent], number[child]) for parent, child in self.edges)
        return edges, [self.marks[node] for node in order]

    def smallest_form(self, color: list[int]) -> Graph:
        """Return the smallest form over all ways to break ties."""
        if not (nodes := tied_nodes(color)):
            return self.first_form(color)
        branches = [self.single_out(color, node) for node in nodes]
        # branches with a form in common are images of each other: one of them is enough
        distinct = {repr(self.first_form(branch)): branch for branch in branches}
        return min(self.smallest_form(branch) for branch in distinct.values())
