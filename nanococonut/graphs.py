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


def up(n: int, multiple: int) -> int:
    """n rounded up, so that there are few shapes and few graphs."""
    return -(-n // multiple) * multiple


class Graphs:
    """Graphs by key; of more than `most` the one not used for longest goes. All take their memory
    from one pool, since they run one after another and keep nothing there in between."""

    # one for all rehearsals and captures: libraries keep memory for every stream they have seen
    stream: torch.cuda.Stream | None = None

    def __init__(self, most: int) -> None:
        self.most = most
        self.kept: OrderedDict[tuple, torch.cuda.CUDAGraph] = OrderedDict()
        self.bytes = 0  # reserved for them, at most
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
        side = Graphs.stream = Graphs.stream or torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.set_rng_state(state)

    def _record(self, work: Callable[[], None], changes: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        if self.pool is None or not self.kept:  # a pool does not outlive its last graph
            self.pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the rehearsal left is not the graph's
        reserved = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # other threads may go on
        with torch.cuda.graph(graph, self.pool, Graphs.stream, capture_error_mode=mode):
            work()
        self.bytes += max(0, torch.cuda.memory_reserved() - reserved)
        return graph
