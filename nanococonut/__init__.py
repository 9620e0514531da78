"""nanococonut: Coconut (Chain of Continuous Thought, arXiv 2412.06769), small, fast and honest."""

import os

# By default, torch's idle OpenMP threads spin for a long time, and another busy process slows
# training 20 to 45 times. If they sleep at once, waking them takes so long that two threads are
# slower than one. So they spin about as long as a wake-up takes (docs/LOG.md). libgomp reads both
# variables when torch is loaded, so every script imports nanococonut first.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from nanococonut.inference.engine import Engine, Generation, load
from nanococonut.weights.pretrained import load_pretrained

__all__ = ["Engine", "Generation", "load", "load_pretrained"]
__version__ = "0.2.0"
