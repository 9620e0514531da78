"""The truth: what each kernel computes, in the plainest torch. Slow, and correct in any dtype."""

import torch
from torch import Tensor
from torch.nn import functional as F


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
