"""The LM head and its cross-entropy over the supervised rows, a chunk of logits at a time.

The products are the library's (cuBLAS): at 768 x 50,260 nothing that Triton makes is faster. What
is ours is between them: one kernel reads a chunk of logits twice (the second time from L2), gives
each row's loss and whether its label is the most probable token, and leaves the gradient in place.
The gradients of h and w are made right then, in the forward pass, as Liger-Kernel does: the loss is
a sum, so backward only scales them. No more than `chunk` rows of logits ever exist, and no
softmax beside them; 1,024 rows of GPT-2's in bf16 are 103 MB.

Memory kept for backward: the gradients themselves, h's shape and w's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100
CHUNK = 1024
BLOCK_V = 2048
NUM_WARPS = 4
NUM_STAGES = 3  # loads go ahead through shared memory, see latent_attention


@triton.jit
def _softmax_cross_entropy_kernel(
    x_ptr,  # (rows, padded V): logits, replaced by d loss / d logits if GRAD
    label_ptr,  # (rows,) int64
    loss_ptr,  # (rows,) fp32
    right_ptr,  # (rows,) bool: the first of the greatest logits is the label's
    V, stride_x,
    GRAD: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x
    label = tl.load(label_ptr + row).to(tl.int32)
    counts = label != -100  # of those that do not: no loss, no gradient, right
    v = tl.arange(0, BLOCK_V)

    # per lane of the block, so that nothing crosses threads inside the loop
    top = tl.full((BLOCK_V,), -1e30, tl.float32)  # finite: a lane that saw no logit makes no NaN
    total = tl.zeros((BLOCK_V,), tl.float32)
    where = tl.zeros((BLOCK_V,), tl.int32)
    for start in tl.range(0, V, BLOCK_V, num_stages=STAGES):
        x = _logits(x_ptr, start + v, V, stride_x)
        new_top = tl.maximum(top, x)
        total = total * tl.exp(top - new_top) + tl.exp(x - new_top)
        where = tl.where(x > top, start + v, where)
        top = new_top
    best = tl.max(top, axis=0)
    total = tl.sum(total * tl.exp(top - best), axis=0)
    first = tl.min(tl.where(top == best, where, V), axis=0)
    known = (label >= 0) & (label < V)
    at_label = tl.load(x_ptr + label, mask=known, other=float("nan")).to(tl.float32)
    # best and total are kept apart: their sum would round by |best|, and every p of the row with it
    tl.store(loss_ptr + row, tl.where(counts, best - at_label + tl.log(total), 0.0))
    tl.store(right_ptr + row, (first == label) | ~counts)

    if GRAD:
        share = 1.0 / total
        tl.debug_barrier()  # the label's logit has been read by all before it is written over
        for start in tl.range(0, V, BLOCK_V, num_stages=STAGES):
            x = _logits(x_ptr, start + v, V, stride_x)
            grad = tl.exp(x - best) * share - tl.where(start + v == label, 1.0, 0.0)
            grad = tl.where(counts, grad, 0.0)
            tl.store(x_ptr + start + v, grad.to(x_ptr.dtype.element_ty), mask=start + v < stride_x)


@triton.jit
def _logits(x_ptr, v, V, stride_x):
    # the mask is the padded width, a multiple of 16: a load stays 128 bits wide up to the end
    x = tl.load(x_ptr + v, mask=v < stride_x, other=0.0).to(tl.float32)
    return tl.where(v < V, x, float("-inf"))


def _rows_triton(logits: Tensor, labels: Tensor, grad: bool) -> tuple[Tensor, Tensor]:
    """Loss and right of each row of logits (rows, V), a view of a wider buffer whose padding may be
    written; grad: the logits become d loss / d logits."""
    rows, V = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    right = torch.empty(rows, dtype=torch.bool, device=logits.device)
    _softmax_cross_entropy_kernel[(rows,)](
        logits, labels, loss, right, V, logits.stride(0),
        GRAD=grad, BLOCK_V=min(BLOCK_V, triton.next_power_of_2(V)), STAGES=NUM_STAGES,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES, enable_fp_fusion=True,
    )  # fmt: skip
    return loss, right


def _rows_torch(logits: Tensor, labels: Tensor, grad: bool) -> tuple[Tensor, Tensor]:
    x = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    loss = F.cross_entropy(x, labels, reduction="none")
    none = labels == IGNORE
    right = (x.argmax(-1) == labels) | none
    if grad:
        p = x.softmax(-1)
        p[torch.arange(len(p), device=p.device), labels.masked_fill(none, 0)] -= 1
        logits.copy_(p.masked_fill_(none[:, None], 0.0))
    return loss, right


@torch.library.custom_op("nanococonut::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    h: Tensor,
    w: Tensor,
    targets: Tensor,
    n_labels: int,
    chunk: int,
    kernel: bool,
    grad_h: bool,
    grad_w: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> loss (), right (N,), dh like h or (0,), dw like w or (0,): gradients of the loss."""
    V, wide = w.shape[0], h.dtype in (torch.float32, torch.float64)
    w_h = w.to(h.dtype)
    none = targets == IGNORE
    if n_labels < 0:
        n_labels = int((~none).sum())  # the host waits here
    elif not h.is_cuda and n_labels < (found := int((~none).sum())):  # a GPU is not asked
        raise ValueError(f"n_labels={n_labels}, and {found} targets are not {IGNORE}")
    at = none.int().argsort(stable=True)[:n_labels]
    rows, labels = h[at], targets[at]
    right = torch.ones(len(h), dtype=torch.bool, device=h.device)
    losses = h.new_zeros(len(at), dtype=h.dtype if wide else torch.float32)
    dh = torch.zeros_like(h) if grad_h else h.new_empty(0)
    # chunks are summed in fp32
    dw = torch.zeros_like(w, dtype=h.dtype if wide else torch.float32) if grad_w else w.new_empty(0)
    # each row of logits starts at a multiple of 16 elements: for 128-bit loads, and for cuBLAS
    buffer = h.new_empty(min(chunk, len(at)), triton.cdiv(V, 16) * 16)
    of_rows = _rows_triton if kernel else _rows_torch
    for start in range(0, len(at), chunk):
        part = slice(start, start + chunk)
        x = rows[part]
        logits = buffer[: len(x), :V]
        torch.mm(x, w_h.t(), out=logits)
        losses[part], right[at[part]] = of_rows(logits, labels[part], grad_h or grad_w)
        if grad_h:
            dh[at[part]] = logits @ w_h
        if grad_w:
            if dw.dtype == x.dtype:
                dw.addmm_(logits.t(), x)
            else:
                dw += logits.t() @ x
    return losses.sum(), right, dh, dw.to(w.dtype)


@_linear_cross_entropy.register_fake
def _(h, w, targets, n_labels, chunk, kernel, grad_h, grad_w):
    loss = h.new_empty((), dtype=torch.promote_types(h.dtype, torch.float32))
    right = torch.empty(h.shape[0], dtype=torch.bool, device=h.device)
    dh = torch.empty_like(h) if grad_h else h.new_empty(0)
    return loss, right, dh, torch.empty_like(w) if grad_w else w.new_empty(0)


def _setup_context(ctx, inputs, output):
    *_, ctx.grad_h, ctx.grad_w = inputs
    _, right, dh, dw = output
    ctx.mark_non_differentiable(right, dh, dw)
    ctx.save_for_backward(dh, dw)


def _backward(ctx, grad, *_):
    dh, dw = ctx.saved_tensors
    dh = (dh * grad).to(dh.dtype) if ctx.grad_h else None
    dw = (dw * grad).to(dw.dtype) if ctx.grad_w else None
    return dh, dw, None, None, None, None, None, None


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def linear_cross_entropy(
    h: Tensor,
    w: Tensor,
    targets: Tensor,
    chunk: int = CHUNK,
    kernel: bool | None = None,
    n_labels: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Hidden states h (N, C), head w (V, C), targets (N,) int64 -> the summed cross-entropy (), in
    fp32 (fp64 for fp64), and right (N,) bool: whether each label is the most probable token (of
    equals, the first).

    Rows whose target is -100 cost nothing, have no loss, and count as right. Products are in h's
    dtype (autocast's, under autocast) and accumulate in fp32; w may be fp32 then, and its gradient
    is w's dtype. chunk: rows whose logits exist at once. kernel: Triton (None: on a GPU) or torch.
    A label outside the vocabulary gives a loss of NaN (Triton) or an error (torch). n_labels: how
    many targets are not -100, at most, where the host knows: it then waits for no GPU.

    Gradients are made in this call unless grad mode is off: evaluate under torch.no_grad(). The
    gradient of the logits is in h's dtype and not scaled by what comes after the sum.
    """
    if h.dim() != 2 or w.shape[1:] != h.shape[1:] or targets.shape != h.shape[:1]:
        raise ValueError(
            f"h {tuple(h.shape)} must be (N, C), w {tuple(w.shape)} (V, C) and targets "
            f"{tuple(targets.shape)} (N,)"
        )
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 row")
    if torch.is_autocast_enabled(h.device.type):
        h = h.to(torch.get_autocast_dtype(h.device.type))
    if kernel is None:
        kernel = h.is_cuda and h.dtype != torch.float64  # the kernel's sums are fp32
    grads = torch.is_grad_enabled()
    loss, right, _, _ = _linear_cross_entropy(
        h, w, targets, -1 if n_labels is None else n_labels, chunk, kernel,
        grads and h.requires_grad, grads and w.requires_grad,
    )  # fmt: skip
    return loss, right


def aot_cases(hip: bool = False) -> list:
    """What kernels.aot compiles. hip changes nothing here."""
    from kernels.aot import Case

    def case(name: str, dtype: str, grad: bool) -> Case:
        signature = dict(x_ptr=f"*{dtype}", label_ptr="*i64", loss_ptr="*fp32", right_ptr="*i1")
        return Case(
            name,
            _softmax_cross_entropy_kernel,
            signature | dict(V="i32", stride_x="i32"),
            dict(GRAD=grad, BLOCK_V=BLOCK_V, STAGES=NUM_STAGES),
            NUM_WARPS,
            NUM_STAGES,
            wide_loads=True,
            divisible=[*signature, "stride_x"],
        )

    return [case("bf16", "bf16", True), case("bf16 no grad", "bf16", False),
            case("fp32", "fp32", True)]  # fmt: skip
