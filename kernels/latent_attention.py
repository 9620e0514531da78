"""Attention of one query per sequence over a KV cache with per-sequence lengths: one latent step.

The query of sequence b attends to keys [0, lengths[b] + n_new), clipped to the cache size. Pass
n_new=1 after append has stored the step's own key at index lengths[b], because lengths are
incremented only after the last layer. The output of an empty sequence is zero, and that of an
inactive sequence is undefined. Slots past the length are never read.

One program handles one (sequence, head, split of the keys). It keeps an online softmax (Milakov and
Gimelshein, arXiv 1805.02867) in fp32 for each of the BLOCK_N lanes and merges the lanes once at the
end. With several splits (flash-decoding), each split stores a partial result. The last split to
finish combines all of them in a fixed order, so results are deterministic. The grid depends only on
shapes, and the number of non-empty splits is computed on the device. So a captured CUDA graph stays
valid while sequences grow. K and V are read once, up to each length.

kernels/prefix_attention.py is the differentiable version for training.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._check import check_tensors
from kernels._launch import await_launches, pdl, prefetch

BLOCK_ELEMENTS = 2048  # elements of K (and of V) per loop iteration: 16 of each per thread
MAX_SPLITS = 32
NUM_WARPS = 4
# Software pipelining through shared memory keeps one or two iterations of loads in flight. Without
# it, ptxas moves each masked load right before its use, so only one is in flight (seen in SASS).
NUM_STAGES = 3


@triton.jit
def split_range(
    lengths_ptr,  # (B,) int64, read
    b, split, T,
    N_NEW: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the keys [lo, hi) of this split and the number of non-empty splits (at least 1)."""
    length = tl.load(lengths_ptr + b) + N_NEW
    length = tl.minimum(tl.maximum(length, 0), T).to(tl.int32)
    chunk = tl.maximum(tl.cdiv(length, SPLITS), BLOCK)
    lo = split * chunk
    hi = tl.minimum(lo + chunk, length)
    # int64, because the caller multiplies them by strides
    return lo.to(tl.int64), hi.to(tl.int64), tl.maximum(tl.cdiv(length, chunk), 1)


@triton.jit
def is_last_split(
    counter_ptr,  # () int32, read and written: number of finished splits
    n_used,
):
    """Return True in the last of n_used programs, which then sees the stores of all others."""
    tl.debug_barrier()  # all threads must have stored before the counter is incremented
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == n_used - 1
    if last:
        tl.store(counter_ptr, 0)  # reset, so that a CUDA graph can replay the launch
    return last


@triton.jit
def _latent_attention_fwd_kernel(
    q_ptr,  # query (B, nh, D), read
    k_ptr,  # keys (B, nh, T, D), read
    v_ptr,  # values (B, nh, T, D), read
    lengths_ptr,  # valid keys (B,) int64, read
    out_ptr,  # output (B, nh, D) contiguous, written
    lse_ptr,  # log-sum-exp of the scores (B, nh) fp32, written; None: not needed
    partial_acc_ptr,  # partial outputs (B * nh, SPLITS, D) fp32, read and written, or None
    partial_ml_ptr,  # running max and sum (B * nh, SPLITS, 2) fp32, read and written
    counter_ptr,  # finished splits (B * nh,) int32, read and written; zero before and after
    nh, T, scale,
    stride_qb, stride_qh,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    N_NEW: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    bh, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = bh // nh, bh % nh
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    if PDL:  # the length may still be that of the previous step, which is enough to prefetch
        lo, hi, n_used = split_range(lengths_ptr, b, split, T, N_NEW, SPLITS, BLOCK_N)
        first = tl.minimum(lo + offs_n, tl.maximum(hi - 1, 0))
        prefetch(k_ptr + first * stride_kt, PDL)
        prefetch(v_ptr + first * stride_vt, PDL)
    await_launches(PDL)
    lo, hi, n_used = split_range(lengths_ptr, b, split, T, N_NEW, SPLITS, BLOCK_N)
    if split >= n_used:
        return
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + offs_d, mask=mask_d, other=0.0)
    q = q.to(tl.float32) * scale  # (BLOCK_D,)

    # One softmax state per lane, so that q . k is the only reduction across threads in the loop.
    # The max starts finite: a lane without keys then gives exp(very negative) = 0, not NaN.
    m_i = tl.full((BLOCK_N,), -1e30, tl.float32)
    l_i = tl.zeros((BLOCK_N,), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        mask_n = offs_n < (hi - start).to(tl.int32)
        mask = mask_n[:, None] & mask_d[None, :]
        offs_k = start * stride_kt + (offs_n[:, None] * stride_kt + offs_d[None, :])
        offs_v = start * stride_vt + (offs_n[:, None] * stride_vt + offs_d[None, :])
        k = tl.load(k_ptr + offs_k, mask=mask, other=0.0)  # (BLOCK_N, BLOCK_D)
        v = tl.load(v_ptr + offs_v, mask=mask, other=0.0)
        s = tl.sum(k.to(tl.float32) * q[None, :], axis=1)  # (BLOCK_N,)
        s = tl.where(mask_n, s, float("-inf"))
        m_new = tl.maximum(m_i, s)
        alpha, p = tl.exp(m_i - m_new), tl.exp(s - m_new)
        l_i = l_i * alpha + p
        acc = acc * alpha[:, None] + p[:, None] * v.to(tl.float32)
        m_i = m_new

    # merge the lanes
    m = tl.max(m_i, axis=0)
    alpha = tl.exp(m_i - m)
    l_i = tl.sum(l_i * alpha, axis=0)
    acc = tl.sum(acc * alpha[:, None], axis=0)  # (BLOCK_D,)

    if SPLITS > 1:
        partial_acc_ptr += bh * SPLITS * D
        partial_ml_ptr += bh * SPLITS * 2
        tl.store(partial_acc_ptr + split * D + offs_d, acc, mask=mask_d)
        tl.store(partial_ml_ptr + split * 2, m)
        tl.store(partial_ml_ptr + split * 2 + 1, l_i)
        if not is_last_split(counter_ptr + bh, n_used):
            return
        offs_s = tl.arange(0, SPLITS)
        mask_s = offs_s < n_used
        # .cg bypasses L1, which does not see stores from other multiprocessors
        m_s = tl.load(partial_ml_ptr + offs_s * 2, mask=mask_s, other=-1e30, cache_modifier=".cg")
        l_s = tl.load(partial_ml_ptr + offs_s * 2 + 1, mask=mask_s, other=0.0, cache_modifier=".cg")
        acc_s = tl.load(
            partial_acc_ptr + offs_s[:, None] * D + offs_d[None, :],
            mask=mask_s[:, None] & mask_d[None, :], other=0.0, cache_modifier=".cg",
        )  # (SPLITS, BLOCK_D)  # fmt: skip
        m = tl.max(m_s, axis=0)
        alpha_s = tl.exp(m_s - m)
        l_i = tl.sum(l_s * alpha_s, axis=0)
        acc = tl.sum(acc_s * alpha_s[:, None], axis=0)
    l_safe = tl.where(l_i == 0.0, 1.0, l_i)  # no key: return zeros instead of 0 / 0
    out = acc / l_safe
    tl.store(out_ptr + bh * D + offs_d, out.to(out_ptr.dtype.element_ty), mask=mask_d)
    if lse_ptr is not None:
        lse = m + tl.log(l_safe)
        tl.store(lse_ptr + bh, tl.where(l_i == 0.0, float("-inf"), lse))


def block_sizes(hs: int, elements: int = BLOCK_ELEMENTS) -> tuple[int, int]:
    """Return (BLOCK_N keys, BLOCK_D head dimensions), together `elements`."""
    block_d = max(16, triton.next_power_of_2(hs))
    return elements // block_d, block_d


def launch_form(n_heads: int) -> tuple[int, int, int]:
    """Return (elements per block, warps, stages) for B * nh heads, as measured on an H200."""
    if n_heads <= 48:  # a split is one block, so there is no loop to pipeline
        return 2 * BLOCK_ELEMENTS, 4, 1
    return BLOCK_ELEMENTS, 2 if n_heads <= 1024 else NUM_WARPS, NUM_STAGES


class SplitWorkspace:
    """Buffers for combining the splits of one attention call over a cache (B, nh, T, hs).

    n_splits     a power of two; None: enough for two programs per multiprocessor, but no split with
                 less than one block of keys
    partial_acc  (B * nh, n_splits, hs) fp32; like the others, None if there is only one split
    partial_ml   (B * nh, n_splits, 2) fp32
    counter      (B * nh,) int32

    Calls that follow each other on one stream can share it, because every launch leaves the
    counters at zero. Create it before capturing a CUDA graph.
    """

    def __init__(
        self, B: int, nh: int, T: int, hs: int, device: torch.device, n_splits: int | None = None
    ) -> None:
        if n_splits is None:
            n_sms = 1
            if device.type == "cuda":
                n_sms = torch.cuda.get_device_properties(device).multi_processor_count
            block_n, _ = block_sizes(hs, launch_form(B * nh)[0])
            n_blocks = triton.next_power_of_2(triton.cdiv(T, block_n))
            # two programs per multiprocessor, rounded down to a power of two
            n_filling = 1 << (triton.cdiv(2 * n_sms, B * nh).bit_length() - 1)
            n_splits = min(n_blocks, n_filling, MAX_SPLITS)
        self.n_splits = n_splits
        self.partial_acc = self.partial_ml = self.counter = None
        if n_splits > 1:
            options = dict(dtype=torch.float32, device=device)
            self.partial_acc = torch.empty(B * nh, n_splits, hs, **options)
            self.partial_ml = torch.empty(B * nh, n_splits, 2, **options)
            self.counter = torch.zeros(B * nh, dtype=torch.int32, device=device)


def latent_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, workspace: SplitWorkspace,
    n_new: int = 0, lse: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return attention (B, nh, hs) of q over keys [0, lengths[b] + n_new). Not differentiable.

    q           (B, nh, hs), hs at most 128
    k, v        (B, nh, T, hs), any strides but the last, such as KVCache.data[layer, 0]
    lengths     (B,) int64, read on the device
    workspace   SplitWorkspace(B, nh, T, hs, device)
    lse         (B, nh) fp32, written: log-sum-exp of the scores; None: not needed

    Safe to capture in a CUDA graph. Raise ValueError if shapes or strides do not match.
    """
    (B, nh, hs), T, n_splits = q.shape, k.shape[2], workspace.n_splits
    if not k.shape == v.shape == (B, nh, T, hs) or {x.stride(-1) for x in (q, k, v)} != {1}:
        raise ValueError(
            "q, k, v: expected (B, nh, hs), twice (B, nh, T, hs), contiguous last dimensions, "
            f"got {[(tuple(x.shape), x.stride()) for x in (q, k, v)]}"
        )
    check_tensors(lengths=(lengths, (B,)), workspace=(workspace.counter, (B * nh,)))
    out = q.new_empty(q.shape)
    elements, num_warps, num_stages = launch_form(B * nh)
    block_n, block_d = block_sizes(hs, elements)
    _latent_attention_fwd_kernel[(B * nh, n_splits)](
        q, k, v, lengths, out, lse,
        workspace.partial_acc, workspace.partial_ml, workspace.counter,
        nh, T, hs**-0.5,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        N_NEW=n_new, D=hs, SPLITS=n_splits,
        BLOCK_N=block_n, BLOCK_D=block_d, STAGES=num_stages,
        num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True, **pdl(q.device, B),
    )  # fmt: skip
    return out
