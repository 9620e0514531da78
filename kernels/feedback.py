"""The end of a latent step: the last hidden state becomes the next input, the row one longer.

Final LayerNorm, position embedding and length in one launch of a program per row. `embed` is the
same end for a step that begins with a word instead of a thought.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _feedback_kernel(
    x_ptr,  # (B, C), read and written
    gain_ptr,  # (C,) LayerNorm's weight
    shift_ptr,  # (C,) LayerNorm's bias
    wpe_ptr,  # (P, C)
    lengths_ptr,  # (B,) int64, read and written
    hidden_ptr,  # (B, C), written where active, read where not
    active_ptr,  # (B,) bool; not read without MASKED
    eps,
    P,
    C: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    valid = c < C
    length = tl.load(lengths_ptr + b)
    x = tl.load(x_ptr + b * C + c, mask=valid, other=0.0).to(tl.float32)
    gain = tl.load(gain_ptr + c, mask=valid, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + c, mask=valid, other=0.0).to(tl.float32)
    x = tl.where(valid, x - tl.sum(x, 0) / C, 0.0)
    h = x * tl.rsqrt(tl.sum(x * x, 0) / C + eps) * gain + shift
    h = h.to(hidden_ptr.dtype.element_ty)  # the next input is made of what is kept
    if MASKED:
        active = tl.load(active_ptr + b).to(tl.int1)
        length += active.to(tl.int64)
        h = tl.where(active, h, tl.load(hidden_ptr + b * C + c, mask=valid, other=0.0))
    else:
        length += 1
    position = tl.load(wpe_ptr + tl.minimum(length, P - 1) * C + c, mask=valid, other=0.0)
    tl.debug_barrier()  # every thread has read the row and its length: both are overwritten now
    tl.store(hidden_ptr + b * C + c, h, mask=valid)
    x = h.to(tl.float32) + position.to(tl.float32)
    tl.store(x_ptr + b * C + c, x.to(x_ptr.dtype.element_ty), mask=valid)
    tl.store(lengths_ptr + b, length)


@triton.jit
def _embed_kernel(
    wte_ptr,  # (V, C)
    token_ptr,  # (B,) int64
    wpe_ptr,  # (P, C)
    lengths_ptr,  # (B,) int64
    x_ptr,  # (B, C), written
    P,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    valid = c < C
    token = tl.load(token_ptr + b)
    length = tl.minimum(tl.load(lengths_ptr + b), P - 1)
    e = tl.load(wte_ptr + token * C + c, mask=valid, other=0.0).to(tl.float32)
    position = tl.load(wpe_ptr + length * C + c, mask=valid, other=0.0).to(tl.float32)
    tl.store(x_ptr + b * C + c, (e + position).to(x_ptr.dtype.element_ty), mask=valid)


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
    """In place, for every row of the residual stream x (B, C) behind the last layer:

    hidden (B, C) = layer_norm(x), what the head reads; an inactive row keeps its own.
    lengths (B,) int64 += 1, an inactive row's stays. active (B,) bool or None: all.
    x = hidden + wpe[lengths], the next thought's input at its position, from the new length; at the
    end of wpe (P, C) the last position stands in, for a row that goes no further.

    All contiguous and of one dtype but lengths and active, else ValueError. Nothing is allocated,
    nothing asks the device.
    """
    B, C = x.shape
    _check(x, lengths, ln_weight=(ln_weight, (C,)), ln_bias=(ln_bias, (C,)), wpe=(wpe, (-1, C)),
           hidden=(hidden, (B, C)))  # fmt: skip
    if active is not None and (active.shape != (B,) or not active.is_contiguous()):
        raise ValueError(f"active is {tuple(active.shape)}: ({B},), contiguous, is wanted")
    _feedback_kernel[(B,)](
        x, ln_weight, ln_bias, wpe, lengths, hidden, lengths if active is None else active, eps,
        len(wpe), C, active is not None, triton.next_power_of_2(C),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def embed(wte: Tensor, token: Tensor, wpe: Tensor, lengths: Tensor, x: Tensor) -> None:
    """x (B, C) = wte[token] + wpe[lengths], in place: a word (B,) int64 as the next input.

    With wte a hidden state (B, C) and token 0 .. B-1 it is the input of a first thought. Checks and
    the last position as in `feedback`.
    """
    B, C = x.shape
    _check(x, lengths, wte=(wte, (-1, C)), wpe=(wpe, (-1, C)))
    if token.shape != (B,) or not token.is_contiguous():
        raise ValueError(f"token is {tuple(token.shape)}: ({B},), contiguous, is wanted")
    _embed_kernel[(B,)](
        wte, token, wpe, lengths, x, len(wpe), C, triton.next_power_of_2(C),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def _check(x: Tensor, lengths: Tensor, **others: tuple[Tensor, tuple[int, ...]]) -> None:
    B, C = x.shape
    if lengths.shape != (B,) or not lengths.is_contiguous():
        raise ValueError(f"lengths is {tuple(lengths.shape)}: ({B},), contiguous, is wanted")
    for name, (t, shape) in {"x": (x, (B, C)), **others}.items():
        shape = tuple(len(t) if s == -1 else s for s in shape)
        if t.shape != shape or not t.is_contiguous() or t.dtype != x.dtype:
            raise ValueError(
                f"{name} is {tuple(t.shape)} {t.dtype}, strides {t.stride()}: {shape} {x.dtype}, "
                "contiguous, is wanted"
            )
