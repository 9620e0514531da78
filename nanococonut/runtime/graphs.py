"""A bounded cache of CUDA graphs.

A step of a small model is about a hundred kernels of a few microseconds each, so launching them one
by one costs more than running them. A graph launches all at once. A replay always uses the same
tensors, so per-step inputs must be copied into them.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch


def round_up(n: int, multiple: int) -> int:
    """Return n rounded up to a multiple: fewer shapes, so fewer graphs."""
    return -(-n // multiple) * multiple


class GraphCache:
    """CUDA graphs by key, at most max_graphs; the least recently used is dropped. 0: no graphs.

    All graphs share one memory pool: they run one after another and keep nothing in it in between.
    """

    # one stream for every first run and capture: libraries keep memory per stream
    stream: torch.cuda.Stream | None = None

    def __init__(self, max_graphs: int) -> None:
        self.max_graphs = max_graphs
        self.graphs: OrderedDict[tuple, torch.cuda.CUDAGraph] = OrderedDict()
        self.bytes = 0  # upper bound of the memory reserved for graphs
        self.pool: torch.cuda.MemPool | None = None

    def run(self, key: tuple, fn: Callable[[], None]) -> None:
        """Do the work of `fn`: call it on first use and capture it, replay its graph later."""
        if self.max_graphs == 0:
            fn()
            return
        if key in self.graphs:
            self.graphs.move_to_end(key)
            self.graphs[key].replay()
            return
        while len(self.graphs) >= self.max_graphs:
            self.graphs.popitem(last=False)
        self.graphs[key] = self._run_and_capture(fn)

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        self.graphs.clear()
        self.bytes, self.pool = 0, None

    def _run_and_capture(self, fn: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Call `fn`, which triggers lazy compilation, then return its graph: capturing it computes
        nothing."""
        if self.pool is None or not self.graphs:  # a pool does not outlive its last graph
            self.pool = torch.cuda.MemPool()
        current = torch.cuda.current_stream()
        side = GraphCache.stream = GraphCache.stream or torch.cuda.Stream()
        torch.cuda.empty_cache()  # so that memory_reserved() below counts the pool only
        reserved = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # other threads may use CUDA during the capture
        # backward on this thread too: use_mem_pool is for one, and cuBLAS keeps memory per thread
        with torch.autograd.set_multithreading_enabled(False):
            # in the pool, so that no second peak of memory stands next to the graphs'. What fn
            # leaves allocated there (new gradients, cuBLAS workspaces) is not used for a graph
            side.wait_stream(current)
            with torch.cuda.use_mem_pool(self.pool), torch.cuda.stream(side):
                fn()
            current.wait_stream(side)
            with torch.cuda.graph(graph, self.pool.id, side, capture_error_mode=mode):
                fn()
        self.bytes += max(0, torch.cuda.memory_reserved() - reserved)
        return graph
