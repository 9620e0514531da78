"""Some kernels in plain torch; the other references are in tests/kernels/references.py."""

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_residual_ref(y: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Add y (B, K) @ weight (N, K)^T + bias (N,) to x (B, N) in place; return x."""
    return x.add_(F.linear(y, weight, bias))


def ln_linear_gelu_ref(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> Tensor:
    """Return gelu(layer_norm(x (B, K)) @ weight (N, K)^T + bias (N,)): (B, N)."""
    h = F.linear(F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, eps), weight, bias)
    return F.gelu(h, approximate="tanh")  # GPT-2's GELU


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
    """Update x, lengths and hidden in place (feedback.py)."""
    active = torch.ones_like(lengths, dtype=torch.bool) if active is None else active
    h = F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, eps)
    hidden.copy_(torch.where(active[:, None], h, hidden))
    lengths += active  # before wpe: the next input is one position later
    x.copy_(hidden + wpe[lengths.clamp(max=len(wpe) - 1)])


def embed_ref(wte: Tensor, token: Tensor, wpe: Tensor, lengths: Tensor, x: Tensor) -> None:
    """Write x (B, C) = wte[token] + wpe[lengths] in place."""
    x.copy_(wte[token] + wpe[lengths.clamp(max=len(wpe) - 1)])
