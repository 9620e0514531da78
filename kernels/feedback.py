"""The end of a latent step: the last hidden state becomes the next input, one position later.

Final LayerNorm, position embedding and length update in one launch, one program per sequence.
`embed` makes the input of a step that starts from a token instead of a thought.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels._linear import check_tensors


@triton.jit
def _feedback_kernel(
    x_ptr,  # residual stream (B, C), read and written
    ln_w_ptr,  # LayerNorm weight (C,), read
    ln_b_ptr,  # LayerNorm bias (C,), read
    wpe_ptr,  # position embeddings (P, C), read
    lengths_ptr,  # (B,) int64, read and written
    hidden_ptr,  # (B, C), written if active, read if not
    active_ptr,  # (B,) bool, read; None: all
    eps, P, C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    offs_c = tl.arange(0, BLOCK_C)
    mask = offs_c < C
    length = tl.load(lengths_ptr + b)
    x = tl.load(x_ptr + b * C + offs_c, mask=mask, other=0.0).to(tl.float32)
    ln_w = tl.load(ln_w_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    ln_b = tl.load(ln_b_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    x = tl.where(mask, x - tl.sum(x, 0) / C, 0.0)
    h = x * tl.rsqrt(tl.sum(x * x, 0) / C + eps) * ln_w + ln_b
    h = h.to(hidden_ptr.dtype.element_ty)  # the next input uses the rounded hidden state
    if active_ptr is not None:
        active = tl.load(active_ptr + b).to(tl.int1)
        length += active.to(tl.int64)
        h = tl.where(active, h, tl.load(hidden_ptr + b * C + offs_c, mask=mask, other=0.0))
    else:
        length += 1
    # clamped: a full sequence may not advance, but must not read past wpe
    position = tl.load(wpe_ptr + tl.minimum(length, P - 1) * C + offs_c, mask=mask, other=0.0)
    tl.debug_barrier()  # all threads must have read x and the length before they are overwritten
    tl.store(hidden_ptr + b * C + offs_c, h, mask=mask)
    x = h.to(tl.float32) + position.to(tl.float32)
    tl.store(x_ptr + b * C + offs_c, x.to(x_ptr.dtype.element_ty), mask=mask)
    tl.store(lengths_ptr + b, length)


@triton.jit
def _embed_kernel(
    wte_ptr,  # token embeddings (V, C), read
    token_ptr,  # (B,) int64, read
    wpe_ptr,  # position embeddings (P, C), read
    lengths_ptr,  # (B,) int64, read
    x_ptr,  # input of the step (B, C), written
    P, C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    offs_c = tl.arange(0, BLOCK_C)
    mask = offs_c < C
    token = tl.load(token_ptr + b)
    length = tl.minimum(tl.load(lengths_ptr + b), P - 1)
    emb = tl.load(wte_ptr + token * C + offs_c, mask=mask, other=0.0).to(tl.float32)
    position = tl.load(wpe_ptr + length * C + offs_c, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + b * C + offs_c, (emb + position).to(x_ptr.dtype.element_ty), mask=mask)


def feedback(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    wpe: Tensor,
    lengths: Tensor,
    hidden: Tensor,
    active: Tensor | None = None,
    eps: float = 1e-5,
) -> None:
    """Turn the output of the last layer x into the next step's input, in place.

    hidden    (B, C) = layer_norm(x), the head's input; unchanged for inactive sequences
    lengths   (B,) int64 += 1; unchanged for inactive sequences
    x         (B, C) = hidden + wpe[lengths], with the new lengths
    wpe       (P, C); a sequence at its end uses the last position, because it goes no further
    active    (B,) bool; None: all

    All tensors are contiguous and, except lengths and active, of one dtype; raise ValueError if
    not. Nothing is allocated, and the GPU is never synchronized.
    """
    B, C = x.shape
    check_tensors(None, lengths=(lengths, (B,)), active=(active, (B,)))
    check_tensors(
        x, x=(x, (B, C)), ln_weight=(ln_weight, (C,)), ln_bias=(ln_bias, (C,)),
        wpe=(wpe, (len(wpe), C)), hidden=(hidden, (B, C)),
    )  # fmt: skip
    _feedback_kernel[(B,)](
        x, ln_weight, ln_bias, wpe, lengths, hidden, active, eps,
        len(wpe), C, triton.next_power_of_2(C), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def embed(wte: Tensor, token: Tensor, wpe: Tensor, lengths: Tensor, x: Tensor) -> None:
    """Write x (B, C) = wte[token] + wpe[lengths] in place; token is (B,) int64.

    If wte is a hidden state (B, C) and token is 0 .. B-1, x is the input of a first thought.
    Checks and the clamped position are those of `feedback`.
    """
    B, C = x.shape
    check_tensors(None, lengths=(lengths, (B,)), token=(token, (B,)))
    check_tensors(x, x=(x, (B, C)), wte=(wte, (len(wte), C)), wpe=(wpe, (len(wpe), C)))
    _embed_kernel[(B,)](
        wte, token, wpe, lengths, x, len(wpe), C, triton.next_power_of_2(C),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
