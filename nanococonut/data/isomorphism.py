"""Which graphs are the same except for their node numbers?

A graph is a pair of lists: edges (parent, child) between nodes 0 to n - 1, and the mark of each
node (the entity, an option, or 0). Two graphs are isomorphic if some renumbering of the nodes turns
one into the other, marks included.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import chain

import numpy as np

Graph = tuple[list[tuple[int, int]], list[int]]  # edges, marks

ROUNDS = 4  # steps that a color looks up and down; fewer only make more graphs look alike


class GraphKey:
    """A graph as a member of a set: equal if and only if isomorphic, so a set holds it once."""

    def __init__(self, graph: Graph, colors: list[int], color: int) -> None:
        self.graph, self.colors, self.color = graph, colors, color

    def __hash__(self) -> int:
        return self.color

    def __eq__(self, other: object) -> bool:  # called for equal colors only: rarely
        if not isinstance(other, GraphKey) or self.color != other.color:
            return False
        return is_isomorphic(self.graph, self.colors, other.graph, other.colors)


def marked_graph(
    edges: Sequence[tuple[Hashable, Hashable]], marks: Mapping[Hashable, int]
) -> Graph:
    """Return the graph of edges between any nodes, of which some have a mark."""
    nodes = dict.fromkeys(chain(chain.from_iterable(edges), marks))
    number = {node: i for i, node in enumerate(nodes)}
    return [(number[a], number[b]) for a, b in edges], [marks.get(node, 0) for node in nodes]


def graph_keys(graphs: Iterable[Graph]) -> list[GraphKey]:
    """Return the key of each graph, fastest for many graphs at once."""
    graphs = list(graphs)
    if not graphs:
        return []
    per_node, per_graph = node_colors(graphs)
    ends = np.cumsum([len(marks) for _, marks in graphs])
    colors = (part.tolist() for part in np.split(per_node, ends[:-1]))
    return [GraphKey(*key) for key in zip(graphs, colors, per_graph.tolist(), strict=True)]


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


def is_isomorphic(a: Graph, colors_a: list[int], b: Graph, colors_b: list[int]) -> bool:
    """Search for a renumbering that turns graph a into b. A node may only become one of its color.

    The first node of a that shares its color is matched with each node of b of that color in turn.
    The matched pair gets a new mark, and the colors are recomputed.
    """
    order_a, order_b = (sorted(range(len(c)), key=c.__getitem__) for c in (colors_a, colors_b))
    ordered = [colors_a[v] for v in order_a]
    if ordered != [colors_b[v] for v in order_b]:
        return False
    tied = next((i for i in range(1, len(ordered)) if ordered[i] == ordered[i - 1]), None)
    if tied is None:  # one way to match the nodes is left
        match = dict(zip(order_a, order_b, strict=True))
        return sorted((match[v], match[w]) for v, w in a[0]) == sorted(b[0])
    v = order_a[tied]
    for w in (w for w in order_b if colors_b[w] == colors_a[v]):
        graphs = _mark(a, colors_a, v), _mark(b, colors_b, w)
        both, _ = node_colors(graphs)
        n = len(colors_a)
        if is_isomorphic(graphs[0], both[:n].tolist(), graphs[1], both[n:].tolist()):
            return True
    return False


def _mark(graph: Graph, colors: list[int], node: int) -> Graph:
    """Return the graph with its colors as marks, except for one node, which gets a new mark."""
    return graph[0], [c ^ (v == node) for v, c in enumerate(colors)]
