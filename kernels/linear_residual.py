"""x += y W^T + b: a projection and its addition to the residual stream in one launch.

Used for both projections of a block: attention's (C, C) and the MLP's (C, 4C).
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels._check import check_tensors
from kernels._launch import pdl
from kernels._linear import auto_impl, launch_config, linear
from kernels.reference import linear_residual_ref


@triton.jit
def _linear_residual_kernel(
    y_ptr,  # input (B, K), read
    w_ptr,  # weight (N, K), read
    bias_ptr,  # bias (N,), read
    x_ptr,  # residual stream (B, N), read and written: each element by one program only
    B, N: tl.constexpr, K: tl.constexpr, PDL: tl.constexpr, IMPL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row0 = tl.program_id(1) * BLOCK_M
    col0 = tl.program_id(0) * BLOCK_N
    offs_m = row0 + tl.arange(0, BLOCK_M)[:, None]
    offs_n = col0 + tl.arange(0, BLOCK_N)[None, :]
    mask = (offs_m < B) & (offs_n < N)
    x = linear(
        y_ptr, w_ptr, bias_ptr, None, None, x_ptr, 0.0, B, row0, col0, N, K, PDL, IMPL,
        BLOCK_M, BLOCK_N, BLOCK_K, CHUNKS,
    )  # fmt: skip
    # one rounding: product, bias and residual are added in fp32
    tl.store(x_ptr + offs_m * N + offs_n, x.to(x_ptr.dtype.element_ty), mask=mask)


def linear_residual(
    y: Tensor, weight: Tensor, bias: Tensor, x: Tensor, impl: str = "auto"
) -> Tensor:
    """Add y (B, K) @ weight (N, K)^T + bias (N,) to x (B, N) in place; return x.

    impl: "auto" or one of _linear.py. The result is rounded once, when stored ("library": twice).
    """
    B, (N, K) = len(y), weight.shape
    check_tensors(y=(y, (B, K)), weight=(weight, (N, K)), bias=(bias, (N,)), x=(x, (B, N)))
    impl = auto_impl(B, K, y.element_size()) if impl == "auto" else impl
    if impl == "library":
        return linear_residual_ref(y, weight, bias, x)
    grid, config = launch_config(impl, B, N, K, y.element_size())
    _linear_residual_kernel[grid](y, weight, bias, x, B, N, K, **config, **pdl(x.device, B))
    return x
