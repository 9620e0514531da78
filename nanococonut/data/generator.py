"""What generated tasks share: examples drawn in batches from a seed, without held-out graphs."""

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from nanococonut.data.examples import Example
from nanococonut.data.isomorphism import Graph, graph_keys
from nanococonut.runtime.errors import UserError

# the random streams of one seed, none of which overlap: training examples, both validation splits,
# the order of an epoch, an example's stage, and generate() with a plain integer
TRAIN, VALID, MATCHED, ORDER, STAGE_STREAM, USER_STREAM = range(6)
# a user's seed: training repeats no graph of the first N_TEST examples of a split by this seed
TEST_SEED, N_TEST = 1_000_003, 2000

BATCH = 1024  # examples drawn at once; constant, so that the first examples do not depend on n
PATIENCE = 100_000  # examples drawn for one that is kept before giving up

# draws BATCH examples with a task's settings; those that do not fit the settings are missing
SampleBatch = Callable[[np.random.Generator, Any], list[Example]]


def sample_batches(
    sample_batch: SampleBatch, seed: int | Sequence[int], config: Any
) -> Iterator[list[Example]]:
    """Yield batches of examples, again and again; one may be empty.

    seed   (seed, stream, ...), or a user's integer
    """
    # numpy pads seeds with zeros: S alone would equal (S, TRAIN, 0), the training stream
    rng = np.random.default_rng((seed, USER_STREAM) if isinstance(seed, int) else seed)
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
    """Return n examples, none of which has a graph whose graph_key is in `exclude`.

    The same seed gives the same examples, and the first ones do not depend on n. Raise UserError
    if examples as configured are too rare. A task's generate() is this function with the first
    three arguments set.
    """
    config = config or default_config
    examples: list[Example] = []
    for n_batches, batch in enumerate(sample_batches(sample_batch, seed, config), 1):
        if exclude:
            keys = zip(batch, graph_keys(map(marked_graph, batch)), strict=True)
            batch = [example for example, key in keys if key not in exclude]
        examples += batch
        if len(examples) >= n:
            break
        if n_batches * BATCH >= PATIENCE * (len(examples) + 1):
            raise UserError(
                f"{n_batches * BATCH:,} graphs gave {len(examples)} examples with {config}.\n"
                "Ask for fewer hops or another number of nodes."
            )
    return examples[:n]
