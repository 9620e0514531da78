"""A bounded cache of CUDA graphs.

A step of a small model is about a hundred kernels of a few microseconds each, so launching them one
by one costs more than running them. A graph launches all at once. A replay always uses the same
tensors, so per-step inputs must be copied into them.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def round_up(n: int, multiple: int) -> int:
    """Return n rounded up to a multiple: fewer shapes, so fewer graphs."""
    return -(-n // multiple) * multiple


class GraphCache:
    """CUDA graphs by key, at most max_graphs; the least recently used is dropped.

    All graphs share one memory pool: they run one after another and keep nothing in it in between.
    """

    # one stream for every warm-up and capture: libraries keep memory per stream
    stream: torch.cuda.Stream | None = None

    def __init__(self, max_graphs: int) -> None:
        self.max_graphs = max_graphs
        self.graphs: OrderedDict[tuple, torch.cuda.CUDAGraph] = OrderedDict()
        self.bytes = 0  # upper bound of the memory reserved for graphs
        self.pool = None

    def run(self, key: tuple, fn: Callable[[], None], mutated: Sequence[Tensor]) -> None:
        """Replay the graph for `key`; capture it from `fn` on first use.

        mutated: tensors that `fn` writes. They are restored after the warm-up run (which triggers
        lazy compilation), so warm-up has no side effect.
        """
        if key not in self.graphs:
            while len(self.graphs) >= self.max_graphs:
                self.graphs.popitem(last=False)
            before = [t.clone() for t in mutated]
            self._warmup(fn)
            for t, value in zip(mutated, before, strict=True):
                t.copy_(value)
            self.graphs[key] = self._capture(fn, mutated)
        self.graphs.move_to_end(key)
        self.graphs[key].replay()

    def _warmup(self, fn: Callable[[], None]) -> None:
        rng_state = torch.cuda.get_rng_state()  # fn may draw random numbers
        side = GraphCache.stream = GraphCache.stream or torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            fn()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.set_rng_state(rng_state)

    def _capture(self, fn: Callable[[], None], mutated: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        if self.pool is None or not self.graphs:  # a pool does not outlive its last graph
            self.pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # so that memory_reserved() below counts the graph only
        reserved = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # other threads may use CUDA during the capture
        with torch.cuda.graph(graph, self.pool, GraphCache.stream, capture_error_mode=mode):
            fn()
        self.bytes += max(0, torch.cuda.memory_reserved() - reserved)
        return graph
