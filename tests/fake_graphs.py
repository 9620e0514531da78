"""What stands for CUDA graphs where there is no GPU: operations remembered and done again."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from nanococonut.runtime.graphs import GraphCache

ASKING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")  # of the device, by the host


class FakeGraph(TorchDispatchMode):
    """What a CUDA graph does: remembers which operation was done to which tensors, and does just
    that again. Python values and shapes are those of the recording."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        assert name not in ASKING, f"{name}: a graph cannot ask the device"
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()  # a backward pass is among what is done again, as plain operations
    def replay(self):
        now = {}  # id of a tensor made in the recording -> what stands for it in this replay

        def mapped(tree):
            return tree_map(lambda x: now.get(id(x), x), tree)

        for func, args, kwargs, out in self.done:
            again = func(*mapped(args), **mapped(kwargs))
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                now[id(old)] = new
        FakeGraphCache.replayed += 1


class FakeGraphCache(GraphCache):
    captured = replayed = 0

    def _warmup(self, work):
        work()

    def _capture(self, work, mutated):
        before = [t.clone() for t in mutated]
        with FakeGraph() as tape:
            work()
        for t, value in zip(mutated, before, strict=True):
            t.copy_(value)  # capturing does nothing
        FakeGraphCache.captured += 1
        return tape
