"""Muon equals torch.optim.Muon, and its updates are orthogonal."""

import pytest
import torch

from nanococonut.training.muon import Muon, orthogonal


def test_singular_values_are_near_one():
    """Guards against a wrong coefficient, which still trains, but worse."""
    torch.manual_seed(0)
    m = torch.randn(3, 20, 50, dtype=torch.float64)
    values = torch.linalg.svdvals(orthogonal(m))
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(m, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(orthogonal(m).flatten(1), (u @ v).flatten(1))
    assert cosine.min() > 0.97


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (64, 16)])
def test_equals_torchs_up_to_bfloat16(shape):
    """Guards against a different scale of tall matrices, Nesterov momentum or weight decay."""
    torch.manual_seed(1)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    a = Muon([ours], lr=0.02, weight_decay=0.1)
    b = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1)
    for _ in range(5):
        start = ours.detach().clone()
        theirs.data.copy_(start)
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
        moved = (ours - start).norm()
        assert ((ours - theirs).norm() / moved).item() < 0.02


def test_queries_keys_and_values_are_three_matrices():
    """Guards against queries, keys and values that are orthogonalized as one matrix."""
    torch.manual_seed(2)
    joint = torch.nn.Parameter(torch.randn(24, 8))
    apart = [torch.nn.Parameter(part.clone()) for part in joint.detach().chunk(3)]
    grad = torch.randn(24, 8)
    joint.grad = grad
    for p, g in zip(apart, grad.chunk(3), strict=True):
        p.grad = g
    Muon([joint], lr=0.1).step()
    Muon(apart, lr=0.1).step()
    torch.testing.assert_close(joint.detach(), torch.cat([p.detach() for p in apart]))
