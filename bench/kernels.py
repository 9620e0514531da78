"""Time each Triton kernel in kernels/ against plain torch and its roofline, on a GPU.

    python bench/kernels.py                    GPT-2 124M's sizes, batch 1, 8, 64, 256

Each time is the mean of the calls captured in one CUDA graph. The calls cycle through copies of the
arguments that together exceed the L2 cache, unless a call touches less than a megabyte. (That is
feedback, whose input has just been written in practice, too.) Training kernels are timed with their
backward pass. The roofline is the time to read and write every operand once, at the bandwidth
measured in the same run. Tests compare the kernels' outputs (tests/bench/test_kernels.py,
tests/kernels/).
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs without installation

import nanococonut  # isort: skip  # noqa: F401  # first: sets how OpenMP waits
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.common.results import ResultWriter
from bench.common.workload import Bandwidth, parse_ints
from nanococonut.model import GPTConfig
from nanococonut.runtime.cli import Options, option
from nanococonut.runtime.errors import run_main

SIZES = GPTConfig(block_size=400)  # GPT-2 124M; a step attends to block_size keys
POSITIONS = 2048  # supervised positions in a training step
REPEATS = 20  # minimum calls per CUDA graph, so that the time to launch it is negligible
SAMPLES = 20  # timed replays of that graph
CACHE_BYTES = 128 << 20  # more than the L2 cache of any GPU
MAX_COPIES, MAX_BYTES = 128, 8 << 30  # copies of a case's arguments, and their size


@dataclass(frozen=True)
class KernelsConfig(Options):
    batches: str = option("1,8,64,256", "batch sizes, separated by commas")
    out: str | None = option(None, "append the results to this file")

    def validate(self) -> None:
        parse_ints("--batches", self.batches)


@dataclass
class KernelCase:
    """A kernel and its plain torch reference, which read and modify the same args. If an arg
    requires a gradient, the backward pass is part of the case."""

    name: str
    impl: Callable[..., Any]
    reference: Callable[..., Any]
    args: list[Tensor]
    n_numbers: int  # to read and write at least
    shape: dict[str, int]

    def copy_args(self) -> list[Tensor]:
        return [a.detach().clone().requires_grad_(a.requires_grad) for a in self.args]

    def run(self, fn: Callable[..., Any], args: list[Tensor]) -> list[Tensor]:
        """Call fn. Return its output and either its gradients or the args, which it may change."""
        inputs = [a for a in args if a.requires_grad]
        out = fn(*args)
        out = out[0] if isinstance(out, tuple) else out
        if inputs:
            return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]
        return [t for t in (out, *args) if t is not None]


# ---- fast references: those in kernels/reference.py loop over sequences to handle NaN


def plain_append(
    x: Tensor, ln_w: Tensor, ln_b: Tensor, w: Tensor, b: Tensor, cache: Tensor, n: Tensor
) -> Tensor:
    _, B, nh, _, hs = cache.shape
    qkv = F.linear(F.layer_norm(x, x.shape[-1:], ln_w, ln_b), w, b).view(B, 3, nh, hs)
    b_idx = torch.arange(B, device=x.device)
    cache[0, b_idx, :, n] = qkv[:, 1]
    cache[1, b_idx, :, n] = qkv[:, 2]
    return qkv[:, 0]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Tensor:
    key_mask = torch.arange(k.shape[2], device=k.device) < n[:, None, None, None]
    return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=key_mask)[:, :, 0]


def plain_cross_entropy(h: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).float(), targets, reduction="sum")


def scaled_randn(*size: int, device: str, dtype: torch.dtype) -> Tensor:
    std = size[-1] ** -0.5 if len(size) == 2 else 1.0  # matrix products have a std of about 1
    return (torch.randn(size, device=device) * std).to(dtype)


def cases(sizes: GPTConfig, batch: int, device: str, dtype: torch.dtype) -> Iterator[KernelCase]:
    """Yield the kernels whose work grows with the batch: inference, then training."""
    from kernels.append import append
    from kernels.feedback import embed, feedback
    from kernels.latent_attention import SplitWorkspace, latent_attention
    from kernels.linear_residual import linear_residual
    from kernels.ln_linear_gelu import ln_linear_gelu
    from kernels.prefix_attention import PrefixBuffers, prefix_attention
    from kernels.reference import embed_ref, feedback_ref, linear_residual_ref, ln_linear_gelu_ref

    torch.manual_seed(0)
    B, C, T, V, nh = batch, sizes.n_embd, sizes.block_size, sizes.vocab_size, sizes.n_head
    hs, shape = C // nh, dict(batch=B, context=T, n_embd=C)
    randn = partial(scaled_randn, device=device, dtype=dtype)
    full = partial(torch.full, (B,), device=device)

    n_numbers = 3 * C * C + 5 * C + 4 * B * C
    cache = randn(2, B, nh, T, hs)
    args = [randn(B, C), randn(C), randn(C), randn(3 * C, C), randn(3 * C), cache, full(T - 1)]
    yield KernelCase("append", append, plain_append, args, n_numbers, shape)

    n_numbers = 4 * C * C + C + 6 * B * C
    args, name = [randn(B, 4 * C), randn(C, 4 * C), randn(C), randn(B, C)], "linear_residual"
    yield KernelCase(name, linear_residual, linear_residual_ref, args, n_numbers, shape)

    n_numbers = 4 * C * C + 6 * C + 5 * B * C
    args = [randn(B, C), randn(C), randn(C), randn(4 * C, C), randn(4 * C)]
    yield KernelCase("ln_linear_gelu", ln_linear_gelu, ln_linear_gelu_ref, args, n_numbers, shape)

    n_numbers = 4 * B * C + 2 * C
    args = [randn(B, C), randn(C), randn(C), randn(T, C), full(1), randn(B, C)]
    yield KernelCase("feedback", feedback, feedback_ref, args, n_numbers, shape)

    tokens = torch.randint(V, (B,), device=device)
    args = [randn(V, C), tokens, randn(T, C), full(1), randn(B, C)]
    yield KernelCase("embed", embed, embed_ref, args, 3 * B * C, shape)

    workspace = SplitWorkspace(B, nh, T, hs, torch.device(device))
    attention, n_numbers = partial(latent_attention, workspace=workspace), 2 * B * C * (T + 1)
    args = [randn(B, nh, hs), *cache, full(T)]
    yield KernelCase("latent_attention", attention, plain_attention, args, n_numbers, shape)

    buffers = PrefixBuffers(B, nh, T, hs, torch.device(device))
    attention, n_numbers = partial(prefix_attention, buffers=buffers), 6 * B * C * T + 5 * B * C
    qkv = [randn(B, nh, hs), randn(B, nh, T, hs), randn(B, nh, T, hs)]
    args = [*(t.requires_grad_() for t in qkv), full(T)]
    yield KernelCase("prefix_attention", attention, plain_attention, args, n_numbers, shape)


def head_case(sizes: GPTConfig, device: str, dtype: torch.dtype) -> KernelCase:
    """Return the loss kernel, whose size is the number of supervised positions."""
    from kernels.linear_cross_entropy import linear_cross_entropy

    P, C, V = POSITIONS, sizes.n_embd, sizes.vocab_size
    args = [scaled_randn(n, C, device=device, dtype=dtype).requires_grad_() for n in (P, V)]
    args.append(torch.randint(V, (P,), device=device))
    n_numbers, shape = 2 * C * (P + V), dict(positions=P, n_embd=C, vocab_size=V)
    name = "linear_cross_entropy"
    return KernelCase(name, linear_cross_entropy, plain_cross_entropy, args, n_numbers, shape)


def time_in_graph(case: KernelCase, fn: Callable[..., Any]) -> list[float]:
    """Return the microseconds per call of each replay of a CUDA graph of many calls."""
    # a KV cache is much larger than what a call touches of it
    touched = case.n_numbers * case.args[0].element_size()
    fitting = 1 + MAX_BYTES // sum(a.nbytes for a in case.args)
    n_copies = min(MAX_COPIES, 1 + CACHE_BYTES // touched, fitting)
    n_calls = max(REPEATS, n_copies)
    copies = [case.copy_args() for _ in range(n_copies)]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()  # the copies were made on the default stream
    with torch.cuda.stream(stream):
        for _ in range(3):
            case.run(fn, copies[0])  # the first call compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(n_calls):
            case.run(fn, copies[i % n_copies])
    times = []
    for _ in range(1 + SAMPLES):  # the first replay also uploads the graph
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / n_calls)
    return times[1:]


def time_cases(config: KernelsConfig) -> ResultWriter:
    """Time every case and append its results."""
    dtype, bandwidth = torch.bfloat16, Bandwidth(torch.device("cuda"))
    results = ResultWriter("kernels", config, torch.device("cuda"), dtype)
    rates = [bandwidth.measure() for _ in range(10)]
    results.add("memory_bandwidth", "torch", rates, "GB/s")
    batches = parse_ints("--batches", config.batches)
    by_batch = chain.from_iterable(cases(SIZES, batch, "cuda", dtype) for batch in batches)
    for case in chain(by_batch, [head_case(SIZES, "cuda", dtype)]):
        own = {"kernel": case.name} | case.shape
        for provider, fn in (("triton", case.impl), ("torch", case.reference)):
            times = time_in_graph(case, fn)
            results.add("kernel", provider, times, "us", **own)
        us = case.n_numbers * dtype.itemsize / statistics.median(rates) / 1e3
        results.add("kernel", "roofline", [us], "us", spread={}, **own)
    return results


def main() -> None:
    config = KernelsConfig.from_cli(__doc__)
    if not torch.cuda.is_available():
        print("There is no GPU: times under Triton's interpreter would mean nothing.")
        print("To compare the kernels' outputs with plain torch: pytest tests/kernels")
        return
    time_cases(config).print_summary()


if __name__ == "__main__":
    run_main(main)
