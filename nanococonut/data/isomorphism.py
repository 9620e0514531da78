"""Which graphs are the same except for their node numbers? Colors find candidates, forms decide.

A graph is a pair of lists: edges (parent, child) between nodes 0 to n - 1, and the mark of each
node (the entity, an option, or 0). Two graphs are isomorphic if some renumbering of the nodes turns
one into the other, marks included.
"""

import hashlib
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


def canonical_form(graph: Graph, colors: list[int]) -> Graph:
    """Return the graph under a numbering that does not depend on the original one.

    colors   of the nodes, equal in isomorphic graphs

    Nodes are numbered by color. A tie is broken both ways (individualization and refinement), and
    the smallest form counts.
    """
    edges, marks = graph
    parents: list[list[int]] = [[] for _ in marks]
    children: list[list[int]] = [[] for _ in marks]
    for parent, child in sorted(edges):
        parents[child].append(parent)
        children[parent].append(child)

    def refine(color: list[int]) -> list[int]:
        """Renumber the colors 0, 1, ... until equal ones have equal parents and children."""
        n_colors = 0
        while n_colors < len(set(color)):
            n_colors = len(set(color))
            keys = [
                (c, sorted([color[p] for p in above]), sorted([color[b] for b in below]))
                for c, above, below in zip(color, parents, children, strict=True)
            ]
            rank = {repr(key): i for i, key in enumerate(sorted(keys))}
            color = [rank[repr(key)] for key in keys]
        return color

    def tied(color: list[int]) -> list[int]:
        """Return the nodes of the lowest color that several nodes have."""
        ordered = sorted(color)
        repeated = [a for a, b in zip(ordered, ordered[1:], strict=False) if a == b]
        return [v for v, c in enumerate(color) if c == repeated[0]] if repeated else []

    def single_out(color: list[int], node: int) -> list[int]:
        return refine([2 * c + (v != node) for v, c in enumerate(color)])

    def leaf(color: list[int]) -> Graph:
        """Return the form after ties are broken by whichever node is first."""
        while nodes := tied(color):
            color = single_out(color, nodes[0])
        order = sorted(range(len(color)), key=color.__getitem__)
        number = {v: i for i, v in enumerate(order)}
        return sorted((number[a], number[b]) for a, b in edges), [marks[v] for v in order]

    def smallest(color: list[int]) -> Graph:
        nodes = tied(color)
        if not nodes:
            return leaf(color)
        # two branches with a form in common are images of each other: one is enough
        branches = {repr(leaf(c)): c for c in (single_out(color, v) for v in nodes)}
        return min(smallest(c) for c in branches.values())

    # twins, with the same mark, parents and children, can be told apart in any order
    n_twins: dict[str, int] = {}
    keys = []
    for color, *twin in zip(colors, marks, parents, children, strict=True):
        n_twins[repr(twin)] = n_twins.get(repr(twin), 0) + 1
        keys.append((color, n_twins[repr(twin)]))
    rank = {key: i for i, key in enumerate(sorted(set(keys)))}
    color = [rank[key] for key in keys]
    return leaf(color) if not tied(color) else smallest(refine(color))
