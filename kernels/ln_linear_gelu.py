"""gelu(LayerNorm(x) W^T + b): the first half of a block's MLP in one launch."""

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels._check import check_tensors
from kernels._launch import EPS, pdl
from kernels._linear import auto_impl, launch_config, layer_norm, linear


@triton.jit
def _ln_linear_gelu_kernel(
    x_ptr,  # residual stream (B, K), read; normalized already unless IMPL is gemv
    ln_w_ptr,  # LayerNorm weight (K,), read
    ln_b_ptr,  # LayerNorm bias (K,), read
    w_ptr,  # weight (N, K), read
    bias_ptr,  # bias (N,), read
    out_ptr,  # output (B, N), written
    eps, B, N: tl.constexpr, K: tl.constexpr, PDL: tl.constexpr, IMPL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row0 = tl.program_id(1) * BLOCK_M
    col0 = tl.program_id(0) * BLOCK_N
    offs_m = row0 + tl.arange(0, BLOCK_M)[:, None]
    offs_n = col0 + tl.arange(0, BLOCK_N)[None, :]
    h = linear(
        x_ptr, w_ptr, bias_ptr, ln_w_ptr, ln_b_ptr, None, eps, B, row0, col0, N, K, PDL, IMPL,
        BLOCK_M, BLOCK_N, BLOCK_K, CHUNKS,
    )  # fmt: skip
    # tanh-GELU: h * (1 + tanh(u)) / 2 = h * sigmoid(2u), u = sqrt(2 / pi) * (h + 0.044715 h^3)
    h = h * tl.sigmoid(1.59576912 * (h + 0.044715 * h * h * h))
    mask = (offs_m < B) & (offs_n < N)
    tl.store(out_ptr + offs_m * N + offs_n, h.to(out_ptr.dtype.element_ty), mask=mask)


def ln_linear_gelu(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor, impl: str = "auto"
) -> Tensor:
    """Return gelu(layer_norm(x (B, K)) @ weight (N, K)^T + bias (N,)), a new (B, N); tanh-GELU.

    impl: "auto" or one of _linear.py.
    """
    B, (N, K) = len(x), weight.shape
    check_tensors(
        x=(x, (B, K)), ln_weight=(ln_weight, (K,)), ln_bias=(ln_bias, (K,)),
        weight=(weight, (N, K)), bias=(bias, (N,)),
    )  # fmt: skip
    itemsize = weight.element_size()
    impl = auto_impl(B, K, itemsize) if impl == "auto" else impl
    if impl != "gemv":  # gemv applies LayerNorm itself
        x = layer_norm(x, ln_weight, ln_bias)
    if impl == "library":
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")  # GPT-2's GELU
    grid, config = launch_config(impl, B, N, K, itemsize)
    out = weight.new_empty(B, N)
    _ln_linear_gelu_kernel[grid](
        x, ln_weight, ln_bias, weight, bias, out, EPS, B, N, K, **config, **pdl(x.device, B)
    )
    return out
