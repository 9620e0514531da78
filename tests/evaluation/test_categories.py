"""Categories of ProsQA answers, on a graph solved by hand and on random examples."""

import random

import pytest

from nanococonut.data import prosqa
from nanococonut.data.files import read_examples
from nanococonut.data.tasks import TASKS
from nanococonut.evaluation.paper import CATEGORIES, category_fractions, classify, heights
from nanococonut.runtime.errors import UserError

# Tom - a - b - c - t          Sam - d - s         the shortest: Tom a c t
#        \_____/ \_ w           \_ e _/
EDGES = "Tom a, a b, b c, a c, c t, c w, Sam d, Sam e, d s, e s".split(", ")
ANSWER = "Tom is a t."


def sentences(chain: str) -> str:
    """ "Tom a c" -> "Tom is a a.\nEvery a is a c.\n" """
    words = chain.split()
    return "".join(
        f"{'' if a.istitle() and len(a) > 1 else 'Every '}{a} is a {b}.\n"
        for a, b in zip(words, words[1:], strict=False)
    )


QUESTION = "".join(sentences(edge) for edge in EDGES) + "Is Tom a s or t?"

# (chain, thoughts, category)
BY_HAND = [
    ("Tom a c t", 0, "Correct Path"),
    ("Tom a b c t", 0, "Longer Path"),
    ("Tom a c w", 0, "Wrong Target"),
    ("Tom a c", 0, "Wrong Target"),  # ends too early
    ("Sam d s", 0, "Hallucination"),  # starts at another entity
    ("Tom c t", 0, "Hallucination"),  # no such edge
    ("Tom a t", 0, "Hallucination"),
    ("Tom a d s", 0, "Hallucination"),
    ("a c t", 0, "Hallucination"),  # without thoughts the chain must start at the entity
    ("a c t", 1, "Correct Path"),
    ("c t", 2, "Correct Path"),
    ("Tom a c t", 3, "Correct Path"),  # written again after the thoughts
    ("c t", 1, "Correct Path"),  # the thoughts covered more than one step
    ("a b c t", 1, "Longer Path"),
    ("b c t", 2, "Longer Path"),  # every way to b is a detour
    ("a c w", 1, "Wrong Target"),
    ("a b", 1, "Wrong Target"),
    ("d s", 1, "Hallucination"),  # edges that the entity does not lead to
    ("Sam e s", 2, "Hallucination"),
    ("a t", 1, "Hallucination"),
    ("t c", 1, "Hallucination"),  # against the edge
]


@pytest.mark.parametrize("chain, k, category", BY_HAND)
def test_chains_by_hand(chain, k, category):
    """Each category of the paper has a minimal example."""
    for answer in (f"### {ANSWER}", "### Tom is a s.", ""):  # a chain decides alone
        assert classify(QUESTION, ANSWER, sentences(chain) + answer, k) == category


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize(
    "text, category",
    [
        (f"### {ANSWER}", "Correct Label"),
        (f"\n ### {ANSWER} \n", "Correct Label"),
        (f"### Tom is a s. ### {ANSWER}", "Correct Label"),  # as accuracy has it
        ("### Tom is a s.", "Incorrect Label"),
        ("### t", "Incorrect Label"),
        ("###", "Incorrect Label"),
        ("", "Incorrect Label"),
        ("Every a is a", "Hallucination"),  # an incomplete sentence
        (ANSWER, "Hallucination"),  # not an edge
        ("Tom is a a.\nEvery b is a c.\n### " + ANSWER, "Hallucination"),  # broken
        ("Tom is a a.\nall a are c.\n### " + ANSWER, "Hallucination"),
    ],
)
def test_texts_by_hand(text, category, k):
    """An answer without a chain is a label, whatever n_thoughts."""
    assert classify(QUESTION, ANSWER, text, k) == category


def test_a_walk_through_a_cycle_is_a_longer_path():
    """Only users' files have cycles."""
    question = "Tom is a a. Every a is a b. Every b is a a. Every b is a t. Is Tom a t or s?"
    assert classify(question, ANSWER, sentences("Tom a b a b t")) == "Longer Path"
    assert classify(question, ANSWER, sentences("Tom a b t")) == "Correct Path"


def test_other_questions_are_refused():
    """All answers of another task would be hallucinations."""
    with pytest.raises(UserError, match="not a ProsQA question"):
        classify("What is 2 + 2?", ANSWER, "")
    with pytest.raises(UserError, match="not a ProsQA sentence"):
        classify(QUESTION, "4", "")


@pytest.mark.parametrize("base", [prosqa.GraphConfig(), prosqa.GraphConfig(13, 2, 3)])
def test_random_examples(base):
    """Check the example's own steps, variants with one change, and random walks."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    seen = set()
    for example in prosqa.generate(60, seed, base):
        edges, entity, _ = prosqa.parse_question(example["question"])
        steps, end = example["steps"], f"\n### {example['answer']}"
        other = f"{entity} is a {example['idx_to_symbol'][example['neg_target']]}."

        def judge(chain, k, example=example, end=end):
            return classify(example["question"], example["answer"], "\n".join(chain) + end, k)

        for k in range(len(steps)):
            assert judge(steps[k:], k) == "Correct Path", seed
            assert (judge(steps[k:], 0) == "Correct Path") == (k == 0), seed
            compact = (
                "".join(prosqa.compact_example(example)["steps"][k:]) + "### " + example["answer"]
            )
            text = TASKS["prosqa"].expand(compact, example["question"])
            assert classify(example["question"], example["answer"], text, k) == "Correct Path", seed
            if k < len(steps) - 1:
                assert judge(steps[k:-1], k) == "Wrong Target", seed
                gap = steps[k : k + 1] + steps[k + 2 :]
                assert k + 2 == len(steps) or judge(gap, k) == "Hallucination", seed
            # replace the child of one step by a node that is not a child of its parent
            at = rng.randrange(k, len(steps))
            parent, _ = prosqa.parse_sentence(steps[at])
            strange = [
                word
                for word in example["idx_to_symbol"]
                if word.islower() and (parent, word) not in edges and word != parent
            ]
            wrong = steps[at].rsplit(" ", 1)[0] + f" {rng.choice(strange)}."
            assert judge([*steps[k:at], wrong, *steps[at + 1 :]], k) == "Hallucination", seed
        assert judge([], 6) == "Correct Label"
        assert (
            classify(example["question"], example["answer"], f"### {other}", 6) == "Incorrect Label"
        )

        # random walks down from the entity, judged by their length and end
        for _ in range(30):
            walk = [entity]
            while below := [b for a, b in edges if a == walk[-1]]:
                walk.append(rng.choice(below))
            chain = [
                f"{'' if i == 0 else 'Every '}{a} is a {b}."
                for i, (a, b) in enumerate(zip(walk, walk[1:], strict=False))
            ]
            expected = "Wrong Target"
            if walk[-1] == example["idx_to_symbol"][example["target"]]:
                expected = "Correct Path" if len(chain) == len(steps) else "Longer Path"
            assert judge(chain, 0) == expected, seed
            seen.add(expected)
    assert seen == {"Wrong Target", "Correct Path", "Longer Path"}


def test_released_steps_are_correct_paths(released):
    """The released steps must be correct paths in every stage."""
    examples = read_examples(released / "prosqa_valid.json")
    for k in range(6):
        texts = [
            "\n".join([*example["steps"][k:], f"### {example['answer']}"]) for example in examples
        ]
        fractions = category_fractions(examples, texts, k)
        chains = sum(len(example["steps"]) > k for example in examples) / len(examples)
        assert fractions["Correct Path"] == chains
        assert fractions["Correct Label"] == pytest.approx(1 - chains)
    assert tuple(fractions) == CATEGORIES


def test_fractions_add_up():
    """A category could be counted twice."""
    examples = [{"question": QUESTION, "steps": [], "answer": ANSWER}] * 4
    texts = [sentences("Tom a c t"), sentences("Tom a c w"), f"### {ANSWER}", ""]
    fractions = category_fractions(examples, texts)
    expected = dict.fromkeys(CATEGORIES, 0.25) | {"Longer Path": 0, "Hallucination": 0}
    assert fractions == expected and sum(fractions.values()) == 1


def test_heights_by_hand():
    """Cycles have no height."""
    edges = [tuple(edge.split()) for edge in EDGES]
    leaves = {"t": 0, "w": 0, "s": 0, "d": 1, "e": 1, "Sam": 2, "c": 1}
    assert heights(edges) == leaves | {"a": 2, "b": 2, "Tom": 3}
    assert heights(edges, longest=True) == leaves | {"b": 2, "a": 3, "Tom": 4}
    short_cut = [*edges, ("Tom", "w")]
    assert heights(short_cut)["Tom"] == 1 and heights(short_cut, longest=True)["Tom"] == 4
    cycle = [("Tom", "a"), ("a", "b"), ("b", "a"), ("b", "t"), ("c", "d"), ("d", "c")]
    assert heights(cycle) == {"t": 0, "b": 1, "a": 2, "Tom": 3}
    assert heights(cycle, longest=True) == {"t": 0}


@pytest.mark.parametrize("longest", [False, True])
def test_heights_of_random_examples(longest):
    """A height is one more than the smallest, or largest, height of the children."""
    seed = random.randrange(2**32)
    for example in prosqa.generate(30, seed):
        edges, _, _ = prosqa.parse_question(example["question"])
        actual = heights(edges, longest)
        assert set(actual) == set(example["idx_to_symbol"])
        for node, height in actual.items():
            children = [actual[b] for a, b in edges if a == node]
            expected = 1 + (max if longest else min)(children) if children else 0
            assert height == expected, seed
