"""Graphs as lists of edges (parent, child): breadth-first search, and keys of isomorphic graphs.

Graphs that differ only in their node numbers have equal keys. Different graphs rarely have equal
keys (never in docs/LOG.md's count); this only costs a training example. A Graph also has a mark for
each node 0 to n - 1 (the entity, an option, or 0), which an isomorphism must preserve.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import chain
from typing import TypeVar

import numpy as np

Node = TypeVar("Node", bound=Hashable)  # a number or a name
Graph = tuple[list[tuple[int, int]], list[int]]  # edges, marks

ROUNDS = 4  # of refinement; with fewer, more graphs have equal keys


def parents_of(edges: Iterable[Sequence[Node]]) -> dict[Node, list[Node]]:
    """Map each child to its parents."""
    parents: dict[Node, list[Node]] = {}
    for parent, child in edges:
        parents.setdefault(child, []).append(parent)
    return parents


def children_of(edges: Iterable[Sequence[Node]]) -> dict[Node, list[Node]]:
    """Map each parent to its children."""
    return parents_of((child, parent) for parent, child in edges)


def reachable(edges: Iterable[Sequence[Node]], root: Node) -> dict[Node, int]:
    """Map `root` and all its descendants to the fewest steps from it."""
    children, steps, queue = children_of(edges), {root: 0}, [root]
    for node in queue:  # grows during the loop
        for child in children.get(node, ()):
            if child not in steps:
                steps[child] = steps[node] + 1
                queue.append(child)
    return steps


def marked_graph(
    edges: Sequence[tuple[Hashable, Hashable]], marks: Mapping[Hashable, int]
) -> Graph:
    """Return the graph of edges between hashable nodes; nodes without a mark get 0."""
    nodes = dict.fromkeys(chain(chain.from_iterable(edges), marks))
    number = {node: i for i, node in enumerate(nodes)}
    return [(number[a], number[b]) for a, b in edges], [marks.get(node, 0) for node in nodes]


def graph_keys(graphs: Iterable[Graph]) -> list[int]:
    """Return the key of each graph. It is faster to pass many graphs at once.

    Weisfeiler-Lehman refinement: in each round, a node's color (uint64) is mixed with the sum of
    its parents' colors and the sum of its children's. A graph's key is the sum of its colors.
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
    return _mix(np.add.reduceat(color, first_node)).tolist()


def _mix(x: np.ndarray) -> np.ndarray:
    """Hash each integer (the finalizer of SplitMix64)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
