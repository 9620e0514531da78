"""append against its reference: q and the slots to be written; no other slot may change."""

import pytest
import torch

pytest.importorskip("triton")
from helpers import assert_three_way, impls_and_dtypes

from kernels.append import append
from kernels.reference import append_ref

IMPLS = ["gemv", "gemm_tile", "gemm", "library"]
NAN = float("nan")
# sequences, heads, head size: heads narrower than a block of columns, C not a power of two
SHAPES = [(1, 3, 8), (3, 5, 5), (17, 1, 8)]


def layer(B, C, dtype, device):
    """Return x (B, C) in fp32, as in a step, and in dtype: LayerNorm weight and bias (C,), QKV
    weight (3C, C) and bias (3C,)."""
    shapes = [(B, C), (C,), (C,), (3 * C, C), (3 * C,)]
    x, *rest = (torch.randn(s, device=device) for s in shapes)
    ln_w, ln_b, w, b = (t.to(dtype) for t in rest)
    return x * 2 + 3, ln_w + 1, ln_b, w / C**0.5, b


def bits(t):
    return t.contiguous().view(torch.uint8)


def check(B, nh, hs, T, dtype, device, impl, data, lengths):
    """Append to layer 1 of data (2, 2, >= B, nh, >= T, hs). Compare q and the new slots with the
    reference, and all other slots with their old content."""
    args = layer(B, nh * hs, dtype, device)
    before = data.clone()
    q = append(*args, data[1, :, :B, :, :T], lengths, impl=impl)

    exact = before.double()
    q64 = append_ref(*(a.double() for a in args), exact[1, :, :B, :, :T], lengths)
    plain = before.clone()
    plain_q = append_ref(*args, plain[1, :, :B, :, :T], lengths)
    assert q.shape == (B, nh, hs) and q.is_contiguous()
    assert_three_way(q, plain_q, q64)

    due = torch.zeros(data.shape[2], data.shape[4], dtype=torch.bool, device=device)  # (B, T)
    for b, length in enumerate(lengths.tolist()):
        due[b, length:T][:1] = True
    rows, slots = due.nonzero(as_tuple=True)
    written = [d[1, :, rows, :, slots] for d in (data, plain, exact)]  # (due, 2, nh, hs) each
    if len(rows):
        assert_three_way(*written)
    data[1, :, rows, :, slots] = before[1, :, rows, :, slots]
    assert torch.equal(bits(data), bits(before)), "a slot that is not due was written"

    again = before.clone()
    assert torch.equal(q, append(*args, again[1, :, :B, :, :T], lengths, impl=impl))
    assert torch.equal(again[1, :, rows, :, slots], written[0])


@pytest.mark.parametrize("impl, dtype", impls_and_dtypes())
@pytest.mark.parametrize("B, nh, hs", SHAPES)
def test_query_and_slots_match_reference(B, nh, hs, dtype, impl, device, seed, nan_memory):
    T = 5
    data = torch.full((2, 2, B, nh, T, hs), NAN, dtype=dtype, device=device)
    lengths = torch.randint(0, T + 1, (B,), device=device)
    lengths[0] = 0
    lengths[-1] = T if B > 2 else T - 1  # full: nothing may be written past the cache
    check(B, nh, hs, T, dtype, device, impl, data, lengths)


@pytest.mark.parametrize("impl", ["gemm_tile", "library"])
def test_views_of_a_larger_cache(impl, device, seed, nan_memory):
    """Fewer sequences and slots than allocated, another dtype, only one sequence not full."""
    data = torch.full((2, 2, 4, 2, 9, 8), NAN, dtype=torch.float32, device=device)
    lengths = torch.tensor([7, 7, 6], device=device)
    check(3, 2, 8, 7, torch.float32, device, impl, data, lengths)
    args = layer(3, 16, torch.float16, device)
    k, v = cache = data[0, :, :3, :, :7]
    append(*args, cache, lengths, impl=impl)
    assert not k[2, :, 6].isnan().any() and k[:2].isnan().all() and v[2, :, :6].isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("nh, C", [(12, 768), (16, 1024), (20, 1280), (25, 1600)])
@pytest.mark.parametrize("B", [1, 3, 8, 33, 64, 256])
def test_gpt2_sizes(B, nh, C, impl, seed, nan_memory):
    data = torch.full((2, 2, B, nh, 40, C // nh), NAN, dtype=torch.bfloat16, device="cuda")
    lengths = torch.randint(0, 41, (B,), device="cuda")
    check(B, nh, C // nh, 40, torch.bfloat16, "cuda", impl, data, lengths)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("impl", IMPLS)
def test_offsets_beyond_31_bits(impl, seed):
    """A cache of more than 2^31 elements: the last key and value are stored at the right slot."""
    B, nh, hs, T = 350, 12, 64, 4096
    args = layer(B, nh * hs, torch.bfloat16, "cuda")
    data = torch.zeros(2, B, nh, T, hs, dtype=torch.bfloat16, device="cuda")
    assert data.numel() > 2**31
    lengths = torch.full((B,), T - 1, device="cuda")
    append(*args, data, lengths, impl=impl)
    small = torch.zeros(2, B, nh, 1, hs, dtype=torch.bfloat16, device="cuda")
    append(*args, small, torch.zeros_like(lengths), impl=impl)
    assert torch.equal(data[:, :, :, -1:], small)
    assert (data[:, :, :, : T - 1].amax(), data[:, :, :, : T - 1].amin()) == (0, 0)


@pytest.mark.parametrize("wrong", ["heads", "weight", "strides", "lengths"])
def test_bad_input_is_an_error(wrong, device):
    x, ln_w, ln_b, w, b = layer(2, 24, torch.float32, device)
    cache = torch.zeros(2, 2, 3, 4, 8, device=device)
    lengths = torch.zeros(2, dtype=torch.int64, device=device)
    if wrong == "heads":
        cache = cache[:, :, :2]
    elif wrong == "weight":
        w, b = w[:-8], b[:-8]
    elif wrong == "strides":
        cache = torch.zeros(2, 2, 3, 8, 4, device=device).transpose(3, 4)
    else:
        lengths = lengths[:1]
    with pytest.raises(ValueError, match="expected"):
        append(x, ln_w, ln_b, w, b, cache, lengths)
