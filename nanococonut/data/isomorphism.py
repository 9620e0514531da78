"""Graph isomorphism: keys that are equal for graphs that differ only in their node numbers.

A graph is a pair of lists: edges (parent, child) between nodes 0 to n - 1, and the mark of each
node (the entity, an option, or 0). An isomorphism also maps each node to one with the same mark.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import eq

import numpy as np

Graph = tuple[list[tuple[int, int]], list[int]]  # edges, marks

ROUNDS = 4  # of refinement; with fewer, more graphs have equal colors and need the exact test


@dataclass(eq=False)
class GraphKey:
    """Hashable key of a graph: two keys are equal if and only if their graphs are isomorphic."""

    graph: Graph
    colors: list[int]  # of the nodes, see graph_keys
    color: int  # of the graph; isomorphic graphs have the same

    def __hash__(self) -> int:
        return self.color

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GraphKey) or self.color != other.color:
            return False  # almost always, if the graphs are not isomorphic
        order_a, order_b = (
            sorted(range(len(c)), key=c.__getitem__) for c in (self.colors, other.colors)
        )
        ordered = [self.colors[v] for v in order_a]
        if ordered != [other.colors[v] for v in order_b]:
            return False
        tied = next((i for i in range(1, len(ordered)) if ordered[i] == ordered[i - 1]), None)
        if tied is None:  # all colors differ, so only one matching is possible
            match = dict(zip(order_a, order_b, strict=True))
            edges = sorted((match[v], match[w]) for v, w in self.graph[0])
            return edges == sorted(other.graph[0])
        # two nodes share a color: match one with each candidate in turn, and refine again
        v = order_a[tied]
        candidates = [w for w in order_b if other.colors[w] == self.colors[v]]
        return any(eq(*graph_keys([self._mark(v), other._mark(w)])) for w in candidates)

    def _mark(self, node: int) -> Graph:
        """Return the graph with its colors as marks, except for one node, which gets a new mark."""
        return self.graph[0], [c ^ (v == node) for v, c in enumerate(self.colors)]


def marked_graph(
    edges: Sequence[tuple[Hashable, Hashable]], marks: Mapping[Hashable, int]
) -> Graph:
    """Return the graph of edges between hashable nodes; nodes without a mark get 0."""
    nodes = dict.fromkeys(chain(chain.from_iterable(edges), marks))
    number = {node: i for i, node in enumerate(nodes)}
    return [(number[a], number[b]) for a, b in edges], [marks.get(node, 0) for node in nodes]


def graph_keys(graphs: Iterable[Graph]) -> list[GraphKey]:
    """Return the key of each graph. Many graphs at once are faster.

    The colors (uint64) come from Weisfeiler-Lehman refinement: in each round, a node's color is
    mixed with the sum of its parents' colors and the sum of its children's.
    """
    graphs = list(graphs)
    if not graphs:
        return []
    n_nodes = np.array([len(marks) for _, marks in graphs])
    n_edges = [len(edges) for edges, _ in graphs]
    flat = np.fromiter(chain.from_iterable(chain.from_iterable(e for e, _ in graphs)), np.int64)
    first_node = n_nodes.cumsum() - n_nodes
    parent, child = (flat.reshape(-1, 2) + np.repeat(first_node, n_edges)[:, None]).T  # (E), (E)
    color = _mix(np.fromiter(chain.from_iterable(marks for _, marks in graphs), np.uint64))  # (V)
    for _ in range(ROUNDS):
        above, below = np.zeros_like(color), np.zeros_like(color)
        np.add.at(above, child, color[parent])  # overflow is intended
        np.add.at(below, parent, color[child])
        color = _mix(_mix(color + np.uint64(2) * _mix(above)) + below)
    per_node = [part.tolist() for part in np.split(color, first_node[1:])]
    per_graph = _mix(np.add.reduceat(color, first_node)).tolist()
    return [GraphKey(*key) for key in zip(graphs, per_node, per_graph, strict=True)]


def _mix(x: np.ndarray) -> np.ndarray:
    """Hash each integer (the finalizer of SplitMix64)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
