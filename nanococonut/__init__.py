"""nanococonut: Coconut (Chain of Continuous Thought, arXiv 2412.06769), small, fast and honest."""

__version__ = "0.1.0"
