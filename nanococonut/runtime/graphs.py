"""A bounded cache of CUDA graphs.

A step of a small model is about a hundred kernels of a few microseconds each, so launching them one
by one takes longer than running them. A graph launches all of them at once. Every replay uses the
same tensors, so a step's inputs must be copied into them.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch


def round_up(n: int, multiple: int) -> int:
    """Return n rounded up to a multiple, so that there are fewer shapes to capture."""
    return -(-n // multiple) * multiple


class GraphCache:
    """Up to max_graphs CUDA graphs, by key (0: none). The least recently used one is dropped.

    All graphs share one memory pool: no two run at once, and they keep nothing in it between
    replays.
    """

    # shared by all captures, because libraries keep a workspace per stream
    stream: torch.cuda.Stream | None = None

    def __init__(self, max_graphs: int) -> None:
        self.max_graphs = max_graphs
        self.graphs: OrderedDict[tuple, torch.cuda.CUDAGraph] = OrderedDict()
        self.bytes = 0  # upper bound of the memory reserved for graphs
        self.pool: torch.cuda.MemPool | None = None

    def run(self, key: tuple, fn: Callable[[], None]) -> None:
        """Run `fn`: on the first use of `key` call and capture it, later replay its graph."""
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

    def keep_only(self, key: tuple) -> None:
        """Drop all graphs but one, as after a first run that allocated memory which stays in use:
        an earlier graph has its temporary tensors in the same memory."""
        self.graphs = OrderedDict({key: self.graphs[key]})

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        self.graphs.clear()
        self.bytes, self.pool = 0, None

    def _run_and_capture(self, fn: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Call `fn`, which also compiles its kernels, then capture it and return the graph."""
        if self.pool is None or not self.graphs:  # a pool is freed with its last graph
            self.pool = torch.cuda.MemPool()
        current = torch.cuda.current_stream()
        side = GraphCache.stream = GraphCache.stream or torch.cuda.Stream()
        torch.cuda.empty_cache()  # so that memory_reserved() below counts the pool only
        reserved = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # other threads may use CUDA during the capture
        # backward has to run on this thread: use_mem_pool and cuBLAS workspaces are per thread
        with torch.autograd.set_multithreading_enabled(False):
            # the first call uses the pool too, or its peak memory would add to that of the graphs.
            # Graphs do not reuse what this call leaves allocated (gradients, cuBLAS workspaces)
            side.wait_stream(current)
            with torch.cuda.use_mem_pool(self.pool), torch.cuda.stream(side):
                fn()
            current.wait_stream(side)
            with torch.cuda.graph(graph, self.pool.id, side, capture_error_mode=mode):
                fn()  # only recorded
        self.bytes += max(0, torch.cuda.memory_reserved() - reserved)
        return graph
