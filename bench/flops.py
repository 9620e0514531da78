"""What a training step costs by arithmetic, and the most that this machine does of it."""

import time
from collections.abc import Iterable

import torch

from nanococonut.model import GPTConfig

# prefix, thoughts, suffix, supervised labels
Lengths = tuple[int, int, int, int]


def step_flop(config: GPTConfig, rows: Iterable[Lengths]) -> tuple[int, int]:
    """FLOP of forward and backward (twice the forward), (in matrices, in attention): what hidden
    states as thoughts cannot do without. No padding, nothing made twice, logits where there are
    labels only, and of the prefix the last layer's keys and values but for the last token. The
    optimizer and whatever is done element by element are not counted.
    """
    C, L = config.n_embd, config.n_layer
    matrices = attention = 0
    for prefix, thoughts, suffix, labels in rows:
        read = prefix + thoughts + suffix - 1  # nothing is read behind the last label
        idle = prefix - 1  # no query and no MLP of the last layer
        weights = 12 * C * C * L * read - 10 * C * C * idle
        weights += C * C * read if config.smear else 0
        matrices += 2 * (weights + config.vocab_size * C * labels)
        seen = L * read * (read + 1) // 2 - idle * (idle + 1) // 2  # keys, summed over queries
        attention += 4 * C * seen  # scores, and the sum of values
    return 3 * matrices, 3 * attention


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 20) -> float:
    """FLOP/s of a product of two square matrices, the best of some: by this process's threads, and
    at its float32_matmul_precision."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(1 + repeats):  # the first is slow
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
