"""CUDA graphs without a GPU: operations are recorded and repeated."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from nanococonut.runtime.graphs import GraphCache

SYNCS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")  # the host reads from the device


class FakeGraph(TorchDispatchMode):
    """Record operations and their tensors, then repeat just these, as a CUDA graph does.

    Python values and shapes are those of the recording.
    """

    def __init__(self):
        super().__init__()
        self.recorded = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        assert name not in SYNCS, f"{name}: a graph cannot sync with the host"
        out = func(*args, **(kwargs or {}))
        self.recorded.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()  # the recording may contain a backward pass, as plain operations
    def replay(self):
        replayed = {}  # id of a tensor created in the recording -> its counterpart in this replay

        def mapped(tree):
            return tree_map(lambda x: replayed.get(id(x), x), tree)

        for func, args, kwargs, out in self.recorded:
            new_out = func(*mapped(args), **mapped(kwargs))
            for old, new in zip(tree_leaves(out), tree_leaves(new_out), strict=True):
                replayed[id(old)] = new
        FakeGraphCache.replayed += 1


class FakeGraphCache(GraphCache):
    captured = replayed = 0

    def _warmup(self, fn):
        fn()

    def _capture(self, fn, mutated):
        before = [t.clone() for t in mutated]
        with FakeGraph() as graph:
            fn()
        for t, value in zip(mutated, before, strict=True):
            t.copy_(value)  # capturing computes nothing
        FakeGraphCache.captured += 1
        return graph
