"""ProntoQA: is it true or false of an entity that it has a property? Ontologies of invented words.

Rows as the public generator (Saparov and He, arXiv 2210.01240) draws them for the Coconut paper:
a chain of concepts, each with a property and a second parent that leads nowhere, and the entity at
its lower end; the property asked for is `hops` steps away. All shapes are the same, so a thousand
rows are drawn at a time, as numbers. The shares of negations follow from that generator's walk (see
_negated); `statistics` and RELEASED compare them with 300 rows that it made.

Those rows can be answered without any search: the property is stated of two concepts, with and
without "not", and the wrong one is named nowhere else in the text. `heuristics` measures that (100
%). In rows of OntologyConfig(matched=True) it stands at the end of a twin of the chain, and only
the entity's fact says which of the two to follow: every such rule is worth 50 % there.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any, NamedTuple

import numpy as np

from nanococonut.data import Row
from nanococonut.data.prosqa import PUBLIC
from nanococonut.errors import UserError

NAMES = "Alex Fae Max Polly Rex Sally Sam Stella Wren".split()
CONCEPTS = (
    "brimpus dumpus gorpus grimpus impus jompus lempus lorpus numpus rompus shumpus sterpus tumpus "
    "vumpus wumpus yumpus zumpus"
).split()
FAMILIES = [  # of properties: a row takes at most one of each
    family.split()
    for family in (
        "blue brown orange red",
        "large small",
        "liquid luminous metallic wooden",
        "opaque transparent",
        "feisty happy nervous shy",
        "bright dull",
        "bitter sour spicy sweet",
        "earthy floral fruity",
        "cold hot temperate",
        "aggressive amenable angry kind mean",
        "discordant loud melodic muffled",
        "fast moderate slow",
        "overcast rainy snowy sunny windy",
    )
]
PROPERTIES = [word for family in FAMILIES for word in family]
# every word and sign of both renderings, and the answer's mark
VOCABULARY = [
    *NAMES,
    *CONCEPTS,
    *(f"{concept}es" for concept in CONCEPTS),
    *(f"{concept.capitalize()}es" for concept in CONCEPTS),
    *PROPERTIES,
    *"Each Every is are a an not True False or false : . ? ###".split(),
]

BATCH = 1024  # rows drawn at once: fixed, so that more rows begin with the same rows
WORDS = CONCEPTS + PROPERTIES


class Claim(NamedTuple):
    """A sentence taken apart: a fact's subject is a name, a rule's a concept.

    The predicate is a concept (a word that ends in -pus) or a property.
    """

    subject: str
    negated: bool
    predicate: str


def _a(concept: str) -> str:
    return f"{'an' if concept[0] in 'aeiou' else 'a'} {concept}"


def _sentence(claim: Claim, wording: str = "Every") -> str:
    """The claim in words; wording is Each, Every or plural and does nothing to a fact."""
    subject, negated, predicate = claim
    no = "not " if negated else ""
    if wording == "plural" and not subject[0].isupper():
        plural = f"{predicate}es" if predicate.endswith("pus") else predicate
        return f"{subject.capitalize()}es are {no}{plural}."
    subject = subject if subject[0].isupper() else f"{wording} {subject}"
    return f"{subject} is {no}{_a(predicate) if predicate.endswith('pus') else predicate}."


# in all wordings (plural twice: half of all rules are), looked up faster than put together
SENTENCES = np.array(
    [
        [[[_sentence(Claim(s, no, p), w) for p in WORDS] for no in (False, True)] for s in CONCEPTS]
        for w in ("Each", "Every", "plural", "plural")
    ],
    dtype=object,
)


class Question(NamedTuple):
    """A question taken apart, singular words throughout, in the order of the text."""

    facts: list[Claim]
    rules: list[Claim]
    query: Claim


@dataclass(frozen=True)
class OntologyConfig:
    """What the ontology is like. UserError where one cannot be.

    hops      steps from the entity's concept to the property asked for (released: 5)
    matched   the wrong property stands at the end of a twin of the chain
    """

    hops: int = 5
    matched: bool = False

    def __post_init__(self) -> None:
        most = 5 if self.matched else 6
        if type(self.hops) is not int or not 1 <= self.hops <= most:
            raise UserError(
                f"hops={self.hops!r}: wanted is a whole number from 1 to {most} (there are "
                f"{len(CONCEPTS)} concepts; matched takes more of them).\n"
                "Change hops (train.py: --max_hops)."
            )


def generate(
    n: int,
    seed: int | Sequence[int],
    config: OntologyConfig | None = None,
    exclude: Collection[bytes] = frozenset(),
) -> list[Row]:
    """n rows; none whose signature is in exclude.

    The same seed gives the same rows, and the first rows do not depend on n. UserError where
    exclude leaves hardly any.
    """
    config = config or OntologyConfig()
    # numpy pads seeds with zeros: a bare S would be the same stream as (S, 0, 0), a training one
    rng = np.random.default_rng((seed, PUBLIC) if isinstance(seed, int) else seed)
    rows: list[Row] = []
    while len(rows) < n:
        batch = _draw(rng, config)
        if exclude:
            batch = [row for row in batch if signature(row) not in exclude]
        if not batch:
            raise UserError(
                f"{BATCH} ontologies with hops={config.hops} gave no row that is not excluded.\n"
                "Exclude fewer rows or ask for more hops."
            )
        rows += batch
    return rows[:n]


def _negated(c: OntologyConfig) -> np.ndarray:
    """(P) how likely each property is a negated one: of concepts 1 to hops, then of all others.

    A third of all properties is. The public generator walks up the chain, and at each concept asks
    for its property, with weight .3 (negated: .7), or goes on, with weight 1. It keeps the walks of
    the right length: a concept that was passed is rather one without "not".
    """
    share = np.full(2 * c.hops + (not c.matched), 1 / 3)
    if c.matched:  # the twin has the opposite: no share but this is the same for both
        share[: c.hops] = 1 / 2
        return share
    no, yes = 1 / 3 / 1.7, 2 / 3 / 1.3
    share[0] = 0.7 * no / (0.7 * no + 0.3 * yes)
    share[1 : c.hops] = no / (no + yes)
    return share


def _rules(c: OntologyConfig) -> tuple[list[tuple[int, int, bool]], int]:
    """(subject, predicate, opposite) of each rule by number, and the second fact's concept.

    Concepts 0 to hops are the chain, top first; concept hops + i is the second parent of concept i.
    Predicates from len(CONCEPTS) on are properties, opposite ones negated where others are not.
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


def _draw(rng: np.random.Generator, c: OntologyConfig) -> list[Row]:
    """BATCH rows."""
    rules, second = _rules(c)
    negated_share = _negated(c)
    n_properties = len(negated_share)
    # B rows, R rules, P properties
    concept = rng.random((BATCH, len(CONCEPTS))).argsort(1)  # (B, 17) the word of each
    family = rng.random((BATCH, len(FAMILIES))).argsort(1)[:, :n_properties]
    size = np.array([len(f) for f in FAMILIES])
    member = (rng.random(family.shape) * size[family]).astype(int)
    word = np.hstack([concept, len(CONCEPTS) + (size.cumsum() - size)[family] + member])
    negated = np.zeros(word.shape, bool)
    negated[:, len(CONCEPTS) :] = rng.random(family.shape) < negated_share

    subject, predicate, opposite = np.array(rules).T
    wording = rng.integers(4, size=(BATCH, len(rules)))
    no = negated[:, predicate] ^ opposite.astype(bool)
    said = SENTENCES[wording, word[:, subject], no.astype(int), word[:, predicate]]  # (B, R)
    order = rng.random(said.shape).argsort(1)
    shuffled = np.take_along_axis(said, order, 1).tolist()
    # the rules of the steps: from concept hops up to 1, then its property
    proof = said[:, [*range(4 * (c.hops - 1), 0, -4), 2]].tolist()
    name = rng.random((BATCH, len(NAMES))).argsort(1)[:, :2].tolist()
    second_first, true = (rng.random((2, BATCH)) < 0.5).tolist()
    rows: list[Row] = []
    for i, (entity, other) in enumerate(name):
        entity, other = NAMES[entity], NAMES[other if c.matched else entity]
        chain = [CONCEPTS[k] for k in concept[i, c.hops : 0 : -1]]
        facts = [f"{entity} is {_a(chain[0])}.", f"{other} is {_a(CONCEPTS[concept[i, second]])}."]
        if second_first[i]:
            facts.reverse()
        asked, no = WORDS[word[i, len(CONCEPTS)]], bool(negated[i, len(CONCEPTS)])
        query = _sentence(Claim(entity, no == true[i], asked))
        steps = [f"{entity} is {_a(k)}. {rule}" for k, rule in zip(chain, proof[i], strict=True)]
        rows.append(
            {
                "question": " ".join([*shuffled[i], *facts, "True or false:", query]),
                "steps": [*steps, _sentence(Claim(entity, no, asked))],
                "answer": str(true[i]),
            }
        )
    return rows


def rows_of_raw(raw: dict[str, Any]) -> list[Row]:
    """The public generator's JSON -> rows, as the released preprocessing makes them.

    raw is {"example1": {"test_example": {question, query, chain_of_thought, answer}}, ...}; other
    keys (in-context examples) are ignored. UserError names the example that is not so.
    """
    if not isinstance(raw, dict):
        raise UserError(
            'not the public generator\'s JSON: no object at the top.\nGive {"example1": ...}.'
        )
    rows: list[Row] = []
    for name, example in raw.items():
        try:
            test = example["test_example"]
            question, query, chain = test["question"], test["query"], test["chain_of_thought"]
            texts = [question, query, test["answer"], *chain]
            fits = isinstance(chain, list) and all(isinstance(t, str) and t.strip() for t in texts)
        except (KeyError, TypeError):
            fits = False
        if not fits:
            raise UserError(
                f"{name} is no example of the public generator.\nIts test_example holds question, "
                "query, answer (texts) and chain_of_thought (a list of texts)."
            )
        steps = [" ".join(chain[i : i + 2]) for i in range(0, len(chain), 2)]
        rows.append({"question": f"{question} {query}", "steps": steps, "answer": test["answer"]})
    return rows


# -- text to claims

PROPERTY = r"(not )?((?!not\b|[a-z]*pus(?:es)?\b)[a-z]+)"
ONE = re.compile(rf"(?:(?:Each|Every) ([a-z]*pus)|([A-Z][a-z]*)) is (?:an? ([a-z]*pus)|{PROPERTY})")
MANY = re.compile(rf"([A-Z][a-z]*pus)es are (?:([a-z]*pus)es|{PROPERTY})")


def _claim(sentence: str) -> Claim:
    """A sentence without its full stop, in any wording. UserError else."""
    if m := ONE.fullmatch(sentence):
        return Claim(m[1] or m[2], bool(m[4]), m[3] or m[5])
    if m := MANY.fullmatch(sentence):
        return Claim(m[1].lower(), bool(m[3]), m[2] or m[4])
    raise UserError(
        f'not a ProntoQA sentence: {sentence[:60]!r}.\nWrite "Max is a wumpus." (a capital for '
        'a name) or "Every wumpus is not red." (Each, or Wumpuses are; concepts end in -pus)'
    )


def _sentences(text: str) -> list[str]:
    """The sentences of a text without their full stops; white space is made single."""
    return [s.strip() for s in " ".join(text.split()).removesuffix(".").split(".")]


def _parts(question: str) -> tuple[list[str], str]:
    """The sentences of what is said, and what is asked behind "True or false:"."""
    told, _, asked = " ".join(question.split()).partition("True or false:")
    return _sentences(told) if told else [], asked.strip()


def parse_question(question: str) -> Question:
    """What is said and what is asked. UserError for a text that is not a ProntoQA question."""
    told, asked = _parts(question)
    try:
        query = _claim(asked.removesuffix("."))
    except UserError:
        query = None
    if not told or not query or not query.subject[0].isupper() or _is_concept(query):
        raise UserError(
            f"not a ProntoQA question: {question[-60:]!r}.\nWrite rules, facts and what is asked: "
            '"Each wumpus is red. Max is a wumpus. True or false: Max is not red."'
        )
    claims = [_claim(sentence) for sentence in told]
    facts = [claim for claim in claims if claim.subject[0].isupper()]
    return Question(facts, [claim for claim in claims if claim.subject[0].islower()], query)


def _is_concept(claim: Claim) -> bool:
    return claim.predicate.endswith("pus")


def _reached(q: Question) -> dict[str, int]:
    """The entity and all concepts that it is -> fewest steps up to them."""
    parents: dict[str, list[str]] = {}
    for claim in q.facts + q.rules:
        if _is_concept(claim):
            parents.setdefault(claim.subject, []).append(claim.predicate)
    steps = {q.query.subject: 0}
    queue = [q.query.subject]
    for at in queue:  # grows while it is read
        for parent in parents.get(at, ()):
            if parent not in steps:
                steps[parent] = steps[at] + 1
                queue.append(parent)
    return steps


def solve(question: str) -> str | None:
    """The answer found by search: "True" or "False". None where the text is no ProntoQA question,
    or where nothing or a contradiction follows about the property."""
    try:
        q = parse_question(question)
    except UserError:
        return None
    reached = _reached(q)
    found = {
        claim.negated
        for claim in q.facts + q.rules
        if claim.predicate == q.query.predicate and claim.subject in reached
    }
    return str(found == {q.query.negated}) if len(found) == 1 else None


def signature(row: Row) -> bytes:
    """Which ontology and question it is: the same for any sentence order, wording, name of the
    entity and names of the concepts (not: properties). UserError as parse_question."""
    q = parse_question(row["question"])
    above: dict[str, list[str]] = {}
    for claim in q.facts + q.rules:
        above.setdefault(claim.subject, [])
        if _is_concept(claim):
            above[claim.subject].append(claim.predicate)
            above.setdefault(claim.predicate, [])
        else:
            above[claim.subject].append(f"{'not ' * claim.negated}{claim.predicate}")
    shape: dict[str, str] = {}

    def describe(node: str) -> str:
        """All that follows from it, without names."""
        if node not in above:
            return node  # a property
        if node not in shape:
            shape[node] = ""  # should it lead back to itself
            shape[node] = f"({','.join(sorted(map(describe, above[node])))})"
        return shape[node]

    asked = describe(q.query.subject), q.query[1:]
    whole = repr((asked, sorted(map(describe, above))))
    return hashlib.blake2b(whole.encode(), digest_size=16).digest()


# -- the compact rendering: "Each p is a c." is " p c.", "Ps are not red." " p not red.", the query
# "? Max? not red". A step, "Max is a p. Each p is a c.", is " p c", the last one " not red"; the
# answer stays. Each symbol has exactly one space in front, and a sign stands before the entity and
# the property asked for, both for the reasons given at prosqa's. Only the wording is lost.


def _compact(claim: Claim) -> str:
    return f" {claim.subject}{_says(claim)}"


def _says(claim: Claim) -> str:
    return f" {'not ' * claim.negated}{claim.predicate}"


def compact_question(question: str) -> str:
    """The rules, the facts, then "? Max? not red". Lost is how rules are worded (Each, Every,
    plural), nothing else. UserError as parse_question."""
    facts, rules, query = parse_question(question)
    told = "".join([f"{_compact(claim)}." for claim in rules + facts])
    return f"{told}? {query.subject}?{_says(query)}"


def compact_step(step: str) -> str:
    """A step, one or two sentences: "Max is a p. Each p is a c." -> " p c", "Max is not red." ->
    " not red". UserError for anything else."""
    fact, *rule = [_claim(sentence) for sentence in _sentences(step)]
    if fact.subject[0].isupper() and not rule:
        return _says(fact)
    if fact.subject[0].isupper() and [claim.subject for claim in rule] == [fact.predicate]:
        return _compact(rule[0])
    raise UserError(
        f"not a ProntoQA step: {step[:60]!r}.\n"
        'Write a fact, or a fact and a rule about it: "Max is a wumpus. Each wumpus is red."'
    )


def compact_row(row: Row) -> Row:
    """The row in compact words, other keys as they are."""
    steps = [compact_step(step) for step in row["steps"]]
    return {**row, "question": compact_question(row["question"]), "steps": steps}


STEP = re.compile(r"([a-z]*pus) (not )?(?!not\b)([a-z]+)|(not )?(?!not\b)([a-z]+)|\S+")


def expand_steps(text: str, question: str) -> list[str]:
    """Compact steps to a question in sentences, one behind the other, as sentences.

    Rules are worded as in the question, those that it does not hold with Every; what is no step is
    left as it is. UserError as parse_question.
    """
    entity = parse_question(question).query.subject
    known = {_claim(sentence): f"{sentence}." for sentence in _parts(question)[0]}
    steps = []
    for m in STEP.finditer(" ".join(text.split())):
        if m[1]:
            rule = Claim(m[1], bool(m[2]), m[3])
            fact = _sentence(Claim(entity, False, m[1]))
            steps.append(f"{fact} {known.get(rule) or _sentence(rule)}")
        else:
            steps.append(_sentence(Claim(entity, bool(m[4]), m[5])) if m[5] else m[0])
    return steps


def expand_answer(text: str, question: str) -> str:
    """A compact answer -> the answer, which is the same word whatever the question."""
    return text.strip()


# -- what rows are like


def statistics(rows: Sequence[Row]) -> dict[str, float]:
    """Means and shares of rows. UserError where a row's answer does not follow from its text.

    "Each", "Every", "plural" are shares of the rules; "negated ..." of the rules that give a
    property: on the way to the conclusion, and aside (others, but none of the property asked for).
    """
    found: dict[str, list[float]] = {}
    for row in rows:
        if solve(row["question"]) != row["answer"]:
            raise UserError(
                f"a row's answer does not follow from its text: ...{row['question'][-40:]!r}.\n"
                "Give rows as generated or released."
            )
        for key, values in _measured(row).items():
            found.setdefault(key, []).extend(values)
    means = {key: fmean(values) for key, values in found.items() if values}
    return {**means, "words sd": pstdev(found["words"])}


def _measured(row: Row) -> dict[str, list[float]]:
    """What `statistics` takes the means of: a value for the row, or one for each of its rules."""
    facts, rules, query = q = parse_question(row["question"])
    reached = _reached(q)
    rising = [rule for rule in rules if _is_concept(rule)]
    giving = [rule for rule in rules if not _is_concept(rule)]
    about = [claim for claim in rules + facts if claim.predicate == query.predicate]
    others = [rule for rule in giving if rule not in about]
    supports = [claim.subject in reached for claim in about]
    right = about[supports.index(True)]
    way = {_claim(_sentences(step)[0]).predicate for step in row["steps"]}
    told, _ = _parts(row["question"])
    opening = [sentence.split()[0] for sentence in told if _claim(sentence) in rules]
    parents = Counter(rule.subject for rule in rising)
    return {
        "sentences": [len(told)],
        "words": [len(row["question"].split())],
        "facts": [len(facts)],
        "facts last": [all(_claim(sentence) in facts for sentence in told[-len(facts) :])],
        "start is first fact": [facts[0].predicate in way],
        "properties": [len(giving)],
        "property families": [sum(any(r.predicate in f for r in giving) for f in FAMILIES)],
        "concepts": [len({r.subject for r in rules} | {r.predicate for r in rising})],
        "concepts with two parents": [sum(n == 2 for n in parents.values())],
        "concepts reached": [len(reached) - 1],
        "Each": [word == "Each" for word in opening],
        "Every": [word == "Every" for word in opening],
        "plural": [word.endswith("puses") for word in opening],
        "negated on the way": [rule.negated for rule in others if rule.subject in way],
        "negated aside": [rule.negated for rule in others if rule.subject not in way],
        "conclusion negated": [right.negated],
        "contradicted by": [supports.count(False)],
        "contradiction first": [not supports[0]],
        "query negated": [query.negated],
        "true": [row["answer"] == "True"],
        "true and negated": [query.negated and row["answer"] == "True"],
        "hops": [reached[right.subject]],
        "steps": [len(row["steps"])],
    }


# `statistics` of 300 rows made by the public generator (5 hops, random order)
RELEASED: dict[str, float] = {
    "sentences": 25,
    "words": 104.72,
    "facts": 2,
    "facts last": 1,
    "start is first fact": 0.5067,
    "properties": 12,
    "property families": 11,
    "concepts": 14,
    "concepts with two parents": 5,
    "concepts reached": 13,
    "Each": 0.2604,
    "Every": 0.2462,
    "plural": 0.4933,
    "negated on the way": 0.2758,
    "negated aside": 0.3294,
    "conclusion negated": 0.4733,
    "contradicted by": 1,
    "contradiction first": 0.5367,
    "query negated": 0.4667,
    "true": 0.4867,
    "true and negated": 0.2133,
    "hops": 5,
    "steps": 6,
    "words sd": 4.2522,
}


def heuristics(rows: Sequence[Row]) -> dict[str, float]:
    """Share of rows that a rule answers right which does not search; ties count half.

    always true, no "not": from the query alone. The others believe one of the rules about the
    property: the one stated first, or last; whose concept leads on to another; which another one
    leads to; whose concept occurs most often.
    """
    right = dict.fromkeys(
        ("always true", 'no "not"', "first", "last", "leads on", "led to", "most often", "random"),
        0.0,
    )
    for row in rows:
        if row["answer"] not in ("True", "False"):
            raise UserError(
                f"the answer {row['answer']!r} is neither True nor False.\n"
                "Give rows as generated or released."
            )
        facts, rules, query = parse_question(row["question"])
        true = row["answer"] == "True"
        right["always true"] += true
        right['no "not"'] += true != query.negated
        subjects = [claim.subject for claim in rules if _is_concept(claim)]
        objects = [claim.predicate for claim in rules if _is_concept(claim)]
        words = [word for claim in rules + facts for word in (claim.subject, claim.predicate)]
        scored: dict[str, list[tuple[float, bool]]] = {}
        for place, (subject, negated, predicate) in enumerate(rules + facts):
            if predicate == query.predicate:
                says_true = negated == query.negated
                for rule, score in (
                    ("first", -place),
                    ("last", place),
                    ("leads on", subject in subjects),
                    ("led to", subject in objects),
                    ("most often", words.count(subject)),
                    ("random", 0),
                ):
                    scored.setdefault(rule, []).append((score, says_true))
        for rule, votes in scored.items():
            best = max(votes)[0]
            right[rule] += fmean(says == true for score, says in votes if score == best)
    return {rule: n / len(rows) for rule, n in right.items()}
