"""The bandwidth of memory, measured between what it is compared with."""

import time
from collections.abc import Callable

import torch

BUFFER_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}  # more than fits into most caches
WIDTH = 1024  # columns of the buffer as a matrix


class Bandwidth:
    """Measures GB/s of memory: a copy, or a matrix times a vector, which reads as a step does."""

    def __init__(self, device: torch.device) -> None:
        rows = BUFFER_BYTES.get(device.type, BUFFER_BYTES["cpu"]) // (4 * WIDTH)
        self.device = device
        self.a, self.b = (torch.ones(rows, WIDTH, device=device) for _ in range(2))
        self.vector = torch.ones(WIDTH, device=device)
        self.measure()  # touches every page

    def measure(self) -> float:
        """Return the rate of the faster of the two."""
        copy = self._rate(lambda: self.b.copy_(self.a), 2 * self.a.nbytes)
        return max(copy, self._rate(lambda: self.a @ self.vector, self.a.nbytes))

    def _rate(self, work: Callable[[], object], n_bytes: int) -> float:
        repeats = 8 if self.device.type == "cuda" else 1  # so that synchronizing hardly counts
        began = now(self.device)
        for _ in range(repeats):
            work()
        return repeats * n_bytes / (now(self.device) - began) / 1e9


def now(device: torch.device) -> float:
    """Return the time in seconds after all work on the device has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
