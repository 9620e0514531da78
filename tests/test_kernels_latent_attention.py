"""latent_attention against its truth: the three-way rule, ragged and empty rows, NaN that must not
leak, splits, every gradient. On Triton's interpreter; on a GPU (-m gpu) in bf16 and large too."""

import pytest
import torch

pytest.importorskip("triton")
from helpers import assert_three_way

import kernels.latent_attention as module
from kernels.latent_attention import (
    _blocks,
    latent_attention,
    latent_attention_backward_,
    latent_attention_lse,
    latent_attention_pass,
    latent_attention_scratch,
)
from kernels.reference import latent_attention_lse_ref, latent_attention_ref
from nanococonut.cache import KVCache
from nanococonut.model import cached_attention

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
NAN = float("nan")


def slow(*values):
    """Parameters for pytest -m slow: the interpreter takes a second each."""
    return [pytest.param(v, marks=pytest.mark.slow) for v in values]


def random_rows(lengths, nh, T, hs, dtype, device, over=3):
    """q, k, v as the engine has them: views of a qkv and of a larger cache, NaN behind lengths."""
    lengths = torch.tensor(lengths, device=device)
    B = len(lengths)
    q = torch.randn(B, 3, nh, hs, device=device).to(dtype)[:, 0]
    data = torch.randn(2, 2, B, nh, T + over, hs, device=device).to(dtype)
    seen = torch.arange(T + over, device=device) < lengths[:, None]
    data.masked_fill_(~seen[:, None, :, None], NAN)
    return q, *data[1, :, :, :, :T], lengths


def truth_of(q, k, v, lengths):
    return latent_attention_lse_ref(q.double(), k.double(), v.double(), lengths)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hs", [16, 64, 80, 128, *slow(24, 48, 96)])
def test_forward(hs, dtype, splits, device, seed):
    T = 3 * _blocks(hs)[0] + 5
    q, k, v, lengths = random_rows([T, 0, 1, T // 2 + 3], 2, T, hs, dtype, device)
    scratch = latent_attention_scratch(*k.shape, device, splits)
    out = torch.full(q.shape, NAN, dtype=dtype, device=device)
    got = latent_attention(q, k, v, lengths, scratch=scratch, out=out)
    assert got is out and (got[1] == 0).all()
    assert_three_way(got, latent_attention_ref(q, k, v, lengths), truth_of(q, k, v, lengths)[0])
    again = latent_attention(q, k, v, lengths, scratch=scratch)  # the counters are at zero again
    assert torch.equal(got, again)


def test_the_steps_own_key(device, seed):
    """extra=1: the key just stored at lengths[b] counts; none is looked for behind the cache."""
    q, k, v, lengths = random_rows([9, 1, 40], 1, 40, 16, torch.float32, device)
    before = latent_attention(q, k, v, lengths - 1, extra=1)
    assert torch.equal(before, latent_attention(q, k, v, lengths))
    assert torch.equal(before[2], latent_attention(q, k, v, lengths, extra=1)[2])  # full


def test_equals_the_models_attention_over_a_cache(device, seed):
    """What engine.step does with cached_attention: append, then look at everything so far."""
    cache = KVCache(3, 4, 2, 20, 16, device=device)
    cache.data.normal_()
    cache.lengths.copy_(torch.tensor([7, 0, 19, 3]))
    q, k, v = torch.randn(3, 4, 2, 1, 16, device=device)
    want = cached_attention(cache, cache.lengths[:, None], 20, 1, q, k, v)  # (B, nh, 1, hs)
    got = latent_attention(q[:, :, 0], *cache.data[1], cache.lengths, extra=1)
    torch.testing.assert_close(got, want[:, :, 0], rtol=1e-5, atol=1e-6)


def gradients(op, inputs, grads, **kwargs):
    """Gradients of out and lse in q, k, v."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    outputs = op(*leaves, inputs[3], **kwargs)
    grads = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
    return torch.autograd.grad(outputs, leaves, grads)


def gradient_bounds(q, k, v, lengths, grads):
    """How far dq, dk and dv may be from the truth, element by element: the roundings of the kernel,
    followed to first order through its formulas, in fp64.

    With u and w the unit roundoffs of the inputs' dtype and of fp32: out is stored in the former,
    all else is fp32. A sum of m terms counts as sqrt(m) roundings of the sum of their magnitudes
    (Higham and Mary 2019, with lambda = 1). What makes the bound large is out: ds = p (v.g - out.g)
    cancels, and out.g brings u |out|.|g| along, however small ds is. That error and the lse's are
    the same for every key, so that in dq they come with sums of keys, not of their magnitudes.
    """
    hs, T = q.shape[-1], k.shape[2]
    u, w = (torch.finfo(t).eps / 2 for t in (q.dtype, torch.float32))
    smallest = torch.finfo(q.dtype).tiny * 2 * u  # subnormal: where rounding is not relative
    seen = (torch.arange(T, device=q.device) < lengths[:, None])[:, None, :]  # (B, 1, T)
    q, k, v, g, g_lse = (x.double() for x in (q, k, v, *grads))
    k, v = (x.masked_fill(~seen[..., None], 0) for x in (k, v))
    scale, dot, total = hs**-0.5, hs**0.5 * w, T**0.5 * w

    def over_hs(x, y):  # (B, nh, T, hs), (B, nh, hs) -> (B, nh, T)
        return (x @ y[..., None])[..., 0]

    def over_keys(x, y):  # (B, nh, T), (B, nh, T, hs) -> (B, nh, hs)
        return (x[:, :, None] @ y)[:, :, 0]

    s = (over_hs(k, q) * scale).masked_fill(~seen, float("-inf"))
    lse = s.logsumexp(dim=-1, keepdim=True)
    p = (s - lse).exp()
    # p's relative error: the score's and exp(s - lse)'s (as a GPU has it); and the lse's, which is
    # the mean of the scores' and its own
    d_s = (dot + 2 * w) * over_hs(k.abs(), q.abs()) * scale
    d_p = d_s + w * (3 * (s - lse).abs().masked_fill(~seen, 0) + 8)
    d_lse = (p * d_s).sum(-1, keepdim=True) + total + w * lse.abs()
    out = over_keys(p, v)
    d_out = over_keys(p * (d_p + d_lse + total), v.abs()) + u * out.abs() + smallest
    shared = (out * g).sum(-1, keepdim=True) - g_lse[..., None]
    d_shared = ((d_out + dot * out.abs()) * g.abs()).sum(-1, keepdim=True) + w * shared.abs()
    d_vg = dot * over_hs(v.abs(), g.abs())
    ds = p * (over_hs(v, g) - shared) * scale
    d_ds = (d_p + 3 * w) * ds.abs() + p * scale * d_vg  # each key's own part

    d_dq = over_keys(d_ds + total * ds.abs(), k.abs()) + scale * d_shared * over_keys(p, k).abs()
    d_dq += (d_lse + u) * over_keys(ds, k).abs() + smallest
    d_ds += d_lse * ds.abs() + p * scale * d_shared
    d_dk = (d_ds + u * ds.abs())[..., None] * q.abs()[:, :, None] + smallest
    d_dv = (p * (d_p + d_lse + w + u))[..., None] * g.abs()[:, :, None] + smallest
    return d_dq, d_dk, d_dv


def assert_within(got, truth, bounds):
    """Every element within its bound; nothing where keys lie behind the lengths, but for what
    rounds to nothing."""
    for name, x, y, bound in zip(("dq", "dk", "dv"), got, truth, bounds, strict=True):
        ratio = ((x.double() - y).abs() / bound).max().item()
        assert ratio <= 1, f"{name} is {ratio:.3g} times its bound from the truth"


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hs", [16, 80, 128, *slow(24, 64)])
def test_every_gradient(hs, dtype, splits, device, seed):
    T, nh = 2 * _blocks(hs)[0] + 3, 2 if hs == 16 else 1
    q, k, v, lengths = random_rows([T, 1, T - 9], nh, T, hs, dtype, device)
    grad_lse = torch.randn(3, nh, device=device)
    grads = torch.randn(3, nh, hs, device=device).to(dtype), grad_lse
    got = gradients(latent_attention_lse, (q, k, v, lengths), grads, splits=splits)
    truth = gradients(
        latent_attention_lse_ref, (q.double(), k.double(), v.double(), lengths), grads
    )
    assert_within(got, truth, gradient_bounds(q, k, v, lengths, grads))
    again = gradients(latent_attention_lse, (q, k, v, lengths), grads, splits=splits)
    assert all(map(torch.equal, got, again))


def test_log_sum_exp_and_empty_rows(device, seed):
    q, k, v, lengths = random_rows([0, 33, 50], 2, 50, 48, torch.float32, device)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse = latent_attention_lse(*inputs, lengths, splits=2)
    torch.testing.assert_close(lse.double(), truth_of(q, k, v, lengths)[1])
    assert (lse[0] == float("-inf")).all() and (out[0] == 0).all()
    for grad in torch.autograd.grad((out.sum(), lse[1:].sum()), inputs):
        assert (grad[0] == 0).all() and grad.isfinite().all()


def test_scores_far_below_zero(device, seed):
    """exp(-lse) overflows here: a lane behind the last key must not make 0 * inf of it."""
    q, k, v, lengths = random_rows([5, 130], 1, 300, 16, torch.float32, device)
    q, k = q.abs() * 20, -k.abs() - 10
    grads = torch.randn(2, 1, 16, device=device), torch.zeros(2, 1, device=device)
    got = gradients(latent_attention_lse, (q, k, v, lengths), grads)
    doubles = (q.double(), k.double(), v.double(), lengths)
    assert (truth_of(*doubles)[1] < -100).all()
    truth = gradients(latent_attention_lse_ref, doubles, grads)
    for x, y in zip(got, truth, strict=True):  # scores near -1000 leave four digits
        torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    only_out = torch.autograd.grad(latent_attention_lse(*leaves, lengths)[0], leaves, grads[0])
    assert all(map(torch.equal, got, only_out))


def test_backward_adds_and_touches_nothing_behind_the_lengths(device, seed):
    """Later passes over one cache add into the same dk and dv, in fp32 if wanted."""
    T, splits = 300, 2
    q, k, v, lengths = random_rows([T, 2, 131], 1, T, 16, torch.float16, device)
    dk, dv = torch.randn(2, 3, 1, T + 1, 16, device=device)[:, :, :, :T]
    behind = (torch.arange(T, device=device) >= lengths[:, None])[:, None, :, None]
    dk.masked_fill_(behind, NAN), dv.masked_fill_(behind, NAN)
    want = [dk.double(), dv.double()]
    out, lse = latent_attention_lse(q, k, v, lengths)
    for _ in range(2):
        grad, grad_lse = torch.randn(3, 1, 16, device=device).half(), torch.randn(3, 1).to(device)
        latent_attention_backward_(grad, grad_lse, q, k, v, lengths, out, lse, dk, dv, splits)
        inputs = (q.double(), k.double(), v.double(), lengths)
        more = gradients(latent_attention_lse_ref, inputs, (grad, grad_lse))
        want = [want[0] + more[1], want[1] + more[2]]
    for got, wanted in zip((dk, dv), want, strict=True):
        assert got.isnan().equal(behind.expand_as(got))
        torch.testing.assert_close(got.double(), wanted, rtol=2e-3, atol=2e-3, equal_nan=True)


def test_two_parts_are_joined_by_their_lse(device, seed):
    """A prefix that stays where it is and thoughts that are kept apart: the same as one cache."""
    T, a = 45, 30
    q, k, v, _ = random_rows([T, T], 2, T, 16, torch.float32, device)
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    ends = torch.tensor([a, a - 4], device=device)  # the second row's prefix is shorter
    rest = torch.tensor([T - a, 6], device=device)
    parts = [
        latent_attention_lse(q, k[:, :, :a], v[:, :, :a], ends),
        latent_attention_lse(q, k[:, :, a:], v[:, :, a:], rest),
    ]
    weights = torch.stack([lse for _, lse in parts]).softmax(dim=0)[..., None]
    joined = weights[0] * parts[0][0] + weights[1] * parts[1][0]

    def in_one_row(x):  # the keys of row 1 side by side
        return [x[:1], torch.cat([x[1:, :, : a - 4], x[1:, :, a : a + 6]], dim=2)]

    whole = [
        latent_attention_ref(q[i : i + 1], *in_row, torch.tensor([n], device=device))
        for i, (in_row, n) in enumerate(
            zip(zip(in_one_row(k), in_one_row(v), strict=True), (T, a + 2), strict=True)
        )
    ]
    torch.testing.assert_close(joined, torch.cat(whole))
    grad = torch.randn_like(joined)
    got = torch.autograd.grad(joined, (q, k, v), grad)
    for x, y in zip(got, torch.autograd.grad(torch.cat(whole), (q, k, v), grad), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def several(op, q, k, v, lengths):
    """Three dependent passes over one k and v, which a product then reads too. op: see below."""
    total, x = 0.0, q
    for _ in range(3):
        out, lse, k, v = op(x, k, v, lengths)
        x = out + lse[..., None] / 8
        total = total + (x * x).sum()
    return total + ((q[:, :, None] @ k.transpose(2, 3)) @ v).sum()


def apart(q, k, v, lengths):
    """Each pass with a dk and dv of its own, summed by autograd."""
    return *latent_attention_lse(q, k, v, lengths), k, v


def leaves_of(device, dtype=torch.float32):
    *inputs, lengths = random_rows([5, 33], 1, 40, 16, dtype, device)
    return [x.detach().nan_to_num().clone().requires_grad_() for x in inputs], lengths


@pytest.mark.parametrize("dtype", DTYPES)
def test_passes_add_to_one_gradient(dtype, device, seed, monkeypatch):
    """Equal to what autograd sums; each pass writes where the one behind it wrote."""
    leaves, lengths = leaves_of(device, dtype)
    wrote = []
    monkeypatch.setattr(
        module,
        "latent_attention_backward_",
        lambda *args: wrote.append(args[8:10]) or latent_attention_backward_(*args),
    )
    got = torch.autograd.grad(several(latent_attention_pass, *leaves, lengths), leaves)
    assert len({(dk.data_ptr(), dv.data_ptr()) for dk, dv in wrote}) == 1 and len(wrote) == 3
    usual = torch.autograd.grad(several(apart, *leaves, lengths), leaves)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    exact = several(lambda *a: (*latent_attention_lse_ref(*a), *a[1:3]), *doubles, lengths)
    for x, y, z in zip(got, usual, torch.autograd.grad(exact, doubles), strict=True):
        assert_three_way(x, y, z)
        assert x.isfinite().all()


def test_passes_of_two_graphs_do_not_mix(device, seed):
    """Backward in any order, twice, in part, and through a checkpoint of either kind."""
    from torch.utils.checkpoint import checkpoint

    leaves, lengths = leaves_of(device)
    want = torch.autograd.grad(several(latent_attention_pass, *leaves, lengths), leaves)
    one, other = (several(latent_attention_pass, *leaves, lengths) for _ in range(2))
    only_q = torch.autograd.grad(other, leaves[0], retain_graph=True)
    found = [
        torch.autograd.grad(one, leaves, retain_graph=True),
        torch.autograd.grad(other, leaves),
        torch.autograd.grad(one, leaves),
        (*only_q, *want[1:]),
    ]
    for again in (True, False):
        copies = [x.detach().clone().requires_grad_() for x in leaves]

        def op(*args, again=again):
            return checkpoint(latent_attention_pass, *args, use_reentrant=again)

        several(op, *copies, lengths).backward()
        found.append([x.grad for x in copies])
    for grads in found:
        assert all(map(torch.equal, grads, want))


def test_a_gradient_that_is_somebody_elses_is_not_written_to(device, seed):
    """A sum hands one tensor to both of its terms, an expanded one to every element."""
    (q, k, v), lengths = leaves_of(device)
    for read in (lambda k, v: (k + v).square().sum(), lambda k, v: k.sum() + 3 * v.sum()):
        grads = []
        for op in (latent_attention_pass, apart):
            out, _, k2, v2 = op(q, k, v, lengths)
            grads.append(torch.autograd.grad(out.sum() + read(k2, v2), (q, k, v)))
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x, y)


def test_passes_have_no_second_derivative(device, seed):
    leaves, lengths = leaves_of(device)
    loss = several(latent_attention_pass, *leaves, lengths)
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grads[0].sum().backward()


def test_the_ops_are_what_torch_expects(device, seed):
    q, k, v, lengths = random_rows([5, 33], 1, 40, 16, torch.float32, device)
    leaves = [x.detach().clone().nan_to_num().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(latent_attention_lse, (*leaves, lengths, 2))
    q, k, v = (x.detach() for x in leaves)
    out, lse = latent_attention_lse(q, k, v, lengths)
    args = (torch.randn_like(out), torch.randn_like(lse), q, k, v, lengths, out, lse)
    torch.library.opcheck(
        latent_attention_backward_, (*args, torch.zeros_like(k), torch.zeros_like(v))
    )


@pytest.mark.parametrize("op", [apart, latent_attention_pass])
def test_compiles_as_one_graph(op, device, seed):
    leaves, lengths = leaves_of(device)

    def loss(*leaves):
        return several(op, *leaves, lengths)

    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    got = torch.autograd.grad(compiled(*leaves), leaves)
    for x, y in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(x, y)


def test_bad_input_is_named(device):
    q, k, v, lengths = random_rows([4, 2], 2, 8, 16, torch.float32, device)
    for args, said in [
        ((q[:, :1], k, v, lengths), "same B, nh and hs"),
        ((q, k, v, lengths.int()), "int64"),
        ((q, k.transpose(2, 3).contiguous().transpose(2, 3), v, lengths), "one element"),
        ((q.double(), k.double(), v.double(), lengths), "float64"),
    ]:
        with pytest.raises(ValueError, match=said):
            latent_attention(*args)
    with pytest.raises(ValueError, match="scratch is for"):
        scratch = latent_attention_scratch(3, 2, 8, 16, device, splits=2)
        latent_attention(q, k, v, lengths, scratch=scratch)
    with pytest.raises(ValueError, match="out must be contiguous"):
        latent_attention(q, k, v, lengths, out=q)


@pytest.mark.parametrize("B, T, splits", [(1, 448, 16), (8, 448, 4), (64, 448, 1), (1, 64, 2)])
def test_splits_come_from_shapes_alone(B, T, splits, monkeypatch):
    """GPT-2's 12 heads of 64 on 132 multiprocessors."""
    properties = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for name in ("empty", "zeros"):
        monkeypatch.setattr(torch, name, lambda *shape, **kwargs: shape)
    assert latent_attention_scratch(B, 12, T, 64, "cuda").splits == splits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
class TestOnAGpu:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("B", [1, 8, 64])
    def test_long_contexts(self, B, dtype, seed):
        T = 4096
        lengths = [T, *torch.randint(0, T, (B - 1,)).tolist()]
        q, k, v, lengths = random_rows(lengths, 12, T, 64, dtype, "cuda")
        got = latent_attention(q, k, v, lengths)
        usual = latent_attention_ref(q, k, v, lengths)
        assert_three_way(got, usual, truth_of(q, k, v, lengths)[0])
        assert all(torch.equal(got, latent_attention(q, k, v, lengths)) for _ in range(20))

    def test_a_cache_of_more_than_2_to_the_31_elements(self, seed):
        B, nh, T, hs = 264, 16, 4096, 128
        k = torch.empty(B, nh, T, hs, dtype=torch.bfloat16, device="cuda").normal_()
        v = torch.empty_like(k).normal_()
        assert k.numel() > 2**31
        q = torch.randn(B, nh, hs, device="cuda").bfloat16()
        lengths = torch.randint(0, T + 1, (B,), device="cuda")
        lengths[-1] = T
        out, lse = latent_attention_lse(q, k, v, lengths)
        last = slice(B - 2, B)
        inputs = [x[last] for x in (q, k, v, lengths)]
        usual = latent_attention_lse_ref(*inputs)
        truth = truth_of(*inputs)
        assert_three_way(out[last], usual[0], truth[0])
        grad, grad_lse = torch.randn_like(out), torch.randn_like(lse)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        dq = latent_attention_backward_(grad, grad_lse, q, k, v, lengths, out, lse, dk, dv)
        grads = grad[last], grad_lse[last]
        doubles = [x.double() for x in inputs[:3]]
        truth = gradients(latent_attention_lse_ref, [*doubles, inputs[3]], grads)
        assert_within((dq[last], dk[last], dv[last]), truth, gradient_bounds(*inputs, grads))

    def test_a_captured_graph_follows_the_lengths(self, seed):
        """Grids are static, loops and used splits are read from the device; the counters come back
        to zero after each replay."""
        q, k, v, lengths = random_rows([900] * 2, 12, 1000, 64, torch.bfloat16, "cuda")
        k, v = k.nan_to_num(), v.nan_to_num()
        scratch = latent_attention_scratch(*k.shape, "cuda")
        assert scratch.splits > 1
        out = torch.empty(q.shape, dtype=q.dtype, device="cuda")
        latent_attention(q, k, v, lengths, 1, scratch, out)  # compiled before capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            latent_attention(q, k, v, lengths, 1, scratch, out)
        for n in ([0, 1], [899, 30], [1000, 500], [63, 64]):
            lengths.copy_(torch.tensor(n))
            graph.replay()
            assert torch.equal(out, latent_attention(q, k, v, lengths, 1))
            assert (scratch.counter == 0).all()
