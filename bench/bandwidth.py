"""Memory bandwidth, measured between what it is compared with."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

# of a buffer, more than fits into a cache (those of this decade's servers aside)
BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}


class Bandwidth:
    """GB/s of memory, measured whenever asked."""

    def __init__(self, device: torch.device) -> None:
        n = BYTES.get(device.type, BYTES["cpu"]) // 4
        self.device = device
        self.a, self.b = torch.ones(n, device=device), torch.zeros(n, device=device)
        self.copied: list[float] = []
        self.summed: list[float] = []
        self.measure()  # touches every page
        self.copied.clear(), self.summed.clear()

    def _rate(self, work: Callable[[], Any], n_bytes: int) -> float:
        began = self._now()
        work()
        return n_bytes / (self._now() - began) / 1e9

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def measure(self) -> None:
        self.copied.append(self._rate(lambda: self.b.copy_(self.a), 2 * self.a.nbytes))
        self.summed.append(self._rate(lambda: self.a.sum(), self.a.nbytes))

    @property
    def values(self) -> list[float]:
        return max(self.copied, self.summed, key=statistics.median)
