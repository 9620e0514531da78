"""Building blocks of a step's linear layers: (B, N) = f(x) W^T + b, f a LayerNorm or the identity.

A step has one row of x per sequence, so its speed is bound by reading the weights. W is the weight
of an nn.Linear, (N, K) with K contiguous. One program computes one block of outputs and accumulates
in fp32. The implementations are:

- `gemv`, for a few rows: each warp loads all weights of a few columns at once, before it reads x,
  and multiplies them with every row while they are in registers. No loop, no shared memory. It
  also applies LayerNorm: every program repeats it, which costs less than another launch.
- `gemm_tile`, for up to 32 rows and a large K: tensor cores (`tl.dot`), with K split among warps.
- `gemm`, for all other sizes: the usual pipelined loop over K.
- "library": PyTorch's matrix product, for fp32, which tensor cores only support as TF32.

All but `gemv` expect rows that `layer_norm` has normalized. `launch_config` depends only on static
shapes, so a captured graph replays the same launches as an eager call. The shapes include the batch
size, so the rounding of a row depends on the size of its batch.
"""

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from kernels._launch import EPS, await_launches, normalize, pdl, prefetch_rows

# measured on an H200 with the sizes of GPT-2 124M
GEMV_MAX_ROWS = 4
TILE_MAX_ROWS = 32
TILE_MIN_INPUTS = 2048
MAX_PROGRAMS = 96  # of gemm; it takes larger blocks rather than more programs
MULTIPROCESSORS = 132  # of an H100 or H200
SHARED_BYTES = 96 << 10  # limit per program, since consumer GPUs have 99 KiB of shared memory


@triton.jit
def gemv(
    x_ptr,  # input (B, K), read
    w_ptr,  # weight (N, K), read
    ln_w_ptr,  # LayerNorm weight (K,), read; None: no LayerNorm
    ln_b_ptr,  # LayerNorm bias (K,), read
    residual_ptr,  # added to the result (B, N), read; None: nothing
    eps, B, row0, col0,
    N: tl.constexpr, K: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return outputs [row0, row0 + BLOCK_M) x [col0, col0 + BLOCK_N), without the bias, in fp32.

    BLOCK_K is a power of two, at least K. All threads lie along K, so x and the weights have the
    same layout and are multiplied in place; only the final sums are reduced across threads.
    """
    offs_m = row0 + tl.arange(0, BLOCK_M)[:, None, None]
    offs_n = col0 + tl.arange(0, BLOCK_N)[None, :, None]
    offs_k = tl.arange(0, BLOCK_K)[None, None, :]
    mask_k = offs_k < K
    w = tl.load(w_ptr + offs_n * K + offs_k, mask=(offs_n < N) & mask_k, other=0.0)
    if ln_w_ptr is not None:
        ln_w = tl.load(ln_w_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        ln_b = tl.load(ln_b_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    await_launches(PDL)  # meanwhile, the loads of the weights above are in flight
    x = tl.load(x_ptr + offs_m * K + offs_k, mask=(offs_m < B) & mask_k, other=0.0)
    residual = _load_residual(residual_ptr, B, row0, col0, N, BLOCK_M, BLOCK_N)
    x = x.to(tl.float32)  # (BLOCK_M, 1, BLOCK_K)
    if ln_w_ptr is not None:
        x = normalize(x, mask_k, ln_w, ln_b, eps, K, 2)
    return residual + tl.sum(x * w.to(tl.float32), 2)


@triton.jit
def gemm_tile(
    x_ptr, w_ptr, residual_ptr,  # as in gemv, x in w's dtype
    B, row0, col0,
    N: tl.constexpr, K: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Return the same block as gemv without LayerNorm, computed on tensor cores.

    Each iteration of a pipelined loop covers CHUNKS * BLOCK_K elements of K. The warps multiply
    different chunks, whose products are added at the end.
    """
    offs_m = row0 + tl.arange(0, BLOCK_M)[None, :, None]
    offs_n = col0 + tl.arange(0, BLOCK_N)[None, :, None]
    chunk = tl.arange(0, CHUNKS)[:, None, None]
    prefetch_rows(w_ptr, col0, N, K, BLOCK_N, PDL)
    await_launches(PDL)
    residual = _load_residual(residual_ptr, B, row0, col0, N, BLOCK_M, BLOCK_N)
    acc = tl.zeros((CHUNKS, BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, CHUNKS * BLOCK_K):
        offs_k = k0 + chunk * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]  # (CHUNKS, 1, BLOCK_K)
        w = tl.load(w_ptr + offs_n * K + offs_k, mask=(offs_n < N) & (offs_k < K), other=0.0)
        x = tl.load(x_ptr + offs_m * K + offs_k, mask=(offs_m < B) & (offs_k < K), other=0.0)
        # "ieee": no TF32 for fp32 inputs
        acc = tl.dot(x, tl.permute(w, (0, 2, 1)), acc, input_precision="ieee")
    return residual + tl.sum(acc, 0)


@triton.jit
def gemm(
    x_ptr, w_ptr, residual_ptr,  # as in gemv, x in w's dtype
    B, row0, col0,
    N: tl.constexpr, K: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the same block as gemv without LayerNorm, by an ordinary pipelined matrix product."""
    # past the end, repeat the last row and column: loads without a mask are all asynchronous
    rows = tl.minimum(row0 + tl.arange(0, BLOCK_M), B - 1)[:, None]
    columns = tl.minimum(col0 + tl.arange(0, BLOCK_N), N - 1)[None, :]
    offs_k = tl.arange(0, BLOCK_K)
    prefetch_rows(w_ptr, col0, N, K, BLOCK_N, PDL)
    await_launches(PDL)
    residual = _load_residual(residual_ptr, B, row0, col0, N, BLOCK_M, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + offs_k
        if K % BLOCK_K == 0:
            x = tl.load(x_ptr + rows * K + k[None, :])
            w = tl.load(w_ptr + columns * K + k[:, None])
        else:
            x = tl.load(x_ptr + rows * K + k[None, :], mask=k[None, :] < K, other=0.0)
            w = tl.load(w_ptr + columns * K + k[:, None], mask=k[:, None] < K, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return residual + acc


@triton.jit
def linear(
    x_ptr, w_ptr,  # as in gemv
    bias_ptr,  # bias (N,), read
    ln_w_ptr, ln_b_ptr, residual_ptr,  # as in gemv
    eps, B, row0, col0,
    N: tl.constexpr, K: tl.constexpr, PDL: tl.constexpr, IMPL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Return outputs [row0, row0 + BLOCK_M) x [col0, col0 + BLOCK_N) in fp32, bias included."""
    offs_n = col0 + tl.arange(0, BLOCK_N)[None, :]
    # loaded before the matrix product, which hides the latency
    bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    if IMPL == "gemv":
        acc = gemv(
            x_ptr, w_ptr, ln_w_ptr, ln_b_ptr, residual_ptr, eps, B, row0, col0, N, K, PDL,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif IMPL == "gemm_tile":
        acc = gemm_tile(
            x_ptr, w_ptr, residual_ptr, B, row0, col0, N, K, PDL, BLOCK_M, BLOCK_N, BLOCK_K, CHUNKS
        )
    else:
        acc = gemm(x_ptr, w_ptr, residual_ptr, B, row0, col0, N, K, PDL, BLOCK_M, BLOCK_N, BLOCK_K)
    return acc + bias


@triton.jit
def _load_residual(
    residual_ptr, B, row0, col0, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    residual = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if residual_ptr is not None:
        offs_m = row0 + tl.arange(0, BLOCK_M)[:, None]
        offs_n = col0 + tl.arange(0, BLOCK_N)[None, :]
        mask = (offs_m < B) & (offs_n < N)
        residual = tl.load(residual_ptr + offs_m * N + offs_n, mask=mask, other=0.0).to(tl.float32)
    return residual


@triton.jit
def _layer_norm_kernel(
    x_ptr,  # input (B, C), read
    ln_w_ptr,  # weight (C,), read
    ln_b_ptr,  # bias (C,), read
    out_ptr,  # output (B, C), written
    eps, C: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    offs_c = tl.arange(0, BLOCK_C)
    mask = offs_c < C
    ln_w = tl.load(ln_w_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    ln_b = tl.load(ln_b_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    await_launches(PDL)
    x = tl.load(x_ptr + b * C + offs_c, mask=mask, other=0.0).to(tl.float32)
    h = normalize(x, mask, ln_w, ln_b, eps, C, 0)
    tl.store(out_ptr + b * C + offs_c, h.to(out_ptr.dtype.element_ty), mask=mask)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return LayerNorm(x) for x (B, C): a new tensor of the weight's dtype; x may have another."""
    B, C = x.shape
    out = weight.new_empty(B, C)
    _layer_norm_kernel[(B,)](
        x, weight, bias, out, EPS, C, triton.next_power_of_2(C),
        num_warps=4, enable_fp_fusion=True, **pdl(x.device, B),
    )  # fmt: skip
    return out


def auto_impl(batch: int, n_in: int, itemsize: int) -> str:
    """Return the implementation for a batch size: "gemv", "gemm_tile", "gemm" or "library"."""
    if batch <= GEMV_MAX_ROWS:
        return "gemv"
    if itemsize > 2:  # fp32
        return "library"
    return "gemm_tile" if batch <= TILE_MAX_ROWS and n_in >= TILE_MIN_INPUTS else "gemm"


@cache
def launch_config(
    impl: str, batch: int, n_out: int, n_in: int, itemsize: int
) -> tuple[tuple[int, int], dict]:
    """Return (grid, block sizes and launch options) of an implementation for (B, K) x (N, K)^T."""
    chunks, warps, stages = 1, 4, 4
    if impl == "gemv":
        block_k = triton.next_power_of_2(n_in)
        block_m = min(4, triton.next_power_of_2(batch))
        # as many columns per warp as fit into registers with x: at most 128 weights per thread
        block_n = 4 if block_m < 4 and itemsize == 2 else 2
        # one warp per 2 KiB of a row of W, so that many programs fit on a multiprocessor
        warps, stages = min(8, max(1, block_k * itemsize // 2048)), 1
    elif impl == "gemm_tile":
        # use wider blocks only if there are more of the small ones than multiprocessors
        is_small = triton.cdiv(batch, 16) * triton.cdiv(n_out, 16) <= MULTIPROCESSORS
        # three buffers of 32 KiB each, for the 32 or 48 (rounded up to 64) rows of x and W together
        elements = SHARED_BYTES // 3 // itemsize // (32 if is_small else 64)
        elements = min(max(16, triton.next_power_of_2(n_in)), elements)
        block_m, block_n, block_k = 16, 16 if is_small else 32, min(elements, 128)
        chunks = elements // block_k
    else:  # gemm
        # the smallest of these blocks that needs at most MAX_PROGRAMS programs
        m = min(64, max(16, triton.next_power_of_2(batch)))
        for block_m, block_n in (m, 16), (m, 32), (m, 64), (2 * m, 64):
            if triton.cdiv(batch, block_m) * triton.cdiv(n_out, block_n) <= MAX_PROGRAMS:
                break
        rows = block_m + block_n
        block_k = min(128 if rows <= 128 else 64, max(16, triton.next_power_of_2(n_in)))
        warps = 8 if block_m > 64 else 4
        stages = min(4, SHARED_BYTES // (rows * block_k * itemsize))
    blocks = dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, CHUNKS=chunks)
    options = dict(num_warps=warps, num_stages=stages, IMPL=impl, enable_fp_fusion=True)
    return (triton.cdiv(n_out, block_n), triton.cdiv(batch, block_m)), blocks | options
