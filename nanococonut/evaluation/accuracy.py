"""Exact-match accuracy of greedy answers, generated in batches.

"Generated tokens" are thoughts plus tokens before eos, that is, sequential steps, averaged over
examples. <eot> is forced and pauses are part of the prompt, so neither counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nanococonut.batch import max_length, tokenize
from nanococonut.data.examples import Example, is_correct, is_correct_as_released
from nanococonut.data.tasks import TASKS
from nanococonut.inference.engine import Engine
from nanococonut.inference.steps import Edit
from nanococonut.runtime.distributed import Distributed
from nanococonut.runtime.errors import UserError
from nanococonut.weights import checkpoint


@dataclass(frozen=True)
class Score:
    """Results on a list of examples."""

    correct: list[bool]  # in the order of the examples, like texts
    generated_tokens: float  # mean over the examples, like thoughts
    thoughts: float
    texts: list[str]
    # of the thoughts of the last batch, see thought_geometry
    geometry: dict[str, list[float]] = field(default_factory=dict, compare=False)
    released_accuracy: float = 0.0  # by the released code's rule, see is_correct_as_released

    @property
    def n(self) -> int:
        return len(self.correct)

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / self.n


def wrote_steps(text: str) -> bool:
    """Return whether a generated text has written steps before the mark of the answer."""
    return bool(text.partition("#")[0].strip())


def wilson(p: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a fraction p of n."""
    z = 1.959964
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def thought_geometry(thoughts: Tensor) -> dict[str, list[float]]:
    """Return means over the examples of thoughts (B, n, C); {} if B < 2 or n = 0.

    thought_norm        (n)      norm of each thought
    thought_cosine      (n - 1)  cosine of each thought with the previous one
    thought_similarity  (n)      cosine between examples: 1 if the question makes no difference
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


def held_out_examples(engine: Engine, advice: str) -> list[Example]:
    """Return the validation examples of a run that trained on a file; [] if they are generated.

    Raise UserError, ending in `advice`, if the file is missing or has changed: the split would then
    differ, and validation examples could have been trained on.
    """
    config = engine.config
    if TASKS[config.task].splits and not config.data and not config.valid_data:
        return []
    try:
        data, _ = checkpoint.load_run_data(config, engine.manifest)
    except UserError as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"this run's validation examples: {reason}\n{advice}") from None
    examples = data.val["valid"]
    if not config.skip_bad_rows:
        return examples
    rendered = TASKS[config.task].render(examples, config.render)
    return [x for x, r in zip(examples, rendered, strict=True) if _was_used(engine, r)]


def _was_used(engine: Engine, rendered: Example) -> bool:
    """Return whether training with skip_bad_rows kept the example."""
    try:
        tokenized = tokenize(engine.tokenizer, rendered)
    except UserError:  # its text contains a special token
        return False
    n_tokens = max_length(engine.curriculum, tokenized, engine.tokenizer)
    return n_tokens <= engine.config.block_size


def note_training_file(engine: Engine, path: str) -> None:
    """Print a note if the engine's run was trained on this file."""
    trained = engine.config.data if "config" in engine.manifest else None
    if trained and Path(path).resolve() == Path(trained).resolve():
        print(f"note: {path} has this run's training examples; leave --data out for unseen ones")


def is_capped(engine: Engine) -> bool:
    """Return whether examples with fewer steps get fewer thoughts (without a stop classifier)."""
    curriculum = engine.curriculum
    has_thoughts = curriculum.rules.n_thoughts_rule != "none"
    return has_thoughts and not curriculum.pad_latent_to_max and not engine.model.config.stop


def thoughts_as_trained(engine: Engine, stage: int, examples: Sequence[Example]) -> list[int]:
    """Return the number of thoughts of each example at a stage of training; see is_capped."""
    if not is_capped(engine):
        return [engine.curriculum.n_thoughts(stage)] * len(examples)
    return [engine.curriculum.plan(stage, len(example["steps"]))[1] for example in examples]


def in_batches(order: Sequence[int], groups: Sequence[int], size: int) -> list[list[int]]:
    """Split indices, sorted by group, into batches of one group and at most `size` indices."""
    same = [list(indices) for _, indices in groupby(order, key=lambda i: groups[i])]
    return [indices[i : i + size] for indices in same for i in range(0, len(indices), size)]


def score(
    engine: Engine,
    examples: Sequence[Example],
    n_thoughts: int | Sequence[int],
    batch_size: int = 100,
    max_new_tokens: int = 128,
    edit: Edit | None = None,
) -> Score:
    """Return the score on unrendered examples.

    n_thoughts  one number for all examples, or one for each
    edit        see Engine.generate; its batches have the examples in this order if n_thoughts is
                one number
    """
    if engine.render and not engine.config:
        raise ValueError("score needs Engine.from_config, to render answers like questions")
    config, rendered = engine.config, examples
    if config:
        rendered = TASKS[config.task].render(examples, config.render)
    counts = n_thoughts if isinstance(n_thoughts, Sequence) else [n_thoughts] * len(examples)
    if len(counts) != len(examples):
        raise ValueError(f"n_thoughts: expected {len(examples)} numbers, got {len(counts)}")
    # a batch has one number of thoughts; similar lengths need little padding
    lengths = [0 if edit else len(x["question"]) for x in rendered]  # an edit may need the order
    order = sorted(range(len(examples)), key=lambda i: (counts[i], lengths[i]))
    texts, n_tokens, n_taken = [""] * len(examples), 0, 0
    for indices in in_batches(order, counts, batch_size):
        questions = [examples[i]["question"] for i in indices]
        out = engine.generate(questions, counts[indices[0]], max_new_tokens, edit=edit)
        for i, text in zip(indices, out.text, strict=True):
            texts[i] = text
        n_tokens += sum(map(len, out.tokens))
        n_taken += sum(out.n_thoughts)
    n, answers = len(examples), [example["answer"] for example in rendered]
    return Score(
        correct=list(map(is_correct, texts, answers)),
        generated_tokens=(n_tokens + n_taken) / n,
        thoughts=n_taken / n,
        texts=texts,
        geometry=thought_geometry(out.thoughts),
        released_accuracy=sum(map(is_correct_as_released, texts, answers)) / n,
    )


@torch.no_grad()
def thoughts_until_repeat(
    engine: Engine, examples: Sequence[Example], n_thoughts: int, batch_size: int = 100
) -> list[int]:
    """Return the number of thoughts (1 to n_thoughts) of each example until the LM head's best
    token repeats. This is a stopping rule that needs no training."""
    counts: list[int] = []
    for start in range(0, len(examples), batch_size):
        questions = [x["question"] for x in examples[start : start + batch_size]]
        thoughts = engine.generate(questions, n_thoughts, max_new_tokens=1).thoughts
        tokens = engine.model.head(thoughts).argmax(-1)  # (B, n): after 0, 1, ..., n - 1 thoughts
        repeats = F.pad(tokens[:, 1:] == tokens[:, :-1], (0, 1), value=True)  # (B, n)
        counts += (repeats.int().argmax(1) + 1).tolist()
    return counts


def evaluate_splits(
    engine: Engine, splits: dict[str, list[Example]], stage: int, dist: Distributed
) -> dict[str, Any]:
    """Return accuracy and generated tokens per example of every split, by greedy decoding.

    Each example has as many thoughts as in training at this stage. The result also contains the
    thought_geometry of this rank's thoughts. All ranks must call it: each scores its own shard.
    """
    metrics: dict[str, Any] = {}
    for name, examples in splits.items():
        n_correct = n_tokens = 0
        if local := dist.shard(examples):  # a small split may leave ranks without examples
            n_thoughts = thoughts_as_trained(engine, stage, local)
            longest = engine.config.max_new_tokens
            result = score(engine, local, n_thoughts, max_new_tokens=longest)
            metrics |= result.geometry
            n_correct = sum(result.correct)
            # an integer, so that the sum does not depend on the order of the ranks
            n_tokens = round(result.generated_tokens * result.n)
        n_correct, n_tokens = dist.all_reduce_sum([n_correct, n_tokens])
        metrics[f"{name}_accuracy"] = n_correct / len(examples)
        metrics[f"{name}_tokens"] = n_tokens / len(examples)
    return metrics
