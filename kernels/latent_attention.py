"""Attention of one query per row over a KV cache with per-row lengths: what a thought costs.

Row b's query sees the keys [0, lengths[b] + extra), never more than the cache holds. `lengths` are
those before the step (KVCache.lengths, moved only after the last layer): after append has stored
the step's own key at index lengths[b], pass extra=1. A row that sees nothing gives zeros. What
stands behind the last key is not read, NaN or not. An inactive row, for which append stored nothing
there, attends to what it finds: its output is the caller's to drop.

One program per (row, head, split of the keys). It keeps an online softmax (Milakov and Gimelshein,
arXiv 1805.02867) in fp32 for each of the BLOCK_N lanes of its tile, so that nothing crosses threads
inside the loop but a key's own dot product; the lanes are merged once at the end. With several
splits (flash-decoding) each leaves its part in scratch memory and the one that arrives last
combines all of them, in order: runs are bit-equal. How many splits there may be depends on static
shapes only, how many have keys is read from the device: a captured graph stays right as rows grow.

    latent_attention      inference: a raw launch, nothing saved, scratch made once by the caller
    latent_attention_lse  training: a torch.library op with autograd, also returns log-sum-exp
    latent_attention_backward_  its backward, which adds into dk and dv
    latent_attention_pass  training: one of several passes over a cache, whose backwards add to one
                           dk and dv

Bytes: K and V up to each row's length, once; the rest is small. Backward: K and V read, dk and dv
read and written.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 2048  # elements of K (and V) per step of the loop: 16 of each for every thread
MAX_SPLITS = 32
NUM_WARPS = 4
# One or two steps of the loop are on their way to shared memory while one is worked on. Not left to
# ptxas: it puts each masked load right before its use, one in flight at a time (seen in SASS).
NUM_STAGES = 3


@triton.jit
def _span(lengths_ptr, b, split, T, EXTRA: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Keys [lo, hi) of this split of row b, and how many splits have keys (at least one)."""
    length = tl.load(lengths_ptr + b) + EXTRA
    length = tl.minimum(tl.maximum(length, 0), T).to(tl.int32)
    chunk = tl.maximum(tl.cdiv(length, SPLITS), BLOCK)
    lo = split * chunk
    hi = tl.minimum(lo + chunk, length)
    # 64 bits: they are multiplied with strides
    return lo.to(tl.int64), hi.to(tl.int64), tl.maximum(tl.cdiv(length, chunk), 1)


@triton.jit
def _arrive(counter_ptr, used):
    """True in the last of `used` programs to come here: what the others stored is visible to it.
    It leaves the counter at zero, so that the launch can be replayed."""
    tl.debug_barrier()  # every thread has stored its part before one of them says so
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == used - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def _latent_attention_fwd_kernel(
    q_ptr,  # (B, nh, D)
    k_ptr,  # (B, nh, T, D)
    v_ptr,  # (B, nh, T, D)
    lengths_ptr,  # (B,) int64
    out_ptr,  # (B, nh, D) contiguous
    lse_ptr,  # (B, nh) fp32, or None
    part_ptr,  # (B * nh, SPLITS, D) fp32: unnormalised outputs; None without splits
    stat_ptr,  # (B * nh, SPLITS, 2) fp32: their maximum and sum
    counter_ptr,  # (B * nh,) int32 zeros: splits that have arrived
    nh, T, scale,
    stride_qb, stride_qh,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    EXTRA: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    bh, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = bh // nh, bh % nh
    lo, hi, used = _span(lengths_ptr, b, split, T, EXTRA, SPLITS, BLOCK_N)
    if split >= used:
        return
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    d_ok = d < D
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + d, mask=d_ok, other=0.0)  # (BLOCK_D,)
    q = q.to(tl.float32) * scale
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh

    # per lane: finite, so that a lane without keys gives exp(very negative) = 0 and no NaN
    top = tl.full((BLOCK_N,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        n_ok = n < (hi - start).to(tl.int32)
        ok = n_ok[:, None] & d_ok[None, :]
        at_k = start * stride_kt + (n[:, None] * stride_kt + d[None, :])
        at_v = start * stride_vt + (n[:, None] * stride_vt + d[None, :])
        k = tl.load(k_ptr + at_k, mask=ok, other=0.0)  # (BLOCK_N, BLOCK_D)
        v = tl.load(v_ptr + at_v, mask=ok, other=0.0)
        s = tl.sum(k.to(tl.float32) * q[None, :], axis=1)  # (BLOCK_N,)
        s = tl.where(n_ok, s, float("-inf"))
        new_top = tl.maximum(top, s)
        shrink, p = tl.exp(top - new_top), tl.exp(s - new_top)
        total = total * shrink + p
        acc = acc * shrink[:, None] + p[:, None] * v.to(tl.float32)
        top = new_top

    best = tl.max(top, axis=0)
    weight = tl.exp(top - best)
    total = tl.sum(total * weight, axis=0)
    acc = tl.sum(acc * weight[:, None], axis=0)  # (BLOCK_D,)

    if SPLITS == 1:
        _store_out(out_ptr, lse_ptr, bh, d, d_ok, acc, best, total, D)
    else:
        part_ptr += bh * SPLITS * D
        stat_ptr += bh * SPLITS * 2
        tl.store(part_ptr + split * D + d, acc, mask=d_ok)
        tl.store(stat_ptr + split * 2, best)
        tl.store(stat_ptr + split * 2 + 1, total)
        if _arrive(counter_ptr + bh, used):
            s = tl.arange(0, SPLITS)
            s_ok = s < used
            # .cg: past this multiprocessor's own cache, where the others' stores are not seen
            tops = tl.load(stat_ptr + s * 2, mask=s_ok, other=-1e30, cache_modifier=".cg")
            totals = tl.load(stat_ptr + s * 2 + 1, mask=s_ok, other=0.0, cache_modifier=".cg")
            parts = tl.load(
                part_ptr + s[:, None] * D + d[None, :],
                mask=s_ok[:, None] & d_ok[None, :], other=0.0, cache_modifier=".cg",
            )  # (SPLITS, BLOCK_D)  # fmt: skip
            best = tl.max(tops, axis=0)
            share = tl.exp(tops - best)
            total = tl.sum(totals * share, axis=0)
            acc = tl.sum(parts * share[:, None], axis=0)
            _store_out(out_ptr, lse_ptr, bh, d, d_ok, acc, best, total, D)


@triton.jit
def _store_out(out_ptr, lse_ptr, bh, d, d_ok, acc, best, total, D: tl.constexpr):
    some = tl.where(total == 0.0, 1.0, total)
    out = acc / some  # no key: zeros
    tl.store(out_ptr + bh * D + d, out.to(out_ptr.dtype.element_ty), mask=d_ok)
    if lse_ptr is not None:
        lse = best + tl.log(some)
        tl.store(lse_ptr + bh, tl.where(total == 0.0, float("-inf"), lse))


@triton.jit
def _latent_attention_bwd_kernel(
    grad_ptr,  # (B, nh, D): of out
    grad_lse_ptr,  # (B, nh) fp32 contiguous
    q_ptr,  # (B, nh, D)
    k_ptr,  # (B, nh, T, D)
    v_ptr,  # (B, nh, T, D)
    lengths_ptr,  # (B,) int64
    out_ptr,  # (B, nh, D) contiguous, as forward left it
    lse_ptr,  # (B, nh) fp32 contiguous, as forward left it
    dq_ptr,  # (B, nh, D) contiguous
    dk_ptr,  # (B, nh, T, D): added to
    dv_ptr,  # (B, nh, T, D): added to
    part_ptr,  # (B * nh, SPLITS, D) fp32; None without splits
    counter_ptr,  # (B * nh,) int32 zeros
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
    lo, hi, used = _span(lengths_ptr, b, split, T, 0, SPLITS, BLOCK_N)
    if split >= used:
        return
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    d_ok = d < D
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + d, mask=d_ok, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + b * stride_gb + h * stride_gh + d, mask=d_ok, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + bh * D + d, mask=d_ok, other=0.0).to(tl.float32)
    # d lse / d s = p, and d out / d s = p (v - out): both in ds = p (v.g - shared)
    shared = tl.sum(out * g, axis=0) - tl.load(grad_lse_ptr + bh)
    lse = tl.load(lse_ptr + bh)
    q_scaled = q * scale  # as in forward: a lone key's p is then exactly 1
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    dk_ptr += b * stride_dkb + h * stride_dkh
    dv_ptr += b * stride_dvb + h * stride_dvh

    dq = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)  # per lane, as in forward
    for start in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        n_ok = n < (hi - start).to(tl.int32)
        ok = n_ok[:, None] & d_ok[None, :]
        at_k = start * stride_kt + (n[:, None] * stride_kt + d[None, :])
        at_v = start * stride_vt + (n[:, None] * stride_vt + d[None, :])
        dk_at = dk_ptr + (start * stride_dkt + (n[:, None] * stride_dkt + d[None, :]))
        dv_at = dv_ptr + (start * stride_dvt + (n[:, None] * stride_dvt + d[None, :]))
        k = tl.load(k_ptr + at_k, mask=ok, other=0.0).to(tl.float32)  # (BLOCK_N, BLOCK_D)
        v = tl.load(v_ptr + at_v, mask=ok, other=0.0).to(tl.float32)
        dk = tl.load(dk_at, mask=ok, other=0.0).to(tl.float32)
        dv = tl.load(dv_at, mask=ok, other=0.0).to(tl.float32)
        p = tl.exp(tl.sum(k * q_scaled[None, :], axis=1) - lse)  # (BLOCK_N,)
        ds = p * (tl.sum(v * g[None, :], axis=1) - shared) * scale
        ds = tl.where(n_ok, ds, 0.0)
        dq += ds[:, None] * k
        dk += ds[:, None] * q[None, :]
        dv += p[:, None] * g[None, :]
        tl.store(dk_at, dk.to(dk_ptr.dtype.element_ty), mask=ok)
        tl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), mask=ok)

    acc = tl.sum(dq, axis=0)  # (BLOCK_D,)
    at_out = dq_ptr + bh * D + d
    if SPLITS == 1:
        tl.store(at_out, acc.to(dq_ptr.dtype.element_ty), mask=d_ok)
    else:
        part_ptr += bh * SPLITS * D
        tl.store(part_ptr + split * D + d, acc, mask=d_ok)
        if _arrive(counter_ptr + bh, used):
            s = tl.arange(0, SPLITS)
            parts = tl.load(
                part_ptr + s[:, None] * D + d[None, :],
                mask=(s < used)[:, None] & d_ok[None, :], other=0.0, cache_modifier=".cg",
            )  # (SPLITS, BLOCK_D)  # fmt: skip
            acc = tl.sum(parts, axis=0)
            tl.store(at_out, acc.to(dq_ptr.dtype.element_ty), mask=d_ok)


@dataclass(frozen=True)
class Scratch:
    """Where splits meet. One serves every layer and every graph of one stream, as launches follow
    each other there; each launch leaves the counters at zero."""

    splits: int
    part: Tensor | None  # (B * nh, splits, hs) fp32
    stat: Tensor | None  # (B * nh, splits, 2) fp32
    counter: Tensor | None  # (B * nh,) int32


def latent_attention_scratch(
    B: int, nh: int, T: int, hs: int, device: torch.device | str, splits: int = 0
) -> Scratch:
    """Scratch memory for caches of (B, nh, T, hs). Make it before a CUDA graph is captured.

    splits (0: chosen): a power of two; no more than give each of them a tile of keys, and as many
    as put two programs on every multiprocessor.
    """
    if not splits:
        device = torch.device(device)
        sms = 1
        # AMD: one split. Triton 3.9's barrier there does not wait for stores (seen in its code)
        if device.type == "cuda" and not torch.version.hip:
            sms = torch.cuda.get_device_properties(device).multi_processor_count
        wanted = min(triton.cdiv(2 * sms, max(1, B * nh)), triton.cdiv(T, _blocks(hs)[0]))
        splits = min(MAX_SPLITS, triton.next_power_of_2(max(1, wanted)))
    if splits == 1:
        return Scratch(1, None, None, None)
    return Scratch(
        splits,
        torch.empty(B * nh, splits, hs, dtype=torch.float32, device=device),
        torch.empty(B * nh, splits, 2, dtype=torch.float32, device=device),
        torch.zeros(B * nh, dtype=torch.int32, device=device),
    )


def _blocks(hs: int) -> tuple[int, int]:
    """BLOCK_N keys by BLOCK_D of a head: TILE elements."""
    block_d = max(16, triton.next_power_of_2(hs))
    return TILE // block_d, block_d


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    B, nh, hs = q.shape
    if k.shape != v.shape or k.shape[:2] != (B, nh) or k.shape[3] != hs:
        raise ValueError(
            f"q {tuple(q.shape)} must be (B, nh, hs), k {tuple(k.shape)} and v {tuple(v.shape)} "
            "(B, nh, T, hs) with the same B, nh and hs"
        )
    if lengths.shape != (B,) or lengths.dtype != torch.int64 or lengths.stride(0) != 1:
        raise ValueError(
            f"lengths must be ({B},) int64, not {tuple(lengths.shape)} {lengths.dtype}"
        )
    if torch.float64 in (q.dtype, k.dtype, v.dtype):
        raise ValueError("sums are fp32 here: float64 would be rounded, use the reference")
    if hs > 128 or not all(x.stride(-1) == 1 for x in (q, k, v)):
        raise ValueError(f"heads have at most 128 dimensions ({hs} given), in steps of one element")


def _forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, extra: int, scratch: Scratch,
    out: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    (B, nh, hs), T = q.shape, k.shape[2]
    block_n, block_d = _blocks(hs)
    _latent_attention_fwd_kernel[(B * nh, scratch.splits)](
        q, k, v, lengths, out, lse, scratch.part, scratch.stat, scratch.counter,
        nh, T, hs**-0.5,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        EXTRA=extra, D=hs, SPLITS=scratch.splits,
        BLOCK_N=block_n, BLOCK_D=block_d, STAGES=NUM_STAGES,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES, enable_fp_fusion=True,
    )  # fmt: skip


def latent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    extra: int = 0,
    scratch: Scratch | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Queries q (B, nh, hs) over k, v (B, nh, T, hs), row b's keys [0, lengths[b] + extra) ->
    (B, nh, hs). For inference: no gradient, and safe to capture.

    k, v: any strides but the last, such as KVCache.data[layer, 0]. lengths (B,) int64, read on the
    device. scratch: from latent_attention_scratch(B, nh, T, hs, device); None makes one. out:
    contiguous, written to. Raises ValueError for shapes that do not fit.
    """
    _check(q, k, v, lengths)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    elif out.shape != q.shape or not out.is_contiguous():
        raise ValueError(f"out must be contiguous and {tuple(q.shape)}, not {tuple(out.shape)}")
    if scratch is None:
        scratch = latent_attention_scratch(*k.shape, k.device)
    elif scratch.part is not None and scratch.part.shape != (len(q) * q.shape[1], scratch.splits,
                                                             q.shape[2]):  # fmt: skip
        raise ValueError(f"scratch is for {tuple(scratch.part.shape)}, not for q {tuple(q.shape)}")
    _forward(q, k, v, lengths, extra, scratch, out, None)
    return out


@torch.library.custom_op("nanococonut::latent_attention_lse", mutates_args=())
def latent_attention_lse(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, splits: int = 0
) -> tuple[Tensor, Tensor]:
    """As latent_attention with extra=0, and differentiable in q, k and v -> out (B, nh, hs), lse
    (B, nh) fp32.

    lse is the natural log-sum-exp of the scaled scores (-inf: no key) and carries gradient too: two
    parts of a sequence, attended to apart, are joined by the softmax of their lse.

    Memory: nothing of the cache's size is saved but k and v themselves. Backward returns dk and dv
    of the cache's shape and dtype, zero behind the lengths: two at a time where n passes over one
    cache are summed by autograd. A pass then moves 7 times the bytes of K and V backward (zeros 1,
    the kernel 3, the sum 3); latent_attention_backward_ adds into dk and dv of all passes: 3 times.
    """
    _check(q, k, v, lengths)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    scratch = latent_attention_scratch(*k.shape, k.device, splits)
    _forward(q, k, v, lengths, 0, scratch, out, lse)
    return out, lse


@latent_attention_lse.register_fake
def _(q, k, v, lengths, splits=0):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(
        q.shape[:2], dtype=torch.float32
    )


@torch.library.custom_op("nanococonut::latent_attention_backward_", mutates_args=("dk", "dv"))
def latent_attention_backward_(
    grad: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    out: Tensor,
    lse: Tensor,
    dk: Tensor,
    dv: Tensor,
    splits: int = 0,
) -> Tensor:
    """Gradients of latent_attention_lse: returns dq, and adds to dk and dv (B, nh, T, hs; any float
    dtype) in the keys [0, lengths[b]) only. Sums are fp32, in a fixed order."""
    _check(q, k, v, lengths)
    _check(q, dk, dv, lengths)
    (B, nh, hs), T = q.shape, k.shape[2]
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    scratch = latent_attention_scratch(*k.shape, k.device, splits)
    block_n, block_d = _blocks(hs)
    _latent_attention_bwd_kernel[(B * nh, scratch.splits)](
        grad, grad_lse.contiguous(), q, k, v, lengths, out, lse, dq, dk, dv,
        scratch.part, scratch.counter, nh, T, hs**-0.5,
        *grad.stride()[:2], *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        *dk.stride()[:3], *dv.stride()[:3],
        D=hs, SPLITS=scratch.splits, BLOCK_N=block_n, BLOCK_D=block_d, STAGES=NUM_STAGES,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES, enable_fp_fusion=True,
    )  # fmt: skip
    return dq


@latent_attention_backward_.register_fake
def _(grad, grad_lse, q, k, v, lengths, out, lse, dk, dv, splits=0):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _setup_context(ctx, inputs, output):
    q, k, v, lengths, ctx.splits = inputs
    ctx.save_for_backward(q, k, v, lengths, *output)


def _backward(ctx, grad, grad_lse):
    q, k, v, lengths, out, lse = ctx.saved_tensors
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    dq = latent_attention_backward_(grad, grad_lse, q, k, v, lengths, out, lse, dk, dv, ctx.splits)
    return dq, dk, dv, None, None


latent_attention_lse.register_autograd(_backward, setup_context=_setup_context)


def _to_add_to(grad: Tensor | None, like: Tensor) -> Tensor:
    """A gradient that may be written to: what another pass made, else a copy."""
    if grad is None:  # nothing has read what the last pass returned
        return torch.zeros_like(like)
    if not torch.compiler.is_compiling() and getattr(grad, "made_by_a_pass", False):
        return grad
    return grad.clone(memory_format=torch.contiguous_format)


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lengths, splits):
        out, lse = latent_attention_lse(q, k, v, lengths, splits)
        ctx.splits = splits
        ctx.save_for_backward(q, k, v, lengths, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse, k.view_as(k), v.view_as(v)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_lse, dk, dv):
        q, k, v, lengths, out, lse = ctx.saved_tensors
        dk, dv = (_to_add_to(x, k) for x in (dk, dv))
        grad = torch.zeros_like(out) if grad is None else grad
        grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
        dq = latent_attention_backward_(
            grad, grad_lse, q, k, v, lengths, out, lse, dk, dv, ctx.splits
        )
        if not torch.compiler.is_compiling():
            dk.made_by_a_pass = dv.made_by_a_pass = True
        return dq, dk, dv, None, None


def latent_attention_pass(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, splits: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As latent_attention_lse, for n passes over the same k and v -> out, lse, k, v. The next pass
    takes the k and v that this one returns, and so does whatever else reads them last.

    They are the same memory. What differs is their gradient: backward goes through the passes in
    reverse, and each adds to the dk and dv that the one behind it made, in place, and hands them
    on. So there is one buffer for all passes and no state but autograd's graph: two graphs cannot
    mix theirs; retain_graph, partial gradients and torch.utils.checkpoint are as anywhere else.
    torch.compile(fullgraph=True) takes it, and copies dk and dv where it cannot prove what we know.

    dk and dv are in k's dtype, rounded once a pass, as autograd's own sum of n of them would be.
    No second derivative.
    """
    return _Pass.apply(q, k, v, lengths, splits)


def aot_cases(hip: bool = False) -> list:
    """What kernels.aot compiles: GPT-2's heads of 64, and the ends of what is allowed. hip changes
    nothing here."""
    from kernels.aot import Case

    fwd, bwd = _latent_attention_fwd_kernel, _latent_attention_bwd_kernel

    def case(kernel, name: str, dtype: str, hs: int, splits: int, **more: str | None) -> Case:
        block_n, block_d = _blocks(hs)
        constexprs = dict(D=hs, SPLITS=splits, BLOCK_N=block_n, BLOCK_D=block_d)
        constexprs |= dict(STAGES=NUM_STAGES) | (dict(EXTRA=1) if kernel is fwd else {})
        pointers = dict.fromkeys(("q", "k", "v", "out", "grad", "dq", "dk", "dv"), f"*{dtype}")
        pointers |= dict.fromkeys(("lse", "grad_lse", "part", "stat"), "*fp32")
        pointers |= dict(lengths="*i64", counter="*i32") | more
        if splits == 1:
            pointers |= dict(part=None, stat=None, counter=None)
        signature = {}
        for arg in kernel.arg_names:
            if arg.endswith("_ptr"):
                kind = pointers[arg.removesuffix("_ptr")]
                (constexprs if kind is None else signature)[arg] = kind
            elif arg not in constexprs:
                signature[arg] = "fp32" if arg.startswith("scale") else "i32"
        divisible = [arg for arg in signature if arg.endswith("_ptr") or arg.startswith("stride")]
        return Case(
            name, kernel, signature, constexprs, NUM_WARPS, NUM_STAGES,
            wide_loads=True, divisible=divisible,
        )  # fmt: skip

    return [
        case(fwd, "bf16 hs=64", "bf16", 64, 1, lse=None),
        case(fwd, "bf16 hs=64 splits=8", "bf16", 64, 8, lse=None),
        case(fwd, "fp32 hs=64 lse", "fp32", 64, 1),
        case(fwd, "fp16 hs=80 splits=32 lse", "fp16", 80, 32),
        case(fwd, "bf16 hs=128 splits=32", "bf16", 128, 32, lse=None),
        case(bwd, "bf16 hs=64", "bf16", 64, 1),
        case(bwd, "bf16 hs=64 splits=4 dk fp32", "bf16", 64, 4, dk="*fp32", dv="*fp32"),
        case(bwd, "fp32 hs=128", "fp32", 128, 1),
    ]
