"""The LM head and its cross-entropy, one chunk of logits at a time.

cuBLAS computes the matrix products, since at 768 x 50,260 no Triton kernel is faster. In between, a
Triton kernel reads a chunk of logits twice (the second time from L2). It computes each position's
loss and whether its label is the argmax, and replaces the logits with their gradient. As in
Liger-Kernel, forward also computes the gradients of h and w; the loss is a sum, so backward only
scales them. At most `chunk` rows of logits exist at a time: 1,024 rows of GPT-2's take 103 MB in
bf16. Only the gradients are kept for backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1024  # rows of logits at once: enough to keep cuBLAS busy
BLOCK_V = 2048  # logits per loop iteration: 16 per thread
NUM_WARPS = 4
NUM_STAGES = 3  # loads are pipelined through shared memory, see latent_attention.py


@triton.jit
def _softmax_cross_entropy_kernel(
    x_ptr,  # logits (rows, V), padded to stride_x, read; replaced by d loss / d logits
    label_ptr,  # targets (rows,) int64, read
    loss_ptr,  # loss of each row (rows,) fp32, written
    correct_ptr,  # whether the label is the first argmax (rows,) bool, written
    V, stride_x,
    BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x
    label = tl.load(label_ptr + row).to(tl.int32)
    supervised = label != -100  # other rows have no loss and no gradient, and count as correct
    offs_v = tl.arange(0, BLOCK_V)

    # One softmax state per lane, so that the loop has no reduction across threads. The max starts
    # finite, so that a lane without logits gives no NaN.
    m_i = tl.full((BLOCK_V,), -1e30, tl.float32)
    l_i = tl.zeros((BLOCK_V,), tl.float32)
    argmax = tl.zeros((BLOCK_V,), tl.int32)
    for start in tl.range(0, V, BLOCK_V, num_stages=STAGES):
        x = _load_logits(x_ptr, start + offs_v, V, stride_x)
        m_new = tl.maximum(m_i, x)
        l_i = l_i * tl.exp(m_i - m_new) + tl.exp(x - m_new)
        argmax = tl.where(x > m_i, start + offs_v, argmax)
        m_i = m_new
    m = tl.max(m_i, axis=0)
    l_i = tl.sum(l_i * tl.exp(m_i - m), axis=0)
    first = tl.min(tl.where(m_i == m, argmax, V), axis=0)
    in_vocabulary = (label >= 0) & (label < V)  # otherwise the loss is NaN
    x_label = tl.load(x_ptr + label, mask=in_vocabulary, other=float("nan")).to(tl.float32)
    # m - x_label first: m + log(l_i) would be rounded relative to |m|, which may be large
    tl.store(loss_ptr + row, tl.where(supervised, m - x_label + tl.log(l_i), 0.0))
    tl.store(correct_ptr + row, (first == label) | ~supervised)

    inv_l = 1.0 / l_i
    tl.debug_barrier()  # all threads must have read the label's logit before it is overwritten
    for start in tl.range(0, V, BLOCK_V, num_stages=STAGES):
        x = _load_logits(x_ptr, start + offs_v, V, stride_x)
        grad = tl.exp(x - m) * inv_l - tl.where(start + offs_v == label, 1.0, 0.0)
        grad = tl.where(supervised, grad, 0.0)
        mask = start + offs_v < stride_x
        tl.store(x_ptr + start + offs_v, grad.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_logits(x_ptr, offs_v, V, stride_x):
    # masked by the padded width, a multiple of 16, so that the last load is 128 bits wide too
    x = tl.load(x_ptr + offs_v, mask=offs_v < stride_x, other=0.0).to(tl.float32)
    return tl.where(offs_v < V, x, float("-inf"))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, w, labels, chunk):
        N, V = len(h), len(w)
        w_h = w.to(h.dtype)
        losses = h.new_empty(N, dtype=torch.float32)
        correct = h.new_empty(N, dtype=torch.bool)
        dh = torch.empty_like(h)
        # fp32 even for a bf16 head, because it is accumulated over the chunks
        dw = torch.zeros_like(w, dtype=torch.float32)
        # row starts are multiples of 16 elements, for 128-bit loads and for cuBLAS
        buffer = h.new_empty(min(chunk, N), triton.cdiv(V, 16) * 16)
        for start in range(0, N, chunk):
            part = slice(start, start + chunk)
            x = h[part]
            logits = buffer[: len(x), :V]
            torch.mm(x, w_h.t(), out=logits)
            _softmax_cross_entropy_kernel[(len(x),)](
                logits, labels[part], losses[part], correct[part], V, logits.stride(0),
                BLOCK_V=min(BLOCK_V, triton.next_power_of_2(V)), STAGES=NUM_STAGES,
                num_warps=NUM_WARPS, num_stages=NUM_STAGES, enable_fp_fusion=True,
            )  # fmt: skip
            dh[part] = logits @ w_h  # the kernel has replaced the logits with their gradient
            if dw.dtype == x.dtype:
                dw.addmm_(logits.t(), x)
            else:
                dw += logits.t() @ x
        ctx.save_for_backward(dh, dw.to(w.dtype))
        ctx.mark_non_differentiable(correct)
        return losses.sum(), correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        dh, dw = ctx.saved_tensors
        return (dh * grad).to(dh.dtype), (dw * grad).to(dw.dtype), None, None


def linear_cross_entropy(
    h: Tensor, w: Tensor, labels: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Return (summed cross-entropy () fp32, correct (N,) bool: the label is the first argmax).

    h        (N, C) hidden states
    w        (V, C) LM head; fp32 weights under autocast are cast, their gradient is fp32
    labels   (N,) int64; -100: no loss, no gradient, counted as correct
    chunk    rows of logits that exist at once

    Products use h's dtype (autocast's under autocast) and accumulate in fp32. A label outside the
    vocabulary gives a loss of NaN. The gradients are computed in this call, before any scaling of
    the loss; the gradient of the logits has h's dtype.
    """
    if torch.is_autocast_enabled(h.device.type):
        h = h.to(torch.get_autocast_dtype(h.device.type))
    return _LinearCrossEntropy.apply(h, w, labels, chunk)
