"""Inputs of the attention tests."""

import pytest
import torch


def slow(*values):
    """Return parameters for pytest -m slow: the interpreter takes a second for each."""
    return [pytest.param(v, marks=pytest.mark.slow) for v in values]


def random_inputs(lengths, nh, T, hs, dtype, device, extra_slots=3):
    """Return q, k, v, lengths: views of a qkv and of a larger cache, NaN past each length."""
    lengths = torch.tensor(lengths, device=device)
    B = len(lengths)
    q = torch.randn(B, 3, nh, hs, device=device).to(dtype)[:, 0]
    data = torch.randn(2, 2, B, nh, T + extra_slots, hs, device=device).to(dtype)
    valid = torch.arange(T + extra_slots, device=device) < lengths[:, None]
    data.masked_fill_(~valid[:, None, :, None], float("nan"))
    return q, *data[1, :, :, :, :T], lengths
