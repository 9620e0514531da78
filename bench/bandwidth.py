"""Memory bandwidth, measured between what it is compared with."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

# of a buffer: more than fits into most caches
BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
WIDTH = 1024  # of the matrix that a buffer is


class Bandwidth:
    """GB/s of memory, whenever asked: of a plain copy, and of a matrix times a vector, which reads
    as a step does."""

    def __init__(self, device: torch.device) -> None:
        rows = BYTES.get(device.type, BYTES["cpu"]) // (4 * WIDTH)
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
        times = 8 if self.device.type == "cuda" else 1  # so that waiting for it hardly counts
        began = self._now()
        for _ in range(times):
            work()
        return times * n_bytes / (self._now() - began) / 1e9

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def best(measured: Sequence[dict[str, float]]) -> tuple[str, list[float]]:
    """Of several measurements: the way that was faster, and its GB/s."""
    values = {name: [m[name] for m in measured] for name in measured[0]}
    name = max(values, key=lambda n: statistics.median(values[n]))
    return name, values[name]
