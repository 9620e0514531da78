"""The random streams that are derived from one seed. No two of them overlap."""

from collections.abc import Sequence

import numpy as np

# training examples, both validation splits, the order of an epoch, an example's stage, and
# generate() with a plain integer
TRAIN, VALID, MATCHED, ORDER, STAGE_STREAM, USER_STREAM = range(6)

# a user's seed: training repeats no graph of the first N_TEST examples of a split by this seed
TEST_SEED, N_TEST = 1_000_003, 2000


def rng_from_seed(seed: int | Sequence[int]) -> np.random.Generator:
    """Return numpy's generator for (seed, stream, ...), or for a user's integer seed."""
    # numpy pads seeds with zeros: S alone would equal (S, TRAIN, 0), the training stream
    return np.random.default_rng((seed, USER_STREAM) if isinstance(seed, int) else seed)
