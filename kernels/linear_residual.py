"""x += y W^T + b: a projection into the residual stream, bias and sum in one launch.

Both of a block's: attention's (C, C) and the MLP's (C, 4C).
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels._linear import auto_form, check_linear, gemv, plan, tile


@triton.jit
def _linear_residual_kernel(
    y_ptr,  # (B, K)
    w_ptr,  # (N, K)
    bias_ptr,  # (N,)
    x_ptr,  # (B, N), read and written: each element by one program only
    B,
    N: tl.constexpr,
    K: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row0 = tl.program_id(1) * BLOCK_M
    col0 = tl.program_id(0) * BLOCK_N
    m = row0 + tl.arange(0, BLOCK_M)[:, None]
    n = col0 + tl.arange(0, BLOCK_N)[None, :]
    valid = (m < B) & (n < N)
    # asked for before the sum: behind it nothing would hide the wait
    bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + m * N + n, mask=valid, other=0.0).to(tl.float32)
    if DOT:
        acc = tile(
            y_ptr, w_ptr, y_ptr, y_ptr, 0.0, B, row0, col0, N, K, False, BLOCK_M, BLOCK_N, BLOCK_K,
            CHUNKS,
        )  # fmt: skip
    else:
        acc = gemv(
            y_ptr, w_ptr, y_ptr, y_ptr, 0.0, B, row0, col0, N, K, False, BLOCK_M, BLOCK_N, BLOCK_K
        )  # fmt: skip
    tl.store(x_ptr + m * N + n, (x + (acc + bias)).to(x_ptr.dtype.element_ty), mask=valid)


def linear_residual(
    y: Tensor, weight: Tensor, bias: Tensor, x: Tensor, form: str = "auto"
) -> Tensor:
    """x (B, N) += y (B, K) @ weight (N, K)^T + bias (N,), in place; x is returned.

    form: "gemv", "tile", "library", or "auto" (kernels._linear.auto_form by the batch). All tensors
    contiguous and of one dtype (fp32, bf16, fp16), else ValueError. One rounding, at the store (the
    library's: two). Nothing is allocated but by the library's form, nothing asks the device.
    """
    check_linear(y, weight, bias)
    if x.shape != (len(y), len(weight)) or not x.is_contiguous() or x.dtype != y.dtype:
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype}, strides {x.stride()}: "
            f"{(len(y), len(weight))} {y.dtype}, contiguous, is wanted"
        )
    B, (N, K) = len(y), weight.shape
    form = auto_form(B, y.element_size()) if form == "auto" else form
    if form == "library":
        return x.add_(F.linear(y, weight, bias))
    grid, options = plan(form, B, N, K, y.element_size(), norm=False)
    _linear_residual_kernel[grid](y, weight, bias, x, B, N, K, **options)
    return x
