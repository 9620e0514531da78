"""feedback and embed against their references, and a whole chain of thoughts by all kernels."""

import copy

import pytest
import torch

pytest.importorskip("triton")
from helpers import assert_three_way, impls_and_dtypes, random_gpt
from torch.nn import functional as F

from kernels.append import append
from kernels.feedback import embed, feedback
from kernels.linear_residual import linear_residual
from kernels.ln_linear_gelu import ln_linear_gelu
from kernels.reference import embed_ref, feedback_ref
from nanococonut.inference import steps

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
    n_taken, thought = torch.full_like(lengths, 2), torch.full_like(hidden, float("nan"))
    feedback(ours[0], ln_w, ln_b, wpe, *ours[1:], active, n_taken=n_taken, thought=thought)
    feedback_ref(plain[0], ln_w, ln_b, wpe, *plain[1:], active)
    feedback_ref(exact[0], ln_w.double(), ln_b.double(), wpe.double(), *exact[1:], active)
    assert_three_way(ours[0], plain[0], exact[0])
    assert_three_way(ours[2], plain[2], exact[2])
    assert torch.equal(ours[1], lengths + (1 if active is None else active))
    assert torch.equal(n_taken, ours[1] - lengths + 2) and torch.equal(thought, ours[2])
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


def attention(q, k, v, lengths):
    """Return attention (B, C) of q (B, nh, hs) over keys [0, lengths[b]], in plain torch."""
    valid = torch.arange(k.shape[2], device=q.device) <= lengths[:, None]
    y = F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=valid[:, None, None])
    return y.flatten(1)


def blocks(model, cache, x, impl, active):
    """Run every layer of one step in place on the residual stream x (B, C)."""
    for layer, block in enumerate(model.h):
        ln, fc = block.ln_1, block.attn.c_attn
        args = (ln.weight, ln.bias, fc.weight, fc.bias)
        q = append(x, *args, cache.data[layer], cache.lengths, active, impl=impl)
        y = attention(q, *cache.data[layer], cache.lengths)
        linear_residual(y, block.attn.c_proj.weight, block.attn.c_proj.bias, x, impl)
        ln, fc = block.ln_2, block.mlp.c_fc
        h = ln_linear_gelu(x, ln.weight, ln.bias, fc.weight, fc.bias, impl=impl)
        linear_residual(h, block.mlp.c_proj.weight, block.mlp.c_proj.bias, x, impl)


def chain(model, cache, hidden, n, token, impl, active):
    """Return the hidden states of n thoughts and a token from hidden (B, C), by the kernels."""
    x, hidden = torch.empty_like(hidden, dtype=torch.float32), hidden.clone()
    rows = cache.batch_index[:, 0].contiguous()
    states = []
    embed(hidden, rows, model.wpe.weight, cache.lengths, x)
    for step in range(n + 1):
        if step == n:  # the last step is a token
            active = None
            embed(model.wte.weight, token, model.wpe.weight, cache.lengths, x)
        blocks(model, cache, x, impl, active)
        ln = model.ln_f
        feedback(x, ln.weight, ln.bias, model.wpe.weight, cache.lengths, hidden, active)
        states.append(hidden.clone())
    return torch.stack(states)


def engines_chain(model, cache, state, n, token, active):
    """Return the same by the engine's torch path."""
    states = []
    for _ in range(n):
        state = steps.latent_step(model, cache, state, active)
        states.append(state.hidden)
    state = steps.decode_step(model, cache, token, state)
    return torch.stack([*states, state.hidden])


def prefilled(dtype, lengths, device, **shape):
    """Return a random GPT, its cache after prefill of a ragged batch, the state, and a token."""
    model = random_gpt(**shape).to(device)
    idx = torch.randint(0, 41, (len(lengths), max(lengths)), device=device)
    cache = model.new_cache(len(lengths), max(lengths) + 8)
    state = steps.prefill(model, cache, idx, torch.tensor(lengths, device=device))
    model, cache.data = model.to(dtype), cache.data.to(dtype)
    state = steps.DecodeState(state.hidden.to(dtype), state.prev_embedding.to(dtype), state.span)
    return model, cache, state, torch.randint(0, 41, (len(lengths),), device=device)


def compare(model, cache, state, token, n, active, impl):
    """Assert that hidden states, lengths and valid slots agree with the torch path."""
    exact, exact_cache = copy.deepcopy(model).double(), copy.deepcopy(cache)
    exact_cache.data = exact_cache.data.double()
    exact_state = steps.DecodeState(
        state.hidden.double(), state.prev_embedding.double(), state.span
    )
    exact_states = engines_chain(exact, exact_cache, exact_state, n, token, active)
    plain_cache = copy.deepcopy(cache)
    plain = engines_chain(model, plain_cache, state, n, token, active)
    ours = chain(model, cache, state.hidden, n, token, impl, active)
    assert_three_way(ours, plain, exact_states)
    assert torch.equal(cache.lengths, exact_cache.lengths)
    valid = torch.arange(cache.data.shape[4], device=token.device) < cache.lengths[:, None]
    slots = [c.data.transpose(3, 4)[:, :, valid.nonzero()[:, 0], valid.nonzero()[:, 1]]
            for c in (cache, plain_cache, exact_cache)]  # fmt: skip
    assert_three_way(*slots)


@torch.no_grad()
@pytest.mark.parametrize("impl", ["gemv", "gemm_tile", "gemm", "library"])
def test_chain_of_thoughts_equals_the_torch_path(impl, device, seed):
    """A ragged batch with an inactive sequence: every hidden state, key and value."""
    dtype = torch.float16 if impl == "gemm" else torch.float32
    args = prefilled(dtype, [5, 1, 9], device, n_embd=12, seed=seed)
    active = torch.tensor([True, False, True], device=device)
    compare(*args, 2, active, impl)


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("impl, dtype", impls_and_dtypes())
def test_captured_chain_equals_the_eager_one(dtype, impl, seed):
    """A replayed CUDA graph of several thoughts equals the eager run bit for bit."""
    args = prefilled(dtype, [5, 1, 9, 30, 2], "cuda", n_embd=96, n_head=6, seed=seed)
    model, cache, state, token = args
    active = torch.tensor([True, False, True, True, True], device="cuda")
    data, lengths = cache.data.clone(), cache.lengths.clone()
    eager = chain(model, cache, state.hidden, 4, token, impl, active)
    eager_data, eager_lengths = cache.data.clone(), cache.lengths.clone()

    cache.data.copy_(data), cache.lengths.copy_(lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(model, cache, state.hidden, 4, token, impl, active)
    for _ in range(3):
        cache.data.copy_(data), cache.lengths.copy_(lengths)
        graph.replay()
        assert torch.equal(captured, eager)
        assert torch.equal(cache.data, eager_data) and torch.equal(cache.lengths, eager_lengths)
