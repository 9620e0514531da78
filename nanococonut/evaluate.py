"""How good is a model: batched greedy answers against the known ones.

Generated tokens, everywhere in this project: thoughts + words up to and without eos, a row's mean.
The <eot> behind the thoughts is given, not generated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nanococonut.curriculum import METHODS, Curriculum, answer_of
from nanococonut.data import Row
from nanococonut.engine import Generation, generate
from nanococonut.errors import UserError
from nanococonut.model import GPT
from nanococonut.tokenizer import Tokenizer


@dataclass(frozen=True)
class Score:
    """correct of rows; interval: 95 % (Wilson); generated_tokens: a row's mean; texts: in order."""

    correct: int
    rows: int
    generated_tokens: float
    texts: list[str]

    @property
    def accuracy(self) -> float:
        return self.correct / self.rows

    @property
    def interval(self) -> tuple[float, float]:
        z, n, p = 1.959964, self.rows, self.accuracy
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return max(0.0, centre - half), min(1.0, centre + half)


def ask(
    model: GPT,
    tokenizer: Tokenizer,
    curriculum: Curriculum,
    questions: Sequence[str],
    n_thoughts: int,
    max_new_tokens: int = 128,
) -> Generation:
    """Greedy answers to a batch of rendered questions, in the layout the method was trained in.

    max_new_tokens is cut to what block_size leaves. UserError where it leaves nothing.
    """
    markers = METHODS[curriculum.method].markers
    bot, eot = ([tokenizer.bot], [tokenizer.eot]) if markers else ([], [])
    prefixes = [tokenizer.encode(q) + bot for q in questions]
    longest = max(map(len, prefixes))
    room = model.config.block_size - longest - n_thoughts - len(eot)
    if room < 1:
        raise UserError(
            f"a question of {longest} tokens with {n_thoughts} thoughts does not fit into the "
            f"model's block_size={model.config.block_size}.\nAsk a shorter question or use fewer "
            "thoughts."
        )
    return generate(model, prefixes, n_thoughts, eot, tokenizer.eos, min(max_new_tokens, room))


def score(
    model: GPT,
    tokenizer: Tokenizer,
    curriculum: Curriculum,
    rows: Sequence[Row],
    n_thoughts: int,
    batch_size: int = 100,
    max_new_tokens: int = 128,
) -> Score:
    """Accuracy over rendered rows: exact match of what stands behind the last "#"."""
    was_training = model.training
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["question"]))  # little padding
    texts, new = [""] * len(rows), 0
    for start in range(0, len(rows), batch_size):
        part = order[start : start + batch_size]
        questions = [rows[i]["question"] for i in part]
        out = ask(model, tokenizer, curriculum, questions, n_thoughts, max_new_tokens)
        for i, tokens in zip(part, out.tokens, strict=True):
            texts[i] = tokenizer.decode(tokens)
            new += len(tokens)
    model.train(was_training)
    right = [
        "#" in text and answer_of(text) == answer_of(row["answer"])
        for text, row in zip(texts, rows, strict=True)
    ]
    return Score(sum(right), len(rows), n_thoughts + new / len(rows), texts)
