"""linear_residual and ln_linear_gelu against their references; how implementations are chosen."""

import pytest
import torch

pytest.importorskip("triton")
from helpers import assert_three_way, impls_and_dtypes

from kernels._linear import auto_impl, launch_config
from kernels.linear_residual import linear_residual
from kernels.ln_linear_gelu import ln_linear_gelu
from kernels.reference import linear_residual_ref, ln_linear_gelu_ref

IMPLS = ["gemv", "gemm_tile", "gemm", "library"]
# rows, outputs, inputs: not powers of two, less than a block, several chunks, several loops
SHAPES = [(1, 24, 96), (2, 20, 300), (17, 17, 700)]
GPT2 = [768, 1024, 1280, 1600]


def randn(*shape, dtype, device):
    return torch.randn(*shape, device=device).to(dtype)


def layer(B, N, K, dtype, device):
    """Return x (B, K) in fp32, as in a step, and in dtype: LayerNorm weight and bias (K,), weight
    (N, K), bias (N,)."""
    ln_w, ln_b, w, b = (
        randn(*shape, dtype=dtype, device=device) for shape in [(K,), (K,), (N, K), (N,)]
    )
    x = torch.randn(B, K, device=device)
    x[:, 0] += 30  # a mean far from zero and one large value, as in GPT-2's residual stream
    return x + 3, ln_w + 1, ln_b, w / K**0.5, b


def double(*tensors):
    return [t.double() for t in tensors]


@pytest.mark.parametrize("impl, dtype", impls_and_dtypes())
@pytest.mark.parametrize("B, N, K", SHAPES)
def test_ln_linear_gelu_matches_reference(B, N, K, dtype, impl, device, seed, nan_memory):
    args = layer(B, N, K, dtype, device)
    out = ln_linear_gelu(*args, impl=impl)
    assert_three_way(out, ln_linear_gelu_ref(*args), ln_linear_gelu_ref(*double(*args)))
    assert torch.equal(out, ln_linear_gelu(*args, impl=impl))


@pytest.mark.parametrize("impl, dtype", impls_and_dtypes())
@pytest.mark.parametrize("B, N, K", SHAPES)
def test_linear_residual_matches_reference(B, N, K, dtype, impl, device, seed):
    x, _, _, w, b = layer(B, N, K, dtype, device)
    y, padded = x.to(dtype), torch.randn(B + 2, N, device=device)
    before, x = padded.clone(), padded[1:-1]
    assert linear_residual(y, w, b, x, impl) is x
    plain = linear_residual_ref(y, w, b, before[1:-1].clone())
    assert_three_way(x, plain, linear_residual_ref(*double(y, w, b, before[1:-1])))
    assert torch.equal(padded[[0, -1]], before[[0, -1]])  # the neighbors in memory
    assert torch.equal(x, linear_residual(y, w, b, before[1:-1], impl))


@pytest.mark.parametrize("impl", ["gemv", "gemm_tile"])
def test_rows_do_not_affect_each_other(impl, device, seed):
    """Neither padding nor the NaN of another row leaks into a row."""
    x, *rest = layer(3, 20, 24, torch.float32, device)
    expected = ln_linear_gelu(x, *rest, impl=impl)
    x[1] = float("nan")
    out = ln_linear_gelu(x, *rest, impl=impl)
    assert torch.equal(out[[0, 2]], expected[[0, 2]]) and out[1].isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("C", GPT2)
@pytest.mark.parametrize("B", [1, 3, 8, 33, 64, 256])
def test_gpt2_sizes(B, C, impl, seed, nan_memory):
    args = layer(B, 4 * C, C, torch.bfloat16, "cuda")
    out = ln_linear_gelu(*args, impl=impl)
    assert_three_way(out, ln_linear_gelu_ref(*args), ln_linear_gelu_ref(*double(*args)))
    for _ in range(5):
        assert torch.equal(out, ln_linear_gelu(*args, impl=impl))
    y, _, _, w, b = layer(B, C, 4 * C, torch.bfloat16, "cuda")
    y, x = y.to(torch.bfloat16), torch.randn(B, C, device="cuda")
    out, plain = linear_residual(y, w, b, x.clone(), impl), linear_residual_ref(y, w, b, x.clone())
    assert_three_way(out, plain, linear_residual_ref(*double(y, w, b, x)))
    for _ in range(5):
        assert torch.equal(out, linear_residual(y, w, b, x.clone(), impl))


def test_implementation_follows_the_sizes():
    """An off-by-one limit would select a slower kernel."""
    impls = [auto_impl(B, K, 2) for B in (1, 4, 5, 32, 33) for K in (768, 3072)]
    assert impls == ["gemv"] * 4 + ["gemm", "gemm_tile"] * 2 + ["gemm"] * 2
    assert [auto_impl(B, 3072, 4) for B in (4, 5)] == ["gemv", "library"]  # no fp32 tensor cores


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("C", [24, 64, *GPT2])
@pytest.mark.parametrize(
    "impl, batch",
    [("gemv", 1), ("gemv", 4), ("gemm_tile", 8), ("gemm_tile", 63), ("gemm", 5), ("gemm", 999)],
)
def test_launch_configs_cover_and_fit(impl, batch, C, itemsize):
    """The grid covers all outputs; blocks fit registers and a consumer GPU's shared memory."""
    for n_out, n_in in [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)]:
        if impl == "gemm" and itemsize == 4:
            continue
        (columns, rows), config = launch_config(impl, batch, n_out, n_in, itemsize)
        assert (columns - 1) * config["BLOCK_N"] < n_out <= columns * config["BLOCK_N"]
        assert (rows - 1) * config["BLOCK_M"] < batch <= rows * config["BLOCK_M"]
        step = config["CHUNKS"] * config["BLOCK_K"]
        if impl == "gemv":  # 128 weights per thread
            assert n_in <= step and config["BLOCK_N"] * step <= 128 * 32 * config["num_warps"]
            assert columns >= 128 or C not in GPT2
        else:
            buffers = config["num_stages"] - (impl == "gemm_tile")
            width = config["BLOCK_M"] + config["BLOCK_N"]
            assert 1 <= buffers and buffers * width * step * itemsize <= 96 * 1024


@pytest.mark.parametrize("wrong", ["weight", "bias", "strides", "residual"])
def test_bad_input_is_an_error(wrong, device):
    x, ln_w, ln_b, w, b = layer(2, 8, 24, torch.float32, device)
    r = torch.zeros(2, 8, device=device)
    if wrong == "weight":
        w = w[:, :-1].contiguous()
    elif wrong == "bias":
        b = b[:-1]
    elif wrong == "strides":
        w = w.T.contiguous().T
    else:
        r = r[:1]
    with pytest.raises(ValueError, match="expected"):
        linear_residual(x, w, b, r)
    if wrong != "residual":
        with pytest.raises(ValueError, match="expected"):
            ln_linear_gelu(x, ln_w, ln_b, w, b)
