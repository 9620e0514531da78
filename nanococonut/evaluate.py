"""How good is a model: batched greedy answers against the known ones.

Generated tokens, everywhere in this project: thoughts + words up to and without eos, a row's mean:
what has to be made one after the other. The <eot> behind the thoughts is given, and pauses are read
along with the question: neither is generated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nanococonut.curriculum import Curriculum, answer_of, asking
from nanococonut.data import Row
from nanococonut.engine import Generation, generate
from nanococonut.errors import UserError
from nanococonut.model import GPT
from nanococonut.tokenizer import Tokenizer


@dataclass(frozen=True)
class Score:
    """right: of each row, in order; generated_tokens: a row's mean; texts: in order; interval: 95 %
    (Wilson)."""

    right: list[bool]
    generated_tokens: float
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


def ask(
    model: GPT,
    tokenizer: Tokenizer,
    curriculum: Curriculum,
    questions: Sequence[str],
    n_slots: int,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    kernels: str = "torch",
) -> Generation:
    """Answers to a batch of rendered questions, in the layout the method was trained in: greedy, or
    drawn at a temperature by the seed. kernels: "torch" or "triton", as ops.choose says.

    n_slots: thoughts or pauses. A model with a classifier that stops them has no more than these.
    max_new_tokens is cut to what block_size leaves. UserError where it leaves nothing.
    """
    asked = [asking(curriculum, tokenizer.encode(q), n_slots, tokenizer) for q in questions]
    prefixes, (n_thoughts, *_), (opening, *_) = (list(part) for part in zip(*asked, strict=True))
    longest = max(map(len, prefixes))
    room = model.config.block_size - longest - n_thoughts - len(opening)
    if room < 1:
        raise UserError(
            f"a question of {longest} tokens with {n_thoughts} thoughts does not fit into the "
            f"model's block_size={model.config.block_size}.\nAsk a shorter question or use fewer "
            "thoughts."
        )
    return generate(
        model,
        prefixes,
        n_thoughts,
        opening,
        tokenizer.eos,
        min(max_new_tokens, room),
        model.config.stop,
        temperature,
        seed,
        kernels,
    )


def score(
    model: GPT,
    tokenizer: Tokenizer,
    curriculum: Curriculum,
    rows: Sequence[Row],
    n_slots: int,
    batch_size: int = 100,
    max_new_tokens: int = 128,
    kernels: str = "torch",
) -> Score:
    """Accuracy over rendered rows: exact match of what stands behind the last "#"."""
    was_training = model.training
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["question"]))  # little padding
    texts, new = [""] * len(rows), 0
    for start in range(0, len(rows), batch_size):
        part = order[start : start + batch_size]
        questions = [rows[i]["question"] for i in part]
        out = ask(model, tokenizer, curriculum, questions, n_slots, max_new_tokens, kernels=kernels)
        for i, tokens in zip(part, out.tokens, strict=True):
            texts[i] = tokenizer.decode(tokens)
            new += len(tokens)
        new += sum(out.n_thoughts)
    model.train(was_training)
    right = [
        "#" in text and answer_of(text) == answer_of(row["answer"])
        for text, row in zip(texts, rows, strict=True)
    ]
    return Score(right, new / len(rows), texts)
