"""Exact-match accuracy of batched greedy answers.

Generated tokens = thoughts + tokens before eos, averaged over examples: the number of sequential
steps. <eot> is forced and pauses are part of the prompt, so neither counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional as F

from nanococonut.data.examples import Example, extract_answer
from nanococonut.data.tasks import TASKS
from nanococonut.inference.engine import Engine


@dataclass(frozen=True)
class Score:
    """correct and texts: one per example, in order. generated_tokens and thoughts: means.

    geometry: of the thoughts of the last batch, see thought_geometry.
    """

    correct: list[bool]
    generated_tokens: float
    thoughts: float
    texts: list[str]
    geometry: dict[str, list[float]] = field(default_factory=dict, compare=False)

    @property
    def n(self) -> int:
        return len(self.correct)

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy."""
        return wilson(self.accuracy, self.n)


def wilson(p: float, n: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a fraction p of n (Wilson)."""
    z = 1.959964
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def thought_geometry(thoughts: Tensor) -> dict[str, list[float]]:
    """Return means over the B examples of thoughts (B, n, C); {} if there is nothing to compare.

    thought_norm        of each thought
    thought_cosine      of each thought after the first with the one before it
    thought_similarity  cosine of each thought of two examples: 1 if the question does not matter
    """
    B, n = thoughts.shape[:2]
    if B < 2 or n == 0:
        return {}
    thoughts = thoughts.float()
    unit = F.normalize(thoughts, dim=-1)  # (B, n, C)
    # the squared sum of B unit vectors is B plus the cosines of all ordered pairs
    pairs = (unit.sum(0).square().sum(-1) - B) / (B * (B - 1))  # (n,)
    means = {
        "thought_norm": thoughts.norm(dim=-1).mean(0),
        "thought_cosine": (unit[:, 1:] * unit[:, :-1]).sum(-1).mean(0),
        "thought_similarity": pairs,
    }
    return {name: [round(x, 4) for x in mean.tolist()] for name, mean in means.items()}


def score(
    engine: Engine,
    examples: Sequence[Example],
    n_thoughts: int,
    batch_size: int = 100,
    max_new_tokens: int = 128,
) -> Score:
    """Return the score of an engine on examples as in their file; the engine renders them."""
    if engine.render and not engine.config:
        raise ValueError("score needs Engine.from_config: an answer is rendered as its question is")
    config, rendered = engine.config, examples
    if config:
        rendered = TASKS[config.task].render(examples, config.render)
    # similar lengths together: little padding
    order = sorted(range(len(examples)), key=lambda i: len(rendered[i]["question"]))
    texts, n_tokens, n_taken = [""] * len(examples), 0, 0
    for start in range(0, len(examples), batch_size):
        indices = order[start : start + batch_size]
        questions = [examples[i]["question"] for i in indices]
        out = engine.generate(questions, n_thoughts, max_new_tokens)
        for i, text in zip(indices, out.text, strict=True):
            texts[i] = text
        n_tokens += sum(map(len, out.tokens))
        n_taken += sum(out.n_thoughts)
    correct = [
        "#" in text and extract_answer(text) == extract_answer(example["answer"])
        for text, example in zip(texts, rendered, strict=True)
    ]
    n = len(examples)
    geometry = thought_geometry(out.thoughts)
    return Score(correct, (n_tokens + n_taken) / n, n_taken / n, texts, geometry)
