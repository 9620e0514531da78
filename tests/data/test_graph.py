"""Isomorphic graphs are recognized, and training and evaluation never share one."""

import itertools
import random
from collections import Counter

import pytest

from nanococonut.config import TrainConfig
from nanococonut.curriculum import Curriculum
from nanococonut.data import prosqa, tasks
from nanococonut.data.graph import graph_keys
from nanococonut.data.prosqa import GraphConfig
from nanococonut.training.loader import TrainLoader
from nanococonut.training.setup import init_tokenizer

MINI = GraphConfig(n_nodes=13, min_hops=2, max_hops=3)
NODES = ("root", "target", "neg_target")


def graph_key(example: dict) -> int:
    return graph_keys([prosqa.marked_graph(example)])[0]


def renumber(example: dict, rng: random.Random) -> dict:
    """Return the same example with other node numbers and another order of edges."""
    n = 1 + max(map(max, example["edges"]))
    number = rng.sample(range(n), n)
    edges = [[number[a], number[b]] for a, b in example["edges"]]
    return example | {
        "edges": rng.sample(edges, len(edges)),
        **{key: number[example[key]] for key in NODES},
    }


def marked(example: dict) -> tuple[Counter, dict[int, tuple]]:
    """Return the count of each edge, and (marks, in-degree, out-degree) of each node."""
    edges = Counter(map(tuple, example["edges"]))
    nodes = sorted({node for edge in edges for node in edge})
    return edges, {
        v: (
            tuple(example[key] == v for key in NODES),
            sum(n for (_, b), n in edges.items() if b == v),
            sum(n for (a, _), n in edges.items() if a == v),
        )
        for v in nodes
    }


def is_isomorphic(first: dict, second: dict) -> bool:
    """Return whether any matching of the nodes is an isomorphism: slow, simple and exact."""
    (edges, nodes), (other_edges, other_nodes) = marked(first), marked(second)
    if Counter(nodes.values()) != Counter(other_nodes.values()):
        return False
    rarity = Counter(nodes.values())
    order = sorted(nodes, key=lambda v: rarity[nodes[v]])

    def extend(match: dict[int, int]) -> bool:
        if len(match) == len(order):
            return True
        v = order[len(match)]
        for w in set(other_nodes) - set(match.values()):
            if other_nodes[w] == nodes[v] and all(
                edges[v, a] == other_edges[w, b] and edges[a, v] == other_edges[b, w]
                for a, b in [*match.items(), (v, w)]
            ):
                if extend(match | {v: w}):
                    return True
        return False

    return extend({})


def example_of(edges: list, root: int, target: int, neg_target: int) -> dict:
    nodes = dict(zip(NODES, (root, target, neg_target), strict=True))
    return {"question": "x", "steps": [], "answer": "x", "edges": edges, **nodes}


def test_two_numberings_of_a_graph_hash_alike():
    """Node numbers, which no prompt shows, made held-out graphs look new."""
    first = example_of([[0, 2], [0, 3], [3, 4], [1, 5]], 0, 4, 5)
    second = example_of([[0, 3], [0, 2], [2, 4], [1, 5]], 0, 4, 5)
    assert graph_key(first) == graph_key(second)
    far = example_of([[7, 900], [7, -3], [-3, 4], [10**20, 5]], 7, 4, 5)
    assert graph_key(first) == graph_key(far)


@pytest.mark.parametrize("config", [GraphConfig(), MINI, GraphConfig(n_nodes=50, parent_rate=1.1)])
def test_random_renumberings_hash_alike(config):
    """Node numbers could break ties between nodes."""
    rng = random.Random(0)
    for example in prosqa.generate(150, 0, config):
        other = renumber(example, rng)
        assert graph_key(other) == graph_key(example)
        assert is_isomorphic(example, other)


def test_other_graphs_hash_differently():
    """A coarse key would exclude training graphs that are not held out. Here two edges differ."""
    rng = random.Random(0)
    n_different = 0
    for example in prosqa.generate(300, 1, MINI):
        edges = [list(edge) for edge in example["edges"]]
        i, j = rng.sample(range(len(edges)), 2)
        edges[i][1], edges[j][1] = edges[j][1], edges[i][1]  # all degrees stay the same
        other = renumber(example | {"edges": edges}, rng)
        same = is_isomorphic(example, other)
        assert (graph_key(example) == graph_key(other)) == same
        n_different += not same
    assert n_different >= 200


def test_hashes_agree_with_a_plain_search():
    """Compare all pairs of very small graphs, most of which have symmetries."""
    examples = prosqa.generate(60, 0, GraphConfig(n_nodes=6, min_hops=1, max_hops=2))
    hashes = graph_keys(map(prosqa.marked_graph, examples))
    assert hashes == [graph_key(example) for example in examples]
    pairs = itertools.combinations(zip(examples, hashes, strict=True), 2)
    same = [is_isomorphic(a, b) == (x == y) for (a, x), (b, y) in pairs]
    assert all(same) and len(set(hashes)) < 50


def test_symmetric_graphs_are_fast():
    """Ten equal branches have 10! numberings, which must not be tried one by one."""
    branches = [e for i in range(10) for e in ([0, 10 * i + 2], [10 * i + 2, 10 * i + 3])]
    twins = [[1, v] for v in range(200, 220)]
    example = example_of([*branches, *twins], 0, 3, 200)
    other = renumber(example_of([*branches, *twins], 0, 93, 219), random.Random(0))
    assert graph_key(example) == graph_key(other)


@pytest.mark.parametrize("task, nodes, hops", [("prosqa", 11, 3), ("prontoqa", 11, 1)])
def test_training_never_repeats_a_held_out_graph(task, nodes, hops):
    """Training repeated validation and test graphs with other node numbers."""
    config = TrainConfig(
        task=task, tokenizer="words", render="compact", n_nodes=nodes, min_hops=1, max_hops=hops,
        train_examples=1000, val_examples=100, regenerate_each_epoch=True, matched_fraction=0.4,
        short_fraction=0.2, long_fraction=0.1,
    )  # fmt: skip
    module = tasks.TASKS[task].module
    splits = tasks.TASKS[task].splits.items()
    held_out = tasks.load_data(config).val | {
        name: module.generate(2000, 1_000_003, split(config))
        for name, split in splits
        if name != "prosqa_long"  # training generates no chains of this length
    }
    assert {"valid", "matched", task, f"{task}_matched"} <= set(held_out)
    hashes = {
        key
        for examples in held_out.values()
        for key in graph_keys(map(module.marked_graph, examples))
    }
    loader = TrainLoader(
        config,
        Curriculum.from_config(config),
        init_tokenizer(config, None),
        tasks.load_data(config),
    )
    loader._fitting = lambda examples: [(x, x) for x in examples]  # texts, not tokens
    trained = [example for epoch in range(3) for example in loader._generate(epoch)]
    loader.close()
    assert hashes.isdisjoint(graph_keys(map(module.marked_graph, trained)))
    assert not any(
        is_isomorphic(a, b) for a in trained[:100] for b in held_out["valid"] if task == "prosqa"
    )


def test_rare_test_graphs_do_not_delay_a_start(monkeypatch):
    """Two thousand balanced examples of exactly six hops take eight minutes."""
    monkeypatch.setattr(tasks, "MAX_TEST_BATCHES", 2)
    rare = TrainConfig(min_hops=6, max_hops=6, val_examples=1)
    assert 10 < len(tasks.test_hashes(rare)) < 300
