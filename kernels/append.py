"""Append one key and value per sequence to the KV cache, and return the query.

One launch computes LayerNorm and the QKV projection. The key and value of sequence b are stored at
index lengths[b], after its valid ones. kernels/feedback.py increments the lengths after the last
layer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels._check import check_tensors
from kernels._launch import EPS, pdl
from kernels._linear import auto_impl, launch_config, layer_norm, linear


@triton.jit
def _append_kernel(
    x_ptr,  # residual stream (B, C), read; normalized already unless IMPL is gemv
    ln_w_ptr,  # LayerNorm weight (C,), read
    ln_b_ptr,  # LayerNorm bias (C,), read
    w_ptr,  # QKV weight (3C, C), read
    bias_ptr,  # QKV bias (3C,), read
    q_ptr,  # query (B, nh, D) contiguous, written
    k_ptr,  # key cache (B, nh, T, D), written at slot length
    v_ptr,  # value cache, same strides, written at slot length
    lengths_ptr,  # valid keys (B,) int64, read
    eps, B, T, stride_kb, stride_kh, stride_kt,
    C: tl.constexpr, D: tl.constexpr, PDL: tl.constexpr, IMPL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row0 = tl.program_id(1) * BLOCK_M
    col0 = tl.program_id(0) * BLOCK_N
    offs_m = row0 + tl.arange(0, BLOCK_M)[:, None]
    offs_n = col0 + tl.arange(0, BLOCK_N)[None, :]
    qkv = linear(
        x_ptr, w_ptr, bias_ptr, ln_w_ptr, ln_b_ptr, None, eps, B, row0, col0, 3 * C, C, PDL, IMPL,
        BLOCK_M, BLOCK_N, BLOCK_K, CHUNKS,
    )  # fmt: skip
    # without a mask, so that the compiler can issue these loads during the matrix product
    row = tl.minimum(offs_m, B - 1)
    length = tl.load(lengths_ptr + row)  # int64
    is_stored = (offs_m < B) & (length < T)  # a full sequence stores nothing
    c = offs_n % C
    # lengths are int64, so all offsets into the cache are, too
    offs_kv = offs_m.to(tl.int64) * stride_kb + length * stride_kt + (c // D) * stride_kh + c % D
    mask_q = (offs_m < B) & (offs_n < C)
    tl.store(q_ptr + offs_m * C + c, qkv.to(q_ptr.dtype.element_ty), mask=mask_q)
    qkv = qkv.to(k_ptr.dtype.element_ty)  # the cache may have another dtype
    tl.store(k_ptr + offs_kv, qkv, mask=is_stored & (offs_n >= C) & (offs_n < 2 * C))
    tl.store(v_ptr + offs_kv, qkv, mask=is_stored & (offs_n >= 2 * C) & (offs_n < 3 * C))


def append(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor,
    cache: Tensor, lengths: Tensor, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Return q (B, nh, hs), a new tensor; store k and v at [:, b, :, lengths[b]] of the cache.

    x              (B, C) residual stream
    weight, bias   (3C, C), (3C,) of an nn.Linear; columns of q, k and v, head by head
    cache          (2, B, nh, T, hs), KVCache.data of one layer; hs contiguous
    lengths        (B,) int64, read on the device
    impl           "auto" or one of _linear.py ("library": a GEMM and plain torch)

    A full sequence (length T) stores nothing, and its q is meaningless. An inactive one, whose
    length feedback.py keeps, is stored past its length, where its next token overwrites it.
    """
    _, B, nh, T, hs = cache.shape
    C = nh * hs
    check_tensors(
        x=(x, (B, C)), ln_weight=(ln_weight, (C,)), ln_bias=(ln_bias, (C,)),
        weight=(weight, (3 * C, C)), bias=(bias, (3 * C,)), lengths=(lengths, (B,)),
        slot=(cache[0, 0, 0, 0], (hs,)),
    )  # fmt: skip
    itemsize = weight.element_size()
    impl = auto_impl(B, C, itemsize) if impl == "auto" else impl
    if impl != "gemv":  # gemv applies LayerNorm itself
        x = layer_norm(x, ln_weight, ln_bias)
    if impl == "library":
        qkv = F.linear(x, weight, bias).view(B, 3, nh, hs)
        rows, slot = torch.arange(B, device=x.device), lengths.clamp(max=T - 1)
        is_stored = (lengths < T).view(B, 1, 1, 1)
        old = cache[:, rows, :, slot]  # (B, 2, nh, hs): keys and values
        cache[:, rows, :, slot] = torch.where(is_stored, qkv[:, 1:].to(cache.dtype), old)
        return qkv[:, 0].contiguous()
    q = weight.new_empty(B, nh, hs)
    grid, config = launch_config(impl, B, 3 * C, C, itemsize)
    # late, because attention reads no weights: if started early, it would only occupy the GPU
    _append_kernel[grid](
        x, ln_weight, ln_bias, weight, bias, q, *cache, lengths,
        EPS, B, T, *cache.stride()[1:4], C, hs, **config, **pdl(x.device, B, late=True),
    )  # fmt: skip
    return q
