"""nanococonut: Coconut (Chain of Continuous Thought, arXiv 2412.06769), small, fast and honest."""

from nanococonut.inference.engine import Engine, Generation
from nanococonut.weights.pretrained import load_pretrained

__all__ = ["Engine", "Generation", "load_pretrained"]
__version__ = "0.2.0"
