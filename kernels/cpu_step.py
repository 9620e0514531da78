"""A step of GPT-2 on a CPU, in C: cpu_step.c, compiled when it is first used."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels._check import check_tensors
from kernels._compile import compile_c


class CpuStep:
    """All layers of a GPT-2 for one new position per sequence, and its LM head.

    weights  those of GPT.layer_weights
    wte      (V, C), the head's weight

    All tensors are on a CPU, in float32 or bfloat16. Contiguous matrices are not copied. Raise
    OSError if compile_c does.
    """

    MAX_BATCH = 3  # matrix products are faster for more sequences

    def __init__(self, weights: Sequence[Tensor], wte: Tensor, n_head: int) -> None:
        options = {torch.float32: [], torch.bfloat16: ["-DBF16"]}[wte.dtype]
        self.compiled = compile_c("cpu_step.c", *options)
        p, n = ctypes.c_void_p, ctypes.c_int
        self.compiled.step.argtypes = [p, p, p, n, n, n, n, p, n, p, p, n]
        self.compiled.lm_head.argtypes = [p, p, p, n, n, n, n]
        # kept here, because C has only their addresses
        self.wte = wte.detach().contiguous()
        self.weights = [
            w.detach().to(wte.dtype if w.dim() == 2 else torch.float32).contiguous()
            for w in weights
        ]
        pointers = [w.data_ptr() for w in self.weights]
        self.blocks = (ctypes.c_void_p * (len(pointers) - 2))(*pointers[:-2])
        self.ln_f = (ctypes.c_void_p * 2)(*pointers[-2:])
        self.n_layer, self.n_head = len(weights) // 12, n_head

    def __call__(self, x: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
        """Append x to the cache. Overwrite x with the hidden states after the final LayerNorm, and
        return it. Raise ValueError for other shapes or dtypes, IndexError if the cache is full.

        x        (B, C) float32                                      embeddings with positions
        cache    (n_layer, 2, B, n_head, capacity, C / n_head) fp32  KVCache.data
        lengths  (B,) int64                                          positions to write to
        """
        (B, C), nh, capacity = x.shape, self.n_head, cache.shape[4]
        cache_shape = (self.n_layer, 2, B, nh, capacity, C // nh)
        check_tensors(
            x=(x, (B, self.wte.shape[1])), cache=(cache, cache_shape), lengths=(lengths, (B,))
        )
        dtypes = x.dtype, cache.dtype, lengths.dtype
        if dtypes != (torch.float32, torch.float32, torch.int64):
            raise ValueError(f"x, cache, lengths: expected float32, float32, int64, got {dtypes}")
        if not 0 <= int(lengths.min()) <= int(lengths.max()) < capacity:
            raise IndexError(f"lengths {lengths.tolist()} in a cache of {capacity} positions")
        workspace = x.new_empty(B, 8 * C)
        self.compiled.step(
            x.data_ptr(), self.blocks, self.ln_f, self.n_layer, B, C, nh, cache.data_ptr(),
            capacity, lengths.data_ptr(), workspace.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return x

    def lm_head(self, hidden: Tensor) -> Tensor:
        """Return the logits (B, V) of hidden states (B, C), both float32.

        Raise ValueError for another shape or dtype.
        """
        V, C = self.wte.shape
        check_tensors(hidden=(hidden, (len(hidden), C)))
        if hidden.dtype != torch.float32:
            raise ValueError(f"hidden: expected float32, got {hidden.dtype}")
        logits = hidden.new_empty(len(hidden), V)
        self.compiled.lm_head(
            logits.data_ptr(), hidden.data_ptr(), self.wte.data_ptr(), len(hidden), C, V,
            torch.get_num_threads(),
        )  # fmt: skip
        return logits
