"""A row of the residual stream becomes a query and one more key and value in the KV cache.

LayerNorm, QKV projection and bias in one launch; k and v go straight to each row's own length, q is
handed on. In the project's words: row b's valid keys are [0, lengths[b]), and this is what makes
[0, lengths[b] + 1) true. The length itself is moved by kernels.feedback, after the last layer.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels._linear import auto_form, check_linear, gemv, plan, tile


@triton.jit
def _store_qkv(
    qkv,  # (BLOCK_M, BLOCK_N)
    m,  # (BLOCK_M, 1) rows
    n,  # (1, BLOCK_N) columns: C of q, then C of k, then C of v, head by head
    q_ptr,
    k_ptr,
    v_ptr,
    length,  # (BLOCK_M, 1) int64, and so is every offset into the cache
    store,  # (BLOCK_M, 1): whether the row's k and v are stored
    B,
    stride_b,
    stride_h,
    stride_t,
    C: tl.constexpr,
    HEAD: tl.constexpr,
):
    c = n % C
    at = m.to(tl.int64) * stride_b + length * stride_t + (c // HEAD) * stride_h + c % HEAD
    tl.store(q_ptr + m * C + c, qkv.to(q_ptr.dtype.element_ty), mask=(m < B) & (n < C))
    qkv = qkv.to(k_ptr.dtype.element_ty)
    tl.store(k_ptr + at, qkv, mask=store & (n >= C) & (n < 2 * C))
    tl.store(v_ptr + at, qkv, mask=store & (n >= 2 * C) & (n < 3 * C))


@triton.jit
def _append_kernel(
    x_ptr,  # (B, C)
    gain_ptr,  # (C,) LayerNorm's weight
    shift_ptr,  # (C,) LayerNorm's bias
    w_ptr,  # (3C, C)
    bias_ptr,  # (3C,)
    q_ptr,  # (B, nh, HEAD), contiguous
    k_ptr,  # (B, nh, T, HEAD), strided, HEAD contiguous
    v_ptr,  # the same
    lengths_ptr,  # (B,) int64
    active_ptr,  # (B,) bool; not read without MASKED
    eps,
    B,
    T,
    stride_b,
    stride_h,
    stride_t,
    C: tl.constexpr,
    HEAD: tl.constexpr,
    MASKED: tl.constexpr,
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
    bias = tl.load(bias_ptr + n, mask=n < 3 * C, other=0.0).to(tl.float32)
    length = tl.load(lengths_ptr + m, mask=m < B, other=0)  # int64
    store = (m < B) & (length < T)
    if MASKED:
        store = store & tl.load(active_ptr + m, mask=m < B, other=0).to(tl.int1)
    if DOT:
        acc = tile(
            x_ptr, w_ptr, gain_ptr, shift_ptr, eps, B, row0, col0, 3 * C, C, True,
            BLOCK_M, BLOCK_N, BLOCK_K, CHUNKS,
        )  # fmt: skip
    else:
        acc = gemv(
            x_ptr, w_ptr, gain_ptr, shift_ptr, eps, B, row0, col0, 3 * C, C, True,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    _store_qkv(
        acc + bias, m, n, q_ptr, k_ptr, v_ptr, length, store, B,
        stride_b, stride_h, stride_t, C, HEAD,
    )  # fmt: skip


@triton.jit
def _append_store_kernel(
    qkv_ptr,  # (B, 3C), contiguous
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    active_ptr,
    B,
    T,
    stride_b,
    stride_h,
    stride_t,
    C: tl.constexpr,
    HEAD: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m = tl.program_id(1) + tl.zeros((1, 1), tl.int32)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    length = tl.load(lengths_ptr + m)
    store = length < T
    if MASKED:
        store = store & tl.load(active_ptr + m).to(tl.int1)
    qkv = tl.load(qkv_ptr + m * (3 * C) + n, mask=n < 3 * C, other=0.0)
    _store_qkv(
        qkv, m, n, q_ptr, k_ptr, v_ptr, length, store, B,
        stride_b, stride_h, stride_t, C, HEAD,
    )  # fmt: skip


def append(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    lengths: Tensor,
    active: Tensor | None = None,
    eps: float = 1e-5,
    form: str = "auto",
) -> Tensor:
    """x (B, C) -> q (B, nh, hs), a new tensor; k, v go to cache_k, cache_v at [b, :, lengths[b]].

    weight (3C, C), bias (3C,): an nn.Linear's, the columns those of q, k and v, head by head.
    cache_k, cache_v (B, nh, T, hs): one layer's views of the cache, hs contiguous, equal strides.
    lengths (B,) int64 and active (B,) bool or None (all), read on the device. A row that is not
    active, or whose length is T already, stores nothing; its q is made all the same.

    form: "gemv", "tile", "library" (a GEMM, then a kernel that only stores), or "auto"
    (kernels._linear.auto_form by the batch). x and the parameters are contiguous and of one dtype
    (fp32, bf16, fp16); the cache may have another. Otherwise ValueError. Nothing but q is allocated
    (the library's form: two more), nothing asks the device.
    """
    check_linear(x, weight, bias, ln_weight, ln_bias)
    B, nh, T, hs = cache_k.shape
    C = nh * hs
    if x.shape != (B, C) or weight.shape != (3 * C, C):
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit a cache of "
            f"{B} rows and {nh} heads of {hs}"
        )
    if cache_v.shape != cache_k.shape or cache_v.stride() != cache_k.stride():
        raise ValueError("cache_k and cache_v are to have the same shape and strides")
    if cache_k.stride(3) != 1 or cache_v.dtype != cache_k.dtype:
        raise ValueError("the cache's last dimension is to be contiguous, and of one dtype")
    if lengths.shape != (B,) or not lengths.is_contiguous():
        raise ValueError(f"lengths is {tuple(lengths.shape)}: ({B},), contiguous, is wanted")
    if active is not None and (active.shape != (B,) or not active.is_contiguous()):
        raise ValueError(f"active is {tuple(active.shape)}: ({B},), contiguous, is wanted")
    q = x.new_empty(B, nh, hs)
    form = auto_form(B, x.element_size(), C) if form == "auto" else form
    cache = (q, cache_k, cache_v, lengths, lengths if active is None else active)
    sizes = (B, T, *cache_k.stride()[:3], C, hs, active is not None)
    if form == "library":
        qkv = F.linear(F.layer_norm(x, (C,), ln_weight, ln_bias, eps), weight, bias)
        block = min(1024, triton.next_power_of_2(3 * C))
        grid = (triton.cdiv(3 * C, block), B)
        _append_store_kernel[grid](
            qkv, *cache, *sizes, BLOCK_N=block, num_warps=2, enable_fp_fusion=True
        )
        return q
    grid, options = plan(form, B, 3 * C, C, x.element_size(), norm=True)
    _append_kernel[grid](x, ln_weight, ln_bias, weight, bias, *cache, eps, *sizes, **options)
    return q
