"""Shortcut rules that answer without search: the baselines that a searching model has to beat."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from nanococonut.data import prontoqa, prosqa
from nanococonut.data.examples import Example
from nanococonut.data.graph import parents_of, reachable
from nanococonut.runtime.errors import UserError


def _guess(scores: Sequence[Any], correct: Sequence[bool]) -> float:
    """Return the probability that a choice with the highest score, drawn at random, is correct."""
    return fmean(c for score, c in zip(scores, correct, strict=True) if score == max(scores))


def prosqa_shortcuts(examples: Sequence[Example]) -> dict[str, float]:
    """Return the accuracy of rules that ignore the entity; ties count half. A rule chooses

    deeper           the option farther from its nearest parentless node
    farthest         the option farther from its farthest parentless node
    more ancestors   the option with more ancestors
    fewer parents    the option with fewer parents
    """
    rules = ("deeper", "farthest", "more ancestors", "fewer parents", "random")
    n_correct = dict.fromkeys(rules, 0.0)
    for example in examples:
        edges, _, options = prosqa.parse_question(example["question"])
        parents = parents_of(edges)
        scores = []
        for option in options:
            above = reachable([(child, parent) for parent, child in edges], option)
            # in a user's graph, an option may have only cycles above it
            depths = [depth for node, depth in above.items() if node not in parents] or [0]
            n_parents = len(parents.get(option, ()))
            scores.append((min(depths), max(depths), len(above), -n_parents, 0))
        correct_option = example["answer"].split()[-1].removesuffix(".")
        if correct_option not in options:
            raise UserError(
                f"the answer {example['answer']!r} is none of the options: {', '.join(options)}.\n"
                "Give generated or released examples."
            )
        for rule, values in zip(rules, zip(*scores, strict=True), strict=True):
            n_correct[rule] += _guess(values, [option == correct_option for option in options])
    return {rule: n / len(examples) for rule, n in n_correct.items()}


def prontoqa_shortcuts(examples: Sequence[Example]) -> dict[str, float]:
    """Return the accuracy of rules that do not search; ties count half.

    always true, no "not"   use only the query; the others believe one claim about the property:
    first, last             the first one, the last one
    leads on                the one whose concept has a parent
    led to                  the one whose concept has a child
    most often              the one whose concept occurs most often
    """
    rules = ("always true", 'no "not"', "first", "last", "leads on", "led to", "most often")
    n_correct = dict.fromkeys((*rules, "random"), 0.0)
    for example in examples:
        if example["answer"] not in ("True", "False"):
            raise UserError(
                f"the answer {example['answer']!r} is neither True nor False.\n"
                "Give generated or released examples."
            )
        is_true = example["answer"] == "True"
        facts, claims, query = prontoqa.parse_question(example["question"])
        edges = [claim for claim in claims if claim.names_concept]
        subjects, predicates = {c.subject for c in edges}, {c.predicate for c in edges}
        claims += facts
        words = [word for claim in claims for word in (claim.subject, claim.predicate)]
        n_correct["always true"] += is_true
        n_correct['no "not"'] += is_true != query.negated
        about = [(i, c) for i, c in enumerate(claims) if c.predicate == query.predicate]
        correct = [(claim.negated == query.negated) == is_true for _, claim in about]
        scores = {  # rule -> score of each claim
            "first": [-i for i, _ in about],
            "last": [i for i, _ in about],
            "leads on": [claim.subject in subjects for _, claim in about],
            "led to": [claim.subject in predicates for _, claim in about],
            "most often": [words.count(claim.subject) for _, claim in about],
            "random": [0 for _ in about],
        }
        for rule, values in scores.items() if about else ():
            n_correct[rule] += _guess(values, correct)
    return {rule: n / len(examples) for rule, n in n_correct.items()}
