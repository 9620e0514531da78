"""How good is a model: batched greedy answers against the known ones.

Generated tokens, everywhere in this project: thoughts + words up to and without eos, a row's mean:
what has to be made one after the other. The <eot> behind the thoughts is given, and pauses are read
along with the question: neither is generated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nanococonut.data.examples import Example, extract_answer
from nanococonut.inference.engine import Engine


@dataclass(frozen=True)
class Score:
    """right: of each row, in order; generated_tokens, thoughts (fed back): a row's means; texts: in
    order; interval: 95 % (Wilson)."""

    right: list[bool]
    generated_tokens: float
    thoughts: float
    texts: list[str]

    @property
    def rows(self) -> int:
        return len(self.right)

    @property
    def accuracy(self) -> float:
        return sum(self.right) / self.rows

    @property
    def interval(self) -> tuple[float, float]:
        z, n, p = 1.959964, self.rows, self.accuracy
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return max(0.0, centre - half), min(1.0, centre + half)


def score(
    engine: Engine,
    rows: Sequence[Example],
    n_slots: int,
    batch_size: int = 100,
    max_new_tokens: int = 128,
) -> Score:
    """Accuracy over rendered rows: exact match of what stands behind the last "#".

    n_slots: thoughts or pauses.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["question"]))  # little padding
    texts, words, thoughts = [""] * len(rows), 0, 0
    for start in range(0, len(rows), batch_size):
        part = order[start : start + batch_size]
        out = engine.generate([rows[i]["question"] for i in part], n_slots, max_new_tokens)
        for i, text in zip(part, out.text, strict=True):
            texts[i] = text
        words += sum(map(len, out.tokens))
        thoughts += sum(out.n_thoughts)
    right = [
        "#" in text and extract_answer(text) == extract_answer(row["answer"])
        for text, row in zip(texts, rows, strict=True)
    ]
    return Score(right, (words + thoughts) / len(rows), thoughts / len(rows), texts)
