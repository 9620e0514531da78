"""Muon: momentum with orthogonalized updates, for the matrices inside a transformer's layers.

This follows Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon). The update of a
matrix is its momentum, with all singular values pulled towards 1 by five Newton-Schulz steps.
torch.optim.Muon orthogonalizes one matrix at a time in bfloat16. On a CPU without bfloat16
arithmetic, this takes longer than the rest of a small model's training step (docs/LOG.md). Here,
matrices of the same shape are batched, in their own precision.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

STEPS = 5
# Jordan's coefficients of the quintic: the steepest slope at 0 that still maps (0, 1] close to 1
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonal(m: Tensor) -> Tensor:
    """Return approximately the nearest matrices with orthonormal rows.

    m: (n, rows, cols) with rows <= cols. Singular values of the result are between 0.7 and 1.2.
    """
    x = m / (m.norm(dim=(1, 2), keepdim=True) + 1e-7)  # singular values within (0, 1]
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x


class Muon(Optimizer):
    """Muon for 2-D parameters. A (3n, n) matrix is treated as three: queries, keys and values."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            momentum, lr = group["momentum"], group["lr"]
            by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor, float]]] = {}
            for p in group["params"]:
                if p.grad is None:  # not used in this step
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(state["momentum"], momentum)  # Nesterov
                p.mul_(1 - lr * group["weight_decay"])
                n = 3 if p.shape[0] == 3 * p.shape[1] else 1
                for w, u in zip(p.chunk(n), update.chunk(n), strict=True):
                    rows, cols = u.shape
                    scale = max(1.0, rows / cols) ** 0.5  # Jordan's: larger for tall matrices
                    w, u = (w.mT, u.mT) if rows > cols else (w, u)
                    by_shape.setdefault(u.shape, []).append((w, u, scale))
            for entries in by_shape.values():
                updates = orthogonal(torch.stack([u for _, u, _ in entries]))
                for (w, _, scale), u in zip(entries, updates, strict=True):
                    w.add_(u, alpha=-lr * scale)
