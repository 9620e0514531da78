"""Bounds of speed: the bandwidth of memory, measured, and the FLOP of a training step, counted."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import torch

from nanococonut.model import GPTConfig

BUFFER_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}  # more than fits into most caches
WIDTH = 1024  # columns of the buffer as a matrix

# tokens of one sequence: prefix, thoughts, suffix, supervised labels
Lengths = tuple[int, int, int, int]


class Bandwidth:
    """GB/s of memory: of a copy, and of a matrix times a vector, which reads as a step does."""

    def __init__(self, device: torch.device) -> None:
        rows = BUFFER_BYTES.get(device.type, BUFFER_BYTES["cpu"]) // (4 * WIDTH)
        self.device = device
        self.a, self.b = (torch.ones(rows, WIDTH, device=device) for _ in range(2))
        self.vector = torch.ones(WIDTH, device=device)
        self.measure()  # touches every page

    def measure(self) -> dict[str, float]:
        return {
            "copy": self._rate(lambda: self.b.copy_(self.a), 2 * self.a.nbytes),
            "matrix times vector": self._rate(lambda: self.a @ self.vector, self.a.nbytes),
        }

    def _rate(self, work: Callable[[], object], n_bytes: int) -> float:
        repeats = 8 if self.device.type == "cuda" else 1  # so that synchronizing hardly counts
        began = now(self.device)
        for _ in range(repeats):
            work()
        return repeats * n_bytes / (now(self.device) - began) / 1e9


def best(measured: Sequence[dict[str, float]]) -> tuple[str, list[float]]:
    """Return the faster way of several measurements, and its GB/s."""
    values = {name: [m[name] for m in measured] for name in measured[0]}
    name = max(values, key=lambda n: statistics.median(values[n]))
    return name, values[name]


def step_flop(config: GPTConfig, sequences: Iterable[Lengths]) -> tuple[int, int]:
    """Return the FLOP of a training step, (in matrix products, in attention).

    Backward counts twice the forward. Counted is what Coconut cannot do without: no padding, no
    recomputation, logits at labels only, and in the prefix's last layer only keys and values but
    for the last token. Elementwise operations and the optimizer are not counted.
    """
    C, L = config.n_embd, config.n_layer
    matmul = attention = 0
    for prefix, thoughts, suffix, labels in sequences:
        n_tokens = prefix + thoughts + suffix - 1  # nothing is read after the last label
        idle = prefix - 1  # tokens without query and MLP in the last layer
        weights = 12 * C * C * L * n_tokens - 10 * C * C * idle
        weights += C * C * n_tokens if config.smear else 0
        matmul += 2 * (weights + config.vocab_size * C * labels)
        keys = L * n_tokens * (n_tokens + 1) // 2 - idle * (idle + 1) // 2  # summed over queries
        attention += 4 * C * keys  # scores, and the sum of values
    return 3 * matmul, 3 * attention


def now(device: torch.device) -> float:
    """Return the time in seconds after all work on the device has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
