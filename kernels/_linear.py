"""What the linear maps of one step share: (B, N) = f(x) W^T, f a LayerNorm or nothing.

A step has one row per sequence, so its linear maps read far more weight than anything else and the
weight's bytes are the floor. W is an nn.Linear's, (N, K) with K contiguous. Two shapes of the same
sum, both a program per block of output columns and both with fp32 accumulation:

- `gemv`, for a few rows: a warp per few columns asks for all of its weights at once, before it
  looks at x, and multiplies them with every row while they sit in registers. No loop, no shared
  memory.
- `tile`, from about eight rows on: tensor cores (`tl.dot`), the rows padded to 16, W streamed
  through `num_stages` buffers of shared memory.

Beyond `library_from` rows the library's GEMM is taken. LayerNorm's mean and variance are found anew
by each program: K values per row, which the L2 cache serves, against a launch of their own.

`plan` is a pure function of static shapes: a captured graph replays what an eager call would do.
"""

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

GEMV_UP_TO = 4  # rows; on paper: beyond it shuffles cost more than tensor cores (unmeasured)
LIBRARY_FROM = 64  # rows; on paper: from here on each program's own LayerNorm costs (unmeasured)
TILE_ROW_BYTES = 2048  # of a row that a tile normalises in registers: GPT-2 medium in bf16
MULTIPROCESSORS = 132  # of an H100 or H200


@triton.jit
def gemv(
    x_ptr,  # (B, K) rows
    w_ptr,  # (N, K) weights
    gain_ptr,  # (K,) LayerNorm's weight; not read without NORM
    shift_ptr,  # (K,) LayerNorm's bias; not read without NORM
    eps,
    B,
    row0,
    col0,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a power of two, >= K
):
    """Rows [row0, row0 + BLOCK_M) times columns [col0, col0 + BLOCK_N): (BLOCK_M, BLOCK_N) fp32.

    All threads lie along K, so that rows and weights are held alike and multiplied where they are:
    nothing changes threads but the sums at the end."""
    m = row0 + tl.arange(0, BLOCK_M)[:, None, None]
    n = col0 + tl.arange(0, BLOCK_N)[None, :, None]
    k = tl.arange(0, BLOCK_K)[None, None, :]
    w = tl.load(w_ptr + n * K + k, mask=(n < N) & (k < K), other=0.0)  # (1, BLOCK_N, BLOCK_K)
    if NORM:
        gain = tl.load(gain_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    tl.debug_barrier()  # the compiler would put loads off: all of the above are under way now
    x = tl.load(x_ptr + m * K + k, mask=(m < B) & (k < K), other=0.0).to(tl.float32)
    if NORM:
        x = tl.where(k < K, x - tl.sum(x, 2, keep_dims=True) / K, 0.0)
        var = tl.sum(x * x, 2, keep_dims=True) / K
        x = x * tl.rsqrt(var + eps) * gain + shift
    return tl.sum(x * w.to(tl.float32), 2)


@triton.jit
def tile(
    x_ptr,
    w_ptr,
    gain_ptr,
    shift_ptr,
    eps,
    B,
    row0,
    col0,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The same block on tensor cores.

    K is cut into CHUNKS of BLOCK_K here too, for the warps to share: each multiplies its own, the
    products are added at the end. What is left of K is a pipelined loop. With NORM there is none,
    CHUNKS * BLOCK_K >= K: the statistics want the whole row, and are made while the weights are on
    their way. The normalised rows are rounded to the weights' dtype, as nn.LayerNorm's output is.
    """
    m = row0 + tl.arange(0, BLOCK_M)[None, :, None]
    n = col0 + tl.arange(0, BLOCK_N)[None, :, None]
    chunk = tl.arange(0, CHUNKS)[:, None, None]
    acc = tl.zeros((CHUNKS, BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, CHUNKS * BLOCK_K):
        k = k0 + chunk * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]  # (CHUNKS, 1, BLOCK_K)
        w = tl.load(w_ptr + n * K + k, mask=(n < N) & (k < K), other=0.0)
        if NORM:
            tl.static_assert(CHUNKS * BLOCK_K >= K)
            # in x's shape: a broadcast would be preceded by a change of layout, which waits
            whole = tl.broadcast_to(k, (CHUNKS, BLOCK_M, BLOCK_K))
            gain = tl.load(gain_ptr + whole, mask=whole < K, other=0.0)
            shift = tl.load(shift_ptr + whole, mask=whole < K, other=0.0)
            tl.debug_barrier()  # all of the above is asked for before x is
        x = tl.load(x_ptr + m * K + k, mask=(m < B) & (k < K), other=0.0)
        if NORM:
            h = x.to(tl.float32)
            mean = tl.sum(tl.sum(h, 2, keep_dims=True), 0, keep_dims=True) / K
            h = tl.where(k < K, h - mean, 0.0)
            var = tl.sum(tl.sum(h * h, 2, keep_dims=True), 0, keep_dims=True) / K
            h = h * tl.rsqrt(var + eps) * gain.to(tl.float32) + shift.to(tl.float32)
            x = h.to(w.dtype)
            w = tl.where(n < N, w, 0.0)  # w as it is would be waited for as soon as it is loaded
        # "ieee": fp32 stays fp32, no TF32
        acc = tl.dot(x, tl.permute(w, (0, 2, 1)), acc, input_precision="ieee")
    return tl.sum(acc, 0)


def auto_form(
    batch: int,
    itemsize: int,
    norm_width: int = 0,
    gemv_up_to: int = GEMV_UP_TO,
    library_from: int = LIBRARY_FROM,
) -> str:
    """The form for a batch of rows. Both thresholds are to be measured on the GPU at hand.

    A tile is for two-byte types (fp32 proper has no tensor cores) and for a LayerNorm, if there is
    one, of norm_width numbers that fit."""
    if batch >= library_from:
        return "library"
    tiled = itemsize == 2 and norm_width * itemsize <= TILE_ROW_BYTES
    return "tile" if tiled and batch > gemv_up_to else "gemv"


@cache
def plan(
    form: str, batch: int, n_out: int, n_in: int, itemsize: int, norm: bool
) -> tuple[tuple, dict]:
    """(grid, block sizes and launch options) of form "gemv" or "tile" for (B, K) x (N, K)^T.

    gemv: a warp per 4 columns (2 beside four rows) and 1,024 of K, many such programs on each
    multiprocessor; a thread holds at most 128 weights.
    tile: the least bytes that the busiest multiprocessor reads, (rows + columns) * K per program;
    without LayerNorm three buffers of 32 KiB, so that 48 programs keep 3 MB under way and consumer
    cards' 99 KiB are enough.
    """
    whole = triton.next_power_of_2(n_in)
    chunks, stages = 1, 1
    if form == "gemv":
        block_m, block_k = min(4, triton.next_power_of_2(batch)), whole
        block_n = 4 if block_m < 4 else 2  # what fits into registers beside the rows
        warps = min(8, max(1, whole // 1024))
    elif form == "tile":
        whole = max(16, whole)
        if norm and n_in * itemsize > TILE_ROW_BYTES:
            raise ValueError(f"form 'tile': a row of {n_in} is too long, 'gemv' is wanted")
        shapes = [(m, n) for m in (16, 32, 64) for n in (16, 32, 64)]
        if norm:  # rows and weights go through registers and 64 KiB of shared memory
            shapes = [(16, n) for n in (16, 32) if n == 16 or n * whole * itemsize <= 65536]

        def busiest(shape: tuple[int, int]) -> tuple[int, int]:
            programs = triton.cdiv(batch, shape[0]) * triton.cdiv(n_out, shape[1])
            return triton.cdiv(programs, MULTIPROCESSORS) * sum(shape), programs

        block_m, block_n = min(shapes, key=busiest)
        block_k = min(whole, 128)
        if norm:
            chunks, warps = whole // block_k, 8
        else:
            buffer = 32768 // itemsize // triton.next_power_of_2(block_m + block_n)
            chunks, warps = max(1, min(whole, buffer) // block_k), 4
            stages = 4
    else:
        raise ValueError(f"form {form!r}: one of auto, gemv, tile, library is wanted")
    grid = (triton.cdiv(n_out, block_n), triton.cdiv(batch, block_m))
    return grid, dict(
        DOT=form == "tile",
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        CHUNKS=chunks,
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )


def check_linear(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> None:
    """ValueError where x (B, K), weight (N, K), bias (N,) and a LayerNorm's (K,) do not fit."""
    K = x.shape[-1]
    wanted = [("x", x, (len(x), K)), ("weight", weight, (len(bias), K)), ("bias", bias, bias.shape)]
    wanted += [("a LayerNorm's parameter", p, (K,)) for p in norm]
    for name, t, shape in wanted:
        if t.shape != shape or not t.is_contiguous():
            raise ValueError(
                f"{name} is {tuple(t.shape)}, strides {t.stride()}: {tuple(shape)}, contiguous, "
                "is wanted"
            )
        if t.dtype != x.dtype or t.device != x.device:
            raise ValueError(f"{name} is {t.dtype} on {t.device}, x is {x.dtype} on {x.device}")
