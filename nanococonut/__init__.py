"""nanococonut: Coconut (Chain of Continuous Thought, arXiv 2412.06769), small, fast and honest."""

import os

# A waiting thread of torch's would spin for long, and a busy neighbour slow both 20 to 45 times.
# One that sleeps at once is slow to wake: two threads trained slower than one. So it spins for
# about as long as waking takes (docs/LOG.md). libgomp reads this when torch is loaded, so every
# script imports nanococonut first.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from nanococonut.inference.engine import Engine, Generation, load
from nanococonut.weights.pretrained import load_pretrained

__all__ = ["Engine", "Generation", "load", "load_pretrained"]
__version__ = "0.2.0"
