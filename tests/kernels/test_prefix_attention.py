"""prefix_attention against its reference: every gradient, accumulation over chained calls, autograd
graphs that must not mix. On Triton's interpreter; on a GPU (-m gpu) also bf16 and large sizes."""

import pytest
import torch

pytest.importorskip("triton")
from attention_inputs import random_inputs, slow
from helpers import assert_three_way

import kernels.prefix_attention as module
from kernels.latent_attention import block_sizes
from kernels.prefix_attention import PrefixBuffers, prefix_attention
from kernels.reference import latent_attention_ref

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
NAN = float("nan")


def buffers_for(k, n_splits=None):
    return PrefixBuffers(*k.shape, k.device, n_splits)


def attend(q, k, v, lengths, n_splits=None):
    """Return (out, lse) of one call with a dK and dV of its own."""
    buffers = buffers_for(k, n_splits)
    return prefix_attention(q, k, v, lengths, buffers)[:2]


def exact(q, k, v, lengths):
    return latent_attention_ref(q.double(), k.double(), v.double(), lengths)


def gradients(op, inputs, grads, **kwargs):
    """Return the gradients of out and lse in q, k, v."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    outputs = op(*leaves, inputs[3], **kwargs)
    grads = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
    return torch.autograd.grad(outputs, leaves, grads)


def gradient_bounds(q, k, v, lengths, grads):
    """Return elementwise error bounds of dq, dk, dv: the kernel's roundings, propagated to first
    order through its formulas in fp64.

    u and w are the unit roundoffs of the inputs' dtype and of fp32. out is stored in the former,
    everything else in fp32. A sum of m terms counts as sqrt(m) roundings of the sum of their
    magnitudes (Higham and Mary 2019, with lambda = 1). The largest part comes from out: ds =
    p (v.g - out.g) cancels, and out.g has an error of u |out|.|g|, however small ds is. This error
    and that of lse are the same for every key, so in dq they multiply sums of keys, not of their
    magnitudes.
    """
    hs, T = q.shape[-1], k.shape[2]
    u, w = (torch.finfo(t).eps / 2 for t in (q.dtype, torch.float32))
    smallest = torch.finfo(q.dtype).tiny * 2 * u  # subnormals round absolutely
    valid = (torch.arange(T, device=q.device) < lengths[:, None])[:, None, :]  # (B, 1, T)
    q, k, v, g, g_lse = (x.double() for x in (q, k, v, *grads))
    k, v = (x.masked_fill(~valid[..., None], 0) for x in (k, v))
    scale, dot, total = hs**-0.5, hs**0.5 * w, T**0.5 * w

    def over_hs(x, y):  # (B, nh, T, hs), (B, nh, hs) -> (B, nh, T)
        return (x @ y[..., None])[..., 0]

    def over_keys(x, y):  # (B, nh, T), (B, nh, T, hs) -> (B, nh, hs)
        return (x[:, :, None] @ y)[:, :, 0]

    s = (over_hs(k, q) * scale).masked_fill(~valid, float("-inf"))
    lse = s.logsumexp(dim=-1, keepdim=True)
    p = (s - lse).exp()
    # relative error of p: from the score, from exp(s - lse) on a GPU, and from lse, which has the
    # mean error of the scores and its own
    d_s = (dot + 2 * w) * over_hs(k.abs(), q.abs()) * scale
    d_p = d_s + w * (3 * (s - lse).abs().masked_fill(~valid, 0) + 8)
    d_lse = (p * d_s).sum(-1, keepdim=True) + total + w * lse.abs()
    out = over_keys(p, v)
    d_out = over_keys(p * (d_p + d_lse + total), v.abs()) + u * out.abs() + smallest
    shared = (out * g).sum(-1, keepdim=True) - g_lse[..., None]
    d_shared = ((d_out + dot * out.abs()) * g.abs()).sum(-1, keepdim=True) + w * shared.abs()
    d_vg = dot * over_hs(v.abs(), g.abs())
    ds = p * (over_hs(v, g) - shared) * scale
    d_ds = (d_p + 3 * w) * ds.abs() + p * scale * d_vg  # not shared by the keys

    d_dq = over_keys(d_ds + total * ds.abs(), k.abs()) + scale * d_shared * over_keys(p, k).abs()
    d_dq += (d_lse + u) * over_keys(ds, k).abs() + smallest
    d_ds += d_lse * ds.abs() + p * scale * d_shared
    d_dk = (d_ds + u * ds.abs())[..., None] * q.abs()[:, :, None] + smallest
    d_dv = (p * (d_p + d_lse + w + u))[..., None] * g.abs()[:, :, None] + smallest
    return d_dq, d_dk, d_dv


def assert_within(grads, expected, bounds):
    """Every element is within its bound, which past the lengths is a subnormal."""
    for name, x, y, bound in zip(("dq", "dk", "dv"), grads, expected, bounds, strict=True):
        ratio = ((x.double() - y).abs() / bound).max().item()
        assert ratio <= 1, f"{name}: error is {ratio:.3g} times its bound"


@pytest.mark.parametrize("n_splits", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hs", [16, 80, 128, *slow(24, 64)])
def test_gradients_match_reference(hs, dtype, n_splits, device, seed):
    T, nh = 2 * block_sizes(hs)[0] + 3, 2 if hs == 16 else 1
    q, k, v, lengths = random_inputs([T, 1, T - 9], nh, T, hs, dtype, device)
    grad_lse = torch.randn(3, nh, device=device)
    grads = torch.randn(3, nh, hs, device=device).to(dtype), grad_lse
    ours = gradients(attend, (q, k, v, lengths), grads, n_splits=n_splits)
    expected = gradients(latent_attention_ref, (q.double(), k.double(), v.double(), lengths), grads)
    assert_within(ours, expected, gradient_bounds(q, k, v, lengths, grads))
    again = gradients(attend, (q, k, v, lengths), grads, n_splits=n_splits)
    assert all(map(torch.equal, ours, again))


def test_empty_sequences_give_zeros(device, seed):
    q, k, v, lengths = random_inputs([0, 33, 50], 2, 50, 48, torch.float32, device)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attend(*inputs, lengths, n_splits=2)
    torch.testing.assert_close(lse.double(), exact(q, k, v, lengths)[1])
    assert (lse[0] == float("-inf")).all() and (out[0] == 0).all()
    for grad in torch.autograd.grad((out.sum(), lse[1:].sum()), inputs):
        assert (grad[0] == 0).all() and grad.isfinite().all()


def test_very_negative_scores_give_finite_gradients(device, seed):
    """exp(-lse) overflows here: a lane past the last key must not compute 0 * inf."""
    q, k, v, lengths = random_inputs([5, 130], 1, 300, 16, torch.float32, device)
    q, k = q.abs() * 20, -k.abs() - 10
    grads = torch.randn(2, 1, 16, device=device), torch.zeros(2, 1, device=device)
    ours = gradients(attend, (q, k, v, lengths), grads)
    doubles = (q.double(), k.double(), v.double(), lengths)
    assert (exact(*doubles)[1] < -100).all()
    expected = gradients(latent_attention_ref, doubles, grads)
    for x, y in zip(ours, expected, strict=True):  # scores near -1000 leave four digits
        torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    only_out = torch.autograd.grad(attend(*leaves, lengths)[0], leaves, grads[0])
    assert all(map(torch.equal, ours, only_out))


def test_backward_adds_within_the_lengths_only(device, seed):
    """Backward adds to dk and dv, and leaves slots past the lengths alone."""
    T = 300
    q, k, v, lengths = random_inputs([T, 2, 131], 1, T, 16, torch.float16, device)
    dk, dv = torch.randn(2, 3, 1, T, 16, device=device).half()
    unused = (torch.arange(T, device=device) >= lengths[:, None])[:, None, :, None]
    dk.masked_fill_(unused, NAN), dv.masked_fill_(unused, NAN)
    expected = [dk.double(), dv.double()]
    buffers = buffers_for(k, 2)
    k, v = k.requires_grad_(), v.requires_grad_()
    for _ in range(2):  # into a copy, then in place
        grad, grad_lse = torch.randn(3, 1, 16, device=device).half(), torch.randn(3, 1).to(device)
        outputs = prefix_attention(q, k, v, lengths, buffers)
        dk, dv = torch.autograd.grad(outputs, (k, v), (grad, grad_lse, dk, dv))
        inputs = (q.double(), k.double(), v.double(), lengths)
        added = gradients(latent_attention_ref, inputs, (grad, grad_lse))
        expected = [expected[0] + added[1], expected[1] + added[2]]
    for x, y in zip((dk, dv), expected, strict=True):
        assert x.isnan().equal(unused.expand_as(x))
        torch.testing.assert_close(x.double(), y, rtol=2e-3, atol=2e-3, equal_nan=True)


def test_lse_joins_two_parts(device, seed):
    """Attention over a prefix and over thoughts, combined, equals attention over all keys."""
    T, a = 45, 30
    q, k, v, _ = random_inputs([T, T], 2, T, 16, torch.float32, device)
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    ends = torch.tensor([a, a - 4], device=device)  # the second prefix is shorter
    rest = torch.tensor([T - a, 6], device=device)
    parts = [
        attend(q, k[:, :, :a], v[:, :, :a], ends),
        attend(q, k[:, :, a:], v[:, :, a:], rest),
    ]
    weights = torch.stack([lse for _, lse in parts]).softmax(dim=0)[..., None]
    joined = weights[0] * parts[0][0] + weights[1] * parts[1][0]

    def concatenated(x):  # the valid keys of sequence 1, without the gap
        return [x[:1], torch.cat([x[1:, :, : a - 4], x[1:, :, a : a + 6]], dim=2)]

    whole = [
        latent_attention_ref(q[i : i + 1], *kv, torch.tensor([n], device=device))[0]
        for i, (kv, n) in enumerate(
            zip(zip(concatenated(k), concatenated(v), strict=True), (T, a + 2), strict=True)
        )
    ]
    torch.testing.assert_close(joined, torch.cat(whole))
    grad = torch.randn_like(joined)
    ours = torch.autograd.grad(joined, (q, k, v), grad)
    for x, y in zip(ours, torch.autograd.grad(torch.cat(whole), (q, k, v), grad), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def chain(op, q, k, v, lengths):
    """Return a loss of three dependent calls of op over one k and v, read by a product too."""
    total, x = 0.0, q
    for _ in range(3):
        out, lse, k, v = op(x, k, v, lengths)
        x = out + lse[..., None] / 8
        total = total + (x * x).sum()
    return total + ((q[:, :, None] @ k.transpose(2, 3)) @ v).sum()


def chained(q, k, v, lengths, op=prefix_attention):
    """Return the loss of a chain of calls that share buffers."""
    buffers = buffers_for(k)
    return chain(lambda *args: op(*args, buffers), q, k, v, lengths)


def separate(q, k, v, lengths):
    """Call with a dK and dV of its own, so that autograd sums them."""
    return *attend(q, k, v, lengths), k, v


def random_leaves(device, dtype=torch.float32):
    *inputs, lengths = random_inputs([5, 33], 1, 40, 16, dtype, device)
    return [x.detach().nan_to_num().clone().requires_grad_() for x in inputs], lengths


@pytest.mark.parametrize("dtype", DTYPES)
def test_chained_calls_share_one_gradient_buffer(dtype, device, seed, monkeypatch):
    """Equal to autograd's own sum, and every call writes to the memory of the call after it."""
    leaves, lengths = random_leaves(device, dtype)
    written, writable = [], module._writable
    monkeypatch.setattr(
        module, "_writable", lambda *args: written.append(writable(*args)) or written[-1]
    )
    ours = torch.autograd.grad(chained(*leaves, lengths), leaves)
    assert len({t.data_ptr() for t in written}) == 2 and len(written) == 2 * 3  # dk and dv
    summed = torch.autograd.grad(chain(separate, *leaves, lengths), leaves)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    loss = chain(lambda *a: (*latent_attention_ref(*a), *a[1:3]), *doubles, lengths)
    for x, y, z in zip(ours, summed, torch.autograd.grad(loss, doubles), strict=True):
        assert_three_way(x, y, z)
        assert x.isfinite().all()


def test_two_graphs_do_not_mix(device, seed):
    """Backward in any order, twice, in part, and through a checkpoint of either kind."""
    from torch.utils.checkpoint import checkpoint

    leaves, lengths = random_leaves(device)
    expected = torch.autograd.grad(chained(*leaves, lengths), leaves)
    one, other = (chained(*leaves, lengths) for _ in range(2))
    only_q = torch.autograd.grad(other, leaves[0], retain_graph=True)
    results = [
        torch.autograd.grad(one, leaves, retain_graph=True),
        torch.autograd.grad(other, leaves),
        torch.autograd.grad(one, leaves),
        (*only_q, *expected[1:]),
    ]
    for reentrant in (True, False):
        copies = [x.detach().clone().requires_grad_() for x in leaves]

        def op(*args, reentrant=reentrant):
            return checkpoint(prefix_attention, *args, use_reentrant=reentrant)

        chained(*copies, lengths, op=op).backward()
        results.append([x.grad for x in copies])
    for grads in results:
        assert all(map(torch.equal, grads, expected))


def test_two_graphs_may_share_buffers(device, seed):
    """If two graphs share buffers by mistake, they are copied instead of being added to."""
    leaves, lengths = random_leaves(device)
    expected = torch.autograd.grad(chained(*leaves, lengths), leaves)
    buffers = buffers_for(leaves[1])
    losses = [chain(lambda *a: prefix_attention(*a, buffers), *leaves, lengths) for _ in range(2)]
    results = [torch.autograd.grad(loss, leaves) for loss in losses]
    for grads in results:
        assert all(map(torch.equal, grads, expected))


def test_foreign_gradients_are_not_written_to(device, seed):
    """Autograd passes one tensor to both terms of a sum, and an expanded one for each element."""
    (q, k, v), lengths = random_leaves(device)
    buffers = buffers_for(k)
    for read in (lambda k, v: (k + v).square().sum(), lambda k, v: k.sum() + 3 * v.sum()):
        grads = []
        for op in (lambda *args: prefix_attention(*args, buffers), separate):
            out, _, k2, v2 = op(q, k, v, lengths)
            grads.append(torch.autograd.grad(out.sum() + read(k2, v2), (q, k, v)))
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x, y)


def test_second_derivative_is_an_error(device, seed):
    leaves, lengths = random_leaves(device)
    grads = torch.autograd.grad(chained(*leaves, lengths), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grads[0].sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_offsets_beyond_31_bits(seed):
    """Keys of more than 2^31 elements: the last sequences are right."""
    B, nh, T, hs = 264, 16, 4096, 128
    k = torch.empty(B, nh, T, hs, dtype=torch.bfloat16, device="cuda").normal_()
    v = torch.empty_like(k).normal_()
    assert k.numel() > 2**31
    q = torch.randn(B, nh, hs, device="cuda").bfloat16()
    lengths = torch.randint(0, T + 1, (B,), device="cuda")
    lengths[-1] = T
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, lse = attend(q, k, v, lengths)
    last = slice(B - 2, B)
    inputs = [x[last].detach() for x in (q, k, v, lengths)]
    assert_three_way(out[last], latent_attention_ref(*inputs)[0], exact(*inputs)[0])
    grad, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (grad, grad_lse))
    grads = grad[last], grad_lse[last]
    doubles = [x.double() for x in inputs[:3]]
    expected = gradients(latent_attention_ref, [*doubles, inputs[3]], grads)
    assert_within((dq[last], dk[last], dv[last]), expected, gradient_bounds(*inputs, grads))
