"""Breadth-first search in graphs that are given as edges (parent, child)."""

from collections import Counter
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


def reachable(edges: Iterable[Sequence[Node]], root: Node) -> dict[Node, tuple[int, int]]:
    """Map `root` and its descendants to (fewest steps, number of shortest paths)."""
    children = children_of(edges)
    result: dict[Node, tuple[int, int]] = {}
    level, depth = Counter({root: 1}), 0
    while level:
        result |= {node: (depth, n_paths) for node, n_paths in level.items()}
        next_level: Counter[Node] = Counter()
        for node, n_paths in level.items():
            for child in children.get(node, ()):
                if child not in result:
                    next_level[child] += n_paths
        level, depth = next_level, depth + 1
    return result
