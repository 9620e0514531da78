"""Breadth-first search in graphs, given as edges (parent, child)."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)  # a number or a name


def parents_of(edges: Iterable[Sequence[Node]]) -> dict[Node, list[Node]]:
    """Map each child to its parents."""
    parents: dict[Node, list[Node]] = {}
    for parent, child in edges:
        parents.setdefault(child, []).append(parent)
    return parents


def children_of(edges: Iterable[Sequence[Node]]) -> dict[Node, list[Node]]:
    """Map each parent to its children."""
    return parents_of((child, parent) for parent, child in edges)


def distances(neighbors: Mapping[Node, Sequence[Node]], start: Node) -> dict[Node, int]:
    """Map `start` and all nodes reachable from it to the fewest steps from `start`."""
    steps = {start: 0}
    queue = [start]
    for node in queue:  # grows during the loop
        for neighbor in neighbors.get(node, ()):
            if neighbor not in steps:
                steps[neighbor] = steps[node] + 1
                queue.append(neighbor)
    return steps


def reachable(edges: Iterable[Sequence[Node]], root: Node) -> dict[Node, int]:
    """Map `root` and all its descendants to the fewest steps from it."""
    return distances(children_of(edges), root)
