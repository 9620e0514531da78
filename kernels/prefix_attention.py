"""Differentiable attention of one query per sequence over a fixed prefix: latent steps in training.

All n latent steps attend to the same prefix keys and values. If autograd summed their gradients of
K and V, each step would move data of the prefix's size 7 times (1 for zeros, 3 in the kernel, 3 for
the sum). Here every backward call adds to one dK, dV buffer in place, which takes only 3 moves
(read K and V, read and write dK and dV).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.latent_attention import (
    NUM_STAGES,
    NUM_WARPS,
    SplitWorkspace,
    block_sizes,
    is_last_split,
    latent_attention,
    split_range,
)


@triton.jit
def _prefix_attention_bwd_kernel(
    grad_ptr,  # gradient of out (B, nh, D), read
    grad_lse_ptr,  # gradient of lse (B, nh) fp32 contiguous, read
    q_ptr,  # query (B, nh, D), read
    k_ptr,  # keys (B, nh, T, D), read
    v_ptr,  # values (B, nh, T, D), read
    lengths_ptr,  # valid keys (B,) int64, read
    out_ptr,  # output of forward (B, nh, D) contiguous, read
    lse_ptr,  # log-sum-exp of forward (B, nh) fp32 contiguous, read
    dq_ptr,  # gradient of q (B, nh, D) contiguous, written
    dk_ptr,  # gradient of k (B, nh, T, D), read and written: added to
    dv_ptr,  # gradient of v (B, nh, T, D), read and written: added to
    partial_acc_ptr,  # dq per split (B * nh, SPLITS, D) fp32, read and written; None: 1 split
    counter_ptr,  # finished splits (B * nh,) int32, read and written; zero before and after
    nh, T, scale,
    stride_gb, stride_gh,
    stride_qb, stride_qh,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_dkb, stride_dkh, stride_dkt,
    stride_dvb, stride_dvh, stride_dvt,
    D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    bh, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = bh // nh, bh % nh
    lo, hi, n_used = split_range(lengths_ptr, b, split, T, 0, SPLITS, BLOCK_N)
    if split >= n_used:
        return
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + offs_d, mask=mask_d, other=0.0)
    q = q.to(tl.float32)
    grad = tl.load(grad_ptr + b * stride_gb + h * stride_gh + offs_d, mask=mask_d, other=0.0)
    grad = grad.to(tl.float32)
    out = tl.load(out_ptr + bh * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    # d lse / d s = p and d out / d s = p (v - out), so ds = p (v . grad - delta)
    delta = tl.sum(out * grad, axis=0) - tl.load(grad_lse_ptr + bh)
    lse = tl.load(lse_ptr + bh)
    q_scaled = q * scale  # same rounding as in forward, so that p of a single key is exactly 1
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    dk_ptr += b * stride_dkb + h * stride_dkh
    dv_ptr += b * stride_dvb + h * stride_dvh

    # one dq per lane, so that the dot products are the only reductions across threads in the loop
    dq = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        mask_n = offs_n < (hi - start).to(tl.int32)
        mask = mask_n[:, None] & mask_d[None, :]
        offs_k = start * stride_kt + (offs_n[:, None] * stride_kt + offs_d[None, :])
        offs_v = start * stride_vt + (offs_n[:, None] * stride_vt + offs_d[None, :])
        dk_ptrs = dk_ptr + (start * stride_dkt + (offs_n[:, None] * stride_dkt + offs_d[None, :]))
        dv_ptrs = dv_ptr + (start * stride_dvt + (offs_n[:, None] * stride_dvt + offs_d[None, :]))
        k = tl.load(k_ptr + offs_k, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_N, BLOCK_D)
        v = tl.load(v_ptr + offs_v, mask=mask, other=0.0).to(tl.float32)
        dk = tl.load(dk_ptrs, mask=mask, other=0.0).to(tl.float32)
        dv = tl.load(dv_ptrs, mask=mask, other=0.0).to(tl.float32)
        p = tl.exp(tl.sum(k * q_scaled[None, :], axis=1) - lse)  # (BLOCK_N,)
        ds = p * (tl.sum(v * grad[None, :], axis=1) - delta) * scale
        ds = tl.where(mask_n, ds, 0.0)  # exp(-lse) can be inf, and inf * 0 is NaN
        dq += ds[:, None] * k
        dk += ds[:, None] * q[None, :]
        dv += p[:, None] * grad[None, :]
        tl.store(dk_ptrs, dk.to(dk_ptr.dtype.element_ty), mask=mask)
        tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=mask)

    acc = tl.sum(dq, axis=0)  # (BLOCK_D,)
    if SPLITS > 1:
        partial_acc_ptr += bh * SPLITS * D
        tl.store(partial_acc_ptr + split * D + offs_d, acc, mask=mask_d)
        if not is_last_split(counter_ptr + bh, n_used):
            return
        offs_s = tl.arange(0, SPLITS)
        # .cg bypasses L1, which does not see stores from other multiprocessors
        acc_s = tl.load(
            partial_acc_ptr + offs_s[:, None] * D + offs_d[None, :],
            mask=(offs_s < n_used)[:, None] & mask_d[None, :], other=0.0, cache_modifier=".cg",
        )  # (SPLITS, BLOCK_D)  # fmt: skip
        acc = tl.sum(acc_s, axis=0)
    tl.store(dq_ptr + bh * D + offs_d, acc.to(dq_ptr.dtype.element_ty), mask=mask_d)


class PrefixBuffers(SplitWorkspace):
    """Buffers shared by all calls of prefix_attention over one prefix (B, nh, T, hs).

    dk and dv are the gradients that the last backward call returned (None before the first call).
    The next call adds to them in place only if autograd passes exactly these tensors to it. Another
    gradient, such as a sum made by autograd, may be in use elsewhere and must not be modified.
    """

    dk: Tensor | None = None
    dv: Tensor | None = None


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lengths, buffers):
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        out = latent_attention(q, k, v, lengths, buffers, lse=lse)
        ctx.buffers = buffers
        ctx.save_for_backward(q, k, v, lengths, out, lse)
        ctx.set_materialize_grads(False)  # None instead of zeros the size of the prefix
        return out, lse, k.view_as(k), v.view_as(v)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_lse, dk, dv):
        (q, k, v, lengths, out, lse), buffers = ctx.saved_tensors, ctx.buffers
        (B, nh, hs), T = q.shape, k.shape[2]
        # the kernel adds to slots [0, lengths[b]) of dk and dv, in fp32 and in a fixed order
        dk = buffers.dk = _writable(dk, buffers.dk, k)
        dv = buffers.dv = _writable(dv, buffers.dv, v)
        grad = torch.zeros_like(out) if grad is None else grad.contiguous()
        grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.contiguous()
        dq = q.new_empty(q.shape)
        block_n, block_d = block_sizes(hs)
        _prefix_attention_bwd_kernel[(B * nh, buffers.n_splits)](
            grad, grad_lse, q, k, v, lengths, out, lse, dq, dk, dv,
            buffers.partial_acc, buffers.counter, nh, T, hs**-0.5,
            *grad.stride()[:2], *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
            *dk.stride()[:3], *dv.stride()[:3],
            D=hs, SPLITS=buffers.n_splits, BLOCK_N=block_n, BLOCK_D=block_d, STAGES=NUM_STAGES,
            num_warps=NUM_WARPS, num_stages=NUM_STAGES, enable_fp_fusion=True,
        )  # fmt: skip
        return dq, dk, dv, None, None


def _writable(grad: Tensor | None, owned: Tensor | None, like: Tensor) -> Tensor:
    """Return grad if it is the owned buffer, otherwise a copy; zeros if there is no gradient."""
    if grad is None:
        return torch.zeros_like(like)
    return grad if grad is owned else grad.clone(memory_format=torch.contiguous_format)


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, buffers: PrefixBuffers
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (out (B, nh, hs), lse (B, nh) fp32, k, v) of q over the keys [0, lengths[b]).

    q         (B, nh, hs)
    k, v      (B, nh, T, hs), last dimension contiguous
    lengths   (B,) int64, read on the device
    buffers   PrefixBuffers of this prefix, the same in every call

    lse is the log-sum-exp of the scaled scores (-inf without keys). It is differentiable: a softmax
    over the lse of several parts of a sequence gives the weights to combine their outputs.

    Chain the calls: call n + 1 takes the k, v returned by call n (same memory), and any other
    reader takes the last ones. Backward then runs in reverse order and accumulates into one dK, dV
    buffer. Both have k's dtype and are rounded once per call, as autograd's own sum would be.
    There is no second derivative.
    """
    return _PrefixAttention.apply(q, k, v, lengths, buffers)
