"""feedback and embed against their references."""

import pytest
import torch

pytest.importorskip("triton")
from helpers import assert_three_way

from kernels.feedback import embed, feedback
from kernels.reference import embed_ref, feedback_ref

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("B, C", [(1, 24), (2, 64), (5, 7), (9, 100), (17, 1)])
def test_feedback_matches_reference(B, C, masked, dtype, device, seed):
    """Sequences at the first position, at the last one, and between."""
    P = 6
    hidden, wpe = (torch.randn(n, C, device=device).to(dtype) for n in (B, P))
    x = torch.randn(B, C, device=device)  # fp32, as in a step
    ln_w, ln_b = (torch.randn(C, device=device).to(dtype) for _ in range(2))
    lengths = torch.randint(0, P, (B,), device=device)
    active = torch.rand(B, device=device) < 0.5 if masked else None
    if masked:
        active[0] = False
    ours, plain = ([t.clone() for t in (x, lengths, hidden)] for _ in range(2))
    exact = [x.double(), lengths.clone(), hidden.double()]
    thought = torch.full_like(hidden, float("nan"))
    feedback(ours[0], ln_w, ln_b, wpe, *ours[1:], active, thought=thought)
    feedback_ref(plain[0], ln_w, ln_b, wpe, *plain[1:], active)
    feedback_ref(exact[0], ln_w.double(), ln_b.double(), wpe.double(), *exact[1:], active)
    assert_three_way(ours[0], plain[0], exact[0])
    assert_three_way(ours[2], plain[2], exact[2])
    assert torch.equal(ours[1], lengths + (1 if active is None else active))
    assert torch.equal(thought, ours[2])
    if masked:
        assert torch.equal(ours[2][~active], hidden[~active])
    # the next input uses the rounded hidden state
    pos = ours[1].clamp(max=P - 1)
    assert torch.equal(ours[0], ours[2].float() + wpe[pos])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, C", [(1, 24), (5, 7), (9, 100)])
def test_embed_equals_reference(B, C, dtype, device, seed):
    wte, wpe = (torch.randn(n, C, device=device).to(dtype) for n in (11, 6))
    token = torch.randint(0, 11, (B,), device=device)
    lengths = torch.randint(0, 8, (B,), device=device)  # some past the last position
    x, expected = (torch.full((B, C), float("nan"), device=device) for _ in range(2))  # fp32
    embed(wte, token, wpe, lengths, x)
    embed_ref(wte, token, wpe, lengths, expected)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("wrong", ["wpe", "hidden", "strides", "lengths", "active"])
def test_bad_input_is_an_error(wrong, device):
    x, hidden, wpe = (torch.zeros(n, 8, device=device) for n in (2, 2, 6))
    ln_w, lengths, active = wpe[0], torch.zeros(2, dtype=torch.int64, device=device), None
    if wrong == "wpe":
        wpe = wpe[:, :-1].contiguous()
    elif wrong == "hidden":
        hidden = hidden[:1]
    elif wrong == "strides":
        x = torch.zeros(8, 2, device=device).T
    elif wrong == "lengths":
        lengths = lengths[:1]
    else:
        active = torch.ones(3, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match="expected"):
        feedback(x, ln_w, ln_w, wpe, lengths, hidden, active)
    if wrong in ("wpe", "strides", "lengths"):
        with pytest.raises(ValueError, match="expected"):
            embed(hidden, lengths, wpe, lengths, x)
