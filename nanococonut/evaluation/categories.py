"""The six categories of ProsQA answers (the paper's section 5.1), and node heights (5.4).

Texts are generated answers in sentences: steps, then "### " and the answer.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import count, pairwise

from nanococonut.data.examples import Example, split_answer
from nanococonut.data.prosqa import parse_question, parse_sentence
from nanococonut.data.search import children_of, reachable
from nanococonut.data.tasks import TASKS
from nanococonut.runtime.errors import UserError

CATEGORIES = (
    "Correct Path",
    "Longer Path",
    "Hallucination",
    "Wrong Target",
    "Correct Label",
    "Incorrect Label",
)


def classify(question: str, answer: str, text: str, n_thoughts: int = 0) -> str:
    """Return the category of a text that was generated after n_thoughts thoughts.

    The chain is the part before the first "#"; if it is empty, the part after the mark decides:

    Correct Label     it is the known answer
    Incorrect Label   it is something else, or missing

    Without thoughts, a chain has to start at the entity. With thoughts, its first steps were
    latent: it may start at any node that the entity leads to, and a shortest path from the entity
    completes it, however many thoughts there were. A chain decides alone, whatever answer follows:

    Hallucination     it has a sentence that is not ProsQA or not an edge of the graph, is broken,
                      or cannot be completed
    Wrong Target      it does not end at the answer
    Correct Path      it ends at the answer and, once completed, is a shortest path
    Longer Path       it ends at the answer and is longer than that

    Raise UserError if the question or the known answer is not ProsQA.
    """
    edges, entity, _ = parse_question(question)
    target = parse_sentence(answer)[1]
    try:
        sentences = text.partition("#")[0].split(".")
        chain = [parse_sentence(sentence) for sentence in sentences if sentence.strip()]
    except UserError:
        return "Hallucination"
    if not chain:
        is_correct = split_answer(text, answer)[1] == answer.strip()
        return "Correct Label" if is_correct else "Incorrect Label"
    start, end = chain[0][0], chain[-1][1]
    steps = reachable(edges, entity)  # node -> fewest steps
    is_broken = any(step[1] != next_step[0] for step, next_step in pairwise(chain))
    starts_well = start in steps if n_thoughts else start == entity
    if is_broken or not set(chain) <= set(edges) or not starts_well:
        return "Hallucination"
    if end != target:
        return "Wrong Target"
    is_shortest = steps[start] + len(chain) == steps[target]
    return "Correct Path" if is_shortest else "Longer Path"


def category_fractions(
    examples: Sequence[Example],
    texts: Sequence[str],
    n_thoughts: int = 0,
    style: str = "sentences",
) -> dict[str, float]:
    """Return the fraction of each category among texts generated in this style; see classify."""
    counts, expand = Counter(), TASKS["prosqa"].expand
    for x, text in zip(examples, texts, strict=True):
        text = expand(text, x["question"], style)
        counts[classify(x["question"], x["answer"], text, n_thoughts)] += 1
    return {name: counts[name] / len(examples) for name in CATEGORIES}


def heights(edges: Sequence[tuple[str, str]], longest: bool = False) -> dict[str, int]:
    """Map each node to the fewest steps down to a leaf (section 5.4), or the most (figure 7).

    A node that leads only into a cycle has no height. With `longest`, one path into a cycle is
    enough for that.
    """
    children = children_of(edges)
    condition = all if longest else any
    result = {child: 0 for _, child in edges if child not in children}
    for height in count(1):
        level = [
            node
            for node, below in children.items()
            if node not in result and condition(child in result for child in below)
        ]
        if not level:
            return result
        result |= dict.fromkeys(level, height)
