"""ProntoQA: does an entity have a property, by the rules of an ontology of invented words?

The examples are like those of the public generator (Saparov and He, arXiv 2210.01240) that the
Coconut paper uses. A chain of concepts leads up from the entity. Each concept has a property and a
second parent that leads nowhere; the property in the query is `hops` steps away. All examples have
the same structure, so a thousand are drawn at once as arrays. docs/DATA.md compares the statistics.

These examples need no search. Two concepts have the property in the query, one of them with "not",
and the wrong concept occurs nowhere else in the text (shortcuts.py: 100 % correct). With
OntologyConfig(matched=True), the wrong concept is at the end of a second chain, the twin of the
first. Only the fact about the entity distinguishes the chains, so shortcut rules get 50 %.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple
from zlib import crc32

import numpy as np

from nanococonut.config import TrainConfig
from nanococonut.data import graph
from nanococonut.data.examples import Example
from nanococonut.data.generator import BATCH, draw
from nanococonut.data.graph import reachable
from nanococonut.runtime.cli import Options, option
from nanococonut.runtime.errors import UserError

NAMES = "Alex Fae Max Polly Rex Sally Sam Stella Wren".split()
CONCEPTS = (
    "brimpus dumpus gorpus grimpus impus jompus lempus lorpus numpus rompus shumpus sterpus tumpus "
    "vumpus wumpus yumpus zumpus"
).split()
# families of properties: an example uses at most one property of each
FAMILIES = [
    family.split()
    for family in (
        "blue brown orange red, large small, liquid luminous metallic wooden, opaque transparent, "
        "feisty happy nervous shy, bright dull, bitter sour spicy sweet, earthy floral fruity, "
        "cold hot temperate, aggressive amenable angry kind mean, discordant loud melodic muffled, "
        "fast moderate slow, overcast rainy snowy sunny windy"
    ).split(", ")
]
PROPERTIES = [word for family in FAMILIES for word in family]
# all words and punctuation of both styles, and the mark before the answer
VOCABULARY = [
    *NAMES,
    *CONCEPTS,
    *(f"{concept}es" for concept in CONCEPTS),
    *(f"{concept.capitalize()}es" for concept in CONCEPTS),
    *PROPERTIES,
    *"Each Every is are a an not True False or false : . ? ###".split(),
]

WORDINGS = ("Each", "Every", "plural", "plural")  # half of all rules are plural


class Claim(NamedTuple):
    """A parsed sentence. The subject of a fact is a name, that of a rule a concept."""

    subject: str
    negated: bool
    predicate: str  # a concept (ends in -pus) or a property

    @property
    def compact(self) -> str:
        """Return the claim in compact style, without its subject: " red" or " not red"."""
        return f" {'not ' * self.negated}{self.predicate}"

    @property
    def is_fact(self) -> bool:
        return self.subject[0].isupper()

    @property
    def names_concept(self) -> bool:
        return self.predicate.endswith("pus")


def _a(concept: str) -> str:
    return f"{'an' if concept[0] in 'aeiou' else 'a'} {concept}"


@lru_cache(10_000)  # a lookup is faster than formatting
def _sentence(claim: Claim, wording: str = "Every") -> str:
    """Return a claim as a sentence. wording: of WORDINGS; makes no difference for facts."""
    subject, negated, predicate = claim
    no = "not " if negated else ""
    if wording == "plural" and not claim.is_fact:
        plural = f"{predicate}es" if claim.names_concept else predicate
        return f"{subject.capitalize()}es are {no}{plural}."
    subject = subject if claim.is_fact else f"{wording} {subject}"
    return f"{subject} is {no}{_a(predicate) if claim.names_concept else predicate}."


@dataclass(frozen=True)
class OntologyConfig(Options):
    """Settings of the ontologies."""

    hops: int = option(5, "steps from the entity's concept to the queried property", ge=1, le=6)
    matched: bool = option(False, "the wrong property is at the end of a second chain")

    def validate(self) -> None:
        if self.matched and self.hops > 5:  # two chains need more concepts
            raise UserError(f"hops={self.hops}: matched has at most 5.\nLower hops (--max_hops).")


# split -> function from the training settings to the settings of the split
SPLITS: dict[str, Callable[[TrainConfig], OntologyConfig]] = {
    "prontoqa": lambda trained: OntologyConfig(trained.max_hops),
    "prontoqa_matched": lambda trained: OntologyConfig(trained.max_hops, matched=True),
}


def easier_configs(trained: TrainConfig) -> list[OntologyConfig]:
    """Return settings with fewer steps than the task, which make search easier to learn."""
    return [OntologyConfig(hops, matched=True) for hops in range(1, trained.max_hops)]


def longest_configs(trained: TrainConfig) -> list[OntologyConfig]:
    """Return no settings: all examples have the same number of steps."""
    return []


def configs_by_hops(trained: TrainConfig) -> dict[int, OntologyConfig]:
    """Return number of steps -> settings without shortcuts."""
    return {n: OntologyConfig(n, matched=True) for n in range(1, min(5, trained.max_hops) + 1)}


def _negated_probability(c: OntologyConfig) -> np.ndarray:
    """Return (P): the probability that a property is negated, for concepts 1 to hops, then others.

    The public generator negates a third of all properties. Then it walks up the chain. At each
    concept, it ends at the property with weight 0.3 (negated: 0.7) or continues with weight 1. It
    keeps only walks of the right length, so properties on the way are negated less often.
    """
    probability = np.full(2 * c.hops + (not c.matched), 1 / 3)
    if c.matched:  # the second chain has the opposite properties, so only 1/2 suits both
        probability[: c.hops] = 1 / 2
        return probability
    no, yes = 1 / 3 / 1.7, 2 / 3 / 1.3
    probability[0] = 0.7 * no / (0.7 * no + 0.3 * yes)
    probability[1 : c.hops] = no / (no + yes)
    return probability


def _rules(c: OntologyConfig) -> tuple[list[tuple[int, int, bool]], int]:
    """Return (subject, predicate, opposite) of each rule as numbers, and the second fact's concept.

    Concepts 0 to hops are the chain, top first; concept hops + i is the second parent of concept i.
    Predicates from len(CONCEPTS) on are properties; if opposite, the rule flips their negation.
    """
    h, p = c.hops, len(CONCEPTS)
    rules = []
    for i in range(1, h + 1):
        up, aside = (i, i - 1, False), (i, h + i, False)
        rules += [up, aside, (i, p + i - 1, False), (h + i, p + h + i - 1, False)]
    if not c.matched:
        alone, other, top = 2 * h + 1, 2 * h + 2, 2 * h + 3
        rules += [(alone, p, True), (other, top, False), (other, p + 2 * h, False)]
        return rules, other
    for i in range(1, h + 1):  # concept 2 * hops + i is the twin of concept i
        twin = 2 * h + i
        rules += [(twin, twin - 1 if i > 1 else 0, False), (twin, h + i, False)]
        rules += [(twin, p + i - 1, True)]
    return rules, 3 * h


def sample_batch(rng: np.random.Generator, c: OntologyConfig) -> list[Example]:
    """Return BATCH examples. Shapes: B examples, P properties, 17 concepts, 13 families."""
    rules, second = _rules(c)
    negated_probability = _negated_probability(c)
    concepts = rng.random((BATCH, len(CONCEPTS))).argsort(1).tolist()  # (B, 17)
    family = rng.random((BATCH, len(FAMILIES))).argsort(1)[:, : len(negated_probability)]  # (B, P)
    n_members = np.array([len(f) for f in FAMILIES])
    member = (rng.random(family.shape) * n_members[family]).astype(int).tolist()
    is_negated = (rng.random(family.shape) < negated_probability).tolist()
    wording = rng.integers(4, size=(BATCH, len(rules))).tolist()
    order = rng.random((BATCH, len(rules))).argsort(1).tolist()
    names = rng.random((BATCH, len(NAMES))).argsort(1)[:, :2].tolist()
    second_first, is_true = (rng.random((2, BATCH)) < 0.5).tolist()
    examples: list[Example] = []
    for i, families in enumerate(family.tolist()):
        words = [CONCEPTS[k] for k in concepts[i]]
        words += [FAMILIES[f][m] for f, m in zip(families, member[i], strict=True)]
        negated = [False] * len(CONCEPTS) + is_negated[i]
        sentences = [
            _sentence(Claim(words[s], negated[p] ^ opposite, words[p]), WORDINGS[w])
            for (s, p, opposite), w in zip(rules, wording[i], strict=True)
        ]
        first_name, second_name = (NAMES[k] for k in names[i])
        entity, other = first_name, second_name if c.matched else first_name
        chain = words[c.hops : 0 : -1]  # the entity's concept first
        facts = [f"{entity} is {_a(chain[0])}.", f"{other} is {_a(words[second])}."]
        if second_first[i]:
            facts.reverse()
        prop, no = words[len(CONCEPTS)], negated[len(CONCEPTS)]
        query = _sentence(Claim(entity, no == is_true[i], prop))
        # the rules of the steps: from each concept to its parent, then to the property
        proof = [sentences[rule] for rule in (*range(4 * (c.hops - 1), 0, -4), 2)]
        steps = [f"{entity} is {_a(k)}. {rule}" for k, rule in zip(chain, proof, strict=True)]
        context = [sentences[rule] for rule in order[i]]
        examples.append(
            {
                "question": " ".join([*context, *facts, "True or false:", query]),
                "steps": [*steps, _sentence(Claim(entity, no, prop))],
                "answer": str(is_true[i]),
            }
        )
    return examples


# ---- sentences


class Question(NamedTuple):
    """A parsed question in the order of the text. All words are singular."""

    facts: list[Claim]
    rules: list[Claim]
    query: Claim


PROPERTY = r"(not )?((?!not\b|[a-z]*pus(?:es)?\b)[a-z]+)"
SINGULAR_RE = re.compile(
    rf"(?:(?:Each|Every) ([a-z]*pus)|([A-Z][a-z]*)) is (?:an? ([a-z]*pus)|{PROPERTY})"
)
PLURAL_RE = re.compile(rf"([A-Z][a-z]*pus)es are (?:([a-z]*pus)es|{PROPERTY})")


def parse_sentence(sentence: str) -> Claim:
    """Parse a sentence of any wording, without full stop, or raise UserError if it does not fit."""
    if m := SINGULAR_RE.fullmatch(sentence):
        return Claim(m[1] or m[2], bool(m[4]), m[3] or m[5])
    if m := PLURAL_RE.fullmatch(sentence):
        return Claim(m[1].lower(), bool(m[3]), m[2] or m[4])
    raise UserError(
        f'not a ProntoQA sentence: {sentence[:60]!r}.\nWrite "Max is a wumpus." (capitalize '
        'names) or "Every wumpus is not red." (also Each, Wumpuses are; concepts end in -pus)'
    )


def split_sentences(text: str) -> list[str]:
    """Return the sentences without full stops and with single spaces."""
    return [s.strip() for s in " ".join(text.split()).removesuffix(".").split(".")]


def split_question(question: str) -> tuple[list[str], str]:
    """Return (sentences of rules and facts, query after "True or false:")."""
    context, _, query = " ".join(question.split()).partition("True or false:")
    return split_sentences(context) if context else [], query.strip()


def parse_question(question: str) -> Question:
    """Parse a question. Raise UserError if it is not ProntoQA."""
    sentences, query_text = split_question(question)
    m = SINGULAR_RE.fullmatch(query_text.removesuffix("."))
    if not sentences or not m or not m[2] or not m[5]:  # a name and a property
        raise UserError(
            f"not a ProntoQA question: {question[-60:]!r}.\nWrite rules, facts and a query: "
            '"Each wumpus is red. Max is a wumpus. True or false: Max is not red."'
        )
    claims = [parse_sentence(sentence) for sentence in sentences]
    facts = [claim for claim in claims if claim.is_fact]
    rules = [claim for claim in claims if not claim.is_fact]
    return Question(facts, rules, Claim(m[2], bool(m[4]), m[5]))


def concepts_of(q: Question) -> dict[str, int]:
    """Map the entity and all concepts that apply to it to the fewest steps up to them."""
    edges = [(c.subject, c.predicate) for c in q.facts + q.rules if c.names_concept]
    return reachable(edges, q.query.subject)


def solve(question: str) -> str | None:
    """Return the answer found by search, "True" or "False"; None if neither or both follow."""
    q = parse_question(question)
    concepts = concepts_of(q)
    signs = {
        claim.negated
        for claim in q.facts + q.rules
        if claim.predicate == q.query.predicate and claim.subject in concepts
    }
    return str(signs == {q.query.negated}) if len(signs) == 1 else None


def marked_graph(example: Example) -> graph.Graph:
    """Return the ontology with the query marked, for graph.graph_keys.

    Sentence order, wording and the words for entity and concepts make no difference; properties do.
    Raise UserError as in parse_question.
    """
    facts, rules, query = parse_question(example["question"])
    # nodes: names, concepts, and properties with their "not", such as " not red"
    edges = [(c.subject, c.predicate if c.names_concept else c.compact) for c in facts + rules]
    marks = {node: crc32(node.encode()) for _, node in edges if node.startswith(" ")}
    marks[query.subject] = crc32(query.compact.encode())
    return graph.marked_graph(edges, marks)


generate = partial(draw, sample_batch, marked_graph, OntologyConfig())


def twin(example: Example) -> Example | None:
    """Return the question with the concepts of its two names exchanged, so that its answer flips.

    Return None if there is only one name, as without OntologyConfig(matched=True), or if the other
    answer does not follow from rules.
    """
    facts, rules, (entity, _, prop) = parse_question(example["question"])
    concepts = {fact.subject: fact.predicate for fact in facts}
    if len(concepts) != 2 or entity not in concepts:
        return None
    concepts = dict(zip(concepts, reversed(concepts.values()), strict=True))
    sentences, query = split_question(example["question"])
    texts = [f"{sentence}." for sentence in sentences]
    for i, claim in enumerate(map(parse_sentence, sentences)):
        if claim.is_fact:
            texts[i] = _sentence(claim._replace(predicate=concepts[claim.subject]))
    question = " ".join([*texts, "True or false:", query])
    answer = solve(question)
    if answer is None or answer == example["answer"]:
        return None
    # breadth-first search from the entity's concept up to the nearest one with the property
    rule_of = {rule.subject: rule for rule in rules if rule.predicate == prop}
    proofs: list[list[Claim]] = [[Claim(entity, False, concepts[entity])]]
    for proof in proofs:  # grows during the loop
        concept = proof[-1].predicate
        if concept in rule_of:
            break
        proofs += [[*proof, r] for r in rules if r.subject == concept and r.names_concept]
    else:
        return None
    last = rule_of[concept]
    compact = "".join(f" {rule.subject}{rule.compact}" for rule in [*proof[1:], last])
    steps = expand_steps(compact + last.compact, question)
    return {**example, "question": question, "steps": steps, "answer": answer}


def reworded(example: Example) -> str:
    """Return the question with the opposite query: the same search, the other answer."""
    context = example["question"].partition("True or false:")[0]
    query = parse_question(example["question"]).query
    return f"{context}True or false: {_sentence(query._replace(negated=not query.negated))}"


# ---- compact style: "Each p is a c." becomes " p c.", "Ps are not red." " p not red.", the query
# "? Max? not red". A step "Max is a p. Each p is a c." becomes " p c", the last one " not red"; the
# answer is unchanged. Spaces and "?" are as in prosqa.py. Only the wording is lost.


def compact_question(question: str) -> str:
    """Return the rules, the facts, then "? Max? not red". Raise UserError as in parse_question."""
    facts, rules, query = parse_question(question)
    claims = "".join([f" {claim.subject}{claim.compact}." for claim in rules + facts])
    return f"{claims}? {query.subject}?{query.compact}"


def compact_step(step: str) -> str:
    """Return a step in compact style, see above. Raise UserError if it is not a step."""
    fact, *rule = [parse_sentence(sentence) for sentence in split_sentences(step)]
    if fact.is_fact and not rule:
        return fact.compact
    if fact.is_fact and [claim.subject for claim in rule] == [fact.predicate]:
        return f" {rule[0].subject}{rule[0].compact}"
    raise UserError(
        f"not a ProntoQA step: {step[:60]!r}.\n"
        'Write a fact, or a fact and a rule about it: "Max is a wumpus. Each wumpus is red."'
    )


def compact_example(example: Example) -> Example:
    """Return the example in compact style; other keys are unchanged."""
    steps = [compact_step(step) for step in example["steps"]]
    return {**example, "question": compact_question(example["question"]), "steps": steps}


STEP_RE = re.compile(r"([a-z]*pus) (not )?(?!not\b)([a-z]+)|(not )?(?!not\b)([a-z]+)|\S+")


def expand_steps(text: str, question: str) -> list[str]:
    """Return concatenated compact steps as sentences; text that is not a step is unchanged.

    Rules are worded as in the question; rules that are not in the question start with Every. Raise
    UserError as in parse_question.
    """
    entity = parse_question(question).query.subject
    wording = {parse_sentence(s): f"{s}." for s in split_question(question)[0]}
    steps = []
    for m in STEP_RE.finditer(" ".join(text.split())):
        if m[1]:
            rule = Claim(m[1], bool(m[2]), m[3])
            fact = _sentence(Claim(entity, False, m[1]))
            steps.append(f"{fact} {wording.get(rule) or _sentence(rule)}")
        else:
            steps.append(_sentence(Claim(entity, bool(m[4]), m[5])) if m[5] else m[0])
    return steps
