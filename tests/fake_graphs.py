"""CUDA graphs without a GPU: record operations and repeat them."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from nanococonut.runtime.graphs import GraphCache

SYNCS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")  # these sync with the host


class FakeGraph(TorchDispatchMode):
    """Record operations on tensors and repeat them, as a CUDA graph does.

    A replay uses the Python values and shapes of the recording. The recording changes no tensor.
    """

    def __init__(self):
        super().__init__()
        self.recorded, self.before = [], {}  # before: address -> (storage, its first content)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        assert name not in SYNCS, f"{name}: a graph cannot sync with the host"
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if argument.is_write and value is not None:
                for storage in (x.untyped_storage() for x in tree_leaves(value)):
                    self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = func(*args, **kwargs)
        self.recorded.append((func, args, kwargs, out))
        return out

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for storage, content in self.before.values():
            storage.copy_(content)

    @torch.no_grad()  # the recording may contain a backward pass, as plain operations
    def replay(self):
        replayed = {}  # id of a recorded output -> the output in this replay

        def mapped(tree):
            return tree_map(lambda x: replayed.get(id(x), x), tree)

        for func, args, kwargs, out in self.recorded:
            new_out = func(*mapped(args), **mapped(kwargs))
            for old, new in zip(tree_leaves(out), tree_leaves(new_out), strict=True):
                replayed[id(old)] = new
        FakeGraphCache.replayed += 1


class FakeGraphCache(GraphCache):
    captured = replayed = 0

    def _run_and_capture(self, fn):
        fn()
        with FakeGraph() as graph:
            fn()
        FakeGraphCache.captured += 1
        return graph
