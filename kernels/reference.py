"""Every kernel's op in plain torch: slow, but correct in any dtype. Tests compare kernels with it.

The residual stream x may have another dtype than the parameters (fp32 in inference).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def layer_norm_ref(x: Tensor, ln_weight: Tensor, ln_bias: Tensor) -> Tensor:
    """Return the LayerNorm of x (B, C) in the weight's dtype."""
    weight, bias = ln_weight.to(x.dtype), ln_bias.to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], weight, bias).to(ln_weight.dtype)


def append_ref(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor,
    cache: Tensor, lengths: Tensor,
) -> Tensor:  # fmt: skip
    """Return q (B, nh, hs) of x (B, C); store k and v at each sequence's length (append.py)."""
    _, B, nh, T, hs = cache.shape
    qkv = F.linear(layer_norm_ref(x, ln_weight, ln_bias), weight, bias).view(B, 3, nh, hs)
    # one sequence at a time, because each has its own length
    for b, length in enumerate(lengths.tolist()):
        if length < T:  # a full sequence stores nothing
            cache[:, b, :, length] = qkv[b, 1:]  # (2, nh, hs)
    return qkv[:, 0]


def latent_attention_ref(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return (out (B, nh, hs), lse (B, nh)) of q (B, nh, hs) over keys [0, lengths[b]).

    k and v are (B, nh, T, hs); lse is the log-sum-exp of the scaled scores. Without keys out is
    zero and lse is -inf.
    """
    valid = torch.arange(k.shape[2], device=k.device) < lengths[:, None]  # (B, T)
    unused = ~valid[:, None, :, None]
    # unused slots may hold NaN, which a zero weight would not remove
    k, v = k.masked_fill(unused, 0), v.masked_fill(unused, 0)
    scores = (k @ q[..., None])[..., 0] * q.shape[-1] ** -0.5  # (B, nh, T)
    scores = scores.masked_fill(~valid[:, None], float("-inf"))
    # softmax over -inf only would be NaN
    empty = (lengths <= 0)[:, None, None]
    p = scores.masked_fill(empty, 0).softmax(dim=-1).masked_fill(empty, 0)
    # (B, nh, 1, T) @ (B, nh, T, hs) -> (B, nh, hs)
    return (p[:, :, None] @ v)[:, :, 0], scores.logsumexp(dim=-1)


def linear_cross_entropy_ref(h: Tensor, w: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return (summed cross-entropy (), correct (N,) bool) of h (N, C), w (V, C), targets (N,).

    correct: the label is the argmax, or there is none (-100).
    """
    logits = F.linear(h, w)  # (N, V)
    # softmax in at least fp32, as autocast does
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return loss, (logits.argmax(-1) == targets) | (targets == -100)


def linear_residual_ref(y: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Add y (B, K) @ weight (N, K)^T + bias (N,) to x (B, N) in place; return x."""
    # in place, because the residual stream keeps its memory from layer to layer
    return x.add_(F.linear(y, weight, bias))


def ln_linear_gelu_ref(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Return gelu(layer_norm(x (B, K)) @ weight (N, K)^T + bias (N,)): (B, N)."""
    h = F.linear(layer_norm_ref(x, ln_weight, ln_bias), weight, bias)
    return F.gelu(h, approximate="tanh")  # GPT-2's GELU


def feedback_ref(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, wpe: Tensor, lengths: Tensor, hidden: Tensor,
    active: Tensor | None = None,
) -> None:  # fmt: skip
    """Update x (B, C), lengths (B,) and hidden (B, C) in place (feedback.py)."""
    active = torch.ones_like(lengths, dtype=torch.bool) if active is None else active
    # an inactive sequence keeps its state and its length
    h = layer_norm_ref(x, ln_weight, ln_bias)
    hidden.copy_(torch.where(active[:, None], h, hidden))
    lengths += active  # before wpe: the next input is one position later
    # clamped, because a full sequence has no next position; its x is never used
    x.copy_(hidden.to(x.dtype) + wpe[lengths.clamp(max=len(wpe) - 1)])


def embed_ref(wte: Tensor, token: Tensor, wpe: Tensor, lengths: Tensor, x: Tensor) -> None:
    """Write x (B, C) = wte[token] + wpe[lengths] in place."""
    # in place, because a CUDA graph reads the input of a step from one address
    x.copy_(wte[token].to(x.dtype) + wpe[lengths.clamp(max=len(wpe) - 1)])
