"""The end of a latent step: the last hidden state becomes the next input, one position later.

One launch applies the final LayerNorm, adds the position embedding and increments the length, with
one program per sequence. `embed` makes a step's input from a token instead of a thought.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels._check import check_tensors
from kernels._launch import EPS, await_launches, normalize, pdl


@triton.jit
def _feedback_kernel(
    x_ptr,  # residual stream (B, C), read and written
    ln_w_ptr,  # LayerNorm weight (C,), read
    ln_b_ptr,  # LayerNorm bias (C,), read
    wpe_ptr,  # position embeddings (P, C), read
    lengths_ptr,  # (B,) int64, read and written
    hidden_ptr,  # (B, C), written if active, read if not
    active_ptr,  # (B,) bool, read; None: all
    thought_ptr,  # (B, C), written: a copy of hidden; None: no copy
    eps, P, C: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    offs_c = tl.arange(0, BLOCK_C)
    mask = offs_c < C
    ln_w = tl.load(ln_w_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    ln_b = tl.load(ln_b_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    await_launches(PDL)
    # issue all loads first, starting with those that other loads depend on
    length, step = tl.load(lengths_ptr + b), 1
    if active_ptr is not None:
        step = tl.load(active_ptr + b).to(tl.int64)
        before = tl.load(hidden_ptr + b * C + offs_c, mask=mask, other=0.0)
    x = tl.load(x_ptr + b * C + offs_c, mask=mask, other=0.0).to(tl.float32)
    length += step
    # clamped, so that a full sequence does not read past the end of wpe
    position = tl.load(wpe_ptr + tl.minimum(length, P - 1) * C + offs_c, mask=mask, other=0.0)
    tl.debug_barrier()  # all threads must have read x and the length before they are overwritten
    h = normalize(x, mask, ln_w, ln_b, eps, C, 0)
    h = h.to(hidden_ptr.dtype.element_ty)  # the next input uses the rounded hidden state
    if active_ptr is not None:
        h = tl.where(step == 1, h, before)
    tl.store(hidden_ptr + b * C + offs_c, h, mask=mask)
    if thought_ptr is not None:
        tl.store(thought_ptr + b * C + offs_c, h, mask=mask)
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
    P, C: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    offs_c = tl.arange(0, BLOCK_C)
    mask = offs_c < C
    await_launches(PDL)
    token = tl.load(token_ptr + b)
    length = tl.minimum(tl.load(lengths_ptr + b), P - 1)
    emb = tl.load(wte_ptr + token * C + offs_c, mask=mask, other=0.0).to(tl.float32)
    position = tl.load(wpe_ptr + length * C + offs_c, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + b * C + offs_c, (emb + position).to(x_ptr.dtype.element_ty), mask=mask)


def feedback(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, wpe: Tensor, lengths: Tensor, hidden: Tensor,
    active: Tensor | None = None, thought: Tensor | None = None,
) -> None:  # fmt: skip
    """Turn x, the output of the last layer, into the input of the next step, in place.

    hidden    (B, C) = layer_norm(x), the head's input; unchanged for inactive sequences
    lengths   (B,) int64 += 1; unchanged for inactive sequences
    x         (B, C) = hidden + wpe[lengths], with the new lengths
    wpe       (P, C); a full sequence uses the last position, and its x is never used
    active    (B,) bool; None: all
    thought   (B, C) = hidden: a copy of the thought that is fed back; None: no copy
    """
    B, C = x.shape
    check_tensors(
        x=(x, (B, C)), ln_weight=(ln_weight, (C,)), ln_bias=(ln_bias, (C,)),
        wpe=(wpe, (len(wpe), C)), lengths=(lengths, (B,)), hidden=(hidden, (B, C)),
        active=(active, (B,)), thought=(thought, (B, C)),
    )  # fmt: skip
    _feedback_kernel[(B,)](
        x, ln_weight, ln_bias, wpe, lengths, hidden, active, thought, EPS,
        len(wpe), C, triton.next_power_of_2(C),
        num_warps=4, enable_fp_fusion=True, **pdl(x.device, B),
    )  # fmt: skip


def embed(wte: Tensor, token: Tensor, wpe: Tensor, lengths: Tensor, x: Tensor) -> None:
    """Write x (B, C) = wte[token] + wpe[lengths] in place; token is (B,) int64.

    With hidden states (B, C) as wte and 0 .. B - 1 as token, x is the input of a first thought.
    Positions are clamped as in `feedback`.
    """
    B, C = x.shape
    check_tensors(
        wte=(wte, (len(wte), C)), token=(token, (B,)), wpe=(wpe, (len(wpe), C)),
        lengths=(lengths, (B,)), x=(x, (B, C)),
    )  # fmt: skip
    _embed_kernel[(B,)](
        wte, token, wpe, lengths, x, len(wpe), C, triton.next_power_of_2(C),
        num_warps=4, enable_fp_fusion=True, **pdl(x.device, B),
    )  # fmt: skip
