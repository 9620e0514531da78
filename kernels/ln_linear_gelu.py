"""gelu(LayerNorm(x) W^T + b): the first half of a block's MLP in one launch."""

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels._linear import auto_form, check_linear, gemv, plan, tile


@triton.jit
def _ln_linear_gelu_kernel(
    x_ptr,  # (B, K)
    gain_ptr,  # (K,) LayerNorm's weight
    shift_ptr,  # (K,) LayerNorm's bias
    w_ptr,  # (N, K)
    bias_ptr,  # (N,)
    out_ptr,  # (B, N)
    eps,
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
    # asked for before the sum: behind it nothing would hide the wait
    bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if DOT:
        acc = tile(
            x_ptr, w_ptr, gain_ptr, shift_ptr, eps, B, row0, col0, N, K, True,
            BLOCK_M, BLOCK_N, BLOCK_K, CHUNKS,
        )  # fmt: skip
    else:
        acc = gemv(
            x_ptr, w_ptr, gain_ptr, shift_ptr, eps, B, row0, col0, N, K, True,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    h = acc + bias
    # tanh-GELU: h * (1 + tanh(u)) / 2 = h * sigmoid(2u), u = sqrt(2 / pi) * (h + 0.044715 h^3)
    h = h * tl.sigmoid(1.59576912 * (h + 0.044715 * h * h * h))
    tl.store(out_ptr + m * N + n, h.to(out_ptr.dtype.element_ty), mask=(m < B) & (n < N))


def ln_linear_gelu(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    form: str = "auto",
) -> Tensor:
    """gelu(layer_norm(x (B, K)) @ weight (N, K)^T + bias (N,)) -> a new (B, N), GELU by its tanh.

    form: "gemv", "tile", "library", or "auto" (kernels._linear.auto_form by the batch). All tensors
    contiguous and of one dtype (fp32, bf16, fp16), else ValueError. Nothing but the output is
    allocated (the library's form: three), nothing asks the device.
    """
    check_linear(x, weight, bias, ln_weight, ln_bias)
    B, (N, K) = len(x), weight.shape
    form = auto_form(B, x.element_size(), K) if form == "auto" else form
    if form == "library":
        h = F.linear(F.layer_norm(x, (K,), ln_weight, ln_bias, eps), weight, bias)
        return F.gelu(h, approximate="tanh")
    grid, options = plan(form, B, N, K, x.element_size(), norm=True)
    out = x.new_empty(B, N)
    _ln_linear_gelu_kernel[grid](x, ln_weight, ln_bias, weight, bias, out, eps, B, N, K, **options)
    return out
