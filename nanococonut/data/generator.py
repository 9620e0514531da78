"""Generation for all tasks: draw examples in batches from a seed, and skip held-out graphs."""

import operator
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from nanococonut.data.examples import Example
from nanococonut.data.graph import Graph, graph_keys
from nanococonut.runtime.errors import UserError

# independent random streams of one seed: training examples, both validation splits, the order of
# an epoch, the stages of examples, and generate() with a plain integer
TRAIN, VALID, MATCHED, ORDER, STAGE_STREAM, USER_STREAM = range(6)
# seed of the test examples: training skips the graphs of the first N_TEST in each split
TEST_SEED, N_TEST = 1_000_003, 2000

BATCH = 1024  # graphs drawn at once; constant, so that the first examples do not depend on n
PATIENCE = 100_000  # graphs drawn per example before giving up

# draws BATCH graphs and returns the examples of the graphs that fit the settings
SampleBatch = Callable[[np.random.Generator, Any], list[Example]]


def sample_batches(
    sample_batch: SampleBatch, seed: int | Sequence[int], config: Any
) -> Iterator[list[Example]]:
    """Yield batches of examples without end; a batch may be empty.

    seed   (seed, stream, ...), or a plain integer
    """
    # numpy pads seeds with zeros, so S alone would equal (S, TRAIN, 0), a training stream
    if not isinstance(seed, Sequence):
        seed = (operator.index(seed), USER_STREAM)  # a NumPy integer, too
    rng = np.random.default_rng(seed)
    while True:
        yield sample_batch(rng, config)


def draw(
    sample_batch: SampleBatch,
    marked_graph: Callable[[Example], Graph],
    default_config: Any,
    n: int,
    seed: int | Sequence[int],
    config: Any = None,
    exclude: Collection[Hashable] = frozenset(),
) -> list[Example]:
    """Return n examples whose graph keys are not in `exclude`.

    The same seed gives the same examples, and the first ones do not depend on n. Raise UserError
    if too few graphs fit the settings. A task's generate() is this function with the first three
    arguments set.
    """
    config = config or default_config
    examples: list[Example] = []
    n_excluded = 0
    for n_batches, batch in enumerate(sample_batches(sample_batch, seed, config), 1):
        if exclude:
            keys = zip(batch, graph_keys(map(marked_graph, batch)), strict=True)
            kept = [example for example, key in keys if key not in exclude]
            n_excluded += len(batch) - len(kept)
            batch = kept
        examples += batch
        if len(examples) >= n:
            break
        if n_batches * BATCH >= PATIENCE * (len(examples) + 1):
            held_out = f" ({n_excluded} more are held out)" * (n_excluded > 0)
            raise UserError(
                f"{n_batches * BATCH:,} graphs gave {len(examples)} examples{held_out} with "
                f"{config}.\nUse fewer hops or another number of nodes."
            )
    return examples[:n]
