"""ProntoQA rows: right by an independent search, and like those of the public generator."""

import hashlib
import json
import random
import re
from collections import Counter
from math import sqrt

import pytest

from nanococonut.data import prontoqa
from nanococonut.data.files import read_examples
from nanococonut.data.prontoqa import Claim, OntologyConfig
from nanococonut.runtime.errors import UserError
from nanococonut.tokenizer import Tokenizer

CONFIGS = {
    "released": OntologyConfig(),
    "one hop": OntologyConfig(hops=1),
    "three hops": OntologyConfig(hops=3),
    "six hops": OntologyConfig(hops=6),
    "matched": OntologyConfig(matched=True),
    "one hop matched": OntologyConfig(hops=1, matched=True),
}


@pytest.fixture(scope="module")
def rows() -> list:
    return prontoqa.generate(3000, 0)


@pytest.fixture
def real(released) -> list:
    return read_examples(released / "prontoqa_valid.json")


def words(sentence: str) -> tuple[str, bool, str]:
    """Subject, whether there is a "not", and predicate of a sentence, the slow and plain way."""
    said = sentence.removesuffix(".").split()
    kept = [w for w in said if w not in ("Each", "Every", "is", "are", "a", "an", "not")]
    if "are" in said:
        kept = [w.lower().removesuffix("es") if w.endswith("puses") else w for w in kept]
    subject, predicate = kept
    return subject, "not" in said, predicate


def check(row: dict, config: OntologyConfig) -> None:
    """Everything that a row promises, from its text alone."""
    told, query = row["question"].split(" True or false: ")
    *rules, _, _ = sentences = re.findall(r"[^.]+\.", told)
    sentences = [s.strip() for s in sentences]
    assert len(set(sentences)) == len(sentences)
    claims = [words(s) for s in sentences]
    facts = claims[-2:]
    assert all(f[0] in prontoqa.NAMES for f in facts)
    assert all(c[0] in prontoqa.CONCEPTS for c in claims[:-2])
    entity, asks_not, asked = words(query)
    known = {entity}
    while more := {p for s, _, p in claims if s in known} - known:
        known |= more
    about = [(s, no) for s, no, p in claims if p == asked]
    says = [no for s, no in about if s in known]
    # stated of two concepts, once so and once so, and only one of them is the entity's
    assert len(about) == 2 and {no for _, no in about} == {False, True} and len(says) == 1
    assert row["answer"] == str(says[0] == asks_not)

    # steps: from the entity, each rule from the text and about what was found before
    at = entity
    for step in row["steps"][:-1]:
        fact, rule = (s.strip() for s in re.findall(r"[^.]+\.", step))
        assert words(fact)[0] == entity and words(rule)[0] == words(fact)[2]
        assert words(fact) in facts if at == entity else words(fact)[2] == at
        assert rule in sentences
        _, no, at = words(rule)
    assert (no, at) == (says[0], asked)
    assert words(row["steps"][-1]) == (entity, no, asked)
    assert len(row["steps"]) == config.hops + 1

    # nothing twice: properties come from as many families, the twin repeats those of the chain
    used = Counter(p for _, _, p in claims if p in prontoqa.PROPERTIES)
    homes = Counter(f[0] for f in prontoqa.FAMILIES for p in used if p in f)
    assert set(homes.values()) == {1}
    assert sum(used.values()) - len(used) == (config.hops if config.matched else 1)
    for sentence in sentences + [s for step in row["steps"] for s in step.split(". ")]:
        assert not re.search(r" a [aeiou]| an [^aeiou]", sentence)
    assert (facts[0][0] == facts[1][0]) != config.matched


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_are_right_by_an_independent_search(name):
    for row in prontoqa.generate(150, 1, CONFIGS[name]):
        check(row, CONFIGS[name])
        assert prontoqa.solve(row["question"]) == row["answer"]


def test_the_public_rows_keep_the_same_promises(real):
    for row in real:
        check(row, OntologyConfig())
        assert prontoqa.solve(row["question"]) == row["answer"]


# twice the sampling error of 300 rows: of shares by what they are shares of, 300 rows else
RULES, WAY, ASIDE = 23 * 300, 4 * 300, 6 * 300
SHARES = {"Each": RULES, "Every": RULES, "plural": RULES}
SHARES |= {"negated on the way": WAY, "negated aside": ASIDE}
SHARES |= dict.fromkeys(
    ("start is first fact", "conclusion negated", "contradiction first", "query negated"), 300
)
SHARES |= {"true": 300, "true and negated": 300}
OTHERS = {"words": 0.5, "words sd": 0.4}


def test_statistics_are_like_the_public_rows(rows):
    found = prontoqa.statistics(rows)
    assert found.keys() == prontoqa.RELEASED.keys()
    for key, share in prontoqa.RELEASED.items():
        near = 2 * sqrt(share * (1 - share) / SHARES[key]) if key in SHARES else OTHERS.get(key, 0)
        assert found[key] == pytest.approx(share, abs=near), key


def test_statistics_of_the_public_rows(real):
    assert prontoqa.statistics(real) == pytest.approx(prontoqa.RELEASED, abs=6e-5)


def test_words_are_drawn_evenly(rows):
    """Names; concepts, 14 of 17; properties, 11 of 13 families, each evenly."""
    seen: Counter[str] = Counter()
    for row in rows:
        seen.update(set(re.findall(r"[A-Za-z]+", prontoqa.compact_question(row["question"]))))
    expected = dict.fromkeys(prontoqa.NAMES, 1 / 9) | dict.fromkeys(prontoqa.CONCEPTS, 14 / 17)
    for family in prontoqa.FAMILIES:
        expected |= dict.fromkeys(family, 11 / 13 / len(family))
    assert seen.keys() - {"not"} == expected.keys()
    for word, share in expected.items():
        assert seen[word] / len(rows) == pytest.approx(share, abs=0.035), word


def test_sentences_come_in_random_order(rows):
    places = []
    for row in rows:
        rules = [words(s) for s in re.findall(r"[^.]+\.", row["question"])[:-3]]
        places.append(rules.index(words(row["steps"][0].split(". ")[1])) / (len(rules) - 1))
    assert sum(places) / len(places) == pytest.approx(0.5, abs=0.03)
    assert {0, 1} < set(places)


def test_shortcuts_are_worth_what_is_said(rows):
    found = prontoqa.heuristics(rows)
    assert found["leads on"] == found["led to"] == found["most often"] == 1
    assert found["random"] == 0.5
    for rule in ("always true", 'no "not"', "first", "last"):
        assert found[rule] == pytest.approx(0.5, abs=0.06)
    for hops in (1, 3, 5):
        found = prontoqa.heuristics(prontoqa.generate(1000, 2, OntologyConfig(hops, matched=True)))
        assert found["leads on"] == found["led to"] == found["most often"] == 0.5
        assert all(0.45 < share < 0.55 for share in found.values())


def test_shortcuts_of_the_public_rows(real):
    found = prontoqa.heuristics(real)
    assert found["leads on"] == found["led to"] == found["most often"] == 1
    assert all(0.4 < found[rule] < 0.6 for rule in ("always true", 'no "not"', "first", "last"))


@pytest.mark.parametrize("hops", [1, 3, 5])
def test_a_matched_row_looks_the_same_from_both_entities(hops):
    """Ask about the other entity, and deny what was said twice: the same row, but for words."""
    for row in prontoqa.generate(100, 3, OntologyConfig(hops, matched=True)):
        *told, query = row["question"].split(". ")
        entity = query.split()[3]
        (other,) = {words(s)[0] for s in told[-2:]} - {entity}
        query = query.replace(entity, other)
        asked = {**row, "question": ". ".join([*told, query])}
        assert prontoqa.solve(asked["question"]) == {"True": "False"}.get(row["answer"], "True")
        times = Counter(words(s)[2] for s in told)
        for i, sentence in enumerate(told):
            *said, last = sentence.split()
            if last in prontoqa.PROPERTIES and times[last] == 2:
                said = said[:-1] if said[-1] == "not" else [*said, "not"]
                told[i] = " ".join([*said, last])
        denied = {**row, "question": ". ".join([*told, query])}
        assert prontoqa.signature(denied) == prontoqa.signature(row) != prontoqa.signature(asked)


def test_the_same_seed_gives_the_same_rows():
    """The digest is a fixed one: a seed means the same rows on every machine, now and later."""
    rows = prontoqa.generate(50, (1, 2, 3))
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert digest == "ee7d6d771743f115b6c830f9a2c2aadf7c6a3c8e55826eaa7870a10db4dfee0c"
    assert prontoqa.generate(20, (1, 2, 3)) == rows[:20]
    assert prontoqa.generate(1100, (1, 2, 3))[:50] == rows  # more than are drawn at once
    assert prontoqa.generate(20, (1, 2, 4)) != rows[:20]
    public = prontoqa.generate(5, 7)
    for stream in range(5):  # a bare seed is none of the streams that training draws from
        for tail in ((), (0,), (0, 0), (0, 1)):
            assert prontoqa.generate(5, (7, stream, *tail)) != public


def test_training_rows_are_disjoint_from_excluded_ones():
    tiny = OntologyConfig(hops=1, matched=True)  # so few ontologies that they come again
    held_out = {prontoqa.signature(row) for row in prontoqa.generate(400, 0, tiny)}
    plain = prontoqa.generate(1000, 1, tiny)
    assert any(prontoqa.signature(row) in held_out for row in plain)
    disjoint = prontoqa.generate(1000, 1, tiny, held_out)
    assert not any(prontoqa.signature(row) in held_out for row in disjoint)
    left = [row for row in plain if prontoqa.signature(row) not in held_out]
    assert disjoint[: len(left)] == left


def test_where_all_is_excluded_an_error_says_so(monkeypatch):
    monkeypatch.setattr(prontoqa, "BATCH", 10)
    seen = {prontoqa.signature(row) for row in prontoqa.generate(10, 0)}
    with pytest.raises(UserError, match="10 ontologies with hops=5 gave no row"):
        prontoqa.generate(1, 0, exclude=seen)


def test_a_signature_is_the_ontologys_and_not_the_words(rows):
    rng = random.Random(0)
    for row in rows[:100]:
        told, query = row["question"].split(" True or false: ")
        claims = [words(s) for s in re.findall(r"[^.]+\.", told)]
        rng.shuffle(claims)
        names = dict(zip(prontoqa.CONCEPTS, rng.sample(prontoqa.CONCEPTS, 17), strict=True))
        names |= dict.fromkeys(prontoqa.NAMES, "Tom")
        plural = rng.random() < 0.5
        said = []
        for subject, no, predicate in claims:
            subject, predicate = names[subject], names.get(predicate, predicate)
            noun = predicate.endswith("pus")
            if plural and subject != "Tom":
                predicate = f"{predicate}es" if noun else predicate
                said.append(f"{subject.capitalize()}es are {'not ' * no}{predicate}.")
            else:
                subject = subject if subject == "Tom" else f"Each {subject}"
                said.append(f"{subject} is {'not ' * no}{'a ' * noun}{predicate}.")
        query = " ".join(["Tom", *query.split()[1:]])
        other = {**row, "question": f"{' '.join(said)} True or false: {query}"}
        assert prontoqa.signature(other) == prontoqa.signature(row)
        asked = query.replace(" not ", " ") if " not " in query else query.replace(" is", " is not")
        changed = {**row, "question": f"{' '.join(said)} True or false: {asked}"}
        assert prontoqa.signature(changed) != prontoqa.signature(row)
    assert len({prontoqa.signature(row) for row in rows}) == len(rows)
    row = {"question": f"Each wumpus is an impus. {QUESTION}", "steps": [], "answer": "False"}
    assert prontoqa.signature(row)  # round and round


def test_signatures_of_the_public_rows_are_their_own(real, rows):
    found = {prontoqa.signature(row) for row in real}
    assert len(found) == len(real) and not found & {prontoqa.signature(row) for row in rows}


def test_the_vocabulary_spells_every_word(rows):
    every_word(rows)
    every_word(prontoqa.generate(1000, 0, OntologyConfig(matched=True)))


def test_the_vocabulary_spells_every_word_of_the_public_rows(real):
    every_word(real)


def every_word(rows: list) -> None:
    tokenizer = Tokenizer.words(prontoqa.VOCABULARY)
    for row in (*rows, *map(prontoqa.compact_row, rows[:300])):
        text = " ".join([row["question"], *row["steps"], "###", row["answer"]])
        assert not tokenizer.unknown_words(text)


# -- the public generator's own file


def raw_example(row: dict) -> dict:
    told, asked = row["question"].split(" True or false: ")
    chain = [f"{s}." for step in row["steps"] for s in step.removesuffix(".").split(". ")]
    test = {"question": told, "query": f"True or false: {asked}", "chain_of_thought": chain}
    return {"test_example": {**test, "answer": row["answer"]}}


def test_rows_of_raw_undo_the_splitting(rows):
    raw = {f"example{i}": raw_example(row) for i, row in enumerate(rows[:20])}
    raw["example3"]["in_context_example0"] = {"question": "other"}
    assert prontoqa.rows_of_raw(raw) == rows[:20]


def test_rows_of_the_public_generators_file(released, real):
    raw = json.loads((released / "prontoqa_raw_5hop_sample.json").read_text())
    assert prontoqa.rows_of_raw(raw) == real[:20]


@pytest.mark.parametrize("broken", ["text", None, 3, [], {}, {"test_example": {}}])
def test_a_raw_example_that_is_none_is_named(rows, broken):
    with pytest.raises(UserError, match="^example7 is no example"):
        prontoqa.rows_of_raw({"example1": raw_example(rows[0]), "example7": broken})


@pytest.mark.parametrize(
    "key, value",
    [("answer", True), ("question", " "), ("chain_of_thought", "Max"), ("chain_of_thought", [1])],
)
def test_a_raw_example_with_a_wrong_value_is_named(rows, key, value):
    example = raw_example(rows[0])
    example["test_example"][key] = value
    with pytest.raises(UserError, match="^example1 is no example"):
        prontoqa.rows_of_raw({"example1": example})
    with pytest.raises(UserError, match="no object at the top"):
        prontoqa.rows_of_raw([example])


# -- texts

QUESTION = (
    "Wumpuses are not red. Each impus is a wumpus. Every jompus is red. Jompuses are vumpuses. "
    "Max is an impus. True or false: Max is red."
)


def test_a_question_is_taken_apart():
    facts, rules, query = prontoqa.parse_question(
        f"  {QUESTION} ".replace(". ", ".\n").replace("or", " or")
    )
    assert facts == [("Max", False, "impus")]
    assert rules == [
        Claim("wumpus", True, "red"),
        Claim("impus", False, "wumpus"),
        Claim("jompus", False, "red"),
        Claim("jompus", False, "vumpus"),
    ]
    assert query == ("Max", False, "red")


def test_solving_by_search():
    assert prontoqa.solve(QUESTION) == "False"
    assert prontoqa.solve(QUESTION.replace("Max is red", "Max is not red")) == "True"
    assert prontoqa.solve(QUESTION.replace("an impus", "a jompus")) == "True"
    assert prontoqa.solve(QUESTION.replace("an impus", "a vumpus")) is None  # nothing follows
    assert prontoqa.solve(f"Max is a jompus. {QUESTION}") is None  # both follow
    assert prontoqa.solve(f"Every wumpus is an impus. {QUESTION}") == "False"  # round and round
    assert prontoqa.solve("Who is Max?") is None


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "not a ProntoQA question: ''"),
        ("What is 3 + 4?", "not a ProntoQA question"),
        ("True or false: Max is red.", "not a ProntoQA question"),
        (QUESTION + " And then?", "not a ProntoQA question"),
        (QUESTION.replace("Max is red", "Max is a wumpus"), "not a ProntoQA question"),
        (QUESTION.replace("Max is red", "Each impus is red"), "not a ProntoQA question"),
        ("max is a wumpus. " + QUESTION, "not a ProntoQA sentence: 'max is a wumpus'"),
        ("Each cat is red. " + QUESTION, "not a ProntoQA sentence: 'Each cat is red'"),
        ("Max is not a wumpus. " + QUESTION, "not a ProntoQA sentence: 'Max is not a wumpus'"),
        ("Max is not. " + QUESTION, "not a ProntoQA sentence: 'Max is not'"),
        ("Wumpuses are a wumpus. " + QUESTION, "not a ProntoQA sentence: 'Wumpuses are a"),
    ],
)
def test_other_text_is_refused(text, complaint):
    for take in (prontoqa.parse_question, prontoqa.compact_question):
        with pytest.raises(UserError, match=complaint):
            take(text)


def test_statistics_and_heuristics_refuse_rows_that_are_none():
    row = {"question": QUESTION, "steps": [], "answer": "True"}
    with pytest.raises(UserError, match="answer does not follow"):
        prontoqa.statistics([row])
    with pytest.raises(UserError, match="neither True nor False"):
        prontoqa.heuristics([{**row, "answer": "yes"}])


def test_heuristics_of_a_question_done_by_hand():
    """wumpus is led to and leads nowhere, jompus the other way round; both occur twice."""
    right = {"always true": 0, 'no "not"': 0, "first": 1, "last": 0, "leads on": 0, "led to": 1}
    right |= {"most often": 0.5, "random": 0.5}
    row = {"question": QUESTION, "steps": [], "answer": "False"}
    assert prontoqa.heuristics([row]) == right
    other = {**row, "question": QUESTION.replace("an impus", "a jompus"), "answer": "True"}
    assert prontoqa.heuristics([other])["most often"] == 1


def test_statistics_of_a_question_done_by_hand():
    steps = ["Max is an impus. Each impus is a wumpus.", "Max is a wumpus. Wumpuses are not red."]
    row = {"question": QUESTION, "steps": [*steps, "Max is not red."], "answer": "False"}
    found = prontoqa.statistics([row])
    expected = {"sentences": 5, "words": 26, "facts": 1, "facts last": 1, "properties": 2}
    expected |= {"concepts": 4, "concepts reached": 2, "Each": 0.25, "Every": 0.25, "plural": 0.5}
    expected |= {"hops": 2, "steps": 3, "contradicted by": 1, "contradiction first": 0}
    expected |= {"conclusion negated": 1, "query negated": 0, "true": 0, "property families": 1}
    assert {key: found[key] for key in expected} == expected


# -- the compact rendering


def means_the_same(row: dict) -> None:
    compact = prontoqa.compact_row(row)
    told, entity, asked = compact["question"].split("?")
    claims = []
    for sentence in told.removesuffix(".").split("."):
        subject, *no, predicate = sentence.split()
        claims.append((subject, no == ["not"], predicate))
    *rest, query = re.findall(r"[^.:]+\.", row["question"].replace(" True or false:", ""))
    assert claims == [words(s) for s in rest]
    assert words(f"{entity} is{asked}.") == words(query)
    assert not re.search(r"  |[.?][^ ?]|\?\.", compact["question"])
    assert prontoqa.expand_steps("".join(compact["steps"]), row["question"]) == row["steps"]
    assert prontoqa.expand_answer(" " + compact["answer"], row["question"]) == row["answer"]


def test_the_compact_rendering_loses_only_the_wording(rows):
    for row in (*rows[:200], *prontoqa.generate(200, 4, OntologyConfig(matched=True))):
        means_the_same(row)


def test_the_compact_rendering_of_public_rows_loses_only_the_wording(real):
    for row in real:
        means_the_same(row)


def test_the_compact_rendering_by_hand():
    steps = ["Max is an impus. Each impus is a wumpus.", "Max is a wumpus. Wumpuses are not red."]
    row = {"question": QUESTION, "steps": [*steps, "Max is not red."], "answer": "False", "id": 3}
    asked = " wumpus not red. impus wumpus. jompus red. jompus vumpus. Max impus.? Max? red"
    said = [" impus wumpus", " wumpus not red", " not red"]
    assert prontoqa.compact_row(row) == {**row, "question": asked, "steps": said}
    # a model may say anything
    expand = prontoqa.expand_steps
    assert expand(" vumpus impus", QUESTION) == ["Max is a vumpus. Every vumpus is an impus."]
    assert expand(" impus not", QUESTION) == ["Max is an impus.", "not"]
    assert expand("? nervous", QUESTION) == ["?", "Max is nervous."]


@pytest.mark.parametrize(
    "step", ["", "Max likes red.", "Each impus is red.", "Max is an impus. Each wumpus is red."]
)
def test_a_step_that_is_none_is_refused(step):
    with pytest.raises(UserError, match="not a ProntoQA s"):
        prontoqa.compact_step(step)


@pytest.mark.parametrize(
    "values", [{"hops": 0}, {"hops": 7}, {"hops": 6, "matched": True}, {"hops": 5.0}, {"hops": "5"}]
)
def test_values_that_cannot_be_are_refused(values):
    with pytest.raises(UserError, match="^hops="):
        OntologyConfig(**values)
