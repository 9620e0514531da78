"""A step of GPT-2 on a CPU, in C: cpu_step.c, compiled when it is first used, in half a second."""

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = "-O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -shared -fPIC".split()


@functools.cache
def compile_step(dtype: torch.dtype) -> ctypes.CDLL:
    """Return cpu_step.c, compiled for weights of this dtype, float32 or bfloat16.

    Raise OSError if there is no compiler ($CC, or cc), or if it fails.
    """
    command = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, str(SOURCE)]
    if dtype == torch.bfloat16:
        command.append("-DBF16")
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/cpu_step.so"
        out = subprocess.run([*command, "-o", library, "-lm"], capture_output=True, text=True)
        if out.returncode:
            raise OSError(f"{command[0]}: {(out.stderr.strip() or 'failed').splitlines()[0]}")
        compiled = ctypes.CDLL(library)  # stays loaded without its file
    p, n = ctypes.c_void_p, ctypes.c_int
    compiled.step.argtypes = [p, p, p, n, n, n, n, p, n, p, p, n]
    compiled.head.argtypes = [p, p, p, n, n, n, n]
    return compiled


class CpuStep:
    """All layers of a GPT-2 for one new position per sequence, and its head.

    weights  weight and bias of ln_1, c_attn, c_proj, ln_2, c_fc and c_proj of each layer, then of
             ln_f
    wte      (V, C), the head's weight

    All contiguous, on a CPU, and float32 or bfloat16. Matrices are not copied.
    """

    MAX_BATCH = 3  # matrix products are faster for more sequences

    def __init__(self, weights: Sequence[Tensor], wte: Tensor, n_head: int) -> None:
        # kept here, because C has only their addresses
        self.weights = [w.detach() if w.dim() == 2 else w.detach().float() for w in weights]
        pointers = [w.data_ptr() for w in self.weights]
        self.blocks = (ctypes.c_void_p * (len(pointers) - 2))(*pointers[:-2])
        self.ln_f = (ctypes.c_void_p * 2)(*pointers[-2:])
        self.n_layer, self.n_head = len(weights) // 12, n_head
        self.wte, self.compiled = wte.detach(), compile_step(wte.dtype)

    def __call__(self, x: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
        """Append x to the cache. Return the hidden states after the final LayerNorm, which
        overwrite x. Raise IndexError if the cache is full.

        x        (B, C) float32                                     embeddings with positions
        cache    (n_layer, 2, B, n_head, capacity, head_dim) fp32   KVCache.data
        lengths  (B,) int64                                         positions to write to
        """
        (B, C), capacity = x.shape, cache.shape[4]
        if int(lengths.max()) >= capacity:
            raise IndexError(f"a cache of {capacity} positions is full")
        assert x.dtype == cache.dtype == torch.float32
        assert x.is_contiguous() and cache.is_contiguous() and lengths.is_contiguous()
        workspace = x.new_empty(B, 8 * C)
        self.compiled.step(
            x.data_ptr(), self.blocks, self.ln_f, self.n_layer, B, C, self.n_head,
            cache.data_ptr(), capacity, lengths.data_ptr(), workspace.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return x

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits (B, V) of hidden states (B, C), both float32."""
        assert hidden.dtype == torch.float32
        (B, C), V = hidden.shape, len(self.wte)
        hidden, logits = hidden.contiguous(), hidden.new_empty(B, V)
        self.compiled.head(
            logits.data_ptr(), hidden.data_ptr(), self.wte.data_ptr(), B, C, V,
            torch.get_num_threads(),
        )  # fmt: skip
        return logits
