"""ProntoQA: correct by an independent search, and like the public generator's examples."""

import hashlib
import json
import random
import re
from collections import Counter
from math import sqrt

import pytest
from data.statistics import PRONTOQA_RELEASED, prontoqa_statistics

from nanococonut.data import prontoqa
from nanococonut.data.files import parse_raw_prontoqa, read_examples
from nanococonut.data.graph import graph_keys
from nanococonut.data.prontoqa import Claim, OntologyConfig
from nanococonut.data.shortcuts import prontoqa_shortcuts
from nanococonut.data.tasks import TASKS
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


def graph_key(example: dict) -> int:
    return graph_keys([prontoqa.marked_graph(example)])[0]


@pytest.fixture(scope="module")
def examples() -> list:
    return prontoqa.generate(3000, 0)


@pytest.fixture
def real(released) -> list:
    return read_examples(released / "prontoqa_valid.json")


def words(sentence: str) -> tuple[str, bool, str]:
    """Return (subject, has "not", predicate) of a sentence, independently of the parser."""
    tokens = sentence.removesuffix(".").split()
    kept = [w for w in tokens if w not in ("Each", "Every", "is", "are", "a", "an", "not")]
    if "are" in tokens:
        kept = [w.lower().removesuffix("es") if w.endswith("puses") else w for w in kept]
    subject, predicate = kept
    return subject, "not" in tokens, predicate


def check(example: dict, config: OntologyConfig) -> None:
    """Check all properties of an example by its text alone."""
    context, query = example["question"].split(" True or false: ")
    *rules, _, _ = sentences = re.findall(r"[^.]+\.", context)
    sentences = [s.strip() for s in sentences]
    assert len(set(sentences)) == len(sentences)
    claims = [words(s) for s in sentences]
    facts = claims[-2:]
    assert all(f[0] in prontoqa.NAMES for f in facts)
    assert all(c[0] in prontoqa.CONCEPTS for c in claims[:-2])
    entity, query_negated, query_property = words(query)
    known = {entity}
    while more := {p for s, _, p in claims if s in known} - known:
        known |= more
    about = [(s, no) for s, no, p in claims if p == query_property]
    says = [no for s, no in about if s in known]
    # two concepts have the property, one negated; only one of them applies to the entity
    assert len(about) == 2 and {no for _, no in about} == {False, True} and len(says) == 1
    assert example["answer"] == str(says[0] == query_negated)

    # steps: start at the entity; each rule is in the text and about the previous concept
    at = entity
    for step in example["steps"][:-1]:
        fact, rule = (s.strip() for s in re.findall(r"[^.]+\.", step))
        assert words(fact)[0] == entity and words(rule)[0] == words(fact)[2]
        assert words(fact) in facts if at == entity else words(fact)[2] == at
        assert rule in sentences
        _, no, at = words(rule)
    assert (no, at) == (says[0], query_property)
    assert words(example["steps"][-1]) == (entity, no, query_property)
    assert len(example["steps"]) == config.hops + 1

    # no repetition: one property per family; only the twin repeats the properties of the chain
    used = Counter(p for _, _, p in claims if p in prontoqa.PROPERTIES)
    homes = Counter(f[0] for f in prontoqa.FAMILIES for p in used if p in f)
    assert set(homes.values()) == {1}
    assert sum(used.values()) - len(used) == (config.hops if config.matched else 1)
    for sentence in sentences + [s for step in example["steps"] for s in step.split(". ")]:
        assert not re.search(r" a [aeiou]| an [^aeiou]", sentence)
    assert (facts[0][0] == facts[1][0]) != config.matched


@pytest.mark.parametrize("name", CONFIGS)
def test_answers_agree_with_an_independent_search(name):
    """The generator could add a rule that makes its own answer wrong."""
    for example in prontoqa.generate(150, 1, CONFIGS[name]):
        check(example, CONFIGS[name])
        assert prontoqa.solve(example["question"]) == example["answer"]


def test_public_examples_pass_the_same_checks(real):
    """The checks could pass for our generator only."""
    for example in real:
        check(example, OntologyConfig())
        assert prontoqa.solve(example["question"]) == example["answer"]


# denominators of the fractions, for their sampling error
RULES, WAY, ASIDE = 23 * 300, 4 * 300, 6 * 300
N_COUNTED = {"Each": RULES, "Every": RULES, "plural": RULES}
N_COUNTED |= {"negated on the way": WAY, "negated aside": ASIDE}
N_COUNTED |= dict.fromkeys(
    ("start is first fact", "conclusion negated", "contradiction first", "query negated"), 300
)
N_COUNTED |= {"true": 300}
OTHERS = {"words": 0.5}


def test_statistics_match_the_public_examples(examples):
    """A changed generator could drift away from the paper's data."""
    stats = prontoqa_statistics(examples)
    assert stats.keys() == PRONTOQA_RELEASED.keys()
    for key, fraction in PRONTOQA_RELEASED.items():
        near = (
            2 * sqrt(fraction * (1 - fraction) / N_COUNTED[key])
            if key in N_COUNTED
            else OTHERS.get(key, 0)
        )
        assert stats[key] == pytest.approx(fraction, abs=near), key


def test_statistics_of_the_public_examples(real):
    """PRONTOQA_RELEASED could differ from the file it describes."""
    assert prontoqa_statistics(real) == pytest.approx(PRONTOQA_RELEASED, abs=6e-5)


def test_words_are_drawn_uniformly(examples):
    """Each example has 14 of 17 concepts and 11 of 13 property families, all equally likely."""
    seen: Counter[str] = Counter()
    for example in examples:
        seen.update(set(re.findall(r"[A-Za-z]+", prontoqa.compact_question(example["question"]))))
    expected = dict.fromkeys(prontoqa.NAMES, 1 / 9) | dict.fromkeys(prontoqa.CONCEPTS, 14 / 17)
    for family in prontoqa.FAMILIES:
        expected |= dict.fromkeys(family, 11 / 13 / len(family))
    assert seen.keys() - {"not"} == expected.keys()
    for word, fraction in expected.items():
        assert seen[word] / len(examples) == pytest.approx(fraction, abs=0.035), word


def test_sentences_are_shuffled(examples):
    """A fixed position of the first step would be a shortcut."""
    places = []
    for example in examples:
        rules = [words(s) for s in re.findall(r"[^.]+\.", example["question"])[:-3]]
        places.append(rules.index(words(example["steps"][0].split(". ")[1])) / (len(rules) - 1))
    assert sum(places) / len(places) == pytest.approx(0.5, abs=0.03)
    assert {0, 1} < set(places)


def test_shortcuts_score_as_documented(examples):
    """The matched split could have another shortcut."""
    stats = prontoqa_shortcuts(examples)
    assert stats["leads on"] == stats["led to"] == stats["most often"] == 1
    assert stats["random"] == 0.5
    for rule in ("always true", 'no "not"', "first", "last"):
        assert stats[rule] == pytest.approx(0.5, abs=0.06)
    for hops in (1, 3, 5):
        stats = prontoqa_shortcuts(prontoqa.generate(1000, 2, OntologyConfig(hops, matched=True)))
        assert stats["leads on"] == stats["led to"] == stats["most often"] == 0.5
        assert all(0.45 < fraction < 0.55 for fraction in stats.values())


def test_shortcuts_of_the_public_examples(real):
    """Only our examples could have the shortcuts."""
    stats = prontoqa_shortcuts(real)
    assert stats["leads on"] == stats["led to"] == stats["most often"] == 1
    assert all(0.4 < stats[rule] < 0.6 for rule in ("always true", 'no "not"', "first", "last"))


@pytest.mark.parametrize("hops", [1, 3, 5])
def test_matched_is_symmetric_in_the_entities(hops):
    """Ask about the other entity and negate what is stated twice: the examples are isomorphic."""
    for example in prontoqa.generate(100, 3, OntologyConfig(hops, matched=True)):
        *context, query = example["question"].split(". ")
        entity = query.split()[3]
        (other,) = {words(s)[0] for s in context[-2:]} - {entity}
        query = query.replace(entity, other)
        swapped = {**example, "question": ". ".join([*context, query])}
        assert prontoqa.solve(swapped["question"]) == {"True": "False"}.get(
            example["answer"], "True"
        )
        times = Counter(words(s)[2] for s in context)
        for i, sentence in enumerate(context):
            *tokens, last = sentence.split()
            if last in prontoqa.PROPERTIES and times[last] == 2:
                tokens = tokens[:-1] if tokens[-1] == "not" else [*tokens, "not"]
                context[i] = " ".join([*tokens, last])
        denied = {**example, "question": ". ".join([*context, query])}
        assert graph_key(denied) == graph_key(example) != graph_key(swapped)


def test_a_seed_always_gives_the_same_examples():
    """The digest is fixed: a seed gives the same examples on every machine and in every version."""
    examples = prontoqa.generate(50, (1, 2, 3))
    digest = hashlib.sha256(json.dumps(examples).encode()).hexdigest()
    assert digest == "ee7d6d771743f115b6c830f9a2c2aadf7c6a3c8e55826eaa7870a10db4dfee0c"
    assert prontoqa.generate(20, (1, 2, 3)) == examples[:20]
    assert prontoqa.generate(1100, (1, 2, 3))[:50] == examples  # more than one batch
    assert prontoqa.generate(20, (1, 2, 4)) != examples[:20]
    public = prontoqa.generate(5, 7)
    for stream in range(5):  # a plain seed is not a training stream
        for tail in ((), (0,), (0, 0), (0, 1)):
            assert prontoqa.generate(5, (7, stream, *tail)) != public


def test_excluded_graphs_are_never_generated():
    """Training could repeat validation examples."""
    tiny = OntologyConfig(hops=1, matched=True)  # so few ontologies that they repeat
    held_out = {graph_key(example) for example in prontoqa.generate(400, 0, tiny)}
    plain = prontoqa.generate(1000, 1, tiny)
    assert any(graph_key(example) in held_out for example in plain)
    disjoint = prontoqa.generate(1000, 1, tiny, held_out)
    assert not any(graph_key(example) in held_out for example in disjoint)
    left = [example for example in plain if graph_key(example) not in held_out]
    assert disjoint[: len(left)] == left


def test_graph_hash_ignores_names_and_order(examples):
    """Training could repeat a held-out ontology under other names."""
    rng = random.Random(0)
    for example in examples[:100]:
        context, query = example["question"].split(" True or false: ")
        claims = [words(s) for s in re.findall(r"[^.]+\.", context)]
        rng.shuffle(claims)
        names = dict(zip(prontoqa.CONCEPTS, rng.sample(prontoqa.CONCEPTS, 17), strict=True))
        names |= dict.fromkeys(prontoqa.NAMES, "Tom")
        plural = rng.random() < 0.5
        sentences = []
        for subject, no, predicate in claims:
            subject, predicate = names[subject], names.get(predicate, predicate)
            noun = predicate.endswith("pus")
            if plural and subject != "Tom":
                predicate = f"{predicate}es" if noun else predicate
                sentences.append(f"{subject.capitalize()}es are {'not ' * no}{predicate}.")
            else:
                subject = subject if subject == "Tom" else f"Each {subject}"
                sentences.append(f"{subject} is {'not ' * no}{'a ' * noun}{predicate}.")
        query = " ".join(["Tom", *query.split()[1:]])
        other = {**example, "question": f"{' '.join(sentences)} True or false: {query}"}
        assert graph_key(other) == graph_key(example)
        negated = (
            query.replace(" not ", " ") if " not " in query else query.replace(" is", " is not")
        )
        changed = {**example, "question": f"{' '.join(sentences)} True or false: {negated}"}
        assert graph_key(changed) != graph_key(example)
    assert len({graph_key(example) for example in examples}) == len(examples)
    example = {"question": f"Each wumpus is an impus. {QUESTION}", "steps": [], "answer": "False"}
    assert graph_key(example)  # a cycle


def test_graph_hashes_of_public_examples_are_unique(real, examples):
    """A coarse key would exclude other ontologies."""
    stats = {graph_key(example) for example in real}
    assert len(stats) == len(real) and not stats & {graph_key(example) for example in examples}


def test_vocabulary_covers_generated_examples(examples):
    """A missing word would become an unknown token in training."""
    every_word(examples)
    every_word(prontoqa.generate(1000, 0, OntologyConfig(matched=True)))


def test_vocabulary_covers_the_public_examples(real):
    """A missing word would become an unknown token in evaluation only."""
    every_word(real)


def every_word(examples: list) -> None:
    tokenizer = Tokenizer.words(prontoqa.VOCABULARY)
    for example in (*examples, *map(prontoqa.compact_example, examples[:300])):
        text = " ".join([example["question"], *example["steps"], "###", example["answer"]])
        assert not tokenizer.unknown_words(text)


# ---- the public generator's own file


def raw_example(example: dict) -> dict:
    context, query = example["question"].split(" True or false: ")
    chain = [f"{s}." for step in example["steps"] for s in step.removesuffix(".").split(". ")]
    test = {"question": context, "query": f"True or false: {query}", "chain_of_thought": chain}
    return {"test_example": {**test, "answer": example["answer"]}}


def test_raw_examples_are_joined_as_released(examples):
    """Steps are pairs of sentences, except the last one."""
    raw = {f"example{i}": raw_example(example) for i, example in enumerate(examples[:20])}
    raw["example3"]["in_context_example0"] = {"question": "other"}
    assert [parse_raw_prontoqa(example) for example in raw.values()] == examples[:20]


def test_raw_file_equals_the_released_preprocessing(released, real):
    """The conversion could differ from the released one."""
    raw = json.loads((released / "prontoqa_raw_5hop_sample.json").read_text())
    assert [parse_raw_prontoqa(example) for example in raw.values()] == real[:20]


@pytest.mark.parametrize("broken", ["text", None, 3, [], {}, {"test_example": {}}])
def test_a_broken_raw_example_is_named(tmp_path, examples, broken):
    """A user cannot fix a file of a thousand examples without the name of the invalid one."""
    raw = {"example1": raw_example(examples[0]), "example7": broken}
    (tmp_path / "raw.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="raw.json, example7: not an example"):
        read_examples(tmp_path / "raw.json")


@pytest.mark.parametrize(
    "key, value",
    [("answer", True), ("question", " "), ("chain_of_thought", "Max"), ("chain_of_thought", [1])],
)
def test_a_raw_example_with_a_wrong_value_is_refused(tmp_path, examples, key, value):
    """A string as chain_of_thought would give one step per letter."""
    raw = raw_example(examples[0])
    raw["test_example"][key] = value
    with pytest.raises(ValueError, match="not an example of the public generator"):
        parse_raw_prontoqa(raw)
    (tmp_path / "raw.json").write_text(json.dumps([raw]))
    with pytest.raises(UserError, match="example 0: 'question' is missing"):
        read_examples(tmp_path / "raw.json")


# ---- texts

QUESTION = (
    "Wumpuses are not red. Each impus is a wumpus. Every jompus is red. Jompuses are vumpuses. "
    "Max is an impus. True or false: Max is red."
)


def test_parse_question():
    """Line breaks and plurals must not change the claims."""
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


def test_solve():
    """Cycles must end; contradictions have no answer."""
    assert prontoqa.solve(QUESTION) == "False"
    assert prontoqa.solve(QUESTION.replace("Max is red", "Max is not red")) == "True"
    assert prontoqa.solve(QUESTION.replace("an impus", "a jompus")) == "True"
    assert prontoqa.solve(QUESTION.replace("an impus", "a vumpus")) is None  # nothing follows
    assert prontoqa.solve(f"Max is a jompus. {QUESTION}") is None  # both follow
    assert prontoqa.solve(f"Every wumpus is an impus. {QUESTION}") == "False"  # a cycle
    assert TASKS["prontoqa"].solve("Who is Max?") is None


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
    """Text that is not ProntoQA must not be parsed in part."""
    for take in (prontoqa.parse_question, prontoqa.compact_question):
        with pytest.raises(UserError, match=complaint):
            take(text)


def test_statistics_and_shortcuts_refuse_other_text():
    """A wrong answer would silently change every statistic."""
    example = {"question": QUESTION, "steps": [], "answer": "True"}
    with pytest.raises(UserError, match="answer does not follow"):
        prontoqa_statistics([example])
    with pytest.raises(UserError, match="neither True nor False"):
        prontoqa_shortcuts([{**example, "answer": "yes"}])


def test_shortcuts_by_hand():
    """wumpus has a child and no parent, jompus a parent and no child; both occur twice."""
    expected = {"always true": 0, 'no "not"': 0, "first": 1, "last": 0, "leads on": 0, "led to": 1}
    expected |= {"most often": 0.5, "random": 0.5}
    example = {"question": QUESTION, "steps": [], "answer": "False"}
    assert prontoqa_shortcuts([example]) == expected
    other = {**example, "question": QUESTION.replace("an impus", "a jompus"), "answer": "True"}
    assert prontoqa_shortcuts([other])["most often"] == 1


def test_statistics_by_hand():
    """Statistics that agree with the released ones could still count the wrong thing."""
    steps = ["Max is an impus. Each impus is a wumpus.", "Max is a wumpus. Wumpuses are not red."]
    example = {"question": QUESTION, "steps": [*steps, "Max is not red."], "answer": "False"}
    stats = prontoqa_statistics([example])
    expected = {"sentences": 5, "words": 26, "facts": 1, "facts last": 1, "properties": 2}
    expected |= {"concepts": 4, "concepts reached": 2, "Each": 0.25, "Every": 0.25, "plural": 0.5}
    expected |= {"hops": 2, "steps": 3, "contradiction first": 0}
    expected |= {"conclusion negated": 1, "query negated": 0, "true": 0}
    assert {key: stats[key] for key in expected} == expected


# ---- the compact rendering


def means_the_same(example: dict) -> None:
    compact = prontoqa.compact_example(example)
    claims_text, entity, compact_query = compact["question"].split("?")
    claims = []
    for sentence in claims_text.removesuffix(".").split("."):
        subject, *no, predicate = sentence.split()
        claims.append((subject, no == ["not"], predicate))
    *rest, query = re.findall(r"[^.:]+\.", example["question"].replace(" True or false:", ""))
    assert claims == [words(s) for s in rest]
    assert words(f"{entity} is{compact_query}.") == words(query)
    assert not re.search(r"  |[.?][^ ?]|\?\.", compact["question"])
    assert prontoqa.expand_steps("".join(compact["steps"]), example["question"]) == example["steps"]
    assert compact["answer"] == example["answer"]


def test_compact_examples_lose_only_the_wording(examples):
    """A lost "not" would make the answer wrong."""
    for example in (*examples[:200], *prontoqa.generate(200, 4, OntologyConfig(matched=True))):
        means_the_same(example)


def test_compact_public_examples_lose_only_wording(real):
    """Real wordings that the generator does not make could fail to parse."""
    for example in real:
        means_the_same(example)


def test_compact_by_hand():
    """A round trip alone would accept any invertible format."""
    steps = ["Max is an impus. Each impus is a wumpus.", "Max is a wumpus. Wumpuses are not red."]
    example = {
        "question": QUESTION,
        "steps": [*steps, "Max is not red."],
        "answer": "False",
        "id": 3,
    }
    facts = " wumpus not red. impus wumpus. jompus red. jompus vumpus. Max impus."
    expected = {
        "question": f"{facts}? Max? red",
        "steps": [" impus wumpus", " wumpus not red", " not red"],
    }
    assert prontoqa.compact_example(example) == example | expected
    # a model can generate any text
    expand = prontoqa.expand_steps
    assert expand(" vumpus impus", QUESTION) == ["Max is a vumpus. Every vumpus is an impus."]
    assert expand(" impus not", QUESTION) == ["Max is an impus.", "not"]
    assert expand("? nervous", QUESTION) == ["?", "Max is nervous."]


@pytest.mark.parametrize(
    "step", ["", "Max likes red.", "Each impus is red.", "Max is an impus. Each wumpus is red."]
)
def test_other_steps_are_refused(step):
    """A rule about another concept is not a step."""
    with pytest.raises(UserError, match="not a ProntoQA s"):
        prontoqa.compact_step(step)


@pytest.mark.parametrize(
    "values", [{"hops": 0}, {"hops": 7}, {"hops": 6, "matched": True}, {"hops": 5.0}, {"hops": "5"}]
)
def test_impossible_settings_are_refused(values):
    """There would be too few concepts for the chain."""
    with pytest.raises(UserError, match="^(--)?hops="):
        OntologyConfig(**values)
