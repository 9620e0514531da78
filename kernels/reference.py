"""The truth: what each kernel computes, in the plainest torch. Slow, and correct in any dtype."""

import torch
from torch import Tensor
from torch.nn import functional as F


def append_ref(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    lengths: Tensor,
    active: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """q (B, nh, hs) of x (B, C); k, v are written at each row's length (see kernels/append.py)."""
    B, nh, T, hs = cache_k.shape
    qkv = F.linear(F.layer_norm(x, (nh * hs,), ln_weight, ln_bias, eps), weight, bias)
    q, k, v = qkv.view(B, 3, nh, hs).unbind(1)  # (B, nh, hs) each
    for b, length in enumerate(lengths.tolist()):
        if length < T and (active is None or active[b]):
            cache_k[b, :, length] = k[b]
            cache_v[b, :, length] = v[b]
    return q


def linear_residual_ref(y: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """x (B, N) += y (B, K) @ weight (N, K)^T + bias (N,), in place."""
    return x.add_(F.linear(y, weight, bias))


def ln_linear_gelu_ref(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> Tensor:
    """gelu(layer_norm(x (B, K)) @ weight (N, K)^T + bias (N,)) -> (B, N)."""
    h = F.linear(F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, eps), weight, bias)
    return F.gelu(h, approximate="tanh")


def feedback_ref(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    wpe: Tensor,
    lengths: Tensor,
    hidden: Tensor,
    active: Tensor | None = None,
    eps: float = 1e-5,
) -> None:
    """x, lengths and hidden in place (see kernels/feedback.py)."""
    active = torch.ones_like(lengths, dtype=torch.bool) if active is None else active
    h = F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, eps)
    hidden.copy_(torch.where(active[:, None], h, hidden))
    lengths += active
    x.copy_(hidden + wpe[lengths.clamp(max=len(wpe) - 1)])


def embed_ref(wte: Tensor, token: Tensor, wpe: Tensor, lengths: Tensor, x: Tensor) -> None:
    """x (B, C) = wte[token] + wpe[lengths], in place."""
    x.copy_(wte[token] + wpe[lengths.clamp(max=len(wpe) - 1)])


def latent_attention_lse_ref(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """q (B, nh, hs) over the keys [0, lengths[b]) of k, v (B, nh, T, hs) -> out (B, nh, hs), lse
    (B, nh), the log-sum-exp of the scaled scores. No key: zeros, and -inf."""
    seen = torch.arange(k.shape[2], device=k.device) < lengths[:, None]  # (B, T)
    hidden = ~seen[:, None, :, None]
    k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)  # whatever stands there, NaN even
    scores = (k @ q[..., None])[..., 0] * q.shape[-1] ** -0.5  # (B, nh, T)
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    empty = (lengths <= 0)[:, None, None]
    p = scores.masked_fill(empty, 0).softmax(dim=-1).masked_fill(empty, 0)
    return (p[:, :, None] @ v)[:, :, 0], scores.logsumexp(dim=-1)


def latent_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, extra: int = 0
) -> Tensor:
    """q (B, nh, hs) over the keys [0, lengths[b] + extra) -> (B, nh, hs)."""
    return latent_attention_lse_ref(q, k, v, lengths + extra)[0]


def linear_cross_entropy_ref(h: Tensor, w: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """h (N, C), w (V, C), targets (N,), -100 where there is none -> the summed cross-entropy ()
    and right (N,) bool: the label is the most probable token, or there is none."""
    logits = F.linear(h, w)
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return loss, (logits.argmax(-1) == targets) | (targets == -100)
