"""linear_residual and ln_linear_gelu against their truths, in every form; how forms are chosen."""

import pytest
import torch

pytest.importorskip("triton")
from conftest import assert_three_way

from kernels._linear import TILE_ROW_BYTES, auto_form, plan
from kernels.linear_residual import linear_residual
from kernels.ln_linear_gelu import ln_linear_gelu
from kernels.reference import linear_residual_ref, ln_linear_gelu_ref

FORMS = ["gemv", "tile", "library"]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
# rows, outputs, inputs: no powers of two, less than a block, several chunks, several loops
SHAPES = [(1, 24, 96), (2, 20, 300), (17, 17, 700)]
GPT2 = [768, 1024, 1280, 1600]


def randn(*shape, dtype, device):
    return torch.randn(*shape, device=device).to(dtype)


def layer(B, N, K, dtype, device):
    """x (B, K), LayerNorm's weight and bias (K,), weight (N, K), bias (N,)."""
    x, ln_w, ln_b, w, b = (
        randn(*shape, dtype=dtype, device=device) for shape in [(B, K), (K,), (K,), (N, K), (N,)]
    )
    x[:, 0] += 30  # a mean far from zero, and one great value, as GPT-2's residual stream has
    return x + 3, ln_w + 1, ln_b, w / K**0.5, b


def double(*tensors):
    return [t.double() for t in tensors]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, N, K", SHAPES)
def test_ln_linear_gelu(B, N, K, dtype, form, device, seed, nan_memory):
    K = min(K, 500)  # a longer row of fp32 is no tile's
    args = layer(B, N, K, dtype, device)
    got = ln_linear_gelu(*args, form=form)
    assert_three_way(got, ln_linear_gelu_ref(*args), ln_linear_gelu_ref(*double(*args)))
    assert torch.equal(got, ln_linear_gelu(*args, form=form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, N, K", SHAPES)
def test_linear_residual(B, N, K, dtype, form, device, seed):
    y, _, _, w, b = layer(B, N, K, dtype, device)
    rows = randn(B + 2, N, dtype=dtype, device=device)
    before, x = rows.clone(), rows[1:-1]
    assert linear_residual(y, w, b, x, form) is x
    usual = linear_residual_ref(y, w, b, before[1:-1].clone())
    assert_three_way(x, usual, linear_residual_ref(*double(y, w, b, before[1:-1])))
    assert torch.equal(rows[[0, -1]], before[[0, -1]])  # the neighbours in memory
    assert torch.equal(x, linear_residual(y, w, b, before[1:-1], form))


@pytest.mark.parametrize("form", ["gemv", "tile"])
def test_a_rows_values_do_not_reach_another(form, device, seed):
    """Padded rows and columns, a neighbour's NaN: nothing leaks."""
    x, *rest = layer(3, 20, 24, torch.float32, device)
    want = ln_linear_gelu(x, *rest, form=form)
    x[1] = float("nan")
    got = ln_linear_gelu(x, *rest, form=form)
    assert torch.equal(got[[0, 2]], want[[0, 2]]) and got[1].isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("C", GPT2)
@pytest.mark.parametrize("B", [1, 3, 8, 33, 64, 256])
def test_gpt2_sizes(B, C, form, seed, nan_memory):
    if form == "tile" and 2 * C > TILE_ROW_BYTES:
        pytest.skip("too long a row")
    args = layer(B, 4 * C, C, torch.bfloat16, "cuda")
    got = ln_linear_gelu(*args, form=form)
    assert_three_way(got, ln_linear_gelu_ref(*args), ln_linear_gelu_ref(*double(*args)))
    for _ in range(5):
        assert torch.equal(got, ln_linear_gelu(*args, form=form))
    y, _, _, w, b = layer(B, C, 4 * C, torch.bfloat16, "cuda")
    x = randn(B, C, dtype=torch.bfloat16, device="cuda")
    got, usual = linear_residual(y, w, b, x.clone(), form), linear_residual_ref(y, w, b, x.clone())
    assert_three_way(got, usual, linear_residual_ref(*double(y, w, b, x)))
    for _ in range(5):
        assert torch.equal(got, linear_residual(y, w, b, x.clone(), form))


def test_forms_follow_the_batch():
    forms = [auto_form(b, 2) for b in (1, 4, 5, 63, 64, 999)]
    assert forms == ["gemv", "gemv", "tile", "tile", "library", "library"]
    assert auto_form(32, 2, library_from=32) == "library"
    assert auto_form(2, 2, gemv_up_to=1) == "tile"
    assert auto_form(9, 4) == "gemv"  # no tensor cores for fp32
    assert auto_form(9, 2, norm_width=1024) == "tile"
    assert auto_form(9, 2, norm_width=1280) == "gemv"  # GPT-2 large's rows do not fit
    with pytest.raises(ValueError, match="too long"):
        plan("tile", 9, 4800, 1600, 2, True)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("C", [24, 64, *GPT2])
@pytest.mark.parametrize("form, batch", [("gemv", 1), ("gemv", 4), ("tile", 8), ("tile", 63)])
def test_plans_cover_and_fit(form, batch, C, itemsize):
    """The grid covers every row and column; LayerNorm's whole row is in one block; what a program
    keeps in registers and shared memory stays within what an A100 has."""
    for n_out, n_in, norm in [(3 * C, C, 1), (C, C, 0), (4 * C, C, 1), (C, 4 * C, 0)]:
        if form == "tile" and norm and C * itemsize > TILE_ROW_BYTES:
            continue
        (columns, rows), o = plan(form, batch, n_out, n_in, itemsize, bool(norm))
        assert (columns - 1) * o["BLOCK_N"] < n_out <= columns * o["BLOCK_N"]
        assert (rows - 1) * o["BLOCK_M"] < batch <= rows * o["BLOCK_M"]
        step = o["CHUNKS"] * o["BLOCK_K"]
        assert step >= n_in or not (norm or form == "gemv")
        buffers = max(1, o["num_stages"] - 1)
        buffered = buffers * (o["BLOCK_M"] + o["BLOCK_N"]) * step * itemsize
        if form == "gemv":
            assert o["BLOCK_N"] * step <= 128 * 32 * o["num_warps"]  # 128 weights per thread
            assert columns >= 128 or C not in GPT2
        else:
            assert buffered <= 163 * 1024


@pytest.mark.parametrize("wrong", ["weight", "bias", "dtype", "strides", "residual", "form"])
def test_what_does_not_fit_is_an_error(wrong, device):
    x, ln_w, ln_b, w, b = layer(2, 8, 24, torch.float32, device)
    r, form = torch.zeros(2, 8, device=device), "gemv"
    if wrong == "weight":
        w = w[:, :-1].contiguous()
    elif wrong == "bias":
        b = b[:-1]
    elif wrong == "dtype":
        w = w.half()
    elif wrong == "strides":
        w = w.T.contiguous().T
    elif wrong == "residual":
        r = r[:1]
    else:
        form = "fast"
    with pytest.raises(ValueError, match="wanted|weight is"):
        linear_residual(x, w, b, r, form)
    if wrong != "residual":
        with pytest.raises(ValueError, match="wanted|weight is"):
            ln_linear_gelu(x, ln_w, ln_b, w, b, form=form)
