"""ProsQA rows: right by an independent search, and like the released ones."""

import hashlib
import json
import random
from collections import Counter
from dataclasses import replace

import pytest

from nanococonut.data import prosqa
from nanococonut.data.files import read_examples
from nanococonut.data.prosqa import GraphConfig
from nanococonut.data.tasks import TASKS
from nanococonut.runtime.errors import UserError

FULL = GraphConfig()
MINI = GraphConfig(n_nodes=13, min_hops=2, max_hops=3)
CONFIGS = {
    "full": FULL,
    "mini": MINI,
    "full matched": replace(FULL, matched=True),
    "mini matched": replace(MINI, matched=True),
    "dense": GraphConfig(n_nodes=40, parent_rate=2.5, min_hops=3, max_hops=4),
    **{
        f"{size} {name}": prosqa.split(name, base)
        for size, base in (("full", FULL), ("mini", MINI))
        for name in prosqa.SPLITS[2:]
    },
}


@pytest.fixture(scope="module")
def rows() -> list:
    return prosqa.generate(4000, 0)


def distances(edges: list, start: int) -> dict[int, int]:
    """Steps from start to all that it leads to, the slow and plain way."""
    found, steps = {start: 0}, 0
    while True:
        steps += 1
        new = {b for a, b in edges if a in found and b not in found}
        if not new:
            return found
        found |= dict.fromkeys(new, steps)


def check(row: dict, config: GraphConfig) -> None:
    """Everything that a row promises, from its edges alone."""
    edges, symbol = row["edges"], row["idx_to_symbol"]
    root, target, neg_target = row["root"], row["target"], row["neg_target"]
    assert root in (0, 1)
    mine, theirs = distances(edges, root), distances(edges, 1 - root)
    parents, inner = {b for _, b in edges}, {a for a, _ in edges}
    nodes = parents | inner
    assert nodes == set(range(len(symbol))) and all(a < b for a, b in edges)
    assert len(set(map(tuple, edges))) == len(edges)

    # target: a deepest leaf of the entity's own; neg_target: a leaf of the other root's own
    my_leaves = set(mine) - set(theirs) - inner
    their_leaves = set(theirs) - set(mine) - inner
    hops = mine[target]
    assert target in my_leaves and hops == max(mine[leaf] for leaf in my_leaves)
    assert neg_target in their_leaves and hops >= max(theirs[leaf] for leaf in their_leaves)
    assert config.min_hops <= hops <= config.max_hops
    if config.matched:
        people = [node for node in nodes if node not in parents]
        near = [min(distances(edges, p).get(o, 99) for p in people) for o in (target, neg_target)]
        assert near[0] == near[1]
    if config.balanced:
        assert hops == theirs[neg_target]

    # words: persons are those without parents, no word twice
    for node, word in enumerate(symbol):
        assert word in (prosqa.CONCEPTS if node in parents else prosqa.NAMES)
    assert len(set(symbol)) == len(symbol)

    # texts
    def say(a: int, b: int) -> str:
        return f"{'Every ' if a in parents else ''}{symbol[a]} is a {symbol[b]}."

    *facts, asked = row["question"].split(". ")
    assert sorted(f + "." for f in facts) == sorted(say(a, b) for a, b in edges)
    options = symbol[target], symbol[neg_target]
    asks = [f"Is {symbol[root]} a {a} or {b}?" for a, b in (options, options[::-1])]
    assert asked in asks
    assert row["answer"] == f"{symbol[root]} is a {symbol[target]}."

    # steps: existing edges, from the entity to the target, as few as possible
    number = {word: node for node, word in enumerate(symbol)}
    said = [
        [number[w.strip(".")] for w in s.split() if w.strip(".") in number] for s in row["steps"]
    ]
    assert len(said) == hops and said[0][0] == root and said[-1][1] == target
    assert all(a[1] == b[0] for a, b in zip(said, said[1:], strict=False))
    assert all(step in edges for step in said)
    assert row["steps"] == [say(*step) for step in said]


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_are_right_by_an_independent_search(name):
    for row in prosqa.generate(20 if "long" in name else 100, 1, CONFIGS[name]):
        check(row, CONFIGS[name])


def test_the_released_rows_keep_the_same_promises(released):
    for row in read_examples(released / "prosqa_valid.json"):
        check(row, FULL)


# (released value, tolerance); measured on 800 released rows, farthest on 300
RELEASED = {
    "nodes": (22.8, 0.5),
    "edges": (36.0, 1.2),
    "persons": (2.56, 0.3),
    "hops": (3.77, 0.15),
    "hops 3": (0.408, 0.05),
    "hops 6": (0.024, 0.015),
    "shortest paths": (1.59, 0.12),
    "entity is node 1": (0.636, 0.08),
    "label 0": (0.034, 0.015),
    "label 1": (0.39, 0.03),
    "label 2": (0.517, 0.03),
    "in-degree 1": (0.48, 0.03),
    "in-degree 2": (0.305, 0.03),
    "deeper": (0.92, 0.05),
    "farthest": (0.945, 0.03),
    "more ancestors": (0.7, 0.06),
    "fewer parents": (0.665, 0.06),
    "random": (0.5, 0),
}


def test_statistics_are_like_the_released_ones(rows):
    found = prosqa.statistics(rows) | prosqa.heuristics(rows)
    for key, (value, tolerance) in RELEASED.items():
        assert found[key] == pytest.approx(value, abs=tolerance), key


def test_statistics_of_the_released_rows(released):
    rows = read_examples(released / "prosqa_valid.json")
    found = prosqa.statistics(rows) | prosqa.heuristics(rows)
    for key, (value, tolerance) in RELEASED.items():
        assert found[key] == pytest.approx(value, abs=tolerance), key
    assert found["deeper"] == pytest.approx(0.925, abs=1e-3)


def test_statistics_of_a_graph_done_by_hand():
    """0 -> 2 -> 4, 0 -> 3 -> 4, 1 -> 5, 1 -> 3, 6 -> 5: two ways to 4; 3 and 4 are of both."""
    edges = [[0, 2], [0, 3], [1, 3], [2, 4], [3, 4], [1, 5], [6, 5]]
    row = {"question": "", "edges": edges, "root": 0, "target": 4, "neg_target": 5}
    found = prosqa.statistics([row])
    shares = {"label 0": 0.2, "label 1": 0.2, "label 2": 0.2, "label 3": 0.4}
    shares |= {"in-degree 0": 0.2, "in-degree 1": 0.2, "in-degree 2": 0.6}
    counts = {"nodes": 7, "edges": 7, "persons": 3, "hops": 2, "hops 2": 1, "shortest paths": 2}
    assert found == pytest.approx(counts | shares | {"entity is node 1": 0})


def test_heuristics_of_a_question_done_by_hand():
    """c: 2 from Tom, 1 parent, 2 above it; d: 1 from Sam, 2 from Tom, 3 parents, 4 above it."""
    facts = "Tom is a b. Every b is a c. Sam is a d. Every e is a d. Every b is a d. Sam is a e."
    row = {"question": f"{facts} Is Tom a d or c?", "steps": [], "answer": "Tom is a c."}
    right = {"deeper": 1, "farthest": 0.5, "more ancestors": 0, "fewer parents": 1, "random": 0.5}
    assert prosqa.heuristics([row]) == right
    both = prosqa.heuristics([row, {**row, "answer": "Tom is a d."}])
    assert both == dict.fromkeys(right, 0.5)
    with pytest.raises(UserError, match="none of the options"):
        prosqa.heuristics([{**row, "answer": "Tom is a b."}])


@pytest.mark.parametrize("config", [FULL, MINI], ids=["full", "mini"])
def test_the_matched_split_is_worth_nothing_to_the_shortcut(config):
    rows = prosqa.generate(400, 2, replace(config, matched=True))
    found = prosqa.heuristics(rows)
    assert found["deeper"] == 0.5 and all(0.4 < share < 0.65 for share in found.values())
    assert prosqa.heuristics(prosqa.generate(400, 2, config))["deeper"] > 0.75


@pytest.mark.parametrize("base", [FULL, MINI], ids=["full", "mini"])
def test_splits_differ_from_their_base_as_they_say(base):
    by_name = {name: prosqa.split(name, replace(base, matched=True)) for name in prosqa.SPLITS}
    assert by_name["prosqa"] == base
    assert by_name["prosqa_matched"] == replace(base, matched=True)
    assert by_name["prosqa_balanced"] == replace(base, balanced=True)
    assert by_name["prosqa_dense"] == replace(base, balanced=True, parent_rate=2.5)
    long = by_name["prosqa_long"]
    assert long.balanced and long.min_hops == base.max_hops + 1
    assert base.n_nodes < long.n_nodes <= base.n_nodes + 4
    with pytest.raises(UserError, match="'prosqa_wide' is no split.\nChoose one of prosqa, "):
        prosqa.split("prosqa_wide", base)


def test_a_split_of_the_largest_graphs_keeps_to_the_words_there_are():
    assert prosqa.split("prosqa_long", replace(FULL, n_nodes=55)).n_nodes == 55


@pytest.mark.parametrize("name", [n for n in CONFIGS if CONFIGS[n].balanced])
def test_a_balanced_split_is_worth_nothing_to_any_shortcut(name):
    """Each rule is right in half of the rows, whatever it is: here also ones made up for the test,
    of the text alone. 0.15 are more than four standard deviations."""
    rows = prosqa.generate(200, 3, CONFIGS[name])
    found = prosqa.heuristics(rows)
    for rule in ("said last", "said more often", "of the first root"):
        found[rule] = 0.0
        for row in rows:
            asked = prosqa.parse_question(row["question"])
            words = [word for edge in asked.edges for word in edge]
            good, bad = (row["idx_to_symbol"][row[key]] for key in ("target", "neg_target"))
            scores = {
                "said last": [-words[::-1].index(w) for w in (good, bad)],
                "said more often": [words.count(w) for w in (good, bad)],
                "of the first root": [row["root"] == 0, row["root"] == 1],
            }[rule]
            found[rule] += ((scores[0] > scores[1]) + 0.5 * (scores[0] == scores[1])) / len(rows)
    assert all(share == pytest.approx(0.5, abs=0.15) for share in found.values()), found


def test_options_names_and_sentences_come_in_random_order(rows):
    first = [r["question"].split()[-3] == r["idx_to_symbol"][r["target"]] for r in rows]
    assert sum(first) / len(rows) == pytest.approx(0.5, abs=0.03)
    for name in prosqa.NAMES:  # the entity's: 17 as likely ones
        share = sum(r["idx_to_symbol"][r["root"]] == name for r in rows) / len(rows)
        assert share == pytest.approx(1 / 17, abs=0.02)
    # the edge listed first stands anywhere in the text
    places = []
    for row in rows:
        edges, _, _ = prosqa.parse_question(row["question"])
        a, b = (row["idx_to_symbol"][node] for node in row["edges"][0])
        places.append(edges.index((a, b)) / (len(edges) - 1))
    assert sum(places) / len(places) == pytest.approx(0.5, abs=0.03)


def test_steps_are_a_uniform_choice_of_the_shortest_paths(rows):
    """Of two paths each is taken as often. Where more of a graph's paths enter the target by one
    parent than by another, that parent is taken by their share (a plain walk upward would not)."""
    first, pairs, surplus, uneven = 0, 0, 0.0, 0
    for row in rows[:2500]:
        number = {word: node for node, word in enumerate(row["idx_to_symbol"])}
        words = [step.removesuffix(".").split()[-1] for step in row["steps"]]
        taken = [row["root"], *(number[word] for word in words)]
        paths = [[row["root"]]]
        while not any(path[-1] == row["target"] for path in paths):
            paths = [[*path, b] for path in paths for a, b in row["edges"] if a == path[-1]]
        paths = sorted(path for path in paths if path[-1] == row["target"])
        first += len(paths) == 2 and paths[0] == taken
        pairs += len(paths) == 2
        enters = Counter(path[-2] for path in paths)
        if len(set(enters.values())) > 1:
            share = {parent: n / len(paths) for parent, n in enters.items()}
            surplus += share[taken[-2]] - sum(s * s for s in share.values())
            uneven += 1
    assert pairs > 500 and uneven > 100
    assert first / pairs == pytest.approx(0.5, abs=0.06)
    assert surplus / uneven == pytest.approx(0, abs=0.03)


def test_the_same_seed_gives_the_same_rows():
    """The digest is a fixed one: a seed means the same rows on every machine, now and later."""
    rows = prosqa.generate(50, (1, 2, 3))
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert digest == "4b9871b8489517f7619950442dc24d38b3a7f5489afb56d75f3eb5f66019afd1"
    assert prosqa.generate(20, (1, 2, 3)) == rows[:20]  # more rows begin with the same ones
    assert prosqa.generate(20, (1, 2, 4)) != rows[:20]


def test_a_bare_seed_is_no_stream_of_the_loaders():
    """numpy pads seeds with zeros: S alone would be the training rows of a run with seed S."""
    public = prosqa.generate(5, 7)
    for stream in range(5):
        for tail in ((), (0,), (0, 0), (0, 1)):
            assert prosqa.generate(5, (7, stream, *tail)) != public


def test_training_rows_are_disjoint_from_excluded_ones():
    tiny = GraphConfig(n_nodes=5, min_hops=1, max_hops=2)  # so few graphs that they come again
    held_out = {prosqa.signature(row) for row in prosqa.generate(20, 0, tiny)}
    plain = prosqa.generate(300, 1, tiny)
    assert any(prosqa.signature(row) in held_out for row in plain)
    disjoint = prosqa.generate(300, 1, tiny, held_out)
    assert not any(prosqa.signature(row) in held_out for row in disjoint)
    left = [row for row in plain if prosqa.signature(row) not in held_out]
    assert disjoint[: len(left)] == left


def test_a_signature_is_the_graphs_and_not_the_words(rows):
    shuffle = random.Random(0).sample
    for row in rows[:50]:
        renamed = {**row, "question": "other", "steps": []}
        for key in ("idx_to_symbol", "edges"):
            renamed[key] = shuffle(row[key], len(row[key]))
        assert prosqa.signature(renamed) == prosqa.signature(row)
        swapped = {**row, "target": row["neg_target"], "neg_target": row["target"]}
        assert prosqa.signature(swapped) != prosqa.signature(row)
    assert len({prosqa.signature(row) for row in rows}) == len(rows)
    bare = {key: rows[0][key] for key in ("question", "steps", "answer")}
    for row in (bare, {**rows[0], "edges": [[1]]}, {**rows[0], "root": "Tom"}):
        with pytest.raises(UserError, match="does not hold its graph"):
            prosqa.signature(row)


def round_trips(row: dict) -> None:
    compact = prosqa.compact_row(row)
    assert prosqa.expand_question(compact["question"]) == row["question"]
    assert prosqa.expand_steps("".join(compact["steps"])) == row["steps"]
    assert prosqa.expand_answer(compact["answer"], row["question"]) == row["answer"]
    assert compact["question"].count(" ") == 2 * len(row["edges"]) + 3


def test_the_compact_rendering_loses_nothing(rows):
    for row in rows[:300]:
        round_trips(row)


def test_the_compact_rendering_of_released_rows_loses_nothing(released):
    for row in read_examples(released / "prosqa_valid.json"):
        round_trips(row)


QUESTION = "Every p is a c. Tom is a p. Sam is a d. Is Tom a d or c?"


def test_the_compact_rendering_by_hand():
    row = {"question": QUESTION, "steps": ["Tom is a p.", "Every p is a c."]}
    row |= {"answer": "Tom is a c.", "root": 1}
    short = {"question": " p c. Tom p. Sam d.? Tom? d? c", "steps": [" Tom p", " p c"]}
    assert prosqa.compact_row(row) == {**short, "answer": "c", "root": 1}
    # a model may say anything
    assert prosqa.expand_steps(" p c half") == ["Every p is a c.", "half"]
    assert prosqa.expand_answer("half a thought", QUESTION) == "half a thought"
    assert prosqa.expand_answer("c", QUESTION) == "Tom is a c."
    whole = TASKS["prosqa"].expand(" Tom p p c### c", QUESTION)
    assert whole == "Tom is a p.\nEvery p is a c.\n### Tom is a c."
    assert TASKS["prosqa"].expand("### c", QUESTION) == "### Tom is a c."
    assert TASKS["prosqa"].expand(" Tom p p", QUESTION) == "Tom is a p.\np"
    assert TASKS["prosqa"].expand("", QUESTION) == ""


def test_a_question_typed_by_a_user_is_taken_apart():
    typed = "  Every zonk is an imp.\nTom is  a zonk.Sam is a nix. Is Tom a nix or a imp? "
    edges, entity, options = prosqa.parse_question(typed)
    assert edges == [("zonk", "imp"), ("Tom", "zonk"), ("Sam", "nix")]
    assert (entity, options) == ("Tom", ("nix", "imp"))


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "not a ProsQA question: ''"),
        ("What is 3 + 4?", "not a ProsQA question"),
        ("Is Tom a c or d?", "not a ProsQA question"),
        (QUESTION + " And then?", "not a ProsQA question"),
        (QUESTION[:-1], "not a ProsQA question"),
        ("tom is a c. " + QUESTION, "not a ProsQA sentence: 'tom is a c'"),
        ("Every Tom is a c. " + QUESTION, "not a ProsQA sentence: 'Every Tom is a c'"),
        ("Tom is a C. " + QUESTION, "not a ProsQA sentence: 'Tom is a C'"),
        ("All c are d. " + QUESTION, "not a ProsQA sentence: 'All c are d'"),
    ],
)
def test_other_text_is_refused(text, complaint):
    for take in (prosqa.parse_question, prosqa.compact_question):
        with pytest.raises(UserError, match=complaint):
            take(text)


def test_compact_text_that_is_none_is_refused():
    for text in ("", " a b c?", " a b. c d?", "Is it so?"):
        with pytest.raises(UserError, match="not a compact ProsQA question"):
            prosqa.expand_question(text)
    with pytest.raises(UserError, match="not a ProsQA sentence"):
        prosqa.compact_sentence("Tom likes c.")
    assert prosqa.parse_sentence(" Every p is a c.\n") == ("p", "c")
    with pytest.raises(UserError, match="not a ProsQA sentence"):
        prosqa.parse_sentence("")


def test_solving_by_search(rows):
    for row in rows[:100]:
        assert prosqa.solve(row["question"]) == row["answer"]
    assert prosqa.solve(QUESTION) == "Tom is a c."
    assert prosqa.solve("Tom is a c. Every c is a d. Is Tom a c or d?") is None  # both
    assert prosqa.solve("Tom is a c. Is Tom a a or b?") is None  # neither
    assert prosqa.solve("Every a is a b. Every b is a a. Tom is a b. Is Tom a a or c?") is not None
    assert prosqa.solve("Who is Tom?") is None


@pytest.mark.parametrize(
    "values, field",
    [
        ({"n_nodes": 3}, "n_nodes"),
        ({"n_nodes": 56}, "n_nodes"),
        ({"n_nodes": 13.0}, "n_nodes"),
        ({"min_hops": 0}, "min_hops"),
        ({"n_nodes": 8, "min_hops": 6}, "min_hops"),
        ({"max_hops": 2}, "max_hops"),
        ({"parent_rate": 0}, "parent_rate"),
        ({"parent_rate": float("nan")}, "parent_rate"),
        ({"first_share": 1.1}, "first_share"),
        ({"second_share": 0.7}, "second_share"),
        ({"depth_weight": -1}, "depth_weight"),
        ({"depth_power": 21}, "depth_power"),
        ({"matched": True, "balanced": True}, "matched"),
    ],
)
def test_values_that_cannot_be_are_refused(values, field):
    with pytest.raises(UserError, match=f"^{field}="):
        GraphConfig(**values)


def test_graphs_that_are_never_drawn_end_in_an_error(monkeypatch):
    monkeypatch.setattr(prosqa, "PATIENCE", 5000)
    with pytest.raises(UserError, match="0 rows with n_nodes=12, min_hops=9"):
        prosqa.generate(1, 0, GraphConfig(n_nodes=12, min_hops=9, max_hops=9))
    tiny = GraphConfig(n_nodes=4, min_hops=1, max_hops=1)
    every = {prosqa.signature(row) for row in prosqa.generate(300, 0, tiny)}
    with pytest.raises(UserError, match="0 rows with n_nodes=4"):
        prosqa.generate(1, 0, tiny, every)
