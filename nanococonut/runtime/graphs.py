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


def round_up(n: int, multiple: int) -> int:
    """n rounded up, so that there are few shapes and few graphs."""
    return -(-n // multiple) * multiple


class GraphCache:
    """CUDA graphs by key, at most max_graphs; the least recently used goes. All take their memory
    from one pool, since they run one after another and keep nothing there in between."""

    # one for all rehearsals and captures: libraries keep memory for every stream they have seen
    stream: torch.cuda.Stream | None = None

    def __init__(self, most: int) -> None:
        self.max_graphs = most
        self.graphs: OrderedDict[tuple, torch.cuda.CUDAGraph] = OrderedDict()
        self.bytes = 0  # reserved for them, at most
        self.pool = None

    def run(self, key: tuple, work: Callable[[], None], mutated: Sequence[Tensor]) -> None:
        """Do the work by the key's graph, captured where it is asked for first.

        mutated: what the work mutated and what must not be changed twice, put back after the work
        was done once before the capture, for what is only made at first use (kernels compiled,
        libraries' handles).
        """
        if key not in self.graphs:
            while len(self.graphs) >= self.max_graphs:
                self.graphs.popitem(last=False)
            before = [t.clone() for t in mutated]
            self._warmup(work)
            for t, value in zip(mutated, before, strict=True):
                t.copy_(value)
            self.graphs[key] = self._capture(work, mutated)
        self.graphs.move_to_end(key)
        self.graphs[key].replay()

    def _warmup(self, work: Callable[[], None]) -> None:
        state = torch.cuda.get_rng_state()  # what it draws is drawn again
        side = GraphCache.stream = GraphCache.stream or torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.set_rng_state(state)

    def _capture(self, work: Callable[[], None], mutated: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        if self.pool is None or not self.graphs:  # a pool does not outlive its last graph
            self.pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the rehearsal left is not the graph's
        reserved = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # other threads may go on
        with torch.cuda.graph(graph, self.pool, GraphCache.stream, capture_error_mode=mode):
            work()
        self.bytes += max(0, torch.cuda.memory_reserved() - reserved)
        return graph
