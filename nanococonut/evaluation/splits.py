"""Validation during training: every split, shared between the processes of the run."""

from typing import Any

from nanococonut.config import TrainConfig
from nanococonut.data.examples import Example
from nanococonut.evaluation.accuracy import score, thoughts_as_trained
from nanococonut.inference.engine import Engine
from nanococonut.runtime.distributed import Distributed


def evaluate_splits(
    engine: Engine,
    splits: dict[str, list[Example]],
    stage: int,
    config: TrainConfig,
    dist: Distributed,
) -> dict[str, Any]:
    """Return accuracy and generated tokens per example of every split, by greedy decoding.

    Each example has as many thoughts as in training at this stage. Also norms and cosines of this
    rank's thoughts, see accuracy.thought_geometry. Collective: every rank calls it and scores its
    own share of the examples.
    """
    metrics: dict[str, Any] = {}
    for name, examples in splits.items():
        n_correct = n_tokens = 0
        if local := dist.shard(examples):  # a small split may not reach every rank
            n_thoughts = thoughts_as_trained(engine.curriculum, stage, local)
            result = score(engine, local, n_thoughts, max_new_tokens=config.max_new_tokens)
            metrics |= result.geometry
            n_correct = sum(result.correct)
            n_tokens = round(result.generated_tokens * result.n)  # an integer, so order is free
        n_correct, n_tokens = dist.all_reduce_sum([n_correct, n_tokens])
        metrics[f"{name}_accuracy"] = n_correct / len(examples)
        metrics[f"{name}_tokens"] = n_tokens / len(examples)
    return metrics
