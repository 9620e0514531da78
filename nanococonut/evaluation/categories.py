"""What kind of answer is it? The six categories of the paper's section 5.1, for ProsQA, and
how high a node stands above the graph's leaves (section 5.4).

A text is what a model says to a question, in sentences: steps, then "### " and the answer
(tasks.Task.expand makes such text of the compact rendering).
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from nanococonut.data import Row
from nanococonut.data.prosqa import parse_question, parse_sentence, reachable
from nanococonut.errors import UserError

CATEGORIES = (
    "Correct Path",
    "Longer Path",
    "Hallucination",
    "Wrong Target",
    "Correct Label",
    "Incorrect Label",
)


def classify(question: str, answer: str, text: str, k: int = 0) -> str:
    """The category of a text that was said to a question after k thoughts.

    The chain is what stands before the first "#". Where there is none, the answer behind the last
    "#" decides:

    Correct Label     it is the known one
    Incorrect Label   it is another one, or missing

    With k = 0 a chain has to begin at the entity. With k > 0 its first steps were thought: it may
    begin at any node that the entity leads to, and is completed by a shortest path from there, of
    whatever length. A chain decides alone, whatever answer follows it:

    Hallucination     it holds what is no sentence of the task or no edge of the graph, or is
                      broken, or cannot be completed
    Wrong Target      it ends elsewhere than at the answer
    Correct Path      it ends at the answer and is, completed, as short as can be
    Longer Path       it ends at the answer and is, completed, longer

    UserError where the question or the known answer is none of ProsQA.
    """
    edges, entity, _ = parse_question(question)
    target = parse_sentence(answer)[1]
    try:
        said = text.partition("#")[0].split(".")
        chain = [parse_sentence(sentence) for sentence in said if sentence.strip()]
    except UserError:
        return "Hallucination"
    if not chain:
        right = "#" in text and text.rpartition("#")[2].strip() == answer.strip()
        return "Correct Label" if right else "Incorrect Label"
    start, end = chain[0][0], chain[-1][1]
    steps = reachable(edges, entity)  # node -> (fewest steps from the entity, ...)
    broken = any(above[1] != below[0] for above, below in pairwise(chain))
    if broken or not set(chain) <= set(edges) or (start not in steps if k else start != entity):
        return "Hallucination"
    if end != target:
        return "Wrong Target"
    shortest = steps[start][0] + len(chain) == steps[target][0]
    return "Correct Path" if shortest else "Longer Path"


def categories(rows: Sequence[Row], texts: Sequence[str], k: int = 0) -> dict[str, float]:
    """Share of each category in the texts said to rows after k thoughts, all in sentences."""
    found = Counter(
        classify(row["question"], row["answer"], text, k)
        for row, text in zip(rows, texts, strict=True)
    )
    return {name: found[name] / len(rows) for name in CATEGORIES}


def heights(edges: Sequence[tuple[str, str]], longest: bool = False) -> dict[str, int]:
    """Node -> fewest steps down to a leaf (section 5.4), or most (figure 7).

    What only leads round a cycle has no height and is left out; of the longest, also what leads
    into one.
    """
    children: dict[str, list[str]] = {}
    for parent, child in edges:
        children.setdefault(parent, []).append(child)
    every = all if longest else any
    found = {child: 0 for _, child in edges if child not in children}
    level = 0
    while True:
        level += 1
        new = [
            node
            for node, below in children.items()
            if node not in found and every(child in found for child in below)
        ]
        if not new:
            return found
        found |= dict.fromkeys(new, level)
