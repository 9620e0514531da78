"""LayerNorm of the residual stream, for linear maps that do not fuse it (_linear.py)."""

import triton
import triton.language as tl
from torch import Tensor

from kernels._pdl import await_launches, pdl


@triton.jit
def _layer_norm_kernel(
    x_ptr,  # input (B, C), read
    ln_w_ptr,  # weight (C,), read
    ln_b_ptr,  # bias (C,), read
    out_ptr,  # output (B, C), written
    eps, C: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    offs_c = tl.arange(0, BLOCK_C)
    mask = offs_c < C
    ln_w = tl.load(ln_w_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    ln_b = tl.load(ln_b_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    await_launches(PDL)
    x = tl.load(x_ptr + b * C + offs_c, mask=mask, other=0.0).to(tl.float32)
    x = tl.where(mask, x - tl.sum(x, 0) / C, 0.0)
    h = x * tl.rsqrt(tl.sum(x * x, 0) / C + eps) * ln_w + ln_b
    tl.store(out_ptr + b * C + offs_c, h.to(out_ptr.dtype.element_ty), mask=mask)


def layer_norm(x: Tensor, ln_weight: Tensor, ln_bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Return the LayerNorm of x (B, C), a new tensor of the weight's dtype; x may have another."""
    B, C = x.shape
    out = ln_weight.new_empty(B, C)
    _layer_norm_kernel[(B,)](
        x, ln_weight, ln_bias, out, eps, C, triton.next_power_of_2(C),
        num_warps=4, enable_fp_fusion=True, **pdl(x.device),
    )  # fmt: skip
    return out
