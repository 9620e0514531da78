"""Code shared by the Triton kernels of a step: LayerNorm, programmatic dependent launch (PDL).

All tensors must be contiguous. Parameters and outputs have one dtype (fp32, bf16 or fp16); the
residual stream x and the cache may have another. A launcher allocates its outputs and at most two
temporary tensors, and never synchronizes with the GPU.

With PDL, a kernel starts while the previous one is still running. A step is a chain of about sixty
launches of a few microseconds each, so the gaps between them matter. On Hopper and newer, a kernel
is launched early, loads its weights, and only then waits for the previous kernels. Every kernel of
a step therefore calls `await_launches` once. Before the call it may read only parameters, which no
kernel of a step writes. Other data may be stale and may only be used for the address of a prefetch.
Since every kernel waits, all earlier launches have finished after the call, not only the last one.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

EPS = 1e-5  # of every LayerNorm in GPT-2
LINE_BYTES = tl.constexpr(128)  # of the L2 cache
OFF, EARLY, LATE = 0, 1, 2  # the next kernel may start before or after this one has waited
EARLY_MAX_ROWS = 4  # with more rows, a launch leaves no multiprocessor free for the next one
LATE_MAX_ROWS = 128  # both limits measured on an H200


@cache
def pdl(device: torch.device, batch: int, late: bool = False) -> dict[str, int]:
    """Return the launch options of a kernel that calls `await_launches`.

    late: never let the next kernel start early
    """
    if device.type != "cuda" or torch.version.hip:
        return {"PDL": OFF}  # Triton's interpreter does not know launch_pdl
    return pdl_options(torch.cuda.get_device_capability(device), batch, late)


def pdl_options(capability: tuple[int, int], batch: int, late: bool = False) -> dict[str, int]:
    """Return the options of `pdl` for an NVIDIA GPU of this compute capability."""
    if capability < (9, 0) or batch > LATE_MAX_ROWS:
        return {"PDL": OFF}
    return {"PDL": LATE if late or batch > EARLY_MAX_ROWS else EARLY, "launch_pdl": True}


@triton.jit
def await_launches(PDL: tl.constexpr):
    """Wait until all previous launches have finished, and let the next kernel start.

    The compiler does not move loads above this call below it, with PDL or without.
    """
    if PDL == 1:
        gdc_launch_dependents()
        gdc_wait()
    elif PDL == 2:
        gdc_wait()
        gdc_launch_dependents()
    else:
        tl.debug_barrier()


@triton.jit
def normalize(x, mask, ln_w, ln_b, eps, N: tl.constexpr, AXIS: tl.constexpr):
    """Return LayerNorm of x (fp32) along AXIS, which has N elements; x is zero outside the mask."""
    x = tl.where(mask, x - tl.sum(x, AXIS, keep_dims=True) / N, 0.0)
    var = tl.sum(x * x, AXIS, keep_dims=True) / N
    return x * tl.rsqrt(var + eps) * ln_w + ln_b


@triton.jit
def prefetch(ptrs, PDL: tl.constexpr):
    """Fetch lines into the L2 cache. Unlike a load, this may run while they are being written."""
    if PDL:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptrs.to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def prefetch_rows(
    w_ptr, row0, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr
):
    """Fetch rows [row0, row0 + BLOCK_N) of a matrix (N, K) into the L2 cache."""
    if PDL:
        PER_LINE: tl.constexpr = LINE_BYTES // (w_ptr.dtype.element_ty.primitive_bitwidth // 8)
        N_LINES: tl.constexpr = (K + PER_LINE - 1) // PER_LINE
        BLOCK: tl.constexpr = triton.next_power_of_2(N_LINES)
        offs_n = tl.minimum(row0 + tl.arange(0, BLOCK_N), N - 1)[:, None]
        offs_k = tl.minimum(tl.arange(0, BLOCK), N_LINES - 1)[None, :] * PER_LINE
        prefetch(w_ptr + offs_n * K + offs_k, PDL)
