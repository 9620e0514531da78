"""CUDA graphs of work over tensors that never move, one for each key, a bounded number of them.

A step of a small model is a hundred kernels of a few microseconds: launched one by one, the host is
what takes the time. A graph launches them all at once. What it captures is shapes and addresses, so
work that is played from one reads and writes the same tensors every time, and whatever differs from
time to time lies in them.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Graphs:
    """Graphs by key; of more than `most` the one not used for longest goes. All take their memory
    from one pool, since they run one after another and keep nothing there in between."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.kept: OrderedDict[tuple, torch.cuda.CUDAGraph] = OrderedDict()
        self.bytes = 0  # reserved for them at most
        self.pool = None

    def play(self, key: tuple, work: Callable[[], None], changes: Sequence[Tensor]) -> None:
        """Do the work by the key's graph, captured where it is asked for first.

        changes: what the work changes and what must not be changed twice, put back after the work
        was done once before the capture, for what is only made at first use (kernels compiled,
        libraries' handles).
        """
        if key not in self.kept:
            while len(self.kept) >= self.most:
                self.kept.popitem(last=False)
            before = [t.clone() for t in changes]
            self._rehearse(work)
            for t, value in zip(changes, before, strict=True):
                t.copy_(value)
            self.kept[key] = self._record(work, changes)
        self.kept.move_to_end(key)
        self.kept[key].replay()

    def _rehearse(self, work: Callable[[], None]) -> None:
        state = torch.cuda.get_rng_state()  # what it draws is drawn again
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.set_rng_state(state)

    def _record(self, work: Callable[[], None], changes: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        reserved = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            work()
        self.bytes += max(0, torch.cuda.memory_reserved() - reserved)
        return graph
