"""Statistics of examples, and their values for the released data that the generators fit."""

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean

from nanococonut.data import prontoqa
from nanococonut.data.examples import Example
from nanococonut.data.graph import children_of, parents_of
from nanococonut.runtime.errors import UserError

# fmt: off
# 800 released validation and test examples; shortcuts: the 300 validation examples
PROSQA_RELEASED: dict[str, float] = {
    "nodes": 22.8, "edges": 36.0, "persons": 2.56,
    "hops": 3.77, "hops 3": 0.408, "hops 4": 0.438, "hops 5": 0.131, "hops 6": 0.024,
    "shortest paths": 1.59, "entity is node 1": 0.636,
    "label 0": 0.034, "label 1": 0.390, "label 2": 0.517, "label 3": 0.060,
    "in-degree 0": 0.027, "in-degree 1": 0.480, "in-degree 2": 0.305, "in-degree 3": 0.133,
    "deeper": 0.925, "farthest": 0.945, "more ancestors": 0.698, "fewer parents": 0.667,
    "random": 0.5,
}

# 300 examples of the public generator (5 hops, random order)
PRONTOQA_RELEASED: dict[str, float] = {
    "sentences": 25, "words": 104.72, "facts": 2, "facts last": 1, "start is first fact": 0.5067,
    "properties": 12,
    "concepts": 14, "concepts with two parents": 5, "concepts reached": 13,
    "Each": 0.2604, "Every": 0.2462, "plural": 0.4933,
    "negated on the way": 0.2758, "negated aside": 0.3294, "conclusion negated": 0.4733,
    "contradiction first": 0.5367, "query negated": 0.4667, "true": 0.4867,
    "hops": 5, "steps": 6,
}
# fmt: on


def reachable(edges: Iterable[Sequence[int]], root: int) -> dict[int, tuple[int, int]]:
    """Map `root` and its descendants to (fewest steps, number of shortest paths)."""
    children = children_of(edges)
    result: dict[int, tuple[int, int]] = {}
    level, depth = Counter({root: 1}), 0
    while level:
        result |= {node: (depth, n_paths) for node, n_paths in level.items()}
        next_level: Counter[int] = Counter()
        for node, n_paths in level.items():
            for child in children.get(node, ()):
                if child not in result:
                    next_level[child] += n_paths
        level, depth = next_level, depth + 1
    return result


def prosqa_statistics(examples: Sequence[Example]) -> dict[str, float]:
    """Return means and fractions of examples that store their graphs.

    label, in-degree   fractions of the nodes from 2 on; label 1 (2): only node 0 (1) leads there,
                       label 3: both do
    """
    total: Counter[str] = Counter()
    for example in examples:
        edges, root, target = example["edges"], example["root"], example["target"]
        n = 1 + max(map(max, edges))
        parents = parents_of(edges)
        below = [reachable(edges, 0), reachable(edges, 1)]
        if root not in (0, 1) or target not in below[root] or n < 3:
            raise UserError(
                f"the target does not follow from the root: {example['question'][:40]!r}...\n"
                "Give generated or released examples: node 0 or 1 is the root."
            )
        hops, n_paths = below[root][target]
        total["nodes"] += n
        total["edges"] += len(edges)
        total["persons"] += sum(node not in parents for node in range(n))
        total["hops"] += hops
        total[f"hops {hops}"] += 1
        total["shortest paths"] += n_paths
        total["entity is node 1"] += root == 1
        for node in range(2, n):
            label = (node in below[0]) + 2 * (node in below[1])
            total[f"label {label}"] += 1 / (n - 2)
            total[f"in-degree {len(parents.get(node, ()))}"] += 1 / (n - 2)
    return {key: total[key] / len(examples) for key in sorted(total)}


def prontoqa_statistics(examples: Sequence[Example]) -> dict[str, float]:
    """Return means and fractions. UserError if an answer does not follow from its question.

    Each, Every, plural   fractions of the rules
    negated ...           fractions of the rules that give a property: on the way to the conclusion,
                          and aside (all others, but none about the property in the query)
    """
    values: dict[str, list[float]] = {}
    for example in examples:
        if prontoqa.solve(example["question"]) != example["answer"]:
            raise UserError(
                f"an answer does not follow from its question: ...{example['question'][-40:]!r}.\n"
                "Give generated or released examples."
            )
        for key, new_values in _prontoqa_values(example).items():
            values.setdefault(key, []).extend(new_values)
    return {key: fmean(numbers) for key, numbers in values.items() if numbers}


def _prontoqa_values(example: Example) -> dict[str, list[float]]:
    """Return what prontoqa_statistics averages: one value, or one for each rule."""
    facts, rules, query = question = prontoqa.parse_question(example["question"])
    reached = prontoqa.concepts_of(question)
    edges = [rule for rule in rules if rule.names_concept]
    properties = [rule for rule in rules if not rule.names_concept]
    about_query = [claim for claim in rules + facts if claim.predicate == query.predicate]
    others = [rule for rule in properties if rule not in about_query]
    supports = [claim.subject in reached for claim in about_query]
    conclusion = about_query[supports.index(True)]
    first_sentences = [prontoqa.split_sentences(step)[0] for step in example["steps"]]
    path = {prontoqa.parse_sentence(sentence).predicate for sentence in first_sentences}
    sentences, _ = prontoqa.split_question(example["question"])
    claims = [prontoqa.parse_sentence(sentence) for sentence in sentences]
    openings = [s.split()[0] for s, c in zip(sentences, claims, strict=True) if c in rules]
    n_parents = Counter(rule.subject for rule in edges)
    return {
        "sentences": [len(sentences)],
        "words": [len(example["question"].split())],
        "facts": [len(facts)],
        "facts last": [all(claim in facts for claim in claims[-len(facts) :])],
        "start is first fact": [facts[0].predicate in path],
        "properties": [len(properties)],
        "concepts": [len({rule.subject for rule in rules} | {rule.predicate for rule in edges})],
        "concepts with two parents": [sum(n == 2 for n in n_parents.values())],
        "concepts reached": [len(reached) - 1],
        "Each": [word == "Each" for word in openings],
        "Every": [word == "Every" for word in openings],
        "plural": [word.endswith("puses") for word in openings],
        "negated on the way": [rule.negated for rule in others if rule.subject in path],
        "negated aside": [rule.negated for rule in others if rule.subject not in path],
        "conclusion negated": [conclusion.negated],
        "contradiction first": [not supports[0]],
        "query negated": [query.negated],
        "true": [example["answer"] == "True"],
        "hops": [reached[conclusion.subject]],
        "steps": [len(example["steps"])],
    }
