"""What the launchers of a step share: contracts, and programmatic dependent launch (PDL).

All tensors are contiguous, or a ValueError is raised. The parameters are of one dtype (fp32, bf16
or fp16), which the outputs have, too; the residual stream x and the cache may have others. Only the
outputs are allocated, and at most two tensors between. The GPU is never synchronized.

With PDL a kernel starts while the one before it still runs. A step is a chain of some sixty
launches of a few microseconds each, so the gaps between them count. On Hopper and newer, a kernel
is launched early, loads its weights, and only then waits for the kernels before it. Every kernel of
a step calls `await_launches` once. Before that it may read parameters only, which no launch of a
step writes; whatever another has written, it reads after. Since each kernel waits, all launches
before it have then ended, not only the last one.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

EPS = 1e-5  # of every LayerNorm: GPT-2's, and nn.LayerNorm's default
LINE_BYTES = tl.constexpr(128)  # of the L2 cache
OFF, EARLY, LATE = 0, 1, 2  # whether a kernel lets the next one begin before or after its own wait
EARLY_MAX_ROWS = 4  # more programs would keep those of the next launch from a multiprocessor
LATE_MAX_ROWS = 128  # both measured on an H200


def check_tensors(**expected: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raise ValueError unless each tensor is contiguous and of its shape. None is not checked.

    Kernels compute addresses from the sizes alone, so another shape would read foreign memory.
    """
    for name, (t, shape) in expected.items():
        if t is not None and (t.shape != shape or not t.is_contiguous()):
            actual = f"{tuple(t.shape)}, strides {t.stride()}"
            raise ValueError(f"{name}: expected contiguous {shape}, got {actual}")


@cache
def pdl(device: torch.device, batch: int, late: bool = False) -> dict[str, int]:
    """Return the launch options of a kernel that calls `await_launches`.

    late: the next kernel begins late at any batch
    """
    has_it = device.type == "cuda" and not torch.version.hip
    if not has_it or torch.cuda.get_device_capability(device) < (9, 0) or batch > LATE_MAX_ROWS:
        return {"PDL": OFF}  # Triton's interpreter does not know launch_pdl
    return {"PDL": LATE if late or batch > EARLY_MAX_ROWS else EARLY, "launch_pdl": True}


@triton.jit
def await_launches(PDL: tl.constexpr):
    """Wait until all launches before have ended, and let the next one begin.

    Loads above this call are issued before it, with PDL and without.
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
def prefetch(ptrs, PDL: tl.constexpr):
    """Fetch lines into the L2 cache. Safe for data that is still being written, unlike a load."""
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
