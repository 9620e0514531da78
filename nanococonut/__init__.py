"""nanococonut: Coconut (Chain of Continuous Thought, arXiv 2412.06769), small, fast and honest."""

import os

# torch's waiting threads would spin, and a busy neighbour slow them 20 to 45 times. libgomp reads
# this when torch is loaded, so every script imports nanococonut first.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from nanococonut.inference.engine import Engine, Generation, load
from nanococonut.weights.pretrained import load_pretrained

__all__ = ["Engine", "Generation", "load", "load_pretrained"]
__version__ = "0.2.0"
