"""The bandwidth of memory, measured between what it is compared with."""

import time
from collections.abc import Callable

import torch

BUFFER_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}  # more than fits into most caches


class Bandwidth:
    """GB/s of memory: of a sum, which reads as a step does, and on a GPU also of a copy."""

    def __init__(self, device: torch.device) -> None:
        n = BUFFER_BYTES.get(device.type, BUFFER_BYTES["cpu"]) // 4
        self.device = device
        self.a = torch.ones(n, device=device)
        # a CPU's copy reads what it overwrites, too: no bound for a step
        self.b = torch.ones(n, device=device) if device.type == "cuda" else None
        self.measure()  # touches every page

    def measure(self) -> float:
        read = self._rate(self.a.sum, self.a.nbytes)
        if self.b is None:
            return read
        return max(read, self._rate(lambda: self.b.copy_(self.a), 2 * self.a.nbytes))

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
